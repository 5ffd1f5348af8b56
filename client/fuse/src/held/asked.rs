//! Names that the kernel asks for and that the filesystem has no answer for yet.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjordfs_proto::InodeId;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A lookup: which name, and whom to tell that it is given up.
#[derive(Debug)]
struct Lookup {
    name: Bytes,
    since: Instant,
    given_up: Arc<Notify>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// By directory and a number.
    lookups: Mutex<BTreeMap<(InodeId, u64), Lookup>>,
    number: AtomicU64,
}

impl Asked {
    /// A lookup waits, as long as the result lives.
    pub(crate) fn ask(&self, directory: InodeId, name: &Bytes) -> Waiting<'_> {
        let key = (directory, self.number.fetch_add(1, Ordering::Relaxed));
        let given_up = Arc::new(Notify::new());
        let lookup = Lookup { name: name.clone(), since: Instant::now(), given_up: Arc::clone(&given_up) };
        self.lookups.lock().insert(key, lookup);
        Waiting { asked: self, key, given_up }
    }

    /// Names in a directory that are waited for.
    pub(crate) fn names(&self, directory: InodeId) -> Vec<Bytes> {
        let lookups = self.lookups.lock();
        lookups.range((directory, 0)..=(directory, u64::MAX)).map(|(_, lookup)| lookup.name.clone()).collect()
    }

    /// Gives up what has been waited for in these directories for as long as `held_up`. Not what was asked a moment ago: the kernel asks
    /// again only once, and a program would see the second refusal.
    pub(crate) fn give_up(&self, held_up: Duration, directories: impl Fn(InodeId) -> bool) {
        for ((directory, _), lookup) in &*self.lookups.lock() {
            if directories(*directory) && lookup.since.elapsed() >= held_up {
                lookup.given_up.notify_one();
            }
        }
    }
}

/// A lookup that waits.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    asked: &'a Asked,
    key: (InodeId, u64),
    given_up: Arc<Notify>,
}

impl Waiting<'_> {
    /// Ends when the lookup is to be given up.
    pub(crate) async fn given_up(&self) {
        self.given_up.notified().await;
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.asked.lookups.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn lookups_are_given_up_by_directory() {
        let asked = Asked::default();
        let names = [Bytes::from_static(b"a"), Bytes::from_static(b"b")];
        let (first, second) = (asked.ask(InodeId(5), &names[0]), asked.ask(InodeId(5), &names[0]));
        let other = asked.ask(InodeId(6), &names[1]);
        assert_eq!(asked.names(InodeId(5)), [names[0].clone(), names[0].clone()]);
        asked.give_up(Duration::from_secs(3600), |directory| directory == InodeId(5));
        assert!(first.given_up().now_or_never().is_none(), "it was asked a moment ago");
        asked.give_up(Duration::ZERO, |directory| directory == InodeId(5));
        assert!(first.given_up().now_or_never().is_some() && second.given_up().now_or_never().is_some());
        assert!(other.given_up().now_or_never().is_none());
        drop((first, second));
        assert!(asked.names(InodeId(5)).is_empty());
        assert_eq!(asked.names(InodeId(6)), [names[1].clone()]);
    }
}
