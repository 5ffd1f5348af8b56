//! Obeys recalls, on a thread of its own, and repeats what cannot be obeyed yet because an answer is on its way.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use fjordfs_proto::InodeId;
use tokio::sync::oneshot;

use super::{Recall, log_refusal, notify};
use crate::abi::{NotifyInvalInode, Pod, notify_code};
use crate::held::Held;

/// Pauses between attempts: from, to. The first is about what a thread of the kernel takes to be woken.
const PAUSE: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(10));

/// A recall that is held up for so long probably waits for a lookup that waits for it. No lookup should be given up that the servers
/// would have answered.
const HELD_UP: Duration = Duration::from_millis(30);

/// What a recall asks of the kernel.
pub(super) trait Kernel {
    /// Drops an inode's attributes and voids answers on their way that bring others.
    ///
    /// # Errors
    /// `ENOENT` when the kernel does not have the inode.
    fn drop_attributes(&self, ino: InodeId) -> io::Result<()>;
    /// Makes the kernel ask for every name before it uses it again.
    fn drop_names(&self) -> io::Result<()>;
}

impl Kernel for Arc<OwnedFd> {
    fn drop_attributes(&self, ino: InodeId) -> io::Result<()> {
        // A negative offset: attributes, but no pages.
        let inode = NotifyInvalInode { ino: ino.0, off: -1, len: 0 };
        notify(self, notify_code::INVAL_INODE, &[inode.as_bytes()])
    }

    fn drop_names(&self) -> io::Result<()> {
        notify(self, notify_code::INC_EPOCH, &[])
    }
}

/// A recall that waits for answers to be taken in.
#[derive(Debug)]
struct Unfinished {
    inodes: Vec<InodeId>,
    /// Names of these are on their way.
    directories: Vec<InodeId>,
    since: Instant,
    done: oneshot::Sender<()>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Recaller<K> {
    kernel: K,
    held: Arc<Held>,
    unfinished: Vec<Unfinished>,
}

impl<K: Kernel> Recaller<K> {
    pub(super) fn new(kernel: K, held: Arc<Held>) -> Recaller<K> {
        Recaller { kernel, held, unfinished: Vec::new() }
    }

    /// Until the end, which is a `None`: there is no kernel any more then.
    pub(super) fn obey(&mut self, recalls: &Receiver<Option<Recall>>) {
        let mut pause = PAUSE.0;
        loop {
            let next = match self.unfinished.is_empty() {
                true => recalls.recv().map_err(|_| RecvTimeoutError::Disconnected),
                false => recalls.recv_timeout(pause),
            };
            match next {
                Ok(Some(recall)) => {
                    self.begin(recall);
                    pause = PAUSE.0;
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.go_on();
                    pause = (pause * 2).min(PAUSE.1);
                }
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn begin(&mut self, recall: Recall) {
        let Recall { inodes, names, done } = recall;
        let mut directories = Vec::new();
        if names {
            inodes.iter().for_each(|ino| self.held.unsettled.contend(*ino));
            // Looked at first: what is taken in by now has an old epoch after what follows.
            directories = inodes.iter().copied().filter(|ino| self.held.unsettled.is_listed(*ino)).collect();
            log_refusal("names", self.kernel.drop_names());
        }
        self.attempt(Unfinished { inodes, directories, since: Instant::now(), done });
    }

    fn go_on(&mut self) {
        if self.unfinished.iter().any(|recall| recall.since.elapsed() > HELD_UP) {
            self.held.give_up_lookups(HELD_UP);
        }
        for mut recall in std::mem::take(&mut self.unfinished) {
            let before = recall.directories.len();
            recall.directories.retain(|directory| self.held.unsettled.is_listed(*directory));
            if recall.directories.len() < before {
                log_refusal("names", self.kernel.drop_names());
            }
            self.attempt(recall);
        }
    }

    /// Invalidates attributes; ends the recall if nothing is left to wait for.
    fn attempt(&mut self, mut recall: Unfinished) {
        recall.inodes.retain(|ino| !self.invalidated(*ino));
        if recall.done.is_closed() {
            // Its time is up: what was given has run out by itself, and no answer is on its way for so long. Then these
            // counts are of answers that the kernel did not take.
            for ino in recall.inodes {
                self.held.lookups.subtract(ino, u64::MAX);
            }
        } else if recall.inodes.is_empty() && recall.directories.is_empty() {
            // Nobody waits when the session has ended meanwhile.
            let _ = recall.done.send(());
        } else {
            self.unfinished.push(recall);
        }
    }

    /// Whether the kernel uses no attributes of the inode any more, nor will use such as were given before.
    fn invalidated(&self, ino: InodeId) -> bool {
        // Looked at first: what is taken in by now is invalidated by what follows.
        let is_created = self.held.unsettled.is_created(ino);
        let written = self.kernel.drop_attributes(ino);
        let is_unknown = matches!(&written, Err(e) if e.raw_os_error() == Some(libc::ENOENT));
        log_refusal(ino, written);
        !(is_created || is_unknown && self.held.lookups.count(ino) > 0)
    }
}

#[cfg(test)]
#[path = "recaller_tests.rs"]
mod tests;
