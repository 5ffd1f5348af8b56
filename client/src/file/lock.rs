//! Advisory locks of an open file, for programs on all clients: `fcntl(2)` and `flock(2)`.
//!
//! # Consistency
//! Programs that take turns by a lock see each other's bytes, also in files that stay open: what was written is committed before a
//! lock is given up, and whoever gets one learns the newest attributes before it is told.

use std::pin::pin;

use fjordfs_proto::{
    FsError, FsResult,
    error::Errno,
    pb::meta::{self, Attr, CancelLock, FileLock, LockReply, TestLock, Unlock, request::Op, response},
};

use super::File;
use crate::{
    Client,
    meta::{MetaClient, unexpected},
};

/// Whose lock, and of what kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner {
    /// A number that the client's user gives to a process, or to an open file.
    pub id: u64,
    /// `flock(2)`: the whole file, and of no concern to `fcntl(2)`.
    pub flock: bool,
}

/// A lock, or a range to be unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Whose.
    pub owner: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte; `u64::MAX` for all there will ever be.
    pub end: u64,
    /// For writing: nobody else may have it.
    pub write: bool,
    /// The process, for those who ask; 0 when it is another client's.
    pub pid: u32,
}

/// Gives up a wait whose caller has gone, and what was granted unheard.
struct GiveUp<'a> {
    meta: &'a MetaClient,
    wait: u64,
    lock: FileLock,
    is_over: bool,
}

impl GiveUp<'_> {
    fn cancel(&self) {
        drop(self.meta.submit(Op::CancelLock(CancelLock { wait: self.wait })));
    }
}

impl Drop for GiveUp<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.cancel();
            drop(self.meta.submit(Op::Unlock(Unlock { lock: Some(self.lock) })));
        }
    }
}

impl File {
    /// Takes a lock that is free. The attributes are as of then.
    ///
    /// # Errors
    /// `EAGAIN` when somebody else has what is in the way, `ENOLCK` when this client has too many.
    pub async fn try_lock(&self, lock: Lock) -> FsResult<Attr> {
        let op = meta::Lock { lock: Some(self.to_pb(&lock)), wait: 0 };
        reply_of(self.handle.client.meta.call(Op::Lock(op)).await)?;
        self.see_others(lock).await
    }

    /// Waits for a lock, until `given_up` ends. It may be granted even then: the result tells. Who drops the future gives up, too, and
    /// has nothing in that range afterwards.
    ///
    /// # Errors
    /// `EINTR` when it was given up, `EDEADLK` when the owner would wait for itself, `ENOLCK` when this client has too many.
    pub async fn lock(&self, lock: Lock, given_up: impl Future<Output = ()>) -> FsResult<Attr> {
        let meta = &self.handle.client.meta;
        let (wait, wanted) = (meta.locks().new_wait(), self.to_pb(&lock));
        let op = meta::Lock { lock: Some(wanted), wait };
        let mut answer = pin!(meta.submit(Op::Lock(op)).wait_long());
        let mut give_up = GiveUp { meta, wait, lock: wanted, is_over: false };
        let result = tokio::select! {
            biased;
            result = &mut answer => result,
            () = given_up => {
                give_up.cancel();
                let limit = self.handle.client.options.operation_timeout;
                let late = |_| Err(FsError::new(Errno::EINTR, "the metaserver does not answer; the wait for a lock is given up"));
                tokio::time::timeout(limit, answer).await.unwrap_or_else(late)
            }
        };
        give_up.is_over = true;
        reply_of(result)?;
        self.see_others(lock).await
    }

    /// Gives up what the owner has in a range.
    ///
    /// # Errors
    /// When the metaserver cannot be reached. That something could not be committed before is left for the next [`File::flush`].
    pub async fn unlock(&self, lock: Lock) -> FsResult<()> {
        let client = &self.handle.client;
        // Also what nobody else uses yet: who takes turns by a lock is about to.
        client.flush(&self.handle.state).await?;
        self.unlock_flushed(lock).await
    }

    /// As [`File::unlock`], of what has been flushed. It is sent at the first poll.
    pub async fn unlock_flushed(&self, lock: Lock) -> FsResult<()> {
        let op = Unlock { lock: Some(self.to_pb(&lock)) };
        reply_of(self.handle.client.meta.call(Op::Unlock(op)).await).map(drop)
    }

    /// The first lock that is in the way of this one.
    ///
    /// # Errors
    /// When the metaserver cannot be reached.
    pub async fn test_lock(&self, lock: Lock) -> FsResult<Option<Lock>> {
        let op = TestLock { lock: Some(self.to_pb(&lock)) };
        let reply = reply_of(self.handle.client.meta.call(Op::TestLock(op)).await)?;
        Ok(reply.conflict.map(|held| Lock {
            owner: LockOwner { id: held.owner, flock: held.flock },
            start: held.start,
            end: held.end,
            write: held.write,
            pid: held.pid,
        }))
    }

    /// Whether an owner may hold locks on this file.
    pub fn may_hold_locks(&self, owner: LockOwner) -> bool {
        self.handle.client.meta.locks().may_hold(self.ino(), owner.flock, owner.id)
    }

    /// Whether anybody at this client may hold a `flock` on this file.
    pub fn has_flock(&self) -> bool {
        self.handle.client.meta.locks().has_flock(self.ino())
    }

    /// What others have committed is seen from now on; otherwise nothing is locked.
    async fn see_others(&self, lock: Lock) -> FsResult<Attr> {
        let client = Client { inner: self.handle.client.clone() };
        let seen = client.getattr(self.ino()).await;
        if seen.is_err() {
            drop(client.inner.meta.submit(Op::Unlock(Unlock { lock: Some(self.to_pb(&lock)) })));
        }
        seen
    }

    fn to_pb(&self, lock: &Lock) -> FileLock {
        let Lock { owner: LockOwner { id, flock }, start, end, write, pid } = *lock;
        FileLock { ino: self.ino().0, owner: id, flock, start, end, write, pid }
    }
}

fn reply_of(result: FsResult<response::Result>) -> FsResult<LockReply> {
    match result? {
        response::Result::Lock(reply) => Ok(reply),
        _ => Err(unexpected("a lock")),
    }
}
