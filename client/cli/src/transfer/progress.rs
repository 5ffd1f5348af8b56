//! Progress of a transfer: a bar on a terminal, a line now and then elsewhere.

use std::{
    io::IsTerminal,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinHandle;

use super::ledger::Ledger;
use crate::units::{self, ByteSize};

const BAR_EVERY: Duration = Duration::from_millis(200);
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A running display; ends when dropped.
pub(crate) struct Progress {
    task: Option<JoinHandle<()>>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Shows the ledger until dropped; nothing when `quiet`.
    pub(crate) fn start(ledger: Arc<Ledger>, quiet: bool) -> Progress {
        if quiet {
            return Progress { task: None, bar: None };
        }
        if !std::io::stderr().is_terminal() {
            let task = tokio::spawn(async move {
                loop {
                    tokio::time::sleep(LINE_EVERY).await;
                    eprintln!("{}", line(&ledger));
                }
            });
            return Progress { task: Some(task), bar: None };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}") {
            bar.set_style(style);
        }
        let shown = bar.clone();
        let task = tokio::spawn(async move {
            loop {
                shown.set_length(ledger.found.get().1);
                shown.set_position(ledger.copied.get().1 + ledger.skipped.get().1);
                shown.set_message(line(&ledger));
                tokio::time::sleep(BAR_EVERY).await;
            }
        });
        Progress { task: Some(task), bar: Some(bar) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn line(ledger: &Ledger) -> String {
    let ((files, bytes), (skipped, skipped_bytes)) = (ledger.copied.get(), ledger.skipped.get());
    let (found, found_bytes) = ledger.found.get();
    let so_far = if ledger.walked.load(Relaxed) { "" } else { "+" };
    let mut text = format!(
        "{} of {}{so_far} files, {} of {}{so_far}, {}",
        units::grouped(files + skipped),
        units::grouped(found),
        ByteSize(bytes + skipped_bytes),
        ByteSize(found_bytes),
        units::rate(bytes, ledger.began.elapsed())
    );
    if ledger.errors_count() > 0 {
        text.push_str(&format!(", {} failed", units::grouped(ledger.errors_count())));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_that_still_grows_is_marked() {
        let ledger = Ledger::new();
        ledger.found.file();
        ledger.found.bytes(2048);
        assert!(line(&ledger).starts_with("0 of 1+ files, 0 B of 2.00 KiB+, "));
        ledger.walked.store(true, Relaxed);
        assert!(line(&ledger).starts_with("0 of 1 files, 0 B of 2.00 KiB, "));
    }
}
