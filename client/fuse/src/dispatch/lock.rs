//! Advisory locks. Who may hold what is decided by the filesystem; here are the kernel's numbers, its interrupts, its pages, and
//! which locks a close takes along ([`crate::lock_owners`]).

use fjordfs_proto::error::Errno;
use fjordfs_proto::{FsError, FsResult, InodeId};

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
        let lock = lock_of(&arguments)?;
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
            self.fs.try_lock(&open.file, lock).await?
        };
        if is_listed {
            // Its process may have closed the file while it waited.
            self.locks_through(open.ino, fh, lock.owner.id);
        }
        self.show_others_bytes(&open, version).await;
        Ok(Reply::Empty)
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
    pub(super) async fn unlock_open_file(&self, fh: u64, open: &OpenFile<F::File>, flock_owner: Option<u64>) {
        let flock = flock_owner.map(|id| LockOwner { id, flock: true });
        let Released { used_by, without } = self.lock_owners.released(open.ino, fh);
        used_by.into_iter().for_each(|owner| self.fs.leave_lock_user(open.ino, owner, fh, false));
        let owners = without.into_iter().map(|id| LockOwner { id, flock: false }).chain(flock);
        for owner in owners {
            if let Err(e) = self.unlock_all(open, owner).await {
                tracing::warn!(ino = %open.ino, "a lock may stay behind after a close: {e}");
            }
        }
    }

    async fn unlock_all(&self, open: &OpenFile<F::File>, owner: LockOwner) -> FsResult<()> {
        if !self.fs.may_hold_locks(&open.file, owner) {
            return Ok(());
        }
        self.fs.unlock(&open.file, Lock { owner, start: 0, end: u64::MAX, write: false, pid: 0 }).await
    }
}

fn lock_of(arguments: &LockArguments) -> FsResult<Lock> {
    let LockArguments { owner, is_flock, start, end, kind, pid } = *arguments;
    if !matches!(kind, READ | WRITE | UNLOCK) {
        return Err(FsError::new(Errno::EINVAL, format!("{kind} is no kind of lock")));
    }
    let end = if end >= END { u64::MAX } else { end };
    Ok(Lock { owner: LockOwner { id: owner, flock: is_flock }, start, end, write: kind == WRITE, pid })
}
