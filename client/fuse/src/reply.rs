//! From the filesystem's answers to the kernel's structures.

use std::time::Duration;

use bytes::Bytes;
use fjordfs_proto::pb::meta::{Attr, FileKind, Time};
use fjordfs_proto::{InodeId, NAME_MAX};

use crate::abi::{self, Pod};
use crate::filesystem::Space;

/// Block size reported to programs, bytes. Not the size worth reading at once, which is larger: the kernel takes an inode's block
/// size for page cache arithmetic, and one above the page size has been a source of kernel bugs.
const BLOCK_SIZE: u32 = 4096;

/// Inode numbers are never reused, so one generation serves for all.
const GENERATION: u64 = 0;

/// What goes back after the header.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "a reply is moved a few times and never stored: cheaper than an allocation each"
)]
pub(crate) enum Reply {
    /// Nothing is sent: FORGET and INTERRUPT have no answer.
    None,
    /// A failure, as an errno.
    Error(i32),
    /// Success without a body.
    Empty,
    /// One or two structures.
    Fixed(FixedBody),
    /// Names, directory entries.
    Bytes(Bytes),
    /// File data in pieces, sent without being put together.
    Parts(Vec<Bytes>),
    /// As many bytes of file data, which are in the slot's payload buffer already.
    InPayload(usize),
}

/// Room for the largest fixed answer, kept off the heap.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FixedBody {
    bytes: [u8; FixedBody::SIZE],
    len: usize,
}

impl FixedBody {
    const SIZE: usize = size_of::<abi::StatxOut>();

    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Reply {
    pub(crate) fn of<T: Pod>(value: &T) -> Reply {
        Reply::of_two(value.as_bytes(), &[])
    }

    fn of_two(first: &[u8], second: &[u8]) -> Reply {
        let mut body = FixedBody { bytes: [0; FixedBody::SIZE], len: first.len() + second.len() };
        body.bytes[..first.len()].copy_from_slice(first);
        body.bytes[first.len()..first.len() + second.len()].copy_from_slice(second);
        Reply::Fixed(body)
    }

    /// CREATE answers with an entry and an open file.
    pub(crate) fn created(entry: &abi::EntryOut, open: &abi::OpenOut) -> Reply {
        Reply::of_two(entry.as_bytes(), open.as_bytes())
    }
}

/// How long the kernel may use names and attributes without asking again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Validity {
    pub(crate) entry: Duration,
    pub(crate) attr: Duration,
}

/// Type bits of a mode.
pub(crate) fn type_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Regular | FileKind::Unspecified => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
    }
}

/// The kind that type bits name; `None` for bits that are none.
pub(crate) fn kind_of_mode(mode: u32) -> Option<FileKind> {
    Some(match mode & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFLNK => FileKind::Symlink,
        libc::S_IFIFO => FileKind::Fifo,
        libc::S_IFSOCK => FileKind::Socket,
        libc::S_IFCHR => FileKind::CharDevice,
        libc::S_IFBLK => FileKind::BlockDevice,
        _ => return None,
    })
}

fn split(time: Option<Time>) -> (i64, u32) {
    // The kernel refuses an inode whose nanoseconds are out of range.
    time.map_or((0, 0), |time| (time.sec, time.nsec.min(999_999_999)))
}

/// Attributes in the kernel's order.
pub(crate) fn attr_record(attr: &Attr) -> abi::AttrRecord {
    let (atime, atimensec) = split(attr.atime);
    let (mtime, mtimensec) = split(attr.mtime);
    let (ctime, ctimensec) = split(attr.ctime);
    abi::AttrRecord {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.allocated.div_ceil(512),
        // Times before 1970 are the two's complement, which the kernel turns back.
        atime: atime.cast_unsigned(),
        mtime: mtime.cast_unsigned(),
        ctime: ctime.cast_unsigned(),
        atimensec,
        mtimensec,
        ctimensec,
        mode: type_bits(attr.kind()) | (attr.mode & 0o7777),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

/// Answer to GETATTR and SETATTR.
pub(crate) fn attr_out(attr: &Attr, validity: Validity) -> abi::AttrOut {
    abi::AttrOut {
        attr_valid: validity.attr.as_secs(),
        attr_valid_nsec: validity.attr.subsec_nanos(),
        dummy: 0,
        attr: attr_record(attr),
    }
}

/// Answer to everything that finds or makes a name.
pub(crate) fn entry_out(attr: &Attr, validity: Validity) -> abi::EntryOut {
    abi::EntryOut {
        nodeid: attr.ino,
        generation: GENERATION,
        entry_valid: validity.entry.as_secs(),
        attr_valid: validity.attr.as_secs(),
        entry_valid_nsec: validity.entry.subsec_nanos(),
        attr_valid_nsec: validity.attr.subsec_nanos(),
        attr: attr_record(attr),
    }
}

/// Answer to a LOOKUP that found nothing, which the kernel may remember.
pub(crate) fn absent_out(left: Duration) -> abi::EntryOut {
    abi::EntryOut {
        entry_valid: left.as_secs(),
        entry_valid_nsec: left.subsec_nanos(),
        ..abi::EntryOut::default()
    }
}

/// Answer to STATX, which exists for the birth time.
pub(crate) fn statx_out(attr: &Attr, validity: Validity) -> abi::StatxOut {
    let time = |time: Option<Time>| {
        let (sec, nsec) = split(time);
        abi::SxTime { sec, nsec, reserved: 0 }
    };
    let record = attr_record(attr);
    let mut mask = libc::STATX_BASIC_STATS;
    if attr.btime.is_some() {
        mask |= libc::STATX_BTIME;
    }
    abi::StatxOut {
        attr_valid: validity.attr.as_secs(),
        attr_valid_nsec: validity.attr.subsec_nanos(),
        stat: abi::Statx {
            mask,
            blksize: record.blksize,
            nlink: record.nlink,
            uid: record.uid,
            gid: record.gid,
            mode: record.mode as u16, // type and permission bits fit in 16
            ino: record.ino,
            size: record.size,
            blocks: record.blocks,
            atime: time(attr.atime),
            btime: time(attr.btime),
            ctime: time(attr.ctime),
            mtime: time(attr.mtime),
            // The kernel's 32-bit encoding: minor bits 0-7, major 8-19, minor 20-31.
            rdev_major: (attr.rdev >> 8) & 0xfff,
            rdev_minor: (attr.rdev & 0xff) | ((attr.rdev >> 12) & 0xf_ff00),
            ..abi::Statx::default()
        },
        ..abi::StatxOut::default()
    }
}

/// Answer to STATFS.
pub(crate) fn statfs_out(space: &Space) -> abi::StatfsOut {
    let blocks = |bytes: u64| bytes / u64::from(BLOCK_SIZE);
    // Inodes have no limit of their own; as many as there are blocks left is what `df -i` can make sense of.
    let inodes_free = blocks(space.free);
    abi::StatfsOut {
        blocks: blocks(space.capacity),
        bfree: blocks(space.free),
        bavail: blocks(space.free),
        files: space.files.saturating_add(inodes_free),
        ffree: inodes_free,
        bsize: BLOCK_SIZE,
        namelen: NAME_MAX as u32,
        frsize: BLOCK_SIZE,
        ..abi::StatfsOut::default()
    }
}

/// A directory listing as large as the kernel's buffer.
pub(crate) struct DirentBuffer {
    bytes: Vec<u8>,
    size_max: usize,
}

impl DirentBuffer {
    pub(crate) fn new(size_max: usize) -> DirentBuffer {
        DirentBuffer { bytes: Vec::with_capacity(size_max), size_max }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes left.
    pub(crate) fn room(&self) -> usize {
        self.size_max - self.bytes.len()
    }

    /// Bytes that an entry takes.
    pub(crate) fn size_of(name: &[u8], plus: bool) -> usize {
        let head = if plus { size_of::<abi::EntryOut>() } else { 0 } + size_of::<abi::Dirent>();
        (head + name.len()).next_multiple_of(8)
    }

    /// Adds an entry; false when it does not fit, and then nothing was added. `plus` is what READDIRPLUS puts before it.
    #[must_use]
    pub(crate) fn push(
        &mut self,
        ino: InodeId,
        cookie: u64,
        kind: FileKind,
        name: &[u8],
        plus: Option<&abi::EntryOut>,
    ) -> bool {
        let padded = DirentBuffer::size_of(name, plus.is_some());
        if padded > self.room() {
            return false;
        }
        let end = self.bytes.len() + padded;
        if let Some(entry) = plus {
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        let dirent = abi::Dirent {
            ino: ino.0,
            off: cookie,
            namelen: name.len() as u32,
            // DT_* are the type bits shifted down.
            kind: type_bits(kind) >> 12,
        };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    pub(crate) fn into_reply(self) -> Reply {
        Reply::Bytes(Bytes::from(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_arrive_in_the_kernels_order() {
        let attr = Attr {
            ino: 7,
            kind: FileKind::Directory as i32,
            mode: 0o2755,
            nlink: 2,
            size: 10,
            allocated: 513,
            mtime: Some(Time { sec: -5, nsec: 2_000_000_000 }),
            ..Attr::default()
        };
        let record = attr_record(&attr);
        assert_eq!(record.mode, libc::S_IFDIR | 0o2755);
        assert_eq!(record.blocks, 2);
        assert_eq!((record.mtime.cast_signed(), record.mtimensec), (-5, 999_999_999));
        let entry = entry_out(&attr, Validity { entry: Duration::from_millis(1500), attr: Duration::ZERO });
        assert_eq!(
            (entry.nodeid, entry.entry_valid, entry.entry_valid_nsec, entry.attr_valid),
            (7, 1, 500_000_000, 0)
        );
    }

    #[test]
    fn device_numbers_are_split_as_the_kernel_joined_them() {
        // makedev(259, 70000) in the kernel's encoding
        let (major, minor) = (259u32, 70000u32);
        let rdev = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
        let out = statx_out(&Attr { rdev, ..Attr::default() }, Validity::default());
        assert_eq!((out.stat.rdev_major, out.stat.rdev_minor), (major, minor));
        assert_eq!(out.stat.mask & libc::STATX_BTIME, 0);
    }

    #[test]
    fn a_listing_never_exceeds_its_buffer() {
        let mut buffer = DirentBuffer::new(64);
        assert!(buffer.push(InodeId(1), 1, FileKind::Directory, b".", None)); // 32 bytes
        assert!(!buffer.push(InodeId(1), 2, FileKind::Regular, b"123456789", None)); // 40
        assert!(buffer.push(InodeId(1), 2, FileKind::Regular, b"12345678", None)); // 32
        assert!(!buffer.push(InodeId(1), 3, FileKind::Regular, b"x", None));
        match buffer.into_reply() {
            Reply::Bytes(bytes) => {
                assert_eq!(bytes.len(), 64);
                assert_eq!(bytes[20], libc::DT_DIR);
                assert_eq!(bytes[52], libc::DT_REG);
            }
            other => panic!("{other:?}"),
        }
    }
}
