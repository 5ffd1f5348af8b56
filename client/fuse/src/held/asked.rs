//! Names that the kernel asks for and that the filesystem has no answer for yet.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjordfs_proto::InodeId;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// A thread whose lookup was given up is spared for so long: the kernel walks its path again once, and the program would see a second
/// refusal. Longer than a listing may count as not taken in, so what is held up goes on without.
const SPARED: Duration = Duration::from_secs(3);

/// A lookup: which name, for which thread, and whom to tell that it is given up.
#[derive(Debug)]
struct Lookup {
    name: Bytes,
    thread: u32,
    since: Instant,
    given_up: Arc<Notify>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// By directory and a number.
    lookups: Mutex<BTreeMap<(InodeId, u64), Lookup>>,
    number: AtomicU64,
    /// Threads whose lookups were given up, and when.
    spared: Mutex<HashMap<u32, Instant>>,
}

impl Asked {
    /// A lookup of a thread waits, as long as the result lives.
    pub(crate) fn ask(&self, directory: InodeId, name: &Bytes, thread: u32) -> Waiting<'_> {
        let key = (directory, self.number.fetch_add(1, Ordering::Relaxed));
        let given_up = Arc::new(Notify::new());
        let since = Instant::now();
        let lookup = Lookup { name: name.clone(), thread, since, given_up: Arc::clone(&given_up) };
        self.lookups.lock().insert(key, lookup);
        Waiting { asked: self, key, given_up }
    }

    /// Names in a directory that are waited for.
    pub(crate) fn names(&self, directory: InodeId) -> Vec<Bytes> {
        let lookups = self.lookups.lock();
        lookups.range((directory, 0)..=(directory, u64::MAX)).map(|(_, lookup)| lookup.name.clone()).collect()
    }

    /// Gives up what has been waited for in these directories for as long as `held_up`, of each thread once in a while.
    pub(crate) fn give_up(&self, held_up: Duration, directories: impl Fn(InodeId) -> bool) {
        let mut spared = self.spared.lock();
        spared.retain(|_, since| since.elapsed() < SPARED);
        for ((directory, _), lookup) in &*self.lookups.lock() {
            if lookup.since.elapsed() >= held_up
                && directories(*directory)
                && !spared.contains_key(&lookup.thread)
            {
                tracing::debug!(%directory, name = ?lookup.name, "a lookup is given up, so that a recall goes on");
                spared.insert(lookup.thread, Instant::now());
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
    fn lookups_are_given_up_by_directory_and_of_each_thread_once() {
        let asked = Asked::default();
        let names = [Bytes::from_static(b"a"), Bytes::from_static(b"b")];
        let (first, second) = (asked.ask(InodeId(5), &names[0], 1), asked.ask(InodeId(5), &names[0], 2));
        let other = asked.ask(InodeId(6), &names[1], 3);
        assert_eq!(asked.names(InodeId(5)), [names[0].clone(), names[0].clone()]);
        asked.give_up(Duration::from_secs(3600), |directory| directory == InodeId(5));
        assert!(first.given_up().now_or_never().is_none(), "it was asked a moment ago");
        asked.give_up(Duration::ZERO, |directory| directory == InodeId(5));
        assert!(first.given_up().now_or_never().is_some() && second.given_up().now_or_never().is_some());
        assert!(other.given_up().now_or_never().is_none());
        drop((first, second));
        assert!(asked.names(InodeId(5)).is_empty());
        assert_eq!(asked.names(InodeId(6)), [names[1].clone()]);
        // The kernel walks the path of thread 1 again, by way of another directory.
        let again = asked.ask(InodeId(6), &names[1], 1);
        asked.give_up(Duration::ZERO, |_| true);
        assert!(other.given_up().now_or_never().is_some());
        assert!(again.given_up().now_or_never().is_none());
        asked.spared.lock().values_mut().for_each(|since| *since -= SPARED);
        asked.give_up(Duration::ZERO, |_| true);
        assert!(again.given_up().now_or_never().is_some());
    }
}
