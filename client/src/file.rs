//! Open files.
//!
//! All handles of one inode in this client share one [`FileState`]: what one handle writes, every other reads at once.

mod access;
mod allocate;
mod chunks;
mod copy;
mod failures;
mod lock;
mod read;
mod seek;
mod segment;
mod view;
mod write;

use std::{
    ops::{Range, RangeInclusive},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, HandleId, InodeId,
    error::Errno,
    pb::meta::{Attr, ExtentsReply, Open, OpenReply, Time, request::Op, response},
};
use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};

pub use allocate::Allocation;
pub(crate) use chunks::BlockChunk;
pub use copy::CopiedRange;
pub(crate) use failures::Failures;
use failures::Seen;
pub use lock::{Lock, LockOwner};
pub(crate) use segment::UnitId;
pub(crate) use view::View;

use crate::{
    client::Inner,
    meta::unexpected,
    write::{UnitDone, packer},
};

/// What this client knows of one inode.
pub(crate) struct FileState {
    pub(crate) ino: InodeId,
    inner: Mutex<FileInner>,
}

/// Behind the lock.
pub(crate) struct FileInner {
    pub(crate) view: View,
    /// Units on their way, oldest first.
    pub(crate) units: Vec<(UnitId, UnitDone)>,
    /// Write-backs that failed.
    pub(crate) failures: Failures,
    /// Since when there has been dirty data.
    pub(crate) dirty_since: Option<Instant>,
    /// Appends among it whose callers have no answer yet.
    pub(crate) unanswered: Vec<UnitDone>,
    /// Until when bytes that were lost at the end of the file are not taken for its end.
    lost_until: Option<Instant>,
}

/// How long somebody may go by a size from before bytes at the end were lost: a kernel that shows zeros there, when what it asks for
/// ends before.
const OLD_SIZE_USED: Duration = Duration::from_secs(1);

/// How often a flush begins anew because what it is to commit was written over.
const OVERWRITTEN_MAX: usize = 1000;

impl FileInner {
    /// Drops what was written and not committed. Returns the memory freed.
    pub(crate) fn forget_written(&mut self) -> u64 {
        self.dirty_since = None;
        self.view.forget_local()
    }

    /// The unit will never be committed: its bytes are lost. Returns the memory freed.
    pub(crate) fn unit_failed(&mut self, unit: UnitId) -> u64 {
        self.lost_until = Some(Instant::now() + OLD_SIZE_USED);
        self.view.unit_failed(unit)
    }

    /// As [`File::size_told`].
    fn size_told(&mut self) -> u64 {
        if self.lost_until.is_none_or(|until| Instant::now() >= until) {
            self.lost_until = None;
            self.view.lost_end_is_known();
        }
        self.view.size().max(self.view.lost_end())
    }

    /// An error while bytes of `range` that were lost a moment ago may be taken for bytes of the file.
    fn check_lost(&mut self, range: Range<u64>) -> FsResult<()> {
        let size = self.view.size();
        if range.start >= self.size_told() || range.end <= size {
            return Ok(());
        }
        let what = format!("{}: what was written from byte {size} on could not be stored", self.view.ino());
        Err(FsError::new(Errno::EIO, what))
    }
}

impl FileState {
    pub(crate) fn new(attr: Attr) -> FileState {
        let view = View::new(attr);
        FileState {
            ino: view.ino(),
            inner: Mutex::new(FileInner {
                view,
                units: Vec::new(),
                failures: Failures::default(),
                dirty_since: None,
                unanswered: Vec::new(),
                lost_until: None,
            }),
        }
    }

    pub(crate) fn lock(&self) -> parking_lot::MutexGuard<'_, FileInner> {
        self.inner.lock()
    }

    /// Waits until every unit that is on its way now has been committed or has failed.
    pub(crate) async fn settle(&self) {
        let units: Vec<UnitDone> = self.lock().units.iter().map(|(_, done)| done.clone()).collect();
        for mut done in units {
            // A dropped sender is a finished unit.
            let _ = done.wait_for(|done| *done).await;
        }
    }
}

/// An append that its caller does not know to be done. To be dropped when it does; nobody may wait for a commit of the file before.
#[derive(Debug, Default)]
pub struct Unanswered(Option<watch::Sender<bool>>);

/// An open file. Clones are the same handle; it is closed when the last one is dropped.
///
/// Dropping does not wait: what was written is committed within a second, but only [`File::close`], [`File::flush`]
/// and [`File::fsync`] report a failure.
#[derive(Clone)]
pub struct File {
    handle: Arc<Handle>,
}

/// One open of a file.
struct Handle {
    client: Arc<Inner>,
    state: Arc<FileState>,
    id: HandleId,
    /// Where a sequential reader would go on, and how far it has been read ahead.
    cursor: Mutex<read::Cursor>,
    accesses: access::Accesses,
    /// Failures of the file that were told here. Locked after the file's state.
    seen: Mutex<Seen>,
}

impl Handle {
    /// Reports a write-back failure once, also one of a former process.
    fn take_error(&self) -> FsResult<()> {
        let told = self.state.lock().failures.tell(&mut self.seen.lock());
        if told.is_err() {
            self.client.untold.lock().remove(&self.state.ino);
            self.client.loss_is_told(self.state.ino);
        }
        told
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.client.meta.forget_handle(self.id);
        self.client.meta.leases().closed(self.state.ino, self.id);
        if self.cursor.get_mut().is_stream {
            self.client.streams.end(self.state.ino);
        }
    }
}

impl File {
    /// Opens an inode: without asking, where there is a lease on it.
    pub(crate) async fn open(client: &Arc<Inner>, ino: InodeId) -> FsResult<(Attr, File)> {
        let id = client.meta.new_handle();
        // Before anything else: whatever happens to the stream from now on, the server is told.
        client.meta.remember_handle(id, ino);
        client.habits.opens();
        if let Some((attr, extents)) = client.meta.leases().open_here(ino, id) {
            return File::opened(client, id, attr, extents);
        }
        let opened = client.meta.call(Op::Open(Open { ino: ino.0, handle: id.0 })).await;
        let reply = match opened {
            Ok(response::Result::Open(reply)) => reply,
            Ok(_) => return Err(unexpected("an open")),
            Err(e) => {
                client.meta.forget_handle(id);
                return Err(e);
            }
        };
        let OpenReply { attr: Some(attr), extents } = reply else { return Err(unexpected("an open")) };
        File::opened(client, id, client.meta.leases().newest(attr), extents)
    }

    fn opened(
        client: &Arc<Inner>,
        id: HandleId,
        attr: Attr,
        extents: Option<ExtentsReply>,
    ) -> FsResult<(Attr, File)> {
        let file = File::of_handle(client, id, attr);
        let mut inner = file.handle.state.lock();
        if let Some(extents) = extents
            && extents.next_offset > 0
        {
            inner.view.learn_extents(0, extents)?;
        }
        let attr = inner.view.attr();
        drop(inner);
        Ok((attr, file))
    }

    /// Wraps a handle that the server has opened already (open, or create).
    pub(crate) fn of_handle(client: &Arc<Inner>, id: HandleId, attr: Attr) -> File {
        let state = client.file_state(attr);
        let accesses = access::Accesses::new(client.options.access_times);
        let seen = Mutex::new(state.lock().failures.seen_at_open());
        File {
            handle: Arc::new(Handle {
                client: client.clone(),
                state,
                id,
                cursor: Mutex::default(),
                accesses,
                seen,
            }),
        }
    }

    /// A handle that a former process had open, which the server knows.
    pub(crate) fn resumed(client: &Arc<Inner>, id: HandleId, attr: Attr, lost: bool) -> File {
        let file = File::of_handle(client, id, attr);
        if lost {
            let why =
                format!("{}: what was written last is lost with the mount's former process", file.ino());
            file.handle.state.lock().failures.note(|| FsError::new(Errno::EIO, why));
        }
        file
    }

    pub(crate) fn handle_id(&self) -> HandleId {
        self.handle.id
    }

    /// The inode.
    pub fn ino(&self) -> InodeId {
        self.handle.state.ino
    }

    /// Attributes as last told by the server, with this client's uncommitted writes.
    pub fn attr(&self) -> Attr {
        self.handle.state.lock().view.attr()
    }

    /// Bytes in the file, as [`File::attr`] has it.
    pub fn size(&self) -> u64 {
        self.handle.state.lock().view.size()
    }

    /// As [`File::size`], bytes included that were lost at the end of the file a moment ago: who has been told of them may take the file to
    /// be so long still.
    pub fn size_told(&self) -> u64 {
        self.handle.state.lock().size_told()
    }

    /// Data versions between which nobody but this client changed the file: who cached its bytes as of the first, and
    /// wrote through this client only, has them as of the last.
    pub fn own_versions(&self) -> RangeInclusive<u64> {
        // An answer may show a commit of this client before it has come to the view, or when there is another view already.
        let committed = self.handle.client.meta.leases().own_versions(self.ino());
        let seen = self.handle.state.lock().view.own_versions();
        match committed {
            Some(own) if own.end() >= seen.start() && seen.end() >= own.start() => {
                *own.start().min(seen.start())..=*own.end().max(seen.end())
            }
            Some(own) if own.end() > seen.end() => own,
            _ => seen,
        }
    }

    /// What is written from now on is written by somebody who may not keep the file's suid and sgid: they go with the
    /// next commit, and are not shown from now on. Says whether there were any.
    pub fn drop_suid(&self) -> bool {
        self.handle.state.lock().view.drop_suid()
    }

    /// Reads through this handle leave the access time as it is: `O_NOATIME`.
    pub fn keep_access_time(&self) {
        self.handle.accesses.keep();
    }

    /// Whether they do.
    pub(crate) fn keeps_access_time(&self) -> bool {
        self.handle.accesses.are_kept()
    }

    /// Reads up to `len` bytes at `offset`, without copying: the parts are in file order. Shorter only at the end of
    /// the file.
    ///
    /// # Errors
    /// `EIO` when no copy of some block verifies: wrong bytes are never returned.
    pub async fn read_at(&self, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        self.handle.read_at(offset, len).await
    }

    /// As [`File::read_at`], but into `memory`, from its start on: at most as many bytes as fit. Returns how many. What is not in
    /// this client's memory is received there.
    ///
    /// # Errors
    /// As [`File::read_at`]. What is in `memory` then is nobody's to see.
    pub async fn read_into(&self, offset: u64, memory: &mut [u8]) -> FsResult<usize> {
        self.handle.read_into(offset, memory).await
    }

    /// Writes `data` at `offset` into memory; every handle of this client reads it at once. Waits when dirty data
    /// has reached its bound.
    ///
    /// # Errors
    /// `EFBIG` beyond the largest offset, and the failure of an earlier write-back of this file.
    pub async fn write_at(&self, offset: u64, data: Bytes) -> FsResult<()> {
        self.handle.write_at(offset, data).await
    }

    /// Writes `data` at the end of the file and returns where. When another client appends meanwhile, the bytes go
    /// behind its bytes at commit: nothing is overwritten.
    ///
    /// # Errors
    /// As [`File::write_at`].
    pub async fn append(&self, data: Bytes) -> FsResult<u64> {
        Ok(self.handle.append(data, false).await?.0)
    }

    /// As [`File::append`], for a caller that asks again when this process is killed before it has the answer: until [`Unanswered`] is dropped
    /// nothing of it is committed, if there is to be a successor, so that it is not there twice.
    ///
    /// # Errors
    /// As [`File::append`].
    pub async fn append_unanswered(&self, data: Bytes) -> FsResult<(u64, Unanswered)> {
        let waits = self.handle.client.options.handover.is_some();
        self.handle.append(data, waits).await
    }

    /// `fallocate(2)`: extends the file, or makes a range read as zeros and take no space. Nothing is reserved.
    ///
    /// # Errors
    /// `EFBIG` beyond the largest offset, `ENOSPC` when the range is larger than what is free, `EINVAL` for no bytes.
    pub async fn allocate(&self, range: Range<u64>, how: Allocation) -> FsResult<()> {
        self.handle.allocate(range, how).await
    }

    /// `copy_file_range(2)`: puts bytes of `source` here, by sharing its blocks where that is possible. Returns how many; fewer
    /// than asked for only says that the caller should go on from there, 0 that the source ends.
    ///
    /// # Errors
    /// `EINVAL` when the ranges overlap in one file, and those of reading and writing.
    pub async fn copy_from(&self, source: &File, range: CopiedRange) -> FsResult<u64> {
        self.handle.copy_from(&source.handle, range).await
    }

    /// The first byte at or after `offset` that is in no hole: `SEEK_DATA`.
    ///
    /// # Errors
    /// `ENXIO` when there is none, or `offset` lies beyond the end.
    pub async fn seek_data(&self, offset: u64) -> FsResult<u64> {
        self.handle.seek(seek::Whence::Data, offset).await
    }

    /// The first byte at or after `offset` that is in a hole; the end of the file is one: `SEEK_HOLE`.
    ///
    /// # Errors
    /// `ENXIO` when `offset` lies beyond the end.
    pub async fn seek_hole(&self, offset: u64) -> FsResult<u64> {
        self.handle.seek(seek::Whence::Hole, offset).await
    }

    /// Sees to it that clients that open the file afterwards see everything written. What `close` promises. A file that
    /// nobody else uses is committed a second later at the latest, or when somebody is about to use it; others now.
    ///
    /// # Errors
    /// The first write-back failure since the last report.
    pub async fn flush(&self) -> FsResult<()> {
        if !self.handle.client.meta.leases().is_delegated(self.ino()) {
            self.handle.client.flush(&self.handle.state).await?;
        }
        self.handle.take_error()
    }

    /// Commits everything written and returns when data and metadata survive power failure.
    ///
    /// # Errors
    /// As [`File::flush`], and `EIO` when a server could not sync.
    pub async fn fsync(&self) -> FsResult<()> {
        let leases = self.handle.client.meta.leases();
        let losses = leases.losses();
        self.handle.client.flush(&self.handle.state).await?;
        self.handle.take_error()?;
        self.handle.client.sync_file(self.ino()).await?;
        match leases.losses() == losses {
            true => Ok(()),
            false => Err(FsError::new(
                Errno::EIO,
                format!("{}: lost in a power failure of the metaserver", self.ino()),
            )),
        }
    }

    /// As [`File::close`] where nobody is there to be told: the failure that it returns is still reported to whoever has the file open.
    ///
    /// # Errors
    /// As [`File::flush`].
    pub async fn leave(self) -> FsResult<()> {
        let Handle { client, state, .. } = &*self.handle;
        if !client.meta.leases().is_delegated(self.ino()) {
            client.flush(state).await?;
        }
        state.lock().failures.unseen(&self.handle.seen.lock())
    }

    /// Flushes and closes this handle.
    ///
    /// # Errors
    /// As [`File::flush`].
    pub async fn close(self) -> FsResult<()> {
        self.flush().await
    }
}

impl Inner {
    /// The shared state of an inode, told the newest attributes.
    pub(crate) fn file_state(&self, attr: Attr) -> Arc<FileState> {
        let ino = InodeId(attr.ino);
        let mut files = self.files.lock();
        if let Some(state) = files.get(&ino).and_then(std::sync::Weak::upgrade) {
            drop(files);
            state.lock().view.learn_attr(attr);
            return state;
        }
        let state = Arc::new(FileState::new(attr));
        if files.len() >= self.files_sweep.load(Ordering::Relaxed) {
            files.retain(|_, state| state.strong_count() > 0);
            self.files_sweep.store(2 * files.len().max(1024), Ordering::Relaxed);
        }
        files.insert(ino, Arc::downgrade(&state));
        state
    }

    /// Bytes of a file could not be stored. Whoever has it open is told, and else who waits for everything to be written.
    pub(crate) fn lost(&self, ino: InodeId, file: &mut FileInner, error: &FsError) {
        file.failures.note(|| error.clone());
        self.untold.lock().entry(ino).or_insert_with(|| error.clone());
    }

    /// A failure that nobody was told of, if there is one. Those of files that nobody has open any more are told by this.
    pub(crate) fn tell_lost(&self) -> FsResult<()> {
        let mut untold = self.untold.lock();
        let first = untold.iter().next().map(|(ino, e)| {
            let more = untold.len() - 1;
            let more = if more == 0 { String::new() } else { format!(", and of {more} more files") };
            FsError::new(e.errno, format!("what was written to {ino} is lost{more}: {}", e.message))
        });
        untold.retain(|ino, _| self.known_file(*ino).is_some());
        first.map_or(Ok(()), Err)
    }

    /// The state of an inode that this client has open or has written.
    pub(crate) fn known_file(&self, ino: InodeId) -> Option<Arc<FileState>> {
        self.files.lock().get(&ino).and_then(std::sync::Weak::upgrade)
    }

    /// Whether anything that was written to files is not committed.
    pub(crate) fn has_written(&self) -> bool {
        let files: Vec<_> = self.files.lock().values().filter_map(std::sync::Weak::upgrade).collect();
        files.iter().any(|state| state.lock().view.has_local())
    }

    /// Commits everything written to a file. The failure, if any, is left for the file's next user.
    pub(crate) async fn flush(self: &Arc<Self>, state: &Arc<FileState>) -> FsResult<()> {
        for _ in 0..OVERWRITTEN_MAX {
            let before = {
                let inner = state.lock();
                if !inner.view.has_local() {
                    return Ok(());
                }
                inner.view.overwritten()
            };
            self.start_full_units(state);
            if !self.start_inline_unit(state) && state.lock().view.dirty_bytes() > 0 {
                packer::pack(self, state).await?;
            }
            state.settle().await;
            // What is written over meanwhile leaves its unit. Nobody may be shown, now or after a crash, what was there before either: what
            // has taken its place is committed, too.
            if state.lock().view.overwritten() == before {
                return Ok(());
            }
        }
        let what = format!("{}: what is to be committed was written over all the while", state.ino);
        Err(FsError::new(Errno::EIO, what))
    }

    /// Makes everything that this client has written to an inode power-safe.
    pub(crate) async fn sync_file(self: &Arc<Self>, ino: InodeId) -> FsResult<()> {
        let (data, meta) = tokio::join!(self.sync_stored_of(ino), self.sync_log());
        data.and(meta)
    }

    /// Makes every acknowledged namespace operation power-safe.
    pub(crate) async fn sync_log(&self) -> FsResult<()> {
        match self.meta.call(Op::Sync(fjordfs_proto::pb::meta::Sync {})).await? {
            response::Result::Empty(_) => self.meta.leases().take_refusal().map_or(Ok(()), Err),
            _ => Err(unexpected("a sync")),
        }
    }
}

/// The wall clock, as it is stored.
pub(crate) fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Time { sec: since.as_secs() as i64, nsec: since.subsec_nanos() }
}

/// A write or truncate beyond what an offset can address.
pub(crate) fn too_big(ino: InodeId, end: Option<u64>) -> FsResult<u64> {
    end.filter(|end| *end <= fjordfs_proto::FILE_SIZE_MAX)
        .ok_or_else(|| FsError::new(Errno::EFBIG, format!("{ino}: beyond the largest file offset")))
}
