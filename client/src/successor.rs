//! Going on where a former process of a mount was killed: its open files, what it had not written, what it had not synced.
//!
//! # Consistency
//! What the former process had and no server has is lost, as when a client dies. The difference is that programs live on, so
//! they are told: the next write, fsync or close of each file that had such bytes fails once with `EIO`, and so does the
//! first sync after operations were lost that it had decided by itself.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use fjordfs_proto::{FsError, FsResult, InodeId, error::Errno};
use parking_lot::Mutex;

use crate::{
    Client, File, Handover,
    client::Inner,
    file::FileState,
    handover::{LockUser, Open},
};

/// Between looks whether the metaserver has answered everything: a handover is rare.
const ANSWER_PAUSE: Duration = Duration::from_millis(2);

tokio::task_local! {
    /// The request of the kernel that a task works on.
    static REQUEST: u64;
}

/// The kernel's request that the current task works on; 0 for none, or when there will be no successor.
pub(crate) fn request() -> u64 {
    REQUEST.try_with(|request| *request).unwrap_or(0)
}

/// What is left of the former process.
pub(crate) struct Successor {
    /// Its open files that nobody has used since, by the kernel's numbers.
    opens: Mutex<HashMap<u64, Open>>,
    /// Files that had bytes which no server has, until somebody is told.
    lost: Mutex<HashSet<InodeId>>,
    /// What it had stored may not survive a power failure yet.
    unsynced: AtomicBool,
}

impl Successor {
    /// `None` for the first process.
    pub(crate) fn new(handover: &Arc<Handover>) -> Option<Successor> {
        let legacy = handover.legacy()?;
        Some(Successor {
            opens: Mutex::new(legacy.opens.iter().map(|open| (open.number, *open)).collect()),
            lost: Mutex::new(legacy.dirty.iter().copied().collect()),
            unsynced: AtomicBool::new(true),
        })
    }
}

impl Inner {
    /// A file has bytes that no server has. Under its lock.
    pub(crate) fn is_dirty(&self, state: &Arc<FileState>) {
        if let Some(handover) = &self.options.handover {
            handover.dirty(state.ino);
        }
        self.dirty.lock().insert(state.ino, state.clone());
    }

    /// All bytes of a file are with the servers, or given up. Under its lock.
    pub(crate) fn is_clean(&self, ino: InodeId) -> Option<Arc<FileState>> {
        let file = self.dirty.lock().remove(&ino);
        // A loss that nobody has been told of stays.
        let is_lost = self.successor.as_ref().is_some_and(|former| former.lost.lock().contains(&ino));
        if let Some(handover) = self.options.handover.as_ref().filter(|_| !is_lost) {
            handover.clean(ino);
        }
        file
    }

    /// Somebody has been told that writing a file has failed.
    pub(crate) fn loss_is_told(&self, ino: InodeId) {
        let Some(former) = &self.successor else { return };
        if former.lost.lock().remove(&ino)
            && let Some(handover) = &self.options.handover
            && !self.dirty.lock().contains_key(&ino)
        {
            handover.clean(ino);
        }
    }

    /// Nobody has these files open, so nobody is told: as when a client dies.
    pub(crate) fn clear_former_losses(&self) {
        let (Some(former), Some(handover)) = (&self.successor, &self.options.handover) else { return };
        let open: HashSet<InodeId> = former.opens.lock().values().map(|open| open.ino).collect();
        let mut lost = former.lost.lock();
        if !lost.is_empty() {
            tracing::warn!(
                files = lost.len(),
                "files had bytes that died with the mount's former process: their users are told EIO"
            );
        }
        for ino in lost.extract_if(|ino| !open.contains(ino)) {
            handover.clean(ino);
        }
    }

    /// Makes what the former process had stored power-safe, wherever it is, which is not known: on every target that can be reached. Once.
    ///
    /// # Errors
    /// When a target that the metaserver has for up does not sync.
    pub(crate) async fn sync_what_was_left(self: &Arc<Self>) -> FsResult<()> {
        let Some(former) = &self.successor else { return Ok(()) };
        if !former.unsynced.load(Ordering::Acquire) {
            return Ok(());
        }
        self.data.sync(&self.data.unsynced_of_others()).await.all()?;
        former.unsynced.store(false, Ordering::Release);
        Ok(())
    }
}

impl Client {
    /// Runs what is to be done for a request of the kernel, by its number. A successor that gets it again has each change of names done once,
    /// until [`Client::request_answered`].
    pub async fn for_request<T>(&self, request: u64, work: impl Future<Output = T>) -> T {
        match &self.inner.options.handover {
            Some(handover) => {
                handover.began(request);
                REQUEST.scope(request, work).await
            }
            None => work.await,
        }
    }

    /// A former process has left these requests unanswered, and no others. Before any of them is worked on.
    pub fn requests_come_again(&self, requests: &[u64]) {
        if let Some(handover) = &self.inner.options.handover {
            handover.come_again(requests);
        }
    }

    /// The kernel has taken in the answer to a request.
    pub fn request_answered(&self, request: u64) {
        if let Some(handover) = &self.inner.options.handover {
            handover.answered(request);
        }
    }

    /// The kernel is about to be given a number for an open file: a successor of this process will know what it stands for.
    pub fn leave_open(&self, number: u64, file: &File) {
        if let Some(handover) = &self.inner.options.handover {
            handover.opened(Open {
                number,
                handle: file.handle_id(),
                ino: file.ino(),
                keeps_access_time: file.keeps_access_time(),
            });
        }
    }

    /// The kernel does not use the number any more. One that only a former process has used is closed.
    pub fn leave_closed(&self, number: u64) {
        if let Some(handover) = &self.inner.options.handover {
            handover.closed(number);
        }
        let former = self.inner.successor.as_ref();
        if let Some(Open { handle, ino, .. }) = former.and_then(|former| former.opens.lock().remove(&number))
        {
            self.inner.meta.forget_handle(handle);
            self.inner.meta.leases().closed(ino, handle);
        }
    }

    /// The open file that the kernel was given a number for by a former process; `None` when there is none that has not been
    /// resumed. Not for two callers at a time with the same number.
    ///
    /// # Errors
    /// `ESTALE` when the file was lost with that process, and those of looking it up.
    pub async fn resume(&self, number: u64) -> FsResult<Option<File>> {
        let Some(former) = &self.inner.successor else { return Ok(None) };
        let Some(open) = former.opens.lock().get(&number).copied() else { return Ok(None) };
        let attr = self.getattr(open.ino).await?;
        former.opens.lock().remove(&number);
        let lost = former.lost.lock().contains(&open.ino);
        let file = File::resumed(&self.inner, open.handle, attr, lost);
        if open.keeps_access_time {
            file.keep_access_time();
        }
        Ok(Some(file))
    }

    /// No former process has given the kernel this number, nor any above.
    pub fn first_number(&self) -> u64 {
        self.inner.options.handover.as_ref().map_or(1, |handover| handover.first_number())
    }

    /// Open files of a former process that have not been resumed: the kernel's number, and the inode.
    pub fn left_open(&self) -> Vec<(u64, InodeId)> {
        let former = self.inner.successor.as_ref();
        former.map_or_else(Vec::new, |former| {
            former.opens.lock().values().map(|open| (open.number, open.ino)).collect()
        })
    }

    /// Inodes of which a former process had bytes that no server has: whoever caches those has to drop them.
    pub fn lost_bytes(&self) -> Vec<InodeId> {
        let legacy = self.inner.options.handover.as_ref().and_then(|handover| handover.legacy());
        legacy.map_or_else(Vec::new, |legacy| legacy.dirty.clone())
    }

    /// An owner of locks, other than those of `flock`, is about to lock through an open file of the kernel's, or does not use that any
    /// more: a successor will know which locks go with it.
    pub fn leave_lock_user(&self, user: LockUser, is_used: bool) {
        if let Some(handover) = &self.inner.options.handover {
            handover.locks_through(user, is_used);
        }
    }

    /// Through which open files locks were taken by a former process that still stand, other than by `flock`.
    pub fn left_lock_users(&self) -> Vec<LockUser> {
        let mut opens: HashMap<InodeId, Vec<u64>> = HashMap::new();
        for (number, ino) in self.left_open() {
            opens.entry(ino).or_default().push(number);
        }
        let legacy = self.inner.options.handover.as_ref().and_then(|handover| handover.legacy());
        let listed: HashSet<LockUser> =
            legacy.into_iter().flat_map(|legacy| legacy.users.iter().copied()).collect();
        let users_of = |(ino, owner): (InodeId, u64)| {
            let all = opens.get(&ino).into_iter().flatten();
            let all: Vec<_> = all.map(|number| LockUser { ino, owner, number: *number }).collect();
            let its: Vec<_> = all.iter().filter(|user| listed.contains(user)).copied().collect();
            // An older process did not say: the locks go with the last open file of the inode.
            if its.is_empty() { all } else { its }
        };
        self.inner.meta.locks().owners().into_iter().flat_map(users_of).collect()
    }

    /// Commits what was written and returns when the servers have all of it and of what was decided here, so that a successor
    /// misses nothing. The session stays.
    ///
    /// # Errors
    /// The first failure; a successor tells the files' users.
    pub async fn hand_over(&self) -> FsResult<()> {
        self.sync_all().await?;
        let answered = async {
            self.publish().await?;
            while self.inner.meta.leases().has_unanswered() {
                tokio::time::sleep(ANSWER_PAUSE).await;
            }
            Ok(())
        };
        let limit = self.inner.options.operation_timeout;
        let late =
            |_| Err(FsError::new(Errno::ETIMEDOUT, "the metaserver did not take all that was decided here"));
        tokio::time::timeout(limit, answered).await.unwrap_or_else(late)
    }
}
