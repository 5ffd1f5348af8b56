//! What the metaserver and whoever collects garbage in its process tell each other.
//!
//! Collecting takes a client, which this crate has not; the program around it has one (`fjord meta`). It says here that it is there,
//! how far it is and what it found, for `fjord gc status`, and hears here when an administrator wants it now.

use fjordfs_proto::pb::meta::GcReport;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// See the module.
#[derive(Default)]
pub struct Upkeep {
    /// `None` as long as nobody collects.
    report: Mutex<Option<GcReport>>,
    asked: Notify,
}

impl Upkeep {
    /// Changes what is told; from the first time on, somebody is there who collects.
    pub fn note(&self, change: impl FnOnce(&mut GcReport)) {
        change(self.report.lock().get_or_insert_default());
    }

    /// Waits until an administrator wants a collection; one that was wanted before is not forgotten.
    pub async fn asked(&self) {
        self.asked.notified().await;
    }

    /// What is told now.
    pub(crate) fn report(&self) -> Option<GcReport> {
        self.report.lock().clone()
    }

    /// An administrator wants a collection; what comes of that, as a sentence.
    pub(crate) fn ask(&self) -> Result<String, String> {
        match self.report() {
            None => Err("this metaserver's program collects no garbage: use `fjord gc run`".to_owned()),
            Some(report) => {
                self.asked.notify_one();
                Ok(match report.running {
                    true => "it is running, and will run once more; `fjord gc status` shows how far it is"
                        .to_owned(),
                    false => "it begins now; `fjord gc status` shows how far it is".to_owned(),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn who_is_there_hears_what_is_wanted() {
        let upkeep = Upkeep::default();
        assert!(upkeep.ask().unwrap_err().contains("fjord gc run"));
        assert!(upkeep.report().is_none() && upkeep.asked().now_or_never().is_none());
        upkeep.note(|report| report.interval_ms = 5);
        assert!(upkeep.ask().unwrap().contains("begins now"));
        assert!(upkeep.asked().now_or_never().is_some());
        upkeep.note(|report| report.running = true);
        assert!(upkeep.ask().unwrap().contains("once more"));
        assert_eq!(upkeep.report().map(|report| report.interval_ms), Some(5));
    }
}
