//! Where the scrubbing of a target is, over restarts: `scrub.json` in its folder.
//!
//! It is written now and then and not synced with anything: after a power failure some shards are read once more. A file that
//! makes no sense is as good as none, and is said in the log.

use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

const FILE: &str = "scrub.json";
const FILE_NEW: &str = "scrub.json.new";

/// Times are milliseconds since 1970: they go on while the server does not run.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Place {
    /// When the last pass began, or for a target without one when it was first served.
    pub(super) began_ms: u64,
    /// That pass goes on behind this block; absent: it is over.
    pub(super) after_block: Option<u64>,
    /// Bytes it has read.
    pub(super) bytes_done: u64,
    /// End of the last complete pass; 0: none.
    pub(super) completed_ms: u64,
    /// Damage found so far, and repaired.
    pub(super) shards_bad: u64,
    pub(super) shards_repaired: u64,
}

impl Place {
    /// What the target's folder says.
    pub(super) fn load(folder: &Path) -> Place {
        let new = Place { began_ms: now_ms(), ..Place::default() };
        let text = match fs::read(folder.join(FILE)) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return new,
            Err(e) => {
                tracing::warn!("{}: {e}; its scrub begins anew", folder.join(FILE).display());
                return new;
            }
        };
        serde_json::from_slice(&text).unwrap_or_else(|e| {
            tracing::warn!("{}: {e}; its scrub begins anew", folder.join(FILE).display());
            new
        })
    }

    /// Replaces it whole.
    pub(super) fn save(&self, folder: &Path) -> io::Result<()> {
        fs::write(folder.join(FILE_NEW), serde_json::to_vec(self)?)?;
        fs::rename(folder.join(FILE_NEW), folder.join(FILE))
    }

    /// Whether it is time for the next pass. A clock that was set back must not put it off for long.
    pub(super) fn is_due(&self, interval: Duration, now_ms: u64) -> bool {
        let since = Duration::from_millis(now_ms.saturating_sub(self.began_ms));
        !interval.is_zero() && (since >= interval || self.began_ms > now_ms)
    }
}

pub(super) fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_kept_and_what_makes_no_sense_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = Place::load(dir.path());
        assert!(fresh.began_ms > 0 && fresh.after_block.is_none());
        let place = Place { began_ms: 7, after_block: Some(9), shards_bad: 2, ..Place::default() };
        place.save(dir.path()).unwrap();
        assert_eq!(Place::load(dir.path()), place);
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(Place::load(dir.path()).after_block, None);
    }

    #[test]
    fn a_pass_is_due_after_the_interval_also_over_restarts() {
        let place = Place { began_ms: 10_000, ..Place::default() };
        let hour = Duration::from_secs(3600);
        assert!(!place.is_due(hour, 10_000 + 3_599_999) && place.is_due(hour, 10_000 + 3_600_000));
        assert!(!place.is_due(Duration::ZERO, u64::MAX), "only when asked");
        assert!(place.is_due(hour, 9_000), "the clock was set back");
    }
}
