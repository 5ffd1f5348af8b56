//! Writing into memory. Hot path: one lock, no waiting except for room.

use bytes::Bytes;
use fjordfs_proto::{BLOCK_SIZE_MAX, FsResult};
use tokio::{sync::watch, time::Instant};

use super::{Handle, Unanswered, now, too_big};

/// Scattered dirty bytes of one file are uploaded from here on, without waiting for a full run.
const SCATTERED_MAX: u64 = 4 * BLOCK_SIZE_MAX as u64;

/// Where a write goes.
#[derive(Clone, Copy)]
enum At {
    Offset(u64),
    End,
}

/// The bytes are not to be committed before their caller has its answer.
type Answer<'a> = Option<&'a mut Unanswered>;

impl Handle {
    pub(super) async fn write_at(&self, offset: u64, data: Bytes) -> FsResult<()> {
        let end = too_big(self.state.ino, offset.checked_add(data.len() as u64))?;
        let mixes = self.state.lock().view.mixes_with_appends(end);
        if mixes {
            self.client.flush(&self.state).await?;
        }
        self.write(At::Offset(offset), data, None).await?;
        Ok(())
    }

    pub(super) async fn append(&self, data: Bytes, waits: bool) -> FsResult<(u64, Unanswered)> {
        let mut unanswered = Unanswered::default();
        // Of more than that, the beginning may have to be committed before there is room for the end.
        let waits = waits && data.len() <= self.client.budget.portion_max();
        let at = self.write(At::End, data, waits.then_some(&mut unanswered)).await?;
        Ok((at, unanswered))
    }

    /// Puts `data` in place, in portions that the dirty bound lets through. Returns where it begins.
    async fn write(&self, at: At, mut data: Bytes, mut answer: Answer<'_>) -> FsResult<u64> {
        self.take_error()?;
        let mut begin = None;
        let mut next = at;
        while !data.is_empty() {
            let portion = data.split_to(data.len().min(self.client.budget.portion_max()));
            let len = portion.len() as u64;
            self.client.budget.reserve(len).await;
            self.client.cache.yield_to(self.client.budget.used());
            match self.place(next, portion, answer.as_deref_mut()).await {
                Ok(offset) => {
                    begin.get_or_insert(offset);
                    if let At::Offset(_) = at {
                        next = At::Offset(offset + len);
                    }
                }
                Err(e) => {
                    self.client.budget.release(len);
                    return Err(e);
                }
            }
        }
        Ok(begin.unwrap_or_else(|| self.state.lock().view.size()))
    }

    async fn place(&self, at: At, portion: Bytes, mut answer: Answer<'_>) -> FsResult<u64> {
        loop {
            if let Some(offset) = self.try_place(at, &portion, answer.as_deref_mut())? {
                return Ok(offset);
            }
            // What is local is not all appended: commit it, so that the append has an end of file to refer to.
            self.client.flush(&self.state).await?;
        }
    }

    /// Puts the bytes in place; `None` when an append has to wait for a flush.
    fn try_place(&self, at: At, portion: &Bytes, answer: Answer<'_>) -> FsResult<Option<u64>> {
        let mut inner = self.state.lock();
        let (offset, append) = match at {
            At::Offset(offset) => (offset, false),
            At::End => match inner.view.append_offset() {
                Some(offset) => (offset, true),
                None => return Ok(None),
            },
        };
        too_big(self.state.ino, offset.checked_add(portion.len() as u64))?;
        if let Some(Unanswered(answered)) = answer {
            let (sender, done) = watch::channel(false);
            *answered = Some(sender);
            inner.unanswered.retain(|other| other.has_changed().is_ok());
            inner.unanswered.push(done);
        }
        let before = inner.view.dirty_bytes();
        let freed = inner.view.write(offset, portion.clone(), now(), append);
        let after = inner.view.dirty_bytes();
        let newly_dirty = inner.dirty_since.is_none();
        inner.dirty_since.get_or_insert_with(Instant::now);
        if newly_dirty {
            // Under the file's lock: a unit that finishes now takes the file off the list under it too.
            self.client.is_dirty(&self.state);
        }
        drop(inner);
        self.client.budget.release(freed);
        // Looking for full runs takes a walk: do it once per block's worth of writes.
        let block = BLOCK_SIZE_MAX as u64;
        if before / block < after / block {
            self.client.start_full_units(&self.state);
            if self.state.lock().view.dirty_bytes() >= SCATTERED_MAX {
                self.client.start_scattered_unit(&self.state);
            }
        }
        Ok(Some(offset))
    }
}
