//! What the kernel sends again to a process that takes over.
//!
//! # Exactly once
//! The kernel cannot tell what the former process has read from what this one has: it sends *everything* again that was read and is
//! unanswered. So nobody may read before it is told to. And all that comes again stands before all that is new, so one
//! reader that reads until something new comes has all of it: what else the former process had asked of others was answered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::abi::{UNIQUE_RESEND, opcode};
use crate::buffer::BufferPool;
use crate::transport::Message;
use crate::transport::dev_fuse::{Reader, has_ended, is_passing};

/// When the kernel has no memory for the moment.
const PAUSE: Duration = Duration::from_millis(10);

/// What was read from a device that nobody else reads: to be answered there.
#[derive(Debug, Default)]
pub(super) struct Again {
    pub(super) messages: Vec<Message>,
}

impl Again {
    /// All that comes again, and what comes among it. After the kernel was told to, before anybody else reads.
    pub(super) fn read(device: BorrowedFd<'_>, pool: &Arc<BufferPool>) -> io::Result<Again> {
        let mut reader = Reader::new(Arc::clone(pool));
        let mut again = Again::default();
        loop {
            match reader.read(device.as_fd()) {
                Ok(Some(message)) => {
                    let is_new = is_new(&message);
                    again.messages.push(message);
                    if is_new {
                        return Ok(again);
                    }
                }
                // Given up by its caller while it was being read.
                Ok(None) => {}
                // Unmounted: whoever reads next sees it, too, and ends in good order.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock || has_ended(&e) => return Ok(again),
                Err(e) if is_passing(&e) => std::thread::sleep(PAUSE),
                Err(e) => return Err(e),
            }
        }
    }

    /// Numbers of the requests that come again.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let uniques = self.messages.iter().map(|message| message.header.unique);
        uniques.filter(|unique| unique & UNIQUE_RESEND != 0).map(|unique| unique & !UNIQUE_RESEND).collect()
    }
}

/// Whether nothing that comes again is behind it. What has no answer overtakes.
fn is_new(message: &Message) -> bool {
    let overtakes =
        matches!(message.header.opcode, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT);
    message.header.unique & UNIQUE_RESEND == 0 && !overtakes
}
