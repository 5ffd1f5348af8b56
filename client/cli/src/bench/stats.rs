//! Figures: what they mean, and what is made of several rounds of one.

use serde::Serialize;

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figure {
    Write,
    Read,
    Random,
    RandomP50,
    RandomP99,
    SmallCreate,
    SmallRead,
    SmallStat,
    SmallDelete,
    MetaCreate,
    MetaStat,
    MetaDelete,
}

impl Figure {
    pub(super) fn title(self) -> &'static str {
        match self {
            Figure::Write => "sequential write with fsync",
            Figure::Read => "sequential read",
            Figure::Random => "random 4 KiB reads",
            Figure::RandomP50 => "  half of them within",
            Figure::RandomP99 => "  99 of 100 within",
            Figure::SmallCreate => "small files: create",
            Figure::SmallRead => "small files: read",
            Figure::SmallStat => "small files: stat",
            Figure::SmallDelete => "small files: delete",
            Figure::MetaCreate => "empty files: create",
            Figure::MetaStat => "empty files: stat",
            Figure::MetaDelete => "empty files: delete",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Figure::Write | Figure::Read => "MiB/s",
            Figure::RandomP50 | Figure::RandomP99 => "us",
            _ => "1/s",
        }
    }

    fn is_time(self) -> bool {
        self.unit() == "us"
    }

    /// How much better the first is than the second: above 1 is better, for rates and for times.
    pub(super) fn ratio(self, ours: f64, other: f64) -> Option<f64> {
        let (over, under) = if self.is_time() { (other, ours) } else { (ours, other) };
        (under > 0.0).then(|| over / under)
    }
}

/// Rounds of one figure on one side.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    pub(super) rounds: Vec<f64>,
}

impl Summary {
    /// `None` of nothing.
    fn of(rounds: &[f64]) -> Option<Summary> {
        let mut sorted = rounds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = match sorted.len() % 2 {
            1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        };
        Some(Summary { median, min, max, rounds: rounds.to_vec() })
    }
}

/// Everything measured, in the order in which it was measured first.
#[derive(Default, Debug)]
pub(super) struct Figures {
    rows: Vec<Row>,
}

/// One figure.
#[derive(Debug)]
struct Row {
    figure: Figure,
    /// By side.
    values: [Vec<f64>; 2],
}

impl Figures {
    pub(super) fn add(&mut self, figure: Figure, side: usize, value: f64) {
        let row = match self.rows.iter().position(|row| row.figure == figure) {
            Some(found) => found,
            None => {
                self.rows.push(Row { figure, values: Default::default() });
                self.rows.len() - 1
            }
        };
        self.rows[row].values[side].push(value);
    }

    /// Each figure, ours and the other side's.
    pub(super) fn summaries(&self) -> Vec<(Figure, Option<Summary>, Option<Summary>)> {
        let mut rows: Vec<_> = self
            .rows
            .iter()
            .map(|Row { figure, values: [ours, other] }| (*figure, Summary::of(ours), Summary::of(other)))
            .collect();
        rows.sort_by_key(|(figure, ..)| *figure);
        rows
    }
}

/// The value below which `share` of all lie. Sorts them.
pub(super) fn percentile(values: &mut [u32], share: f64) -> Option<u32> {
    values.sort_unstable();
    let last = values.len().checked_sub(1)?;
    Some(values[(last as f64 * share).round() as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let of = |values: &[f64]| Summary::of(values).map(|s| (s.median, s.min, s.max));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[3.0]), Some((3.0, 3.0, 3.0)));
        assert_eq!(of(&[9.0, 1.0]), Some((5.0, 1.0, 9.0)));
        assert_eq!(of(&[9.0, 1.0, 2.0]), Some((2.0, 1.0, 9.0)));
        assert_eq!(Summary::of(&[9.0, 1.0]).unwrap().rounds, [9.0, 1.0], "rounds stay in their order");
    }

    #[test]
    fn percentiles() {
        let mut values: Vec<u32> = (0..=100).rev().collect();
        assert_eq!(percentile(&mut values, 0.5), Some(50));
        assert_eq!(percentile(&mut values, 0.99), Some(99));
        assert_eq!(percentile(&mut [7], 0.99), Some(7));
        assert_eq!(percentile(&mut [], 0.5), None);
    }

    #[test]
    fn a_ratio_above_one_is_better() {
        assert_eq!(Figure::Write.ratio(200.0, 100.0), Some(2.0));
        assert_eq!(Figure::RandomP99.ratio(200.0, 100.0), Some(0.5));
        assert_eq!(Figure::Read.ratio(1.0, 0.0), None);
        assert_eq!(Figure::RandomP50.ratio(0.0, 1.0), None);
    }

    #[test]
    fn figures_come_in_their_order_with_both_sides() {
        let mut figures = Figures::default();
        figures.add(Figure::Read, 0, 2.0);
        figures.add(Figure::Write, 0, 1.0);
        figures.add(Figure::Read, 1, 4.0);
        figures.add(Figure::Read, 0, 4.0);
        let rows = figures.summaries();
        assert_eq!(rows.iter().map(|r| r.0).collect::<Vec<_>>(), [Figure::Write, Figure::Read]);
        assert!(rows[0].2.is_none());
        assert_eq!(rows[1].1.as_ref().unwrap().median, 3.0);
        assert_eq!(rows[1].2.as_ref().unwrap().median, 4.0);
    }
}
