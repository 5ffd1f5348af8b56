//! A batch that takes longer to be applied than a standby waits for a sign of its owner.

use std::{sync::atomic::AtomicBool, time::Duration};

use super::*;
use crate::store::{Late, remote::owner::Owner};

/// What one transaction takes: the parts of [`large`] take longer than a standby's patience, eight at a time.
const PAUSE: Duration = Duration::from_millis(300);

/// A way to the engine on which each transaction takes its time.
struct Slow {
    inner: Arc<Faulty>,
    pause: Duration,
    /// The process is cut off once it has decided a batch of several parts.
    dies_decided: bool,
}

impl Link for Slow {
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>> {
        Box::pin(async move {
            tokio::time::sleep(self.pause).await;
            let decides = Owner::decode(&next).is_some_and(|owner| owner.parts > 0);
            let done = self.inner.clone().apply(expected, next, writes).await;
            if self.dies_decided && decides {
                *self.inner.left.lock() = 0;
            }
            done
        })
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        self.inner.scan(range, order, limit)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn note(&self, key: Vec<u8>, value: Option<Bytes>) -> BoxFuture<'_, Result<(), Fault>> {
        self.inner.note(key, value)
    }

    fn health(&self) -> BoxFuture<'_, Vec<String>> {
        self.inner.health()
    }

    fn place(&self) -> &str {
        self.inner.place()
    }
}

fn open_slow(pairs: &Pairs, pause: Duration, dies_decided: bool) -> RemoteStore {
    let inner = Faulty::faultless(pairs);
    let link: Arc<dyn Link> = Arc::new(Slow { inner, pause, dies_decided });
    RemoteStore::start("test".into(), "test", 1 << 20, move || Box::pin(async { Ok(link) })).unwrap()
}

fn large() -> Batch {
    let writes =
        (0..7 * 8 * 15u32).map(|n| (format!("k{n:04}").into_bytes(), Some(Bytes::from_static(b"x"))));
    Batch { writes: writes.collect() }
}

/// Whether a standby finds the owner silent while `f` runs.
fn silent_during(pairs: &Pairs, f: impl FnOnce()) -> bool {
    let standby = open(pairs, 2, 0, u32::MAX);
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| standby.await_silence(stop.clone(), None).unwrap());
        f();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        waiting.join().unwrap()
    })
}

#[test]
fn an_owner_with_a_large_batch_is_not_silent() {
    let pairs = Pairs::default();
    let owner = open_slow(&pairs, PAUSE, false);
    let fence = owner.take_over().unwrap();
    let silent = silent_during(&pairs, || {
        owner.commit(large(), fence).unwrap();
        // Behind all of it.
        owner.sync().unwrap();
        owner.commit(batch(1), fence).unwrap();
        owner.sync().unwrap();
    });
    assert!(!silent && owner.is_owner());
    assert_eq!(found(&open(&pairs, 3, 0, u32::MAX)).len(), large().writes.len() + batch(1).writes.len());
}

#[test]
fn nor_is_one_that_rolls_the_batch_of_another_forward() {
    let pairs = Pairs::default();
    let dying = open_slow(&pairs, Duration::ZERO, true);
    let fence = dying.take_over().unwrap();
    dying.commit(large(), fence).unwrap();
    // Whether it hears of its decision before it dies does not matter.
    let _ = dying.sync();
    drop(dying);
    let record = Owner::decode(&pairs.lock()[OWNER]).unwrap();
    assert!(record.parts > 0, "the batch is decided, and not applied");
    let next = open_slow(&pairs, PAUSE, false);
    let silent = silent_during(&pairs, || {
        next.take_over().unwrap();
    });
    assert!(!silent);
    assert_eq!(found(&next).len(), large().writes.len());
}
