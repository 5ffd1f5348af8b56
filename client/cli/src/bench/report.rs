//! Results for people and for programs.

use serde::Serialize;

use super::{
    plan::Plan,
    stats::{Figure, Figures, Summary},
    target::Target,
};
use crate::report::{lines, table};

/// What `--json` prints; the names of its fields are stable.
#[derive(Serialize)]
pub(super) struct Report {
    target: String,
    compared_with: Option<String>,
    threads: u64,
    /// `null` through a mount.
    in_flight: Option<u16>,
    /// Bytes of large files, of all threads together.
    size: u64,
    files: u64,
    small_size: u64,
    rounds: u16,
    /// Random reads went past the page cache, on each side.
    direct: Vec<bool>,
    figures: Vec<Row>,
    #[serde(skip)]
    described: String,
}

#[derive(Serialize)]
struct Row {
    figure: Figure,
    unit: &'static str,
    ours: Option<Summary>,
    other: Option<Summary>,
    /// Of the medians; above 1 is in favour of what is measured, for rates and for times.
    ratio: Option<f64>,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        in_flight: Option<u16>,
        targets: &[&dyn Target],
        figures: &Figures,
    ) -> Report {
        let mut names = targets.iter().map(|t| t.name());
        let rows = figures.summaries().into_iter().map(|(figure, ours, other)| {
            let ratio = match (&ours, &other) {
                (Some(ours), Some(other)) => figure.ratio(ours.median, other.median),
                _ => None,
            };
            Row { figure, unit: figure.unit(), ours, other, ratio }
        });
        Report {
            target: names.next().unwrap_or_default(),
            compared_with: names.next(),
            threads: plan.threads,
            in_flight,
            size: plan.share * plan.threads,
            files: plan.files,
            small_size: plan.small_size,
            rounds: plan.rounds,
            direct: targets.iter().map(|t| t.direct()).collect(),
            figures: rows.collect(),
            described: plan.describe(in_flight),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("{}: {}\n", self.target, self.described);
        if let Some(other) = &self.compared_with {
            text += &format!("compared with {other}, in turns; a ratio above 1 is in favour of the first\n");
        }
        for (name, _) in [Some(&self.target), self.compared_with.as_ref()]
            .into_iter()
            .flatten()
            .zip(&self.direct)
            .filter(|(_, direct)| !**direct)
        {
            text += &format!("{name} has no O_DIRECT: its random reads are from the page cache\n");
        }
        let mut head = vec!["FIGURE", ">MEDIAN", "UNIT", ">LOWEST", ">HIGHEST"];
        if self.compared_with.is_some() {
            head.extend([">OTHER", ">LOWEST", ">HIGHEST", ">RATIO"]);
        }
        let mut rows = table(&head);
        for row in &self.figures {
            let mut cells = vec![row.figure.title().to_owned()];
            let show = |s: &Option<Summary>, of: fn(&Summary) -> f64| {
                s.as_ref().map_or("-".into(), |s| number(of(s)))
            };
            cells.push(show(&row.ours, |s| s.median));
            cells.push(row.unit.to_owned());
            cells.push(show(&row.ours, |s| s.min));
            cells.push(show(&row.ours, |s| s.max));
            if self.compared_with.is_some() {
                cells.push(show(&row.other, |s| s.median));
                cells.push(show(&row.other, |s| s.min));
                cells.push(show(&row.other, |s| s.max));
                cells.push(row.ratio.map_or("-".into(), |r| format!("{r:.2}")));
            }
            rows.add_row(cells);
        }
        text + "\n" + &lines(&rows)
    }
}

/// Three digits are what a median is worth.
fn number(x: f64) -> String {
    match x {
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => crate::units::grouped(x.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let shown = [0.1234, 12.34, 123.4, 1_234_567.8].map(number);
        assert_eq!(shown, ["0.12", "12.3", "123", "1,234,568"]);
    }
}
