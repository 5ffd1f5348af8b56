//! How requests come from the kernel and answers go back.
//!
//! One transport belongs to one worker thread. /dev/fuse ([`dev_fuse`]) works everywhere; over io_uring ([`io_uring`]) each CPU has
//! a queue of its own, and an answer and the fetch of the next request are one step. [`selection`] decides between them
//! before anything is mounted.

use std::io;

use bytes::Bytes;

use crate::abi::{self, InHeader, Pod};
use crate::ends::ShortAnswer;
use crate::reply::Reply;

pub(crate) mod dev_fuse;
pub(crate) mod io_uring;
pub(crate) mod selection;

/// A request as it came: header, the structure of its opcode, and the names or data behind it.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) header: InHeader,
    pub(crate) fixed: Bytes,
    pub(crate) rest: Bytes,
}

impl Message {
    /// Takes apart what /dev/fuse delivers in one piece; `None` when it is shorter than a header.
    pub(crate) fn from_bytes(mut bytes: Bytes) -> Option<Message> {
        let header = InHeader::from_bytes(&bytes)?;
        // Extensions (security contexts, supplementary groups) stand at the end and were not asked for.
        let extensions = usize::from(header.total_extlen) * 8;
        bytes.truncate(bytes.len().saturating_sub(extensions).max(size_of::<InHeader>()));
        let mut rest = bytes.split_off(size_of::<InHeader>());
        let fixed = rest.split_to(abi::fixed_size(header.opcode).min(rest.len()));
        Some(Message { header, fixed, rest })
    }
}

/// A worker's way to the kernel.
pub(crate) trait Transport: 'static {
    /// Where the answer to one request goes.
    type Slot: Slot;

    /// The next request; `None` when the filesystem is not mounted any more. Safe to cancel.
    fn next(&mut self) -> impl Future<Output = io::Result<Option<(Message, Self::Slot)>>>;
}

/// Takes the answer to one request. Dropping it unanswered is right for requests that have none.
pub(crate) trait Slot: 'static {
    /// Memory from which the kernel takes the data of a READ ([`Reply::InPayload`]); empty where the transport has none.
    fn payload(&mut self) -> &mut [u8];

    /// The answer depends on others' requests and may take for ever: it must not use up what those need. False when there is nothing
    /// to be had in its place.
    fn may_be_kept_long(&mut self) -> bool {
        true
    }

    /// To be dropped when the kernel has taken in the answer that was sent.
    fn drop_when_taken_in(&mut self, short: ShortAnswer) {
        drop(short);
    }

    /// Sends the answer. `ENOENT` means that nobody waits for it any more.
    fn answer(&mut self, reply: &Reply) -> io::Result<()>;
}
