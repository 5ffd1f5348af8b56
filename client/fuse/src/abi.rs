//! The kernel's FUSE ABI: constants and structures of `linux/fuse.h`, protocol 7.45, as far as FjordFS uses it.
//!
//! Every structure is declared through [`abi_struct!`], which checks at compile time that its size is the kernel's and
//! that it has no padding. That is what makes reading one from bytes and viewing one as bytes sound ([`Pod`]).

use std::mem::size_of;

/// Protocol version spoken. Minor versions only add.
pub(crate) const KERNEL_VERSION: u32 = 7;
/// Newest minor version this file describes.
pub(crate) const KERNEL_MINOR_VERSION: u32 = 45;
/// Oldest minor version served (Linux 5.14): older kernels may send a SETXATTR that is shorter than this file's.
pub(crate) const KERNEL_MINOR_VERSION_MIN: u32 = 34;
/// First version with `FUSE_NOTIFY_INC_EPOCH` (Linux 6.16).
const KERNEL_MINOR_VERSION_EPOCHS: u32 = 44;

/// Whether names, and attributes that come with them, can be recalled while the answer that brings them is on its way: a kernel
/// with epochs also notices evictions meanwhile.
pub(crate) fn answers_can_be_recalled(kernel_minor: u32) -> bool {
    kernel_minor >= KERNEL_MINOR_VERSION_EPOCHS
}

/// Plain old data: any bytes are a value, and a value has no padding.
///
/// # Safety
/// `repr(C)`, integers only, no padding. Implemented by [`abi_struct!`] alone.
pub(crate) unsafe trait Pod: Copy + Default {
    /// The structure at the start of `bytes`; `None` when they are too few.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() < size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, the read is unaligned, and any bytes are a value of a `Pod`.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// The structure at the start of `bytes`, with zeros for what an older kernel did not send.
    fn from_prefix(bytes: &[u8]) -> Self {
        let mut value = Self::default();
        let len = bytes.len().min(size_of::<Self>());
        // SAFETY: `value` is `len` bytes or longer, and any bytes are a value of a `Pod`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut value).cast::<u8>(), len) };
        value
    }

    /// The bytes as the kernel wants them.
    fn as_bytes(&self) -> &[u8] {
        // SAFETY: a `Pod` has no padding, so all its bytes are initialised; the borrow keeps it alive.
        unsafe { std::slice::from_raw_parts((&raw const *self).cast::<u8>(), size_of::<Self>()) }
    }
}

macro_rules! abi_struct {
    ($($(#[$doc:meta])* struct $name:ident: $size:literal { $($field:ident: $ty:ty,)* })*) => { $(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[allow(dead_code, reason = "the ABI has fields that FjordFS does not read")]
        pub(crate) struct $name { $(pub(crate) $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())* == $size);
        // SAFETY: repr(C), integers only; the assertion above says that the fields fill the size, so no padding.
        unsafe impl Pod for $name {}
    )* };
}

/// Request codes.
#[allow(dead_code, reason = "the list is the ABI's")]
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const ACCESS: u32 = 34;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const BMAP: u32 = 37;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const POLL: u32 = 40;
    pub(crate) const NOTIFY_REPLY: u32 = 41;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
    pub(crate) const COPY_FILE_RANGE_64: u32 = 53;
}

/// Flags of INIT, both 32-bit halves as one number.
#[allow(dead_code, reason = "the ones left out on purpose are named in session/init.rs")]
pub(crate) mod init_flag {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const EXPORT_SUPPORT: u64 = 1 << 4;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const HANDLE_KILLPRIV: u64 = 1 << 19;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// The kernel can send again what was read and not answered (Linux 6.9).
    pub(crate) const HAS_RESEND: u64 = 1 << 39;
    pub(crate) const OVER_IO_URING: u64 = 1 << 41;
}

/// Set in the number of a request that is sent again.
pub(crate) const UNIQUE_RESEND: u64 = 1 << 63;

/// Whether a request changes names or extended attributes: done twice, it has another answer.
pub(crate) fn changes_names(code: u32) -> bool {
    use opcode::*;
    matches!(
        code,
        SYMLINK
            | MKNOD
            | MKDIR
            | UNLINK
            | RMDIR
            | RENAME
            | RENAME2
            | LINK
            | CREATE
            | TMPFILE
            | SETXATTR
            | REMOVEXATTR
    )
}

/// `SetattrIn::valid`.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const CTIME: u32 = 1 << 10;
    /// Truncated by a process without CAP_FSETID.
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// `OpenOut::open_flags`.
pub(crate) mod fopen {
    /// Reads and writes of this handle go around the page cache.
    pub(crate) const DIRECT_IO: u32 = 1 << 0;
    /// Pages cached earlier stay valid.
    pub(crate) const KEEP_CACHE: u32 = 1 << 1;
    /// `close` sends no FLUSH.
    pub(crate) const NOFLUSH: u32 = 1 << 5;
}

/// `SetxattrIn::setxattr_flags`: an access control list set by a process outside the group and without CAP_FSETID.
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `ReadIn::read_flags`: read by a process, around the page cache; without it pages are filled.
pub(crate) const READ_LOCKOWNER: u32 = 1 << 1;
/// `WriteIn::write_flags`: written by a process without CAP_FSETID.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `WriteIn::write_flags`: written back from the page cache (mmap); the handle is any that was open for writing.
pub(crate) const WRITE_CACHE: u32 = 1 << 0;

/// `LkIn::lk_flags`: a lock of flock(2).
pub(crate) const LK_FLOCK: u32 = 1 << 0;

/// The kernel's pages, bytes: 64 KiB on some ARM machines.
pub(crate) fn page_size() -> usize {
    // SAFETY: asks for a number.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Notification codes, sent in `OutHeader::error` with `unique` 0.
pub(crate) mod notify_code {
    pub(crate) const INVAL_INODE: i32 = 2;
    pub(crate) const INVAL_ENTRY: i32 = 3;
    pub(crate) const RESEND: i32 = 7;
    pub(crate) const INC_EPOCH: i32 = 8;
}

/// Commands of the io_uring transport, and where things are in the first of an entry's two buffers (the second has the payload).
pub(crate) mod uring {
    /// Gives the kernel an entry's buffers; completes with a request.
    pub(crate) const REGISTER: u32 = 1;
    /// Gives the kernel the answer to an entry's request; completes with the next request.
    pub(crate) const COMMIT_AND_FETCH: u32 = 2;
    /// `InHeader` of a request, then `OutHeader` of its answer: 128 bytes.
    pub(crate) const IN_OUT: usize = 0;
    /// The structure of the request's opcode: 128 bytes.
    pub(crate) const OP_IN: usize = 128;
    /// `UringInOut`.
    pub(crate) const RING_IN_OUT: usize = 256;
    /// All of them.
    pub(crate) const HEADERS_SIZE: usize = 288;
    /// Smallest payload buffer that the kernel takes (FUSE_MIN_READ_BUFFER).
    pub(crate) const PAYLOAD_MIN: usize = 8192;
}

/// `_IOR(229, 0, uint32_t)`: makes a freshly opened /dev/fuse another channel of the session whose fd is passed.
pub(crate) const DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;

abi_struct! {
    /// Before every request.
    struct InHeader: 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Before every reply and notification.
    struct OutHeader: 16 { len: u32, error: i32, unique: u64, }
    /// An inode's attributes.
    struct AttrRecord: 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32,
        rdev: u32, blksize: u32, flags: u32,
    }
    /// A name found or made.
    struct EntryOut: 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: AttrRecord,
    }
    /// Answer to GETATTR and SETATTR.
    struct AttrOut: 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: AttrRecord, }
    struct ForgetIn: 8 { nlookup: u64, }
    struct ForgetOne: 16 { nodeid: u64, nlookup: u64, }
    struct BatchForgetIn: 8 { count: u32, dummy: u32, }
    struct GetattrIn: 16 { getattr_flags: u32, dummy: u32, fh: u64, }
    struct MknodIn: 16 { mode: u32, rdev: u32, umask: u32, padding: u32, }
    struct MkdirIn: 8 { mode: u32, umask: u32, }
    struct RenameIn: 8 { newdir: u64, }
    struct Rename2In: 16 { newdir: u64, flags: u32, padding: u32, }
    struct SetxattrIn: 16 { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// Of GETXATTR and LISTXATTR.
    struct GetxattrIn: 8 { size: u32, padding: u32, }
    struct GetxattrOut: 8 { size: u32, padding: u32, }
    struct FallocateIn: 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    struct LseekIn: 24 { fh: u64, offset: u64, whence: u32, padding: u32, }
    struct LseekOut: 8 { offset: u64, }
    struct CopyFileRangeIn: 56 {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// Answer to COPY_FILE_RANGE_64; the older request is answered as a WRITE.
    struct CopyFileRangeOut: 8 { bytes_copied: u64, }
    struct LinkIn: 8 { oldnodeid: u64, }
    struct SetattrIn: 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    struct OpenIn: 8 { flags: u32, open_flags: u32, }
    struct CreateIn: 16 { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    struct OpenOut: 16 { fh: u64, open_flags: u32, backing_id: u32, }
    struct ReleaseIn: 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    struct FlushIn: 24 { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    struct ReadIn: 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    struct WriteIn: 40 {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    struct WriteOut: 8 { size: u32, padding: u32, }
    struct StatfsOut: 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    struct FsyncIn: 16 { fh: u64, fsync_flags: u32, padding: u32, }
    struct AccessIn: 8 { mask: u32, padding: u32, }
    /// A range of a file, both ends included.
    struct FileLock: 24 { start: u64, end: u64, kind: u32, pid: u32, }
    /// Of GETLK, SETLK and SETLKW; the first is answered with a `FileLock`.
    struct LkIn: 48 { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    struct InitIn: 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11], }
    struct InitOut: 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    struct InterruptIn: 8 { unique: u64, }
    struct Dirent: 24 { ino: u64, off: u64, namelen: u32, kind: u32, }
    struct SxTime: 16 { sec: i64, nsec: u32, reserved: i32, }
    struct Statx: 256 {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16,
        ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    struct StatxIn: 24 { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    struct StatxOut: 288 { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, }
    /// Of a request and of its answer: what is in the payload buffer.
    struct UringInOut: 32 { flags: u64, commit_id: u64, payload_sz: u32, padding: u32, reserved: u64, }
    /// Beginning of the 80 command bytes of a submission.
    struct UringCommand: 24 { flags: u64, commit_id: u64, qid: u16, padding: [u8; 6], }
    struct NotifyInvalInode: 24 { ino: u64, off: i64, len: i64, }
    struct NotifyInvalEntry: 16 { parent: u64, namelen: u32, flags: u32, }
}

/// Length of the fixed structure that follows the header of a request; names and data come after it.
///
/// io_uring delivers the two apart, so parsing takes them apart on /dev/fuse too.
pub(crate) fn fixed_size(code: u32) -> usize {
    match code {
        opcode::FORGET => size_of::<ForgetIn>(),
        opcode::GETATTR => size_of::<GetattrIn>(),
        opcode::SETATTR => size_of::<SetattrIn>(),
        opcode::MKNOD => size_of::<MknodIn>(),
        opcode::MKDIR => size_of::<MkdirIn>(),
        opcode::RENAME => size_of::<RenameIn>(),
        opcode::RENAME2 => size_of::<Rename2In>(),
        opcode::LINK => size_of::<LinkIn>(),
        opcode::FALLOCATE => size_of::<FallocateIn>(),
        opcode::LSEEK => size_of::<LseekIn>(),
        opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64 => size_of::<CopyFileRangeIn>(),
        opcode::SETXATTR => size_of::<SetxattrIn>(),
        opcode::GETXATTR | opcode::LISTXATTR => size_of::<GetxattrIn>(),
        opcode::OPEN | opcode::OPENDIR => size_of::<OpenIn>(),
        opcode::CREATE | opcode::TMPFILE => size_of::<CreateIn>(),
        opcode::READ | opcode::READDIR | opcode::READDIRPLUS => size_of::<ReadIn>(),
        opcode::WRITE => size_of::<WriteIn>(),
        opcode::RELEASE | opcode::RELEASEDIR => size_of::<ReleaseIn>(),
        opcode::FLUSH => size_of::<FlushIn>(),
        opcode::FSYNC | opcode::FSYNCDIR => size_of::<FsyncIn>(),
        opcode::GETLK | opcode::SETLK | opcode::SETLKW => size_of::<LkIn>(),
        opcode::ACCESS => size_of::<AccessIn>(),
        opcode::INIT => size_of::<InitIn>(),
        opcode::INTERRUPT => size_of::<InterruptIn>(),
        opcode::BATCH_FORGET => size_of::<BatchForgetIn>(),
        opcode::STATX => size_of::<StatxIn>(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_travel_as_bytes() {
        let header =
            InHeader { len: 48, opcode: opcode::FORGET, unique: 7, nodeid: 9, ..InHeader::default() };
        assert_eq!(InHeader::from_bytes(header.as_bytes()), Some(header));
        assert_eq!(InHeader::from_bytes(&header.as_bytes()[..39]), None);
        assert_eq!(header.as_bytes()[..8], [48, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn a_short_init_of_an_older_kernel_is_zero_filled() {
        let init = InitIn { major: 7, minor: 31, max_readahead: 1, flags: 2, flags2: 3, unused: [4; 11] };
        let old = InitIn::from_prefix(&init.as_bytes()[..16]);
        assert_eq!(old, InitIn { flags2: 0, unused: [0; 11], ..init });
    }

    #[test]
    fn clone_ioctl_is_the_kernels_number() {
        // _IOR(type, nr, size): direction 2 << 30 | size << 16 | type << 8 | nr
        assert_eq!(DEV_IOC_CLONE, 2 << 30 | 4 << 16 | 229 << 8);
    }
}
