//! Numbers for inodes that this client makes by itself: leased from the metaserver in ranges, handed out one by one.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fjordfs_proto::{
    SessionId,
    pb::meta::{LeaseInodes, request::Op, response},
};
use parking_lot::Mutex;

use crate::{engine::Engine, meta::MetaClient};

/// Numbers asked for at a time.
const LEASE: u32 = 1 << 14;

/// Fewer left than this, and more are asked for.
const LOW: u64 = LEASE as u64 / 2;

/// Numbers of this session that no inode has yet.
pub(crate) struct InodeIds {
    meta: Arc<MetaClient>,
    engine: Arc<Engine>,
    state: Arc<Mutex<State>>,
    asking: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    session: SessionId,
    /// The one in use, and the next.
    ranges: [Range<u64>; 2],
}

impl InodeIds {
    pub(crate) fn new(meta: Arc<MetaClient>, engine: Arc<Engine>) -> InodeIds {
        InodeIds { meta, engine, state: Arc::default(), asking: Arc::default() }
    }

    /// The next number, when one is there: nobody waits for more.
    pub(crate) fn take_now(&self) -> Option<u64> {
        let session = self.meta.session();
        let mut state = self.state.lock();
        if state.session != session {
            *state = State { session, ..State::default() };
        }
        if state.ranges[0].is_empty() {
            state.ranges.rotate_left(1);
        }
        let taken = state.ranges[0].next();
        let low = state.ranges.iter().map(|range| range.end - range.start).sum::<u64>() < LOW;
        drop(state);
        if low {
            self.refill();
        }
        taken
    }

    /// Asks for more numbers, unless that is under way.
    pub(crate) fn refill(&self) {
        if self.asking.swap(true, Ordering::AcqRel) {
            return;
        }
        let session = self.meta.session();
        let pending = self.meta.submit(Op::LeaseInodes(LeaseInodes { count: LEASE }));
        let (state, asking) = (self.state.clone(), self.asking.clone());
        self.engine.spawn(async move {
            match pending.wait().await {
                Ok(response::Result::LeaseInodes(lease)) => {
                    let mut state = state.lock();
                    if state.session != session {
                        *state = State { session, ..State::default() };
                    }
                    if let Some(empty) = state.ranges.iter_mut().find(|range| range.is_empty()) {
                        *empty = lease.first..lease.first.saturating_add(u64::from(lease.count));
                    }
                }
                Ok(_) => {
                    tracing::warn!("the metaserver answered a lease of inode numbers with something else")
                }
                // Whoever needs one asks the metaserver meanwhile.
                Err(e) => tracing::debug!("no inode numbers: {e}"),
            }
            asking.store(false, Ordering::Release);
        });
    }
}
