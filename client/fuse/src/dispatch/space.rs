//! Where a file has bytes: fallocate, copy_file_range, and lseek for data and holes.

use fjordfs_proto::error::Errno;
use fjordfs_proto::{FsError, FsResult};

use super::{Dispatcher, OpenFile};
use crate::abi::LseekOut;
use crate::filesystem::{Allocation, CopiedRange, Filesystem};
use crate::reply::Reply;
use crate::request::Caller;

const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE.cast_unsigned();
const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE.cast_unsigned();
const ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE.cast_unsigned();

impl<F: Filesystem> Dispatcher<F> {
    pub(super) async fn fallocate(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let clear = match mode & !KEEP_SIZE {
            0 => false,
            PUNCH_HOLE | ZERO_RANGE => true,
            _ => return Err(FsError::new(Errno::EOPNOTSUPP, format!("fallocate with mode {mode:#x}"))),
        };
        let keep_size = mode & (KEEP_SIZE | PUNCH_HOLE) != 0;
        let end = offset.checked_add(length).ok_or_else(|| {
            FsError::new(Errno::EFBIG, format!("{length} bytes at {offset} end beyond the largest offset"))
        })?;
        self.drop_suid(caller, &open);
        let how = Allocation { clear, keep_size, clear_suid: caller.uid != 0 };
        let result = self.fs.allocate(&open.file, offset..end, how).await;
        self.stored(&open, result)
    }

    /// The kernel does not say who may keep suid and sgid here, as it does with writes.
    fn drop_suid(&self, caller: Caller, open: &OpenFile<F::File>) {
        if caller.uid != 0 && self.fs.drop_suid(&open.file) {
            self.pages_are_stale(open.ino);
        }
    }

    pub(super) async fn copy_file_range(
        &self,
        caller: Caller,
        fh_in: u64,
        fh_out: u64,
        range: CopiedRange,
    ) -> FsResult<u64> {
        let (source, target) = (self.file(fh_in).await?, self.file(fh_out).await?);
        self.drop_suid(caller, &target);
        let copied = self.fs.copy_range(&source.file, &target.file, range).await?;
        // The kernel drops its pages of what was copied over.
        self.kernel_cache.changed_here(target.ino, self.fs.own_versions(&target.file));
        Ok(copied)
    }

    pub(super) async fn lseek(&self, fh: u64, offset: u64, whence: u32) -> FsResult<Reply> {
        let open = self.file(fh).await?;
        let data = match whence.cast_signed() {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return Err(FsError::new(Errno::EINVAL, format!("lseek from {whence}"))),
        };
        if self.overtaken.is_written(open.ino) {
            // Pages dirtied through a mapping have bytes that nobody has sent yet. The kernel writes them back before it drops them.
            self.notifier.drop_pages(open.ino, offset..u64::MAX).await;
        }
        let offset = self.fs.seek(&open.file, data, offset).await?;
        Ok(Reply::of(&LseekOut { offset }))
    }
}
