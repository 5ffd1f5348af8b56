//! Names and attributes that this client may use without asking: its leases.
//!
//! # How it works
//! The driver of the session's stream shows every answer to the [`Table`] before the caller gets it, and obeys
//! recalls in their order, so the table never holds what the server has taken back. Callers look here first.
//!
//! # Time
//! Leases are good until a while after the last sign of life that the server has repeated was sent. Somebody who
//! caches further down (the kernel, under a mount) is told how long that is, and hears of every recall through
//! [`Client::recalls`](crate::Client::recalls) before it is acknowledged.

mod table;

use std::time::{Duration, Instant};

use bytes::Bytes;
use fjordfs_proto::{
    FsResult, InodeId,
    pb::meta::{Attr, Recall, request::Op, response::Result as Reply},
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use table::{Bounds, Table};

/// About 100 MiB when full: 300 bytes for an inode, 100 for a name.
const BOUNDS: Bounds = Bounds { inodes: 1 << 17, names: 1 << 19 };

/// A dead reckoning of clocks and of the kernel's ticks: leases are used for this much less than they are good for.
const MARGIN: Duration = Duration::from_millis(50);

/// Inodes whose leases have ended: nothing that was cached of them may be used once `done` is sent or dropped.
#[derive(Debug)]
pub struct Recalled {
    /// These inodes.
    pub inodes: Vec<InodeId>,
    /// Names in directories among them may have been cached.
    pub names: bool,
    /// To be sent when the caches below this one are empty of it. The cluster waits for that.
    pub done: oneshot::Sender<()>,
}

/// Ends when the caches below have let go.
pub(crate) type LetGo = Option<oneshot::Receiver<()>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Leases {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    table: Table,
    /// `None` without a stream.
    good_until: Option<Instant>,
    listener: Option<mpsc::UnboundedSender<Recalled>>,
}

impl State {
    fn left(&self) -> Option<Duration> {
        self.good_until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    fn tell(&mut self, inodes: Vec<InodeId>, names: bool) -> LetGo {
        if inodes.is_empty() {
            return None;
        }
        let (done, let_go) = oneshot::channel();
        // A listener that is gone caches nothing.
        self.listener.as_ref()?.send(Recalled { inodes, names, done }).ok()?;
        Some(let_go)
    }
}

impl Leases {
    pub(crate) fn new() -> Leases {
        Leases { state: Mutex::new(State { table: Table::new(BOUNDS), good_until: None, listener: None }) }
    }

    // ---- for callers ----

    /// The attributes of what is under a name, or that nothing is; `None` when it has to be asked for.
    pub(crate) fn lookup(&self, parent: InodeId, name: &[u8]) -> Option<Option<Attr>> {
        let mut state = self.state.lock();
        state.left()?;
        match state.table.name(parent, name)? {
            None => Some(None),
            Some(ino) => state.table.attr(ino).map(Some),
        }
    }

    /// The attributes of an inode.
    pub(crate) fn attr(&self, ino: InodeId) -> Option<Attr> {
        let mut state = self.state.lock();
        state.left()?;
        state.table.attr(ino)
    }

    /// Where a symbolic link points.
    pub(crate) fn target(&self, ino: InodeId) -> Option<Bytes> {
        self.state.lock().table.target(ino)
    }

    /// How long it stays true that `name` leads to `ino`, or to nothing; zero when that is not known.
    pub(crate) fn name_left(&self, parent: InodeId, name: &[u8], ino: Option<InodeId>) -> Duration {
        let mut state = self.state.lock();
        let left = state.left().unwrap_or_default();
        if state.table.name(parent, name) == Some(ino) { left } else { Duration::ZERO }
    }

    /// How long these stay the attributes of their inode; zero when that is not known.
    pub(crate) fn attr_left(&self, attr: &Attr) -> Duration {
        let mut state = self.state.lock();
        let left = state.left().unwrap_or_default();
        if state.table.attr(InodeId(attr.ino)) == Some(*attr) { left } else { Duration::ZERO }
    }

    /// Whoever caches what is told here must hear of recalls. There is one listener.
    pub(crate) fn listen(&self) -> mpsc::UnboundedReceiver<Recalled> {
        let (sender, recalls) = mpsc::unbounded_channel();
        self.state.lock().listener = Some(sender);
        recalls
    }

    // ---- for the stream ----

    /// An operation is about to be sent.
    pub(crate) fn sent(&self, op: &Op) {
        self.state.lock().table.sent(op);
    }

    /// An operation will never be answered.
    pub(crate) fn failed(&self, op: &Op) {
        self.state.lock().table.settled(op);
    }

    /// Takes an answer in. Answers with inodes that there is no room for any more.
    pub(crate) fn learn(&self, op: &Op, result: &FsResult<Reply>, serial: u64, changed: &[Attr]) -> Dropped {
        let mut state = self.state.lock();
        state.table.settled(op);
        state.table.learn(op, result, serial, changed);
        let inodes = state.table.shrink();
        let as_of = state.table.serial();
        let let_go = state.tell(inodes.clone(), true);
        Dropped { inodes, as_of, let_go }
    }

    /// Drops what is recalled.
    pub(crate) fn recall(&self, recalls: &[Recall]) -> LetGo {
        let mut state = self.state.lock();
        let inodes: Vec<InodeId> = recalls.iter().map(|recall| InodeId(recall.ino)).collect();
        let mut names = false;
        for ino in &inodes {
            names |= state.table.forget(*ino);
        }
        state.tell(inodes, names)
    }

    /// The server has repeated a sign of life that was sent at `sent`: leases are good for `lease` from then.
    pub(crate) fn renew(&self, sent: Instant, lease: Duration) {
        let mut state = self.state.lock();
        if state.left().is_none() {
            // The server may have given up on leases that were not renewed in time. Below, they have run out by themselves.
            state.table.clear();
        }
        let until = sent + lease.saturating_sub(MARGIN);
        state.good_until = state.good_until.max(Some(until));
    }

    /// The stream is gone, and all leases with it.
    pub(crate) fn end(&self) -> LetGo {
        let mut state = self.state.lock();
        state.good_until = None;
        let dropped = state.table.clear();
        state.tell(dropped, true)
    }
}

/// Inodes that were dropped for want of room: their leases are given back when the caches below have let go.
#[derive(Debug)]
pub(crate) struct Dropped {
    pub(crate) inodes: Vec<InodeId>,
    pub(crate) as_of: u64,
    pub(crate) let_go: LetGo,
}
