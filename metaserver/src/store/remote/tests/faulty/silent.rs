//! An engine that does not answer reads, for longer than an owner tries.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::*;
use crate::store::Late;

/// A way to the engine on which reads of what is not the owner's record fail while it is told so.
struct Silent {
    inner: Arc<Faulty>,
    silent: Arc<AtomicBool>,
}

impl Link for Silent {
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>> {
        self.inner.clone().apply(expected, next, writes)
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        if self.silent.load(Ordering::Relaxed) {
            return Box::pin(async { Err(Fault::Unavailable("silent".into())) });
        }
        self.inner.scan(range, order, limit)
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(300)
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

/// What cannot be read can never be served by who stays the owner all the same: another one, or itself again, takes over.
#[test]
fn an_owner_that_cannot_read_gives_its_ownership_up() {
    let pairs = Pairs::default();
    let silent = Arc::new(AtomicBool::new(false));
    let inner = Faulty::faultless(&pairs);
    let link: Arc<dyn Link> = Arc::new(Silent { inner, silent: silent.clone() });
    let owner =
        RemoteStore::start("test".into(), "test", 1 << 20, move || Box::pin(async { Ok(link) })).unwrap();
    let fence = owner.take_over().unwrap();
    owner.commit(batch(5), fence).unwrap();
    owner.sync().unwrap();
    silent.store(true, Ordering::Relaxed);
    assert!(owner.get(b"never read").is_err());
    assert!(!owner.is_owner() && owner.acknowledged().is_err(), "it goes on without what it could not read");
    assert!(owner.commit(batch(1), fence).is_err());
    silent.store(false, Ordering::Relaxed);
    // It gives no signs any more, though it is still there.
    let next = open(&pairs, 2, 0, u32::MAX);
    assert!(next.await_silence(Arc::default(), None).unwrap());
    assert!(next.take_over().unwrap() > fence);
    assert_eq!(found(&next).len(), batch(5).writes.len());
}
