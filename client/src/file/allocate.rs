//! Extending a file and clearing ranges of it: metadata only, since blocks are immutable.
//!
//! # Order
//! What this client has written before is committed first, and what it writes meanwhile into the range is dropped under the
//! file's lock as the operation is submitted: commits are submitted under it too, so the server and this client see
//! writes and the clear in one order.

use std::ops::Range;

use fjordfs_proto::{
    FsError, FsResult,
    error::Errno,
    pb::meta::{Allocate, Entry, request::Op, response},
};

use super::{Handle, too_big};
use crate::meta::unexpected;

/// What `fallocate(2)` can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocation {
    /// The range reads as zeros afterwards and takes no space.
    pub clear: bool,
    /// The file does not become longer.
    pub keep_size: bool,
    /// Whoever changes the file may not keep its suid and sgid.
    pub clear_suid: bool,
}

impl Handle {
    pub(super) async fn allocate(&self, range: Range<u64>, how: Allocation) -> FsResult<()> {
        if range.is_empty() {
            return Err(FsError::new(Errno::EINVAL, format!("{}: a range of no bytes", self.state.ino)));
        }
        too_big(self.state.ino, Some(range.end))?;
        self.client.flush(&self.state).await?;
        self.take_error()?;
        let (freed, pending) = {
            let mut inner = self.state.lock();
            // Dropping written bytes must not make the file shorter.
            let written = inner.view.local_end();
            let size = if how.keep_size { written } else { written.max(range.end) };
            let freed = if how.clear { inner.view.begin_clear(range.clone()) } else { 0 };
            let op = Allocate {
                ino: self.state.ino.0,
                offset: range.start,
                length: range.end - range.start,
                clear: how.clear,
                size,
                clear_suid: how.clear_suid,
            };
            (freed, self.client.meta.submit(Op::Allocate(op)))
        };
        self.client.budget.release(freed);
        let outcome = pending.wait().await;
        let mut inner = self.state.lock();
        match outcome {
            Ok(response::Result::Entry(Entry { attr: Some(attr), .. })) => {
                let changed = if how.clear { range } else { 0..0 };
                inner.view.end_change(changed, true, attr);
                Ok(())
            }
            outcome => {
                // Whether it took effect is not known.
                let version = inner.view.extents_version();
                inner.view.forget_extents(version);
                outcome.and(Err(unexpected("an allocation")))
            }
        }
    }
}
