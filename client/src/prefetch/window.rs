//! How far plans are ahead of their readers. Readers pass here on their hot path: without a plan it costs one load.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Release},
        },
    },
};

use fjordfs_proto::BlockId;
use lru::LruCache;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::cache::CHUNK;

type Key = (BlockId, u32);

/// Readers read about in the order of the plan: what lies further back than this, in chunks, was left out.
const REORDERED_MAX: u64 = 32;

/// A reader may overtake its plan by this many chunks, and the plan knows that they were read.
const OVERTAKEN_MAX: usize = 4096;

/// Chunks that were asked for and not read yet, of all plans.
#[derive(Debug)]
pub(crate) struct Window {
    chunks_max: usize,
    /// Whether there are plans.
    active: AtomicBool,
    state: Mutex<State>,
    room: Notify,
}

#[derive(Debug)]
struct State {
    plans: usize,
    plan_next: u64,
    turn_next: u64,
    /// When each was asked for, and by which plan.
    by_key: HashMap<Key, (u64, u64)>,
    by_turn: BTreeMap<(u64, u64), Key>,
    /// Read before any plan came to them. Fetched then, they would wait for a reader that has passed.
    overtaken: LruCache<Key, ()>,
}

impl State {
    fn remove(&mut self, key: &Key) -> Option<(u64, u64)> {
        let at = self.by_key.remove(key)?;
        self.by_turn.remove(&at);
        Some(at)
    }
}

impl Window {
    /// At least one chunk fits.
    pub(crate) fn new(bytes_max: u64) -> Arc<Window> {
        Arc::new(Window {
            chunks_max: (bytes_max / u64::from(CHUNK)).max(1) as usize,
            active: AtomicBool::new(false),
            state: Mutex::new(State {
                plans: 0,
                plan_next: 0,
                turn_next: 0,
                by_key: HashMap::new(),
                by_turn: BTreeMap::new(),
                // Its room is made when it is needed.
                overtaken: LruCache::unbounded(),
            }),
            room: Notify::new(),
        })
    }

    pub(super) fn plan(self: &Arc<Self>) -> Arc<Plan> {
        let mut state = self.state.lock();
        state.plan_next += 1;
        state.plans += 1;
        self.active.store(true, Release);
        Arc::new(Plan { id: state.plan_next, window: self.clone() })
    }

    /// Somebody reads of this chunk.
    pub(crate) fn read(&self, key: &Key) {
        if !self.active.load(Acquire) {
            return;
        }
        let mut state = self.state.lock();
        let Some((plan, turn)) = state.remove(key) else {
            state.overtaken.put(*key, ());
            if state.overtaken.len() > OVERTAKEN_MAX {
                state.overtaken.pop_lru();
            }
            return;
        };
        while let Some((&(_, passed), &key)) = state.by_turn.range((plan, 0)..(plan, turn)).next()
            && passed + REORDERED_MAX < turn
        {
            state.remove(&key);
        }
        self.room.notify_waiters();
    }
}

/// One plan's part of the window. Dropped, it leaves.
#[derive(Debug)]
pub(super) struct Plan {
    id: u64,
    window: Arc<Window>,
}

impl Plan {
    /// Waits for room for a chunk; false when it is ahead already, or was read.
    pub(super) async fn enter(&self, key: Key) -> bool {
        loop {
            let room = self.window.room.notified();
            let mut room = std::pin::pin!(room);
            room.as_mut().enable();
            {
                let mut state = self.window.state.lock();
                if state.by_key.contains_key(&key) || state.overtaken.pop(&key).is_some() {
                    return false;
                }
                if state.by_key.len() < self.window.chunks_max {
                    state.turn_next += 1;
                    let at = (self.id, state.turn_next);
                    state.by_key.insert(key, at);
                    state.by_turn.insert(at, key);
                    return true;
                }
            }
            room.await;
        }
    }

    /// The chunk did not come.
    pub(super) fn leave(&self, key: &Key) {
        let mut state = self.window.state.lock();
        state.remove(key);
        self.window.room.notify_waiters();
    }

    /// Bytes that were asked for and not read yet.
    pub(super) fn ahead(&self) -> u64 {
        let state = self.window.state.lock();
        state.by_turn.range((self.id, 0)..=(self.id, u64::MAX)).count() as u64 * u64::from(CHUNK)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        let mut state = self.window.state.lock();
        let later = state.by_turn.split_off(&(self.id, 0));
        for (at, key) in later {
            if at.0 == self.id {
                state.by_key.remove(&key);
            } else {
                state.by_turn.insert(at, key);
            }
        }
        state.plans -= 1;
        if state.plans == 0 {
            state.overtaken.clear();
            self.window.active.store(false, Release);
        }
        self.window.room.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn key(i: u32) -> Key {
        (BlockId(1), i)
    }

    #[tokio::test]
    async fn a_plan_waits_for_its_readers() {
        let window = Window::new(3 << 20);
        let plan = window.plan();
        for i in 0..3 {
            assert!(plan.enter(key(i)).await);
        }
        assert!(!plan.enter(key(1)).await, "asked for already");
        assert_eq!(plan.ahead(), 3 << 20);
        assert!(plan.enter(key(3)).now_or_never().is_none());
        window.read(&key(1));
        assert!(plan.enter(key(3)).await);
        plan.leave(&key(0));
        assert_eq!(plan.ahead(), 2 << 20);
    }

    #[tokio::test]
    async fn what_readers_leave_out_is_passed() {
        let window = Window::new(100 << 20);
        let plan = window.plan();
        for i in 0..60 {
            assert!(plan.enter(key(i)).await);
        }
        window.read(&key(59));
        // The last 32 before it may still come.
        assert_eq!(plan.ahead(), 32 << 20);
        window.read(&key(3));
        assert_eq!(plan.ahead(), 32 << 20);
    }

    #[tokio::test]
    async fn what_was_read_before_the_plan_came_to_it_is_not_waited_for() {
        let window = Window::new(2 << 20);
        window.read(&key(0));
        let plan = window.plan();
        assert!(plan.enter(key(0)).await, "read before there was a plan");
        window.read(&key(7));
        assert!(!plan.enter(key(7)).await);
        assert!(plan.enter(key(7)).await, "who names it twice reads it twice");
        window.read(&key(0));
        for i in 0..2 * OVERTAKEN_MAX as u32 {
            window.read(&key(100 + i));
        }
        assert_eq!(window.state.lock().overtaken.len(), OVERTAKEN_MAX);
        drop(plan);
        assert!(window.state.lock().overtaken.is_empty());
    }

    #[tokio::test]
    async fn a_plan_that_ends_makes_room() {
        let window = Window::new(4 << 20);
        let (first, second, third) = (window.plan(), window.plan(), window.plan());
        assert!(first.enter(key(0)).await && second.enter(key(1)).await);
        assert!(third.enter(key(2)).await && second.enter(key(3)).await);
        drop(second);
        assert_eq!((first.ahead(), third.ahead()), (1 << 20, 1 << 20));
        drop((first, third));
        assert!(!window.active.load(Acquire));
    }
}
