//! Callers that die while they wait.
//!
//! The kernel sends INTERRUPT for *any* signal that a waiting thread has a handler for. Answering `EINTR` to those would
//! surprise programs, since `stat` or `read` of a local file never fail so (think of a Go program, whose threads are interrupted
//! many times a second). So a request is given up only when its caller is dying, seen by a pending SIGKILL, which
//! every fatal signal turns into; then nobody sees the answer. Otherwise the request goes on, and because the
//! kernel sends no second INTERRUPT, the caller is looked at again every second.
//!
//! The end of the mount gives up all of them: nobody is left who could hear. It gives up closing and syncing, too: what is left to be written
//! then is the client's, which says what it waits for.
//!
//! Only requests that change nothing are given up ([`crate::request::Request::is_interruptible`]). Waiting for a lock is another matter: it
//! ends at any signal ([`Interrupts::interrupted`]).
//!
//! With cloned descriptors an INTERRUPT can be read by any worker, also before the worker that has the request came to
//! register it; such early ones are kept for a moment.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::numbers::NumberHasher;

const SHARDS: usize = 16;
const EARLY_MAX: usize = 64;
const LOOK_AGAIN: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
struct Shard {
    waiting: HashMap<u64, Arc<Notify>, BuildHasherDefault<NumberHasher>>,
    early: VecDeque<u64>,
}

/// Requests that wait for the filesystem, by their number.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    shards: [Mutex<Shard>; SHARDS],
    ended: AtomicBool,
    end: Notify,
}

impl Interrupts {
    fn shard(&self, unique: u64) -> &Mutex<Shard> {
        // The kernel counts in steps of two.
        &self.shards[(unique / 2 % SHARDS as u64) as usize]
    }

    /// An INTERRUPT for request `unique` came.
    pub(crate) fn interrupt(&self, unique: u64) {
        let mut shard = self.shard(unique).lock();
        match shard.waiting.get(&unique) {
            Some(waiting) => waiting.notify_one(),
            None => {
                if shard.early.len() == EARLY_MAX {
                    shard.early.pop_front();
                }
                shard.early.push_back(unique);
            }
        }
    }

    /// The mount has ended.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.end.notify_waiters();
        for shard in &self.shards {
            shard.lock().waiting.values().for_each(|waiting| waiting.notify_one());
        }
    }

    /// Ends when nobody can hear the answer to request `unique` any more: it was interrupted and its caller is dying, or
    /// the mount has ended.
    pub(crate) async fn caller_is_gone(&self, unique: u64, pid: u32) {
        let (signal, _registration) = self.register(unique);
        signal.notified().await;
        while !self.ended.load(Ordering::Acquire) && !is_dying(pid) {
            // The end of the mount is another signal.
            let _nothing_or_that = tokio::time::timeout(LOOK_AGAIN, signal.notified()).await;
        }
    }
}

impl Interrupts {
    /// Ends with the mount.
    pub(crate) async fn mount_is_gone(&self) {
        let mut end = pin!(self.end.notified());
        // Whoever ends the mount sets this before it tells.
        end.as_mut().enable();
        if !self.ended.load(Ordering::Acquire) {
            end.await;
        }
    }

    /// Ends when request `unique` is interrupted, by whatever signal: its caller waits for a lock, which every program expects to be
    /// interrupted, and the kernel takes it up again if the signal is of that kind. Ends with the mount, too.
    pub(crate) async fn interrupted(&self, unique: u64) {
        let (signal, _registration) = self.register(unique);
        signal.notified().await;
    }

    fn register(&self, unique: u64) -> (Arc<Notify>, Registration<'_>) {
        let signal = Arc::new(Notify::new());
        let mut shard = self.shard(unique).lock();
        if let Some(position) = shard.early.iter().position(|&early| early == unique) {
            shard.early.remove(position);
            signal.notify_one();
        }
        shard.waiting.insert(unique, Arc::clone(&signal));
        // Whoever ends the mount sets this before it comes to the shard.
        if self.ended.load(Ordering::Acquire) {
            signal.notify_one();
        }
        (signal, Registration { interrupts: self, unique })
    }
}

struct Registration<'a> {
    interrupts: &'a Interrupts,
    unique: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.interrupts.shard(self.unique).lock().waiting.remove(&self.unique);
    }
}

/// Whether a thread has SIGKILL pending, or is gone. Not known (another pid namespace) counts as no.
fn is_dying(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => has_pending_kill(&status),
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

fn has_pending_kill(status: &str) -> bool {
    let kill = 1u64 << (libc::SIGKILL - 1);
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & kill != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_kill_is_read_from_proc() {
        let status = |thread: &str, shared: &str| {
            format!("Name:\tcat\nSigPnd:\t{thread}\nShdPnd:\t{shared}\nSigBlk:\t0100\n")
        };
        assert!(has_pending_kill(&status("0000000000000100", "0000000000000000")));
        assert!(has_pending_kill(&status("0000000000000000", "0000000000000100")));
        assert!(!has_pending_kill(&status("0000000000000002", "0000000000000000")));
        assert!(!has_pending_kill(""));
    }

    #[tokio::test]
    async fn only_the_dying_are_given_up() {
        let interrupts = Interrupts::default();
        let alive = std::process::id();
        // Interrupted before it was registered, and alive: goes on.
        interrupts.interrupt(4);
        let waited =
            tokio::time::timeout(Duration::from_millis(50), interrupts.caller_is_gone(4, alive)).await;
        assert!(waited.is_err());
        assert!(interrupts.shards.iter().all(|shard| shard.lock().waiting.is_empty()));
        // A thread id that does not exist is dead.
        interrupts.interrupt(6);
        tokio::time::timeout(Duration::from_secs(5), interrupts.caller_is_gone(6, u32::MAX - 1))
            .await
            .unwrap();
        // Who waits for a lock is interrupted by any signal.
        interrupts.interrupt(10);
        tokio::time::timeout(Duration::from_secs(5), interrupts.interrupted(10)).await.unwrap();
        // Not interrupted: waits.
        let waited =
            tokio::time::timeout(Duration::from_millis(50), interrupts.caller_is_gone(8, u32::MAX - 1)).await;
        assert!(waited.is_err());
        interrupts.end();
        tokio::time::timeout(Duration::from_secs(5), interrupts.caller_is_gone(8, alive)).await.unwrap();
    }
}
