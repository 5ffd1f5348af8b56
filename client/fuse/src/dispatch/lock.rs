//! Advisory locks. Who may hold what is decided by the filesystem; here are the kernel's numbers, its interrupts, its pages, and
//! which locks a close takes along ([`crate::lock_owners`]).

use std::time::Duration;

use fjordfs_proto::error::Errno;
use fjordfs_proto::{FsError, FsResult, InodeId};

use futures_util::future::join_all;

use super::Dispatcher;
use super::file::OpenFile;
use crate::abi::FileLock;
use crate::filesystem::{Filesystem, Lock, LockOwner};
use crate::lock_owners::Released;
use crate::reply::Reply;
use crate::request::LockArguments;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;

/// How long a RELEASE that may be on its way is waited for.
const RELEASE_PAUSES: [Duration; 4] =
    [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4), Duration::from_millis(8)];

/// The last byte that the kernel can name.
const END: u64 = i64::MAX.cast_unsigned();

impl<F: Filesystem> Dispatcher<F> {
    pub(super) async fn getlk(&self, fh: u64, arguments: LockArguments) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let held = self.fs.test_lock(&open.file, lock_of(&arguments)?).await?;
        let lock = match held {
            None => FileLock { kind: UNLOCK, ..FileLock::default() },
            Some(Lock { start, end, write, pid, .. }) => {
                FileLock { start, end: end.min(END), kind: if write { WRITE } else { READ }, pid }
            }
        };
        Ok(Reply::of(&lock))
    }

    /// `unique` is the request's number, by which it is interrupted.
    pub(super) async fn setlk(
        &self,
        unique: u64,
        fh: u64,
        arguments: LockArguments,
        wait: bool,
    ) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let mut lock = lock_of(&arguments)?;
        if lock.owner.flock {
            // The kernel's number of an open file is that of the next one as soon as it is closed, before its RELEASE is here.
            lock.owner.id = fh;
        }
        if arguments.kind == UNLOCK {
            self.fs.unlock(&open.file, lock).await?;
            self.kernel_cache.changed_here(open.ino, self.fs.own_versions(&open.file));
            return Ok(Reply::Empty);
        }
        let is_listed = !lock.owner.flock;
        if is_listed {
            self.locks_through(open.ino, fh, lock.owner.id);
        }
        let version = if wait {
            self.fs.lock(&open.file, lock, self.interrupts.interrupted(unique)).await?
        } else {
            self.try_lock(&open, lock).await?
        };
        if is_listed {
            // Its process may have closed the file while it waited.
            self.locks_through(open.ino, fh, lock.owner.id);
        }
        self.show_others_bytes(&open, version).await;
        Ok(Reply::Empty)
    }

    /// The RELEASE of an open file that had the lock may be on its way: `close` returns before it. It is waited for a moment.
    async fn try_lock(&self, open: &OpenFile<F::File>, lock: Lock) -> FsResult<u64> {
        for pause in RELEASE_PAUSES {
            match self.fs.try_lock(&open.file, lock).await {
                Err(e) if e.errno == Errno::EAGAIN && lock.owner.flock && self.fs.holds_flock(&open.file) => {
                }
                outcome => return outcome,
            }
            tokio::time::sleep(pause).await;
        }
        self.fs.try_lock(&open.file, lock).await
    }

    pub(super) fn locks_through(&self, ino: InodeId, fh: u64, owner: u64) {
        if self.lock_owners.uses(ino, fh, owner) {
            self.fs.leave_lock_user(ino, owner, fh, true);
        }
    }

    /// Whoever has a lock sees what others wrote before they gave it up: pages from before go.
    async fn show_others_bytes(&self, open: &OpenFile<F::File>, version: u64) {
        self.kernel_cache.changed_here(open.ino, self.fs.own_versions(&open.file));
        if !self.kernel_cache.is_current(open.ino, version) {
            self.kernel_cache.forget(open.ino);
            self.notifier.drop_pages(open.ino, 0..u64::MAX).await;
            self.kernel_cache.set_current(open.ino, version);
        }
    }

    /// A process has closed a descriptor: its locks on the file are gone.
    pub(super) async fn unlock_process(&self, fh: u64, open: &OpenFile<F::File>, owner: u64) -> FsResult<()> {
        if self.lock_owners.closed(open.ino, fh, owner) {
            self.fs.leave_lock_user(open.ino, owner, fh, false);
        }
        self.unlock_all(open, LockOwner { id: owner, flock: false }).await
    }

    /// The open file is gone, and with it what was locked through it.
    pub(super) async fn unlock_open_file(&self, fh: u64, open: &OpenFile<F::File>) {
        let flock = LockOwner { id: fh, flock: true };
        if !self.fs.may_hold_locks(&open.file, flock) && !self.lock_owners.knows(open.ino) {
            return;
        }
        // Who gets the lock next sees what was written before. An error is told to who waits for the file.
        let _ = self.fs.flush(&open.file).await;
        // The next open file may have the number of this one as the owner of its locks. From here on nothing is waited for before the
        // unlocks are sent, so that each of its locks either is known here or comes after them.
        let Released { used_by, without } = self.lock_owners.released(open.ino, fh);
        used_by.into_iter().for_each(|owner| self.fs.leave_lock_user(open.ino, owner, fh, false));
        let owners = without.into_iter().map(|id| LockOwner { id, flock: false }).chain([flock]);
        let held = owners.filter(|owner| self.fs.may_hold_locks(&open.file, *owner));
        let unlocks = held.map(|owner| self.fs.unlock_flushed(&open.file, everything(owner)));
        for unlocked in join_all(unlocks).await {
            if let Err(e) = unlocked {
                tracing::warn!(ino = %open.ino, "a lock may stay behind after a close: {e}");
            }
        }
    }

    async fn unlock_all(&self, open: &OpenFile<F::File>, owner: LockOwner) -> FsResult<()> {
        if !self.fs.may_hold_locks(&open.file, owner) {
            return Ok(());
        }
        self.fs.unlock(&open.file, everything(owner)).await
    }
}

/// All that an owner may have locked.
fn everything(owner: LockOwner) -> Lock {
    Lock { owner, start: 0, end: u64::MAX, write: false, pid: 0 }
}

fn lock_of(arguments: &LockArguments) -> FsResult<Lock> {
    let LockArguments { owner, is_flock, start, end, kind, pid } = *arguments;
    if !matches!(kind, READ | WRITE | UNLOCK) {
        return Err(FsError::new(Errno::EINVAL, format!("{kind} is no kind of lock")));
    }
    let end = if end >= END { u64::MAX } else { end };
    Ok(Lock { owner: LockOwner { id: owner, flock: is_flock }, start, end, write: kind == WRITE, pid })
}
