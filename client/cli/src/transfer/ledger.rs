//! What a transfer has done so far, and what went wrong.

use std::{
    fmt::Write,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::units::{self, ByteSize};

/// Errors kept for the list at the end; the rest are counted.
const ERRORS_KEPT: usize = 1000;

/// Counters that workers add to and the progress display reads.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) began: Instant,
    /// Files and bytes seen by the walk.
    pub(crate) found: Tally,
    /// Files and bytes copied.
    pub(crate) copied: Tally,
    /// Files and bytes that an earlier run has copied.
    pub(crate) skipped: Tally,
    /// Files and bytes read back and compared.
    pub(crate) verified: Tally,
    /// Directories, links and special files made or found.
    pub(crate) others: AtomicU64,
    /// The walk has ended: `found` is final.
    pub(crate) walked: AtomicBool,
    errors: Mutex<Vec<(PathBuf, String)>>,
    errors_count: AtomicU64,
}

/// Files and their bytes.
#[derive(Default, Debug)]
pub(crate) struct Tally {
    pub(crate) files: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

impl Tally {
    pub(crate) fn file(&self) {
        self.files.fetch_add(1, Relaxed);
    }

    pub(crate) fn bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Relaxed);
    }

    pub(crate) fn get(&self) -> (u64, u64) {
        (self.files.load(Relaxed), self.bytes.load(Relaxed))
    }
}

impl Ledger {
    pub(crate) fn new() -> Ledger {
        Ledger {
            began: Instant::now(),
            found: Tally::default(),
            copied: Tally::default(),
            skipped: Tally::default(),
            verified: Tally::default(),
            others: AtomicU64::new(0),
            walked: AtomicBool::new(false),
            errors: Mutex::default(),
            errors_count: AtomicU64::new(0),
        }
    }

    /// Notes that something could not be copied. The rest goes on.
    pub(crate) fn fail(&self, path: &Path, error: &anyhow::Error) {
        self.errors_count.fetch_add(1, Relaxed);
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if errors.len() < ERRORS_KEPT {
            errors.push((path.to_owned(), format!("{error:#}")));
        }
    }

    /// Counts one more directory, link or special file.
    pub(crate) fn other(&self) {
        self.others.fetch_add(1, Relaxed);
    }

    pub(crate) fn errors_count(&self) -> u64 {
        self.errors_count.load(Relaxed)
    }

    /// The list of everything that went wrong, one line each.
    pub(crate) fn errors_text(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        for (path, error) in errors.iter() {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{}: {error}", path.display());
        }
        let more = self.errors_count() - errors.len() as u64;
        if more > 0 {
            let _ = writeln!(text, "and {more} more");
        }
        text
    }

    /// One sentence for the end.
    pub(crate) fn summary(&self, verb: &str, took: Duration) -> String {
        let (files, bytes) = self.copied.get();
        let mut text = format!(
            "{verb} {} ({}) in {}",
            units::count(files, "file"),
            ByteSize(bytes),
            units::seconds(took)
        );
        if bytes > 0 {
            text.push_str(&format!(", {}", units::rate(bytes, took)));
        }
        let others = self.others.load(Relaxed);
        if others > 0 {
            text.push_str(&format!("; {} directories, links and special files", units::grouped(others)));
        }
        let (skipped, skipped_bytes) = self.skipped.get();
        if skipped > 0 {
            text.push_str(&format!(
                "; {} ({}) were there already",
                units::grouped(skipped),
                ByteSize(skipped_bytes)
            ));
        }
        let (verified, _) = self.verified.get();
        if verified > 0 {
            text.push_str(&format!("; {} read back and identical", units::grouped(verified)));
        }
        match self.errors_count() {
            0 => {}
            n => text.push_str(&format!("; {} FAILED", units::grouped(n))),
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_summed_up() {
        let ledger = Ledger::new();
        ledger.copied.file();
        ledger.copied.bytes(1 << 20);
        ledger.skipped.file();
        ledger.fail(Path::new("a/b"), &anyhow::anyhow!("no space"));
        assert_eq!(ledger.errors_text(), "a/b: no space\n");
        let text = ledger.summary("imported", Duration::from_secs(1));
        assert_eq!(
            text,
            "imported 1 file (1.00 MiB) in 1.00 s, 1.00 MiB/s; 1 (0 B) were there already; 1 FAILED"
        );
    }

    #[test]
    fn a_flood_of_errors_is_bounded() {
        let ledger = Ledger::new();
        for _ in 0..ERRORS_KEPT + 5 {
            ledger.fail(Path::new("x"), &anyhow::anyhow!("e"));
        }
        assert_eq!(ledger.errors_count(), ERRORS_KEPT as u64 + 5);
        assert!(ledger.errors_text().ends_with("and 5 more\n"));
    }
}
