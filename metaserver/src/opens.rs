//! Open files of all sessions. In memory only: clients declare their handles again when they reattach.
//!
//! What depends on it durably is the fate of an unlinked inode: it lives while it may be open. After a start nobody
//! knows what is open until every session of before has reattached or timed out; until then everything may be.
//!
//! What a rename has replaced lingers for a while, too. Whoever opens the name looks it up first, and what it led to then must still be
//! there: otherwise a name that always leads to something could not be opened at times. (Linux looks it up again, but only
//! once. A name that is just removed needs no such care: then there is nothing to be opened.)

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use fjordfs_proto::{FsError, FsResult, HandleId, InodeId, SessionId, error::Errno};

/// Most handles of one session.
const HANDLES_MAX: usize = 1 << 20;

/// What was replaced lingers for this long, and at most for twice as long: more than passes between a lookup and the open that
/// follows it.
const LINGER: Duration = Duration::from_secs(2);

/// Who has what open.
#[derive(Default)]
pub(crate) struct Opens {
    sessions: HashMap<SessionId, HashMap<HandleId, InodeId>>,
    count: HashMap<InodeId, u32>,
    /// Some session of before the start may still declare handles.
    recovering: bool,
    /// Handles opened since the last commit.
    fresh: Vec<(SessionId, HandleId)>,
    /// Replaced, and perhaps about to be opened: since the last turn, and since the one before.
    lingering: [HashSet<InodeId>; 2],
    last_turn: Option<Instant>,
    /// Those that have lingered for long enough, and are still to be looked at.
    lingered: Vec<InodeId>,
}

impl Opens {
    pub(crate) fn set_recovering(&mut self, recovering: bool) {
        self.recovering = recovering;
    }

    pub(crate) fn recovering(&self) -> bool {
        self.recovering
    }

    /// Opens `ino`; the same again is the same open.
    pub(crate) fn open(&mut self, session: SessionId, handle: HandleId, ino: InodeId) -> FsResult<()> {
        if handle.0 == 0 {
            return Err(FsError::new(Errno::EINVAL, "handle 0 cannot be opened: handles begin at 1"));
        }
        let handles = self.sessions.entry(session).or_default();
        match handles.get(&handle) {
            Some(open) if *open == ino => return Ok(()),
            Some(open) => {
                let message = format!("handle {handle} is open for {open} already, not for {ino}");
                return Err(FsError::new(Errno::EINVAL, message));
            }
            None if handles.len() >= HANDLES_MAX => {
                let message = format!("this client has {HANDLES_MAX} files open: close some");
                return Err(FsError::new(Errno::ENOMEM, message));
            }
            None => {}
        }
        handles.insert(handle, ino);
        *self.count.entry(ino).or_default() += 1;
        self.fresh.push((session, handle));
        Ok(())
    }

    /// Closes a handle. Its inode, if nobody has it open any more.
    pub(crate) fn close(&mut self, session: SessionId, handle: HandleId) -> Option<InodeId> {
        let ino = self.sessions.get_mut(&session)?.remove(&handle)?;
        self.lower(ino).then_some(ino)
    }

    /// Closes everything of a session. The inodes that nobody has open any more.
    pub(crate) fn end(&mut self, session: SessionId) -> Vec<InodeId> {
        let handles = self.sessions.remove(&session).unwrap_or_default();
        handles.into_values().filter(|ino| self.lower(*ino)).collect()
    }

    fn lower(&mut self, ino: InodeId) -> bool {
        let Some(count) = self.count.get_mut(&ino) else { return true };
        *count -= 1;
        let last = *count == 0;
        if last {
            self.count.remove(&ino);
        }
        last
    }

    /// Whether an unlinked inode must be kept.
    pub(crate) fn maybe_open(&self, ino: InodeId) -> bool {
        let lingers = || self.lingering.iter().any(|some| some.contains(&ino));
        self.recovering || self.count.contains_key(&ino) || lingers()
    }

    /// `ino` has lost its last name to another, and may be about to be opened.
    pub(crate) fn linger(&mut self, ino: InodeId) {
        self.lingering[0].insert(ino);
    }

    /// Time has passed.
    pub(crate) fn tick(&mut self, now: Instant) {
        let last = *self.last_turn.get_or_insert(now);
        if now.duration_since(last) >= LINGER {
            self.last_turn = Some(now);
            let newer = std::mem::take(&mut self.lingering[0]);
            self.lingered.extend(std::mem::replace(&mut self.lingering[1], newer));
        }
    }

    /// Up to `limit` inodes that linger no longer.
    pub(crate) fn take_lingered(&mut self, limit: usize) -> Vec<InodeId> {
        self.lingered.split_off(self.lingered.len().saturating_sub(limit))
    }

    pub(crate) fn handles(&self, session: SessionId) -> usize {
        self.sessions.get(&session).map_or(0, HashMap::len)
    }

    /// What has been opened so far, for [`Opens::undo_to`].
    pub(crate) fn mark(&self) -> usize {
        self.fresh.len()
    }

    /// The operation that has opened something since is not executed now.
    pub(crate) fn undo_to(&mut self, mark: usize) {
        for (session, handle) in self.fresh.split_off(mark.min(self.fresh.len())) {
            self.close(session, handle);
        }
    }

    /// The burst is committed: what it opened stays open.
    pub(crate) fn committed(&mut self) {
        self.fresh.clear();
    }

    /// The burst failed, and its clients were told so: what it opened is not open.
    pub(crate) fn abandon(&mut self) {
        self.undo_to(0);
    }
}
