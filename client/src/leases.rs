//! Names and attributes that this client may use without asking, its leases, and what it may decide without asking, its
//! delegations.
//!
//! # How it works
//! The driver of the session's stream shows every answer to the [`Table`] before the caller gets it, and obeys
//! recalls in their order, so the table never holds what the server has taken back. Callers look here first.
//!
//! # Time
//! Leases are good until a while after the last sign of life that the server has repeated was sent. Somebody who
//! caches further down (the kernel, under a mount) is told how long that is, and hears of every recall through
//! [`Client::recalls`](crate::Client::recalls) before it is acknowledged.

//! # Deferred operations
//! An operation that is decided here takes its effect on the table, and is queued, under one lock; the stream's driver takes the
//! queue before anything else that it sends, so the server executes what was decided in the order in which it was
//! decided, and before it sees any later request. It is sent at most [`DEFERRED_MAX`] later. What the server refuses
//! nevertheless (its disk is full, a lease has run out while nobody could be reached) is reported by the next fsync.
//!
//! # Recalls of delegations
//! Beside the caches below, those who have written to a file must let go: data that was written and closed, and not
//! committed, is committed first ([`Keeper`]).

mod ahead;
mod decide;
mod deferred;
mod extents;
mod let_go;
mod openings;
mod table;

use std::{
    ops::RangeInclusive,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, HandleId, InodeId,
    error::Errno,
    operation::access_is_due,
    pb::meta::{
        Accessed, Attr, Close, DirEntry, ExtentsReply, Recall, Time, request::Op, response::Result as Reply,
    },
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};

pub(crate) use decide::Removed;
use deferred::Deferred;
pub(crate) use deferred::Unasked;
pub(crate) use let_go::{LetGo, Patience};
use openings::Openings;
pub(crate) use table::Sent;
pub(crate) use table::Table;
use table::{Bounds, name_taken};

use crate::{file::now, handover::Handover, successor};

/// About 100 MiB when full: 300 bytes for an inode, 100 for a name.
const BOUNDS: Bounds = Bounds { inodes: 1 << 17, names: 1 << 19 };

/// A dead reckoning of clocks and of the kernel's ticks: leases are used for this much less than they are good for.
const MARGIN: Duration = Duration::from_millis(50);

/// Decisions are made only while leases are good for longer than what is deferred may wait.
const DECIDE_LEFT_MIN: Duration = deferred::DEFERRED_MAX.saturating_mul(2);

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

/// What the keeper of this client's files has to do about delegations.
#[derive(Debug)]
pub(crate) enum Keep {
    /// Commit what was written to the files in `recalled`, then say which of `below` have nothing to be written.
    Flush { recalled: Vec<InodeId>, below: Vec<InodeId>, done: oneshot::Sender<Vec<InodeId>> },
    /// Commit all that was written, and say so.
    FlushAll(oneshot::Sender<Vec<InodeId>>),
    /// Something that was decided about these inodes was refused.
    Refused(Vec<InodeId>, FsError),
    /// What was committed to any file, and not synced, may be gone.
    Lost(FsError),
    /// Others may have got the locks on these inodes: what was written under them and is not committed is void.
    LocksLost { inodes: Vec<InodeId>, error: FsError, done: oneshot::Sender<Vec<InodeId>> },
}

/// Whom the leases tell, and in what order: one who works on the client's files.
pub(crate) type Keeper = mpsc::UnboundedReceiver<Keep>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Leases {
    state: Mutex<State>,
    /// Something has been deferred, or should not be any longer.
    deferred_changed: Notify,
    handover: Option<Arc<Handover>>,
}

#[derive(Debug)]
struct State {
    table: Table,
    openings: Openings,
    deferred: Deferred,
    /// Delegations are used.
    decides: bool,
    keeper: Option<mpsc::UnboundedSender<Keep>>,
    /// The first refusal of a deferred operation that nobody has been told of.
    refusal: Option<FsError>,
    /// How often the metaserver has lost what it had answered.
    losses: u64,
    /// Of the last operation, asked or decided.
    sequence: u64,
    /// `None` without a stream.
    good_until: Option<Instant>,
    listener: Option<mpsc::UnboundedSender<Recalled>>,
}

impl State {
    fn left(&self) -> Option<Duration> {
        self.good_until?.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Tells the caches below of inodes that are recalled, and the keeper of files that may have been written to.
    fn tell(
        &mut self,
        inodes: Vec<InodeId>,
        names: bool,
        written: Vec<InodeId>,
        below: Vec<InodeId>,
    ) -> LetGo {
        if inodes.is_empty() {
            return LetGo::default();
        }
        let keeper = self.keep(|done| Keep::Flush { recalled: written, below, done });
        let (done, caches) = oneshot::channel();
        let told = self.listener.as_ref().is_some_and(|l| l.send(Recalled { inodes, names, done }).is_ok());
        LetGo { caches: told.then_some(caches), keeper }
    }

    /// An inode may lose its last name by an operation of this client: the server must know who has it open. `None` when it is
    /// not known what the name leads to.
    fn tell_openings_of(&mut self, (parent, name): (InodeId, &[u8])) -> Vec<Op> {
        match self.table.name(parent, name) {
            Some(Some(ino)) => self.openings.tell(ino),
            Some(None) => Vec::new(),
            None => self.openings.tell_all(),
        }
    }

    fn keep(
        &self,
        order: impl FnOnce(oneshot::Sender<Vec<InodeId>>) -> Keep,
    ) -> Option<oneshot::Receiver<Vec<InodeId>>> {
        let (done, kept) = oneshot::channel();
        self.keeper.as_ref()?.send(order(done)).ok()?;
        Some(kept)
    }
}

impl Leases {
    /// `decides`: delegations are used. A successor is told what of that is not with the server.
    pub(crate) fn new(decides: bool, handover: Option<Arc<Handover>>) -> Leases {
        let state = State {
            table: Table::new(BOUNDS),
            openings: Openings::default(),
            deferred: Deferred::default(),
            decides,
            keeper: None,
            refusal: None,
            losses: 0,
            sequence: 0,
            good_until: None,
            listener: None,
        };
        Leases { state: Mutex::new(state), deferred_changed: Notify::new(), handover }
    }

    // ---- for callers ----

    /// The attributes of what is under a name, or that nothing is; `None` when it has to be asked for.
    pub(crate) fn lookup(&self, parent: InodeId, name: &[u8]) -> Option<Option<Attr>> {
        let mut state = self.state.lock();
        state.left()?;
        match state.table.look_up(parent, name)? {
            None => Some(None),
            Some(ino) => state.table.attr(ino).map(Some),
        }
    }

    /// How many neighbours to ask for with a name that is not known.
    pub(crate) fn neighbours(&self, parent: InodeId) -> u32 {
        self.state.lock().table.neighbours(parent)
    }

    /// The attributes of an inode.
    pub(crate) fn attr(&self, ino: InodeId) -> Option<Attr> {
        let mut state = self.state.lock();
        state.left()?;
        state.table.attr(ino)
    }

    /// Data versions between which nobody but this client changed a file that it has committed to.
    pub(crate) fn own_versions(&self, ino: InodeId) -> Option<RangeInclusive<u64>> {
        self.state.lock().table.own_versions(ino)
    }

    /// Attributes that an answer shows, unless this client has committed to the file since they were so.
    pub(crate) fn newest(&self, attr: Attr) -> Attr {
        self.state.lock().table.newest(attr)
    }

    /// Opens a regular file without asking, if there is a lease on it: its attributes, and its extents if they are known.
    pub(crate) fn open_here(&self, ino: InodeId, handle: HandleId) -> Option<(Attr, Option<ExtentsReply>)> {
        let mut state = self.state.lock();
        state.left()?;
        let found = state.table.openable(ino)?;
        state.openings.add(ino, handle);
        Some(found)
    }

    /// A handle is closed.
    pub(crate) fn closed(&self, ino: InodeId, handle: HandleId) {
        let mut state = self.state.lock();
        if !state.openings.remove(ino, handle) {
            self.defer(&mut state, Unasked::undecided(Op::Close(Close { handle: handle.0 })));
        }
    }

    /// An inode was read, whose attributes are known here.
    pub(crate) fn accessed(&self, ino: InodeId) {
        let attr = self.state.lock().table.attr(ino);
        if let Some(attr) = attr {
            let time = now();
            if access_is_due(attr.atime, [attr.mtime, attr.ctime], Some(time)) {
                self.note_access(ino, time, attr.atime);
            }
        }
    }

    /// An inode was read, and its access time has to follow: the server is told with what is sent next.
    pub(crate) fn note_access(&self, ino: InodeId, time: Time, before: Option<Time>) {
        let mut state = self.state.lock();
        state.table.set_access_time(ino, time);
        let access = Op::Accessed(Accessed { ino: ino.0, time: Some(time), before });
        self.defer(&mut state, Unasked::undecided(access));
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

    /// Attributes of entries of a directory, where name and attributes are known, and how long both stay so.
    pub(crate) fn entries(&self, parent: InodeId, entries: &[DirEntry]) -> (Duration, Vec<Option<Attr>>) {
        let mut state = self.state.lock();
        let Some(left) = state.left() else { return (Duration::ZERO, Vec::new()) };
        let table = &mut state.table;
        let attr = |entry: &DirEntry| {
            let ino = InodeId(entry.ino);
            if table.name(parent, &entry.name) == Some(Some(ino)) { table.attr(ino) } else { None }
        };
        (left, entries.iter().map(attr).collect())
    }

    /// Whoever caches what is told here must hear of recalls. There is one listener.
    pub(crate) fn listen(&self) -> mpsc::UnboundedReceiver<Recalled> {
        let (sender, recalls) = mpsc::unbounded_channel();
        self.state.lock().listener = Some(sender);
        recalls
    }

    // ---- deciding ----

    /// Whether this client alone can use the inode, for as long as it takes to send what is deferred.
    pub(crate) fn is_delegated(&self, ino: InodeId) -> bool {
        let state = self.state.lock();
        state.may_decide() && state.table.is_delegated(ino)
    }

    /// Decides an operation here, if `f` can: it gets the table, the time, and the operation's sequence, and answers
    /// with the operation to be sent later. `removes` is a name that it takes from an inode.
    pub(crate) fn decide<T>(
        &self,
        removes: Option<(InodeId, &[u8])>,
        f: impl FnOnce(&mut Table, Time, u64) -> Option<(Op, T)>,
    ) -> Option<T> {
        let request = successor::request();
        if self.handover.as_ref().is_some_and(|handover| handover.may_be_done(request)) {
            // Only the server knows.
            return None;
        }
        let mut state = self.state.lock();
        if !state.may_decide() || state.deferred.is_full() {
            return None;
        }
        let sequence = state.next_sequence();
        let openings = removes.map(|name| state.tell_openings_of(name)).unwrap_or_default();
        self.defer_openings(&mut state, openings);
        let (op, result) = f(&mut state.table, now(), sequence)?;
        self.defer(&mut state, Unasked { op, decided: true, request });
        Some(result)
    }

    /// They are sent before anything that is asked or told from now on.
    fn defer_openings(&self, state: &mut State, openings: Vec<Op>) {
        for op in openings {
            self.defer(state, Unasked::undecided(op));
        }
    }

    fn defer(&self, state: &mut State, operation: Unasked) {
        if state.deferred.push(operation) {
            self.deferred_changed.notify_one();
        }
        self.leave_to_successor(state);
    }

    fn leave_to_successor(&self, state: &State) {
        if let Some(handover) = &self.handover {
            handover.set_decided(state.deferred.unanswered());
        }
    }

    /// For a successor, who would not know.
    fn note_untold(&self, is_untold: bool) {
        if let Some(handover) = &self.handover {
            handover.set_untold(is_untold);
        }
    }

    /// Whether something was decided here that the server has not answered.
    pub(crate) fn has_unanswered(&self) -> bool {
        self.state.lock().deferred.unanswered() > 0
    }

    /// The process before this one had decided what the server may never have heard of. The next sync says so.
    pub(crate) fn predecessor_lost(&self) {
        let why = "what the mount's former process had decided and not sent is lost with it";
        tracing::error!("{why}: the next fsync reports it");
        self.state.lock().refusal.get_or_insert_with(|| FsError::new(Errno::EIO, why));
    }

    /// Tells the keeper from now on.
    pub(crate) fn keeper(&self) -> Keeper {
        let (sender, keeper) = mpsc::unbounded_channel();
        self.state.lock().keeper = Some(sender);
        keeper
    }

    /// The first refusal of a deferred operation since the last call.
    pub(crate) fn take_refusal(&self) -> Option<FsError> {
        let mut state = self.state.lock();
        let refusal = state.refusal.take()?;
        self.note_untold(false);
        Some(refusal)
    }

    /// How often the metaserver has lost what it had answered. A sync that began before a loss must not succeed after it.
    pub(crate) fn losses(&self) -> u64 {
        self.state.lock().losses
    }

    // ---- for the stream ----

    /// The metaserver has lost something that it had answered and not synced. Whoever has a file open is told, and the next
    /// sync.
    pub(crate) fn lost(&self) {
        let why = "the metaserver has lost what was not synced, in a power failure";
        tracing::error!("{why}: the next fsync of every file reports it");
        let error = FsError::new(Errno::EIO, why);
        let mut state = self.state.lock();
        state.losses += 1;
        state.refusal.get_or_insert_with(|| error.clone());
        self.note_untold(true);
        if let Some(keeper) = &state.keeper {
            // A client that is gone needs no report.
            let _ = keeper.send(Keep::Lost(error));
        }
    }

    /// When what is deferred must be sent; `None` when there is nothing.
    pub(crate) fn deferred_due(&self) -> Option<Instant> {
        self.state.lock().deferred.due()
    }

    /// Resolves when [`Leases::deferred_due`] may have another answer.
    pub(crate) async fn deferred_changed(&self) {
        self.deferred_changed.notified().await;
    }

    /// Takes what is deferred, in order.
    pub(crate) fn take_deferred(&self) -> impl Iterator<Item = Unasked> + use<> {
        self.state.lock().deferred.take()
    }

    /// A decided operation was answered, or will never be.
    pub(crate) fn deferred_answered(&self, op: &Op, result: &FsResult<Reply>) {
        let mut state = self.state.lock();
        state.deferred.answered();
        if let Err(e) = result {
            state.refuse(op, e);
            self.note_untold(true);
        }
        self.leave_to_successor(&state);
    }

    /// An operation is about to be sent.
    pub(crate) fn sent(&self, op: &Op) -> Sent {
        let mut state = self.state.lock();
        let openings = name_taken(op).map(|name| state.tell_openings_of(name)).unwrap_or_default();
        self.defer_openings(&mut state, openings);
        let sequence = state.next_sequence();
        state.table.sent(op, sequence)
    }

    /// An operation will never be answered.
    pub(crate) fn failed(&self, op: &Op, sent: &Sent) {
        self.state.lock().table.settled(op, sent);
    }

    /// Takes an answer in. Answers with inodes that there is no room for any more.
    pub(crate) fn learn(&self, op: &Op, sent: &Sent, answer: &Answered<'_>) -> Dropped {
        let mut state = self.state.lock();
        state.table.settled(op, sent);
        state.table.learn(op, sent, answer.result, answer.serial, answer.changed);
        if state.decides {
            state.table.delegated(answer.delegated);
        }
        let inodes = state.table.shrink();
        for ino in &inodes {
            let openings = state.openings.tell(*ino);
            self.defer_openings(&mut state, openings);
        }
        let as_of = state.table.serial();
        let let_go = state.tell(inodes.clone(), true, inodes.clone(), Vec::new());
        Dropped { inodes, as_of, let_go }
    }

    /// Drops what is recalled. Somebody who asks for a directory will go on to what is in it: delegations there are given
    /// up, too, where nothing is left to be written.
    pub(crate) fn recall(&self, recalls: &[Recall]) -> Recalling {
        let mut state = self.state.lock();
        let inodes: Vec<InodeId> = recalls.iter().map(|recall| InodeId(recall.ino)).collect();
        let below: Vec<InodeId> = inodes.iter().flat_map(|ino| state.table.delegated_in(*ino)).collect();
        state.table.demote(&below);
        let delegated = recalls.iter().filter(|recall| recall.delegated);
        let written = delegated.map(|recall| InodeId(recall.ino)).collect();
        let mut names = false;
        for ino in &inodes {
            let openings = state.openings.tell(*ino);
            self.defer_openings(&mut state, openings);
            names |= state.table.forget(*ino);
        }
        Recalling { as_of: state.table.serial(), let_go: state.tell(inodes, names, written, below) }
    }

    /// The server has repeated a sign of life that was sent at `sent`: leases are good for `lease` from then.
    pub(crate) fn renew(&self, sent: Instant, lease: Duration) {
        let mut state = self.state.lock();
        if state.left().is_none() {
            // The server may have given up on leases that were not renewed in time. Below, they have run out by themselves.
            state.table.clear();
            let openings = state.openings.tell_all();
            self.defer_openings(&mut state, openings);
        }
        let until = sent + lease.saturating_sub(MARGIN);
        state.good_until = state.good_until.max(Some(until));
    }

    /// The stream is gone, and all leases with it.
    pub(crate) fn end(&self) -> LetGo {
        let mut state = self.state.lock();
        state.good_until = None;
        let dropped = state.table.clear();
        // All handles are declared when the client attaches again.
        state.openings.clear();
        // What was written is committed on the next stream.
        let keeper = state.keeper.take();
        let let_go = state.tell(dropped, true, Vec::new(), Vec::new());
        state.keeper = keeper;
        let_go
    }

    /// Nothing that was written under locks on these inodes is submitted any more when this ends.
    pub(crate) fn locks_lost(&self, inodes: Vec<InodeId>, error: FsError) -> LetGo {
        LetGo { caches: None, keeper: self.state.lock().keep(|done| Keep::LocksLost { inodes, error, done }) }
    }

    /// Commits everything that was written, before a new stream counts as settled.
    pub(crate) fn flush_all(&self) -> LetGo {
        LetGo { caches: None, keeper: self.state.lock().keep(Keep::FlushAll) }
    }
}

impl State {
    fn may_decide(&self) -> bool {
        self.decides && self.left().is_some_and(|left| left > DECIDE_LEFT_MIN)
    }

    /// The server did not take what was decided: what is here is wrong.
    fn refuse(&mut self, op: &Op, e: &FsError) {
        tracing::error!("an operation that was reported as done was refused by the metaserver: {e}");
        let inodes = decide::inodes_of(op);
        for ino in &inodes {
            self.table.forget(*ino);
        }
        self.refusal.get_or_insert_with(|| e.clone());
        if let Some(keeper) = &self.keeper {
            // A client that is gone needs no report.
            let _ = keeper.send(Keep::Refused(inodes.clone(), e.clone()));
        }
        // Nobody waits for what is below to hear of it.
        drop(self.tell(inodes, true, Vec::new(), Vec::new()));
    }
}

/// An answer, as far as leases are concerned.
pub(crate) struct Answered<'a> {
    pub(crate) result: &'a FsResult<Reply>,
    pub(crate) serial: u64,
    pub(crate) changed: &'a [Attr],
    pub(crate) delegated: &'a [u64],
}

/// A recall being obeyed; when everybody has let go, delegations in the recalled directories are given up, too.
#[derive(Debug)]
pub(crate) struct Recalling {
    pub(crate) as_of: u64,
    pub(crate) let_go: LetGo,
}

/// Inodes that were dropped for want of room: their leases are given back when the caches below have let go.
#[derive(Debug)]
pub(crate) struct Dropped {
    pub(crate) inodes: Vec<InodeId>,
    pub(crate) as_of: u64,
    pub(crate) let_go: LetGo,
}
