//! Open files: opening, data, and what closing promises. Performance critical: `read` and `write` copy nothing of
//! their own; where the transport has a payload buffer, the filesystem reads into it.
//!
//! # Consistency with the kernel's page cache
//! Pages are kept over `open` while the version of the bytes stands ([`crate::kernel_cache`]). Whatever makes pages wrong in
//! between is announced at once: an append that went elsewhere than the kernel assumed, and data that could not be stored.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use fjordfs_proto::error::Errno;
use fjordfs_proto::mode::PERMISSIONS;
use fjordfs_proto::pb::meta::Attr;
use fjordfs_proto::{FsResult, InodeId};

use super::{Answer, Dispatcher, Opened, told, unknown_handle};
use crate::abi::{OpenOut, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteOut, fopen};
use crate::ends::{ShortAnswer, Told};
use crate::filesystem::{Filesystem, NewFile};
use crate::reply::{self, Reply, Validity};
use crate::request::Caller;

const CAPABILITY: &[u8] = b"security.capability";

/// An open regular file.
pub(super) struct OpenFile<T> {
    pub(super) file: T,
    pub(super) ino: InodeId,
    /// The kernel drops cached pages when it takes in the answer to the open, and no request has shown yet that it did.
    drops_pages: AtomicBool,
    /// It may write.
    pub(super) writes: bool,
}

impl<T> OpenFile<T> {
    fn new(file: T, ino: InodeId, writes: bool) -> OpenFile<T> {
        OpenFile { file, ino, drops_pages: AtomicBool::new(false), writes }
    }
}

fn has(flags: u32, flag: libc::c_int) -> bool {
    flags & flag.cast_unsigned() == flag.cast_unsigned()
}

fn is_read_only(flags: u32) -> bool {
    flags & libc::O_ACCMODE.cast_unsigned() == libc::O_RDONLY.cast_unsigned()
}

/// `O_APPEND`. A handle marked as direct for FUSE's own purposes sends a write as it is, which an append needs: through its pages, the
/// kernel sends what fits into the last one by itself when that is not cached, and another client's append could come between
/// it and the rest. With `O_DIRECT` it sends the parts of a large write all at once, whose order could not be restored; marked, one
/// after another.
fn appends(flags: u32) -> bool {
    has(flags, libc::O_APPEND)
}

pub(super) fn new_file(caller: Caller, mode: u32, umask: u32, flags: u32) -> NewFile {
    let Caller { uid, gid, .. } = caller;
    NewFile { mode: mode & PERMISSIONS, umask, uid, gid, exclusive: has(flags, libc::O_EXCL) }
}

impl<F: Filesystem> Dispatcher<F> {
    pub(super) async fn open(&self, ino: InodeId, flags: u32) -> FsResult<Answer> {
        let (attr, file) = self.fs.open(ino).await?;
        let (fh, out) = self.opened(file, ino, attr.data_version, flags);
        Ok(Answer { opened: Some(Opened::File(fh)), ..Reply::of(&out).into() })
    }

    pub(super) async fn create(
        &self,
        parent: InodeId,
        name: &[u8],
        new: NewFile,
        flags: u32,
    ) -> FsResult<Answer> {
        let (attr, file) = self.fs.create(parent, name, new).await?;
        let attr_left = self.creation_left(&attr);
        let validity = self.validity_of_entry(parent, name, &attr, attr_left);
        Ok(self.created(&attr, validity, file, flags))
    }

    pub(super) async fn tmpfile(&self, directory: InodeId, new: NewFile, flags: u32) -> FsResult<Answer> {
        let (attr, file) = self.fs.create_unnamed(directory, new).await?;
        self.held.lookups.add(InodeId(attr.ino));
        Ok(self.created(&attr, self.validity, file, flags))
    }

    /// Counts an inode, and how long its attributes are good for although no recall voids the answer: its first answer is remembered
    /// until it is settled, which the FLUSH at the file's close does at the latest.
    fn creation_left(&self, attr: &Attr) -> Duration {
        let ino = InodeId(attr.ino);
        let is_first = self.held.lookups.add(ino);
        if is_first && self.answers_can_be_recalled && self.held.unsettled.create(ino) {
            self.fs.attr_left(attr)
        } else {
            Duration::ZERO
        }
    }

    fn created(&self, attr: &Attr, validity: Validity, file: F::File, flags: u32) -> Answer {
        let (fh, out) = self.opened(file, InodeId(attr.ino), attr.data_version, flags);
        let reply = Reply::created(&reply::entry_out(attr, validity), &out);
        Answer { opened: Some(Opened::File(fh)), brings: Some(told(attr)), ..reply.into() }
    }

    fn opened(&self, file: F::File, ino: InodeId, data_version: u64, flags: u32) -> (u64, OpenOut) {
        if has(flags, libc::O_NOATIME) {
            self.fs.keep_access_time(&file);
        }
        let fh = self.files.number();
        let open = OpenFile::new(file, ino, !is_read_only(flags));
        let mut open_flags = 0;
        if self.kernel_cache.keep_at_open(ino, data_version, fh, || self.fs.own_versions(&open.file)) {
            open_flags |= fopen::KEEP_CACHE;
        } else {
            open.drops_pages.store(true, Relaxed);
        }
        if is_read_only(flags) && !self.lock_owners.knows(ino) {
            // Nothing to commit or to unlock at `close`: saves one request per file read.
            open_flags |= fopen::NOFLUSH;
        }
        if appends(flags) {
            open_flags |= fopen::DIRECT_IO;
        }
        self.overtaken.opened(ino, fh, open.writes, open_flags & fopen::KEEP_CACHE == 0);
        self.fs.leave_open(fh, &open.file);
        self.files.insert_as(fh, open);
        (fh, OpenOut { fh, open_flags, ..OpenOut::default() })
    }

    pub(super) async fn file(&self, fh: u64) -> FsResult<Arc<OpenFile<F::File>>> {
        let open = match self.files.get(fh) {
            Some(open) => open,
            None => self.resume(fh).await?,
        };
        self.open_was_taken_in(fh, &open);
        Ok(open)
    }

    /// An open file that a former process gave out.
    async fn resume(&self, fh: u64) -> FsResult<Arc<OpenFile<F::File>>> {
        if fh >= self.first_number {
            return Err(unknown_handle(fh));
        }
        let _one_at_a_time = self.resuming.lock().await;
        if let Some(open) = self.files.get(fh) {
            return Ok(open);
        }
        let (ino, file) = self.fs.resume(fh).await?.ok_or_else(|| unknown_handle(fh))?;
        // How it was opened is not known.
        self.overtaken.opened(ino, fh, true, false);
        self.files.insert_as(fh, OpenFile::new(file, ino, true));
        self.files.get(fh).ok_or_else(|| unknown_handle(fh))
    }

    /// The kernel knows the handle.
    pub(super) fn open_was_taken_in(&self, fh: u64, open: &OpenFile<F::File>) {
        if open.drops_pages.load(Relaxed) && open.drops_pages.swap(false, Relaxed) {
            self.kernel_cache.dropped(open.ino, fh);
        }
    }

    pub(super) async fn read(
        &self,
        fh: u64,
        offset: u64,
        size: u32,
        fills_pages: bool,
        payload: &mut [u8],
    ) -> FsResult<Answer> {
        let open = self.file(fh).await?;
        let size = (size as usize).min(self.size_max);
        if fills_pages {
            self.kernel_cache.filled(open.ino);
            self.overtaken.filling(open.ino, offset..offset + size as u64);
        }
        if let Some(payload) = payload.get_mut(..size)
            && !payload.is_empty()
        {
            let mut filled = 0;
            let ends = loop {
                let rest = &mut payload[filled..];
                let more = self.fs.read_into(&open.file, offset + filled as u64, rest).await?.min(rest.len());
                filled += more;
                if more == 0 || filled == size {
                    break (filled < size).then(|| self.ends.short_answer(open.ino, offset + filled as u64));
                }
                if let Some(ends) = self.end_of_file(&open, offset + filled as u64) {
                    break Some(ends);
                }
            };
            return Ok(Answer { ends, ..Reply::InPayload(filled).into() });
        }
        let mut parts = Vec::new();
        let mut filled = 0;
        let ends = loop {
            let mut more = self.fs.read(&open.file, offset + filled as u64, size - filled).await?;
            cut(&mut more, size - filled);
            let len = more.iter().map(Bytes::len).sum::<usize>();
            filled += len;
            parts.append(&mut more);
            if len == 0 || filled == size {
                break (filled < size).then(|| self.ends.short_answer(open.ino, offset + filled as u64));
            }
            if let Some(ends) = self.end_of_file(&open, offset + filled as u64) {
                break Some(ends);
            }
        };
        Ok(Answer { ends, ..Reply::Parts(parts).into() })
    }

    /// An answer that ends here, at the end of the file; `None` when the file has grown since it was read.
    fn end_of_file(&self, open: &OpenFile<F::File>, end: u64) -> Option<ShortAnswer> {
        let short = self.ends.short_answer(open.ino, end);
        (self.fs.size(&open.file) <= end).then_some(short)
    }

    pub(super) async fn write(
        &self,
        fh: u64,
        offset: u64,
        write_flags: u32,
        flags: u32,
        data: Bytes,
    ) -> FsResult<Answer> {
        let open = self.file(fh).await?;
        let size = data.len();
        if write_flags & WRITE_KILL_SUIDGID != 0 && self.fs.drop_suid(&open.file) {
            // The kernel leaves that to us, and keeps the mode it has cached.
            self.pages_are_stale(open.ino);
        }
        // Pages that were dirtied through a mapping have a place, whatever handle they are written back with.
        let is_write_back = write_flags & WRITE_CACHE != 0;
        let (mut tells, mut overtaken) = (None, None);
        let mut unanswered: Option<Box<dyn Send>> = None;
        if appends(flags) && !is_write_back {
            // The kernel holds no page of it meanwhile, and takes the file to end there afterwards.
            tells = Some(Told { ino: open.ino, size: offset + size as u64 });
            self.drop_capability(&open).await?;
            let (at, until) = self.fs.append(&open.file, data).await?;
            unanswered = Some(Box::new(until));
            if at != offset {
                // Another client appended: the kernel has the data cached where it assumed the end.
                self.pages_are_stale(open.ino);
            }
        } else {
            self.fs.write(&open.file, offset, data).await?;
            let range = offset..offset + size as u64;
            if !has(flags, libc::O_DIRECT) {
                self.ends.overwritten(open.ino, range.clone());
                let is_overtaken = !is_write_back && self.overtaken.is_overtaken(open.ino, fh, &range);
                overtaken = is_overtaken.then_some((open.ino, range));
            } else if !is_write_back && size > 0 && self.kernel_cache.may_hold_pages(open.ino) {
                // The kernel drops pages before it sends the WRITE, and for asynchronous I/O not again: what a reader has cached since
                // then would stay.
                self.notifier.drop_pages(open.ino, range).await;
            }
        }
        if appends(flags) && has(flags, libc::O_DSYNC) {
            // Elsewhere the kernel sends an FSYNC of its own; for handles marked direct it leaves it to us. It is to be committed before the
            // answer then.
            unanswered = None;
            self.fs.fsync(&open.file).await?;
        }
        let reply = Reply::of(&WriteOut { size: size as u32, padding: 0 });
        Ok(Answer { tells, unanswered, overtaken, ..reply.into() })
    }

    /// What is written may not have the rights that the file had. The kernel sees to it elsewhere, and leaves it to us with handles that
    /// are marked direct.
    async fn drop_capability(&self, open: &OpenFile<F::File>) -> FsResult<()> {
        // Mostly known from here: a lease says whether there are any attributes.
        let found = match self.fs.get_xattr(open.ino, CAPABILITY).await {
            Ok(_) => self.fs.remove_xattr(open.ino, CAPABILITY).await,
            Err(e) => Err(e),
        };
        match found {
            Err(e)
                if matches!(e.errno, Errno::ENODATA | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::ESTALE) =>
            {
                Ok(())
            }
            found => found,
        }
    }

    /// Each `close` of a descriptor that can write, or of a file that was locked. Not skipped for a handle that did not write itself: pages
    /// dirtied through a mapping are written back with any handle of the inode.
    pub(super) async fn flush(&self, fh: u64, lock_owner: u64) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let result = self.fs.flush(&open.file).await;
        let unlocked = self.unlock_process(fh, &open, lock_owner).await;
        self.stored(&open, result.and(unlocked))
    }

    pub(super) async fn fsync(&self, fh: u64) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let result = self.fs.fsync(&open.file).await;
        self.stored(&open, result)
    }

    /// After a commit that failed, the kernel caches what the file does not have; after others, what it has now.
    pub(super) fn stored(&self, open: &OpenFile<F::File>, result: FsResult<()>) -> FsResult<Reply> {
        match result {
            Ok(()) => self.kernel_cache.changed_here(open.ino, self.fs.own_versions(&open.file)),
            Err(_) => self.pages_are_stale(open.ino),
        }
        result.map(|()| Reply::Empty)
    }
}

/// The kernel rejects an answer that is longer than it asked for.
fn cut(parts: &mut Vec<Bytes>, mut left: usize) {
    for part in parts.iter_mut() {
        part.truncate(left);
        left -= part.len();
    }
    parts.retain(|part| !part.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_cut_to_what_was_asked() {
        let mut parts =
            vec![Bytes::from_static(b"abc"), Bytes::from_static(b"def"), Bytes::from_static(b"ghi")];
        cut(&mut parts, 4);
        assert_eq!(parts, [&b"abc"[..], b"d"]);
        cut(&mut parts, 0);
        assert!(parts.is_empty());
    }

    #[test]
    fn flags_are_whole() {
        // O_SYNC contains O_DSYNC's bit.
        assert!(has(libc::O_SYNC.cast_unsigned(), libc::O_DSYNC));
        assert!(!has(libc::O_DSYNC.cast_unsigned(), libc::O_SYNC));
        assert!(is_read_only(libc::O_DIRECT.cast_unsigned()));
        assert!(!is_read_only(libc::O_RDWR.cast_unsigned()));
    }
}
