//! Copying between files of this client: by sharing blocks, or, where that cannot be, by reading and writing.
//!
//! # Order
//! What was written to both files before is committed first, so the server knows what to share and what is replaced.
//! Bytes that are written into the target meanwhile come later and stay. What is shared is synced before it takes the place of
//! bytes that may have been, so that a power failure leaves one or the other.

use std::ops::Range;

use fjordfs_proto::{
    FsError, FsResult,
    error::Errno,
    pb::meta::{CopyRange, CopyRangeReply, request::Op, response},
};

use super::{Handle, too_big};
use crate::meta::unexpected;

/// Bytes to copy from one file to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopiedRange {
    /// Where they are in the source.
    pub from: u64,
    /// Where they go in the target.
    pub to: u64,
    /// How many.
    pub length: u64,
    /// Whoever changes the target may not keep its suid and sgid.
    pub clear_suid: bool,
    /// The target has the same bytes there, as of this data version: they are only to lie elsewhere, and the file keeps its times.
    /// `EAGAIN` when it has changed.
    pub same_as: Option<u64>,
}

/// Bytes read and written at a time where nothing can be shared.
const PORTION: u64 = 4 << 20;

/// How often the target is committed again because somebody writes to it all the while.
const ATTEMPTS: usize = 4;

impl Handle {
    pub(super) async fn copy_from(&self, source: &Handle, range: CopiedRange) -> FsResult<u64> {
        let CopiedRange { from, to, length, .. } = range;
        let same = self.state.ino == source.state.ino;
        if same && from.abs_diff(to) < length {
            return Err(FsError::new(Errno::EINVAL, format!("{}: the ranges overlap", self.state.ino)));
        }
        self.client.flush(&source.state).await?;
        source.take_error()?;
        let length = length.min(source.state.lock().view.size().saturating_sub(from));
        let end = too_big(self.state.ino, to.checked_add(length))?;
        if length == 0 {
            return Ok(0);
        }
        match self.share(source, range, to..end).await {
            Err(e) if e.errno == Errno::EOPNOTSUPP && range.same_as.is_none() => {
                self.transfer(source, range).await
            }
            outcome => outcome,
        }
    }

    async fn share(&self, source: &Handle, range: CopiedRange, target: Range<u64>) -> FsResult<u64> {
        let op = CopyRange {
            source: source.state.ino.0,
            source_offset: range.from,
            target: self.state.ino.0,
            target_offset: target.start,
            length: target.end - target.start,
            clear_suid: range.clear_suid,
            same_as: range.same_as,
        };
        // What is moved only has been synced already.
        if range.same_as.is_none() && target.start < self.state.lock().view.size() {
            self.client.sync_shared(source.state.ino).await?;
        }
        let reply = match self.submit_copy(op, &target).await?.wait().await {
            Ok(response::Result::CopyRange(reply)) => reply,
            outcome => {
                if !matches!(&outcome, Err(e) if e.errno == Errno::EOPNOTSUPP) {
                    // Whether it took effect is not known.
                    let mut inner = self.state.lock();
                    let version = inner.view.extents_version();
                    inner.view.forget_extents(version);
                }
                return outcome.and(Err(unexpected("a copy")));
            }
        };
        let CopyRangeReply { copied, attr: Some(attr) } = reply else { return Err(unexpected("a copy")) };
        // An fsync of the target speaks for the shared blocks too, whoever stored them.
        self.client.is_stored_of_too(source.state.ino, self.state.ino);
        let changed = target.start..target.start.saturating_add(copied).min(target.end);
        let mut inner = self.state.lock();
        if range.same_as.is_some() {
            let version = inner.view.extents_version();
            inner.view.forget_extents(version);
        }
        inner.view.end_change(changed, false, attr);
        Ok(copied)
    }

    /// Submits the copy while nothing in the target's range is uncommitted.
    async fn submit_copy(&self, op: CopyRange, target: &Range<u64>) -> FsResult<crate::meta::Pending> {
        for _ in 0..ATTEMPTS {
            self.client.flush(&self.state).await?;
            self.take_error()?;
            let inner = self.state.lock();
            if !inner.view.has_local_in(target.clone()) {
                return Ok(self.client.meta.submit(Op::CopyRange(op)));
            }
        }
        Err(FsError::new(Errno::EOPNOTSUPP, format!("{}: it is being written to", self.state.ino)))
    }

    /// Copies the bytes themselves, one portion.
    async fn transfer(&self, source: &Handle, range: CopiedRange) -> FsResult<u64> {
        let parts = source.read_at(range.from, range.length.min(PORTION) as usize).await?;
        if range.clear_suid {
            self.state.lock().view.drop_suid();
        }
        let mut copied = 0;
        for part in parts {
            let length = part.len() as u64;
            self.write_at(range.to + copied, part).await?;
            copied += length;
        }
        Ok(copied)
    }
}
