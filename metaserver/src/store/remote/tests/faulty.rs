//! An engine in memory whose network loses requests and answers and delivers some late, and whose owners die at any step.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use crate::store::{
    Batch, Fence, MetaStore, Order, Pair, StoreError, StoreResult,
    remote::{
        Fault, Limits, Link, RemoteStore,
        owner::{OWNER, Write},
    },
};

mod silent;
mod slow;

type Pairs = Arc<Mutex<BTreeMap<Vec<u8>, Bytes>>>;

/// The owner record that it expects, the one that it writes, and its writes.
type Transaction = (Bytes, Bytes, Arc<[Write]>);

/// One process's way to the engine.
struct Faulty {
    pairs: Pairs,
    chance: Mutex<Chance>,
    /// Transactions that will arrive after later ones.
    late: Mutex<Vec<Transaction>>,
    /// Calls until the process is cut off for good.
    left: Mutex<u32>,
    overtaken: Mutex<Overtaken>,
}

/// Whether another takes the store over between a take-over of which no answer came and the next transaction.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Overtaken {
    #[default]
    No,
    AfterTheNext,
    Now,
}

struct Chance {
    seed: u64,
    /// Of a hundred transactions, so many suffer.
    faults: u64,
}

impl Chance {
    fn below(&mut self, n: u64) -> u64 {
        self.seed = fjordfs_proto::cluster::mix(self.seed);
        self.seed % n
    }
}

fn apply(pairs: &Pairs, expected: &[u8], next: &[u8], writes: &[Write]) -> bool {
    let mut pairs = pairs.lock();
    if pairs.get(OWNER).map_or(&[][..], |v| v) != expected {
        return false;
    }
    pairs.insert(OWNER.to_vec(), Bytes::copy_from_slice(next));
    for (key, value) in writes {
        match value {
            Some(value) => pairs.insert(key.clone(), value.clone()),
            None => pairs.remove(key),
        };
    }
    true
}

impl Faulty {
    /// Without any fault, yet.
    fn faultless(pairs: &Pairs) -> Arc<Faulty> {
        Arc::new(Faulty {
            pairs: pairs.clone(),
            chance: Mutex::new(Chance { seed: 1, faults: 0 }),
            late: Mutex::default(),
            left: Mutex::new(u32::MAX),
            overtaken: Mutex::default(),
        })
    }
}

impl Link for Faulty {
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>> {
        Box::pin(async move {
            assert!(writes.len() <= self.limits().writes, "the engine would refuse it");
            let (hit, kind, turns) = {
                let mut chance = self.chance.lock();
                (chance.below(100) < chance.faults, chance.below(3), chance.below(4))
            };
            // Those that are sent together arrive in any order.
            if self.chance.lock().faults > 0 {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
            }
            {
                let mut left = self.left.lock();
                if *left == 0 {
                    let source = std::io::Error::other("killed");
                    return Err(Fault::Fatal(StoreError::Io { folder: "test".into(), source }));
                }
                *left -= 1;
            }
            let lost = || Err(Fault::Unavailable("lost".into()));
            let overtaken = std::mem::take(&mut *self.overtaken.lock());
            match overtaken {
                Overtaken::No => {}
                Overtaken::AfterTheNext => {
                    *self.overtaken.lock() = Overtaken::Now;
                    apply(&self.pairs, &expected, &next, &writes);
                    return lost();
                }
                Overtaken::Now => drop(open(&self.pairs, 1, 0, u32::MAX).take_over()),
            }
            let before = if hit { Vec::new() } else { std::mem::take(&mut *self.late.lock()) };
            let result = match (hit, kind) {
                (false, _) => Ok(apply(&self.pairs, &expected, &next, &writes)),
                (true, 0) => lost(),
                (true, 1) => {
                    apply(&self.pairs, &expected, &next, &writes);
                    lost()
                }
                (true, _) => {
                    self.late.lock().push((expected, next, writes));
                    lost()
                }
            };
            for (expected, next, writes) in before {
                apply(&self.pairs, &expected, &next, &writes);
            }
            result
        })
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        Box::pin(async move {
            let pairs = self.pairs.lock();
            let found = pairs.range(range).map(|(k, v)| (k.clone(), v.clone()));
            Ok(match order {
                Order::Ascending => found.take(limit).collect(),
                Order::Descending => found.rev().take(limit).collect(),
            })
        })
    }

    fn limits(&self) -> Limits {
        Limits { writes: 7, bytes: 400 }
    }

    fn note(&self, key: Vec<u8>, value: Option<Bytes>) -> BoxFuture<'_, Result<(), Fault>> {
        let mut pairs = self.pairs.lock();
        match value {
            Some(value) => pairs.insert(key, value),
            None => pairs.remove(&key),
        };
        Box::pin(async { Ok(()) })
    }

    fn health(&self) -> BoxFuture<'_, Vec<String>> {
        Box::pin(async { vec!["test".into()] })
    }

    fn place(&self) -> &str {
        "test"
    }
}

fn open(pairs: &Pairs, seed: u64, faults: u64, left: u32) -> RemoteStore {
    let link = Faulty {
        pairs: pairs.clone(),
        chance: Mutex::new(Chance { seed, faults }),
        late: Mutex::default(),
        left: Mutex::new(left),
        overtaken: Mutex::default(),
    };
    start(link)
}

fn start(link: Faulty) -> RemoteStore {
    let link: Arc<dyn Link> = Arc::new(link);
    RemoteStore::start("test".into(), "test", 1 << 20, move || Box::pin(async { Ok(link) })).unwrap()
}

/// Batch `n` of some: sets as many keys as it has, to its number.
fn batch(n: u64) -> Batch {
    let width = if n.is_multiple_of(5) { 60 } else { n % 5 };
    let mut writes: Vec<Write> = (0..width)
        .map(|k| (format!("w{width:02}-{k:03}").into_bytes(), Some(Bytes::from(n.to_string()))))
        .collect();
    writes.push((b"count".to_vec(), Some(Bytes::from(n.to_string()))));
    Batch { writes }
}

fn after(n: u64) -> BTreeMap<Vec<u8>, Bytes> {
    let mut pairs = BTreeMap::new();
    for n in 1..=n {
        pairs.extend(batch(n).writes.into_iter().filter_map(|(k, v)| Some((k, v?))));
    }
    pairs
}

fn found(store: &RemoteStore) -> BTreeMap<Vec<u8>, Bytes> {
    store.scan(&[1]..&[0xf0], Order::Ascending, usize::MAX).unwrap().into_iter().collect()
}

#[test]
fn lost_and_late_messages_change_nothing() {
    for seed in 1..13 {
        let pairs = Pairs::default();
        let store = open(&pairs, seed, 30, u32::MAX);
        let fence = store.take_over().unwrap();
        for n in 1..=40 {
            store.commit(batch(n), fence).unwrap();
            if n % 7 == 0 {
                store.sync().unwrap();
            }
        }
        store.sync().unwrap();
        drop(store);
        let next = open(&pairs, seed, 0, u32::MAX);
        next.take_over().unwrap();
        assert_eq!(found(&next), after(40), "seed {seed}");
    }
}

/// Every number of transactions after which an owner can die, within batches that take several, too.
#[test]
fn an_owner_that_dies_at_any_step_leaves_whole_batches() {
    for left in 1..70 {
        let pairs = Pairs::default();
        let dying = open(&pairs, left.into(), 0, left);
        let mut acknowledged = 0;
        if let Ok(fence) = dying.take_over() {
            for n in 1..=12 {
                if dying.commit(batch(n), fence).is_err() || dying.sync().is_err() {
                    break;
                }
                acknowledged = n;
            }
        }
        drop(dying);
        // The one who takes over dies, too, perhaps while it rolls forward.
        let _ = open(&pairs, 1, 0, left % 4).take_over();
        let next = open(&pairs, 1, 0, u32::MAX);
        next.take_over().unwrap();
        let there = found(&next);
        let upto: u64 =
            there.get(b"count".as_slice()).map_or(0, |v| str::from_utf8(v).unwrap().parse().unwrap());
        assert!(
            upto == acknowledged || upto == acknowledged + 1,
            "{left}: {upto}, {acknowledged} acknowledged"
        );
        assert_eq!(there, after(upto), "{left}");
    }
}

/// Whoever is overtaken while it asks whether its own take-over has happened, says so: it never owned the store for certain.
#[test]
fn a_take_over_in_doubt_that_is_overtaken_fails() {
    let pairs = Pairs::default();
    let doubtful = start(Faulty {
        pairs: pairs.clone(),
        chance: Mutex::new(Chance { seed: 1, faults: 0 }),
        late: Mutex::default(),
        left: Mutex::new(u32::MAX),
        overtaken: Mutex::new(Overtaken::AfterTheNext),
    });
    let refused = doubtful.take_over().unwrap_err();
    assert!(matches!(refused, StoreError::Fenced { ours: Fence(1), current: Fence(2) }), "{refused}");
    assert!(doubtful.commit(batch(1), Fence(1)).is_err());
    assert_eq!(open(&pairs, 1, 0, u32::MAX).take_over().unwrap(), Fence(3));
}

#[test]
fn two_that_take_over_at_once_do_not_both_own_the_store() {
    for seed in 1..20 {
        let pairs = Pairs::default();
        let stores: Vec<RemoteStore> = (0..4).map(|n| open(&pairs, seed * 10 + n, 20, u32::MAX)).collect();
        let taken: Vec<StoreResult<Fence>> = std::thread::scope(|scope| {
            let threads: Vec<_> = stores.iter().map(|s| scope.spawn(|| s.take_over())).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        // One that was overtaken while it was in doubt says so, as in the test above; the last is overtaken by nobody.
        let fence_of = |taken: &StoreResult<Fence>| match taken {
            Ok(fence) => *fence,
            Err(StoreError::Fenced { ours, .. }) => *ours,
            Err(e) => panic!("seed {seed}: {e}"),
        };
        let fences: Vec<Fence> = taken.iter().map(fence_of).collect();
        let newest = *fences.iter().max().unwrap();
        let mut owners = 0;
        for (store, fence) in stores.iter().zip(&fences) {
            let held = store.commit(batch(1), *fence).is_ok() && store.sync().is_ok();
            assert_eq!(held, *fence == newest, "seed {seed}: {taken:?}");
            owners += u32::from(held);
        }
        assert_eq!(owners, 1, "seed {seed}: {taken:?}");
    }
}
