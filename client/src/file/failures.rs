//! Write-back failures of a file, and who has been told of them.
//!
//! As the kernel's `errseq_t` (lib/errseq.c), which decides what `fsync(2)` reports on local filesystems: whoever had the file open is told
//! of a failure once, each for itself, and so is who opens it next while nobody has been told. That one of them asks, or closes
//! the file, takes nothing from the others: their bytes are lost as well.

use fjordfs_proto::{FsError, FsResult};

/// Of one file.
#[derive(Debug, Default)]
pub(crate) struct Failures {
    /// Those that there were, as far as anybody can tell them apart.
    count: u64,
    last: Option<FsError>,
    /// Somebody knows of the last one.
    told: bool,
}

/// Failures that one handle knows of, or is not to be told.
#[derive(Debug, Default)]
pub(super) struct Seen(u64);

impl Failures {
    /// Notes a failure. While nobody knows of the one before, that stands for both.
    pub(crate) fn note(&mut self, error: impl FnOnce() -> FsError) {
        if self.last.is_none() || self.told {
            self.count += 1;
            self.last = Some(error());
            self.told = false;
        }
    }

    /// For a handle that is opened now.
    pub(super) fn seen_at_open(&self) -> Seen {
        Seen(if self.told { self.count } else { 0 })
    }

    /// What a handle is to be told, if anything.
    pub(super) fn unseen(&self, seen: &Seen) -> FsResult<()> {
        match &self.last {
            Some(e) if seen.0 < self.count => Err(e.clone()),
            _ => Ok(()),
        }
    }

    /// Tells a handle, once.
    pub(super) fn tell(&mut self, seen: &mut Seen) -> FsResult<()> {
        let told = self.unseen(seen);
        if told.is_err() {
            seen.0 = self.count;
            self.told = true;
        }
        told
    }
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::error::Errno;

    use super::*;

    fn told(result: &FsResult<()>) -> Option<&str> {
        result.as_ref().err().map(|e| &*e.message)
    }

    #[test]
    fn each_handle_is_told_once() {
        let mut failures = Failures::default();
        let [mut a, mut b] = [failures.seen_at_open(), failures.seen_at_open()];
        assert!(failures.tell(&mut a).is_ok());
        failures.note(|| FsError::new(Errno::EIO, "first"));
        failures.note(|| FsError::new(Errno::EIO, "with it"));
        // Looking is not telling.
        assert_eq!(told(&failures.unseen(&b)), Some("first"));
        assert_eq!(told(&failures.tell(&mut a)), Some("first"));
        assert!(failures.tell(&mut a).is_ok());
        assert_eq!(told(&failures.tell(&mut b)), Some("first"), "the other's asking took nothing from it");
        failures.note(|| FsError::new(Errno::EIO, "second"));
        assert_eq!(told(&failures.tell(&mut a)), Some("second"));
        assert_eq!(told(&failures.tell(&mut b)), Some("second"));
        assert!(failures.tell(&mut b).is_ok());
    }

    #[test]
    fn who_opens_next_is_told_of_what_nobody_knows() {
        let mut failures = Failures::default();
        failures.note(|| FsError::new(Errno::EIO, "lost"));
        let [mut a, mut b] = [failures.seen_at_open(), failures.seen_at_open()];
        assert_eq!(told(&failures.tell(&mut a)), Some("lost"));
        assert_eq!(told(&failures.tell(&mut b)), Some("lost"), "it was open by then");
        assert!(failures.tell(&mut failures.seen_at_open()).is_ok());
    }
}
