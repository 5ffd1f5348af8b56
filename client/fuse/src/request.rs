//! From a message of the kernel to a typed request.
//!
//! Everything is bounds-checked and nothing panics on any bytes: the kernel is trusted to be well-meaning, but a mount
//! outlives kernel versions, and a property test feeds this noise. Names and data stay shared slices of the message.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use bytes::Bytes;
use fjordfs_proto::{InodeId, NAME_MAX, SYMLINK_MAX};

use crate::abi::{self, InHeader, Pod, opcode};
use crate::transport::Message;

/// Who asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Thread id as this process sees it; 0 for the kernel itself and for processes of another pid namespace.
    pub(crate) pid: u32,
}

/// One request.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// By which the kernel interrupts it.
    pub(crate) unique: u64,
    pub(crate) caller: Caller,
    /// The inode the request is about; for most namespace operations the parent directory.
    pub(crate) node: InodeId,
    pub(crate) operation: Operation,
}

/// What is asked, with the arguments FjordFS uses.
#[derive(Clone, Debug)]
pub(crate) enum Operation {
    Init,
    Destroy,
    Lookup {
        name: Bytes,
    },
    /// The kernel dropped these inodes from its cache, which as many answers had brought it. Never answered.
    Forget(Vec<(InodeId, u64)>),
    Getattr,
    Setattr(Box<abi::SetattrIn>),
    Statx,
    Readlink,
    Symlink {
        name: Bytes,
        target: Bytes,
    },
    Mknod {
        name: Bytes,
        mode: u32,
        umask: u32,
        rdev: u32,
    },
    Mkdir {
        name: Bytes,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Bytes,
    },
    Rmdir {
        name: Bytes,
    },
    Rename {
        name: Bytes,
        new_parent: InodeId,
        new_name: Bytes,
        flags: u32,
    },
    Link {
        ino: InodeId,
        name: Bytes,
    },
    Getxattr {
        name: Bytes,
        size: u32,
    },
    Setxattr {
        name: Bytes,
        value: Bytes,
        flags: u32,
        setxattr_flags: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: Bytes,
    },
    Open {
        flags: u32,
    },
    Create {
        name: Bytes,
        flags: u32,
        mode: u32,
        umask: u32,
    },
    /// `O_TMPFILE` in the directory.
    Tmpfile {
        flags: u32,
        mode: u32,
        umask: u32,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
        /// The answer goes into the page cache.
        fills_pages: bool,
    },
    Write {
        fh: u64,
        offset: u64,
        write_flags: u32,
        flags: u32,
        data: Bytes,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    CopyFileRange {
        fh_in: u64,
        offset_in: u64,
        fh_out: u64,
        offset_out: u64,
        length: u64,
        /// The answer has 64 bits.
        wide: bool,
    },
    /// For data or a hole only; other seeks stay in the kernel.
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    /// Which lock of somebody else is in the way.
    Getlk {
        fh: u64,
        lock: LockArguments,
    },
    /// Locks or unlocks.
    Setlk {
        fh: u64,
        lock: LockArguments,
        wait: bool,
    },
    Flush {
        fh: u64,
        lock_owner: u64,
    },
    Fsync {
        fh: u64,
    },
    Release {
        fh: u64,
    },
    Opendir,
    Readdir {
        fh: u64,
        offset: u64,
        size: u32,
        plus: bool,
    },
    Releasedir {
        fh: u64,
    },
    Fsyncdir,
    Statfs,
    Syncfs,
    /// A waiting caller got a signal; `unique` names its request. Never answered.
    Interrupt {
        unique: u64,
    },
    /// Anything else, by its code.
    Other(u32),
}

/// A lock as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LockArguments {
    /// A process, or an open file.
    pub(crate) owner: u64,
    pub(crate) is_flock: bool,
    pub(crate) start: u64,
    /// Included.
    pub(crate) end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(crate) kind: u32,
    pub(crate) pid: u32,
}

/// Why a message is not a request that can be served; [`ParseError::errno`] is the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ParseError {
    #[error("request {opcode} of {len} bytes is too short")]
    Truncated { opcode: u32, len: usize },
    #[error("request {opcode} has a name of {len} bytes")]
    NameTooLong { opcode: u32, len: usize },
    #[error("request {opcode} has an empty name or one with a slash")]
    BadName { opcode: u32 },
}

impl ParseError {
    pub(crate) fn errno(self) -> i32 {
        match self {
            ParseError::Truncated { .. } => libc::EIO,
            ParseError::NameTooLong { .. } => libc::ENAMETOOLONG,
            ParseError::BadName { .. } => libc::EINVAL,
        }
    }
}

impl Request {
    /// Reads a message.
    pub(crate) fn parse(message: &Message) -> Result<Request, ParseError> {
        let header = &message.header;
        Ok(Request {
            unique: header.unique,
            caller: Caller { uid: header.uid, gid: header.gid, pid: header.pid },
            node: InodeId(header.nodeid),
            operation: Arguments { header, fixed: &message.fixed, rest: message.rest.clone() }.operation()?,
        })
    }

    /// Whether dropping the request half-way leaves nothing changed, so that it may be given up when its caller dies.
    /// Mutations may have been sent already; they run to their end and nobody hears the answer.
    pub(crate) fn is_interruptible(&self) -> bool {
        use Operation::*;
        matches!(
            self.operation,
            Lookup { .. }
                | Getattr
                | Statx
                | Readlink
                | Getxattr { .. }
                | Listxattr { .. }
                | Read { .. }
                | Lseek { .. }
                | Readdir { .. }
                | Statfs
        )
    }

    /// Whether what is not done when the mount ends is done by the client when it ends.
    pub(crate) fn ends_with_mount(&self) -> bool {
        use Operation::*;
        matches!(self.operation, Flush { .. } | Fsync { .. } | Release { .. } | Fsyncdir | Syncfs)
    }
}

/// The unread part of a message.
struct Arguments<'a> {
    header: &'a InHeader,
    fixed: &'a [u8],
    rest: Bytes,
}

impl Arguments<'_> {
    fn operation(mut self) -> Result<Operation, ParseError> {
        Ok(match self.header.opcode {
            opcode::INIT => Operation::Init,
            opcode::DESTROY => Operation::Destroy,
            opcode::LOOKUP => Operation::Lookup { name: self.name()? },
            opcode::FORGET => {
                let input: abi::ForgetIn = self.fixed()?;
                Operation::Forget(vec![(InodeId(self.header.nodeid), input.nlookup)])
            }
            opcode::BATCH_FORGET => {
                let count = self.fixed::<abi::BatchForgetIn>()?.count as usize;
                // Bounded by what is there, whatever the count says.
                let (records, _) = self.rest.as_chunks::<{ size_of::<abi::ForgetOne>() }>();
                let nodes =
                    records.iter().take(count).filter_map(|record| abi::ForgetOne::from_bytes(record));
                Operation::Forget(nodes.map(|record| (InodeId(record.nodeid), record.nlookup)).collect())
            }
            opcode::GETATTR => Operation::Getattr,
            opcode::SETATTR => Operation::Setattr(Box::new(self.fixed()?)),
            opcode::STATX => Operation::Statx,
            opcode::READLINK => Operation::Readlink,
            opcode::SYMLINK => {
                let name = self.name()?;
                let target = self.string()?;
                if target.len() > SYMLINK_MAX {
                    return Err(ParseError::NameTooLong { opcode: self.header.opcode, len: target.len() });
                }
                Operation::Symlink { name, target }
            }
            opcode::MKNOD => {
                let input: abi::MknodIn = self.fixed()?;
                let abi::MknodIn { mode, umask, rdev, .. } = input;
                Operation::Mknod { name: self.name()?, mode, umask, rdev }
            }
            opcode::MKDIR => {
                let input: abi::MkdirIn = self.fixed()?;
                Operation::Mkdir { name: self.name()?, mode: input.mode, umask: input.umask }
            }
            opcode::UNLINK => Operation::Unlink { name: self.name()? },
            opcode::RMDIR => Operation::Rmdir { name: self.name()? },
            opcode::RENAME => {
                let input: abi::RenameIn = self.fixed()?;
                self.rename(input.newdir, 0)?
            }
            opcode::RENAME2 => {
                let input: abi::Rename2In = self.fixed()?;
                self.rename(input.newdir, input.flags)?
            }
            opcode::LINK => {
                let input: abi::LinkIn = self.fixed()?;
                Operation::Link { ino: InodeId(input.oldnodeid), name: self.name()? }
            }
            opcode::GETXATTR => {
                let size = self.fixed::<abi::GetxattrIn>()?.size;
                Operation::Getxattr { name: self.string()?, size }
            }
            opcode::SETXATTR => {
                let input: abi::SetxattrIn = self.fixed()?;
                let name = self.string()?;
                let value = self.data(input.size)?;
                let abi::SetxattrIn { flags, setxattr_flags, .. } = input;
                Operation::Setxattr { name, value, flags, setxattr_flags }
            }
            opcode::LISTXATTR => Operation::Listxattr { size: self.fixed::<abi::GetxattrIn>()?.size },
            opcode::REMOVEXATTR => Operation::Removexattr { name: self.string()? },
            opcode::OPEN => {
                let input: abi::OpenIn = self.fixed()?;
                Operation::Open { flags: input.flags }
            }
            opcode::CREATE => {
                let input: abi::CreateIn = self.fixed()?;
                let abi::CreateIn { flags, mode, umask, .. } = input;
                Operation::Create { name: self.name()?, flags, mode, umask }
            }
            // The name that follows is a place-holder.
            opcode::TMPFILE => {
                let abi::CreateIn { flags, mode, umask, .. } = self.fixed()?;
                Operation::Tmpfile { flags, mode, umask }
            }
            opcode::READ => {
                let input: abi::ReadIn = self.fixed()?;
                let fills_pages = input.read_flags & abi::READ_LOCKOWNER == 0;
                Operation::Read { fh: input.fh, offset: input.offset, size: input.size, fills_pages }
            }
            opcode::WRITE => {
                let input: abi::WriteIn = self.fixed()?;
                let data = self.data(input.size)?;
                Operation::Write {
                    fh: input.fh,
                    offset: input.offset,
                    write_flags: input.write_flags,
                    flags: input.flags,
                    data,
                }
            }
            opcode::FALLOCATE => {
                let abi::FallocateIn { fh, offset, length, mode, .. } = self.fixed()?;
                Operation::Fallocate { fh, offset, length, mode }
            }
            code @ (opcode::COPY_FILE_RANGE | opcode::COPY_FILE_RANGE_64) => {
                let input: abi::CopyFileRangeIn = self.fixed()?;
                Operation::CopyFileRange {
                    fh_in: input.fh_in,
                    offset_in: input.off_in,
                    fh_out: input.fh_out,
                    offset_out: input.off_out,
                    length: input.len,
                    wide: code == opcode::COPY_FILE_RANGE_64,
                }
            }
            opcode::LSEEK => {
                let abi::LseekIn { fh, offset, whence, .. } = self.fixed()?;
                Operation::Lseek { fh, offset, whence }
            }
            opcode::GETLK => {
                let (fh, lock) = self.lock()?;
                Operation::Getlk { fh, lock }
            }
            code @ (opcode::SETLK | opcode::SETLKW) => {
                let (fh, lock) = self.lock()?;
                Operation::Setlk { fh, lock, wait: code == opcode::SETLKW }
            }
            opcode::FLUSH => {
                let abi::FlushIn { fh, lock_owner, .. } = self.fixed()?;
                Operation::Flush { fh, lock_owner }
            }
            opcode::FSYNC => Operation::Fsync { fh: self.fixed::<abi::FsyncIn>()?.fh },
            opcode::RELEASE => Operation::Release { fh: self.fixed::<abi::ReleaseIn>()?.fh },
            opcode::OPENDIR => Operation::Opendir,
            code @ (opcode::READDIR | opcode::READDIRPLUS) => {
                let input: abi::ReadIn = self.fixed()?;
                let plus = code == opcode::READDIRPLUS;
                Operation::Readdir { fh: input.fh, offset: input.offset, size: input.size, plus }
            }
            opcode::RELEASEDIR => Operation::Releasedir { fh: self.fixed::<abi::ReleaseIn>()?.fh },
            opcode::FSYNCDIR => Operation::Fsyncdir,
            opcode::STATFS => Operation::Statfs,
            opcode::SYNCFS => Operation::Syncfs,
            opcode::INTERRUPT => Operation::Interrupt { unique: self.fixed::<abi::InterruptIn>()?.unique },
            code => Operation::Other(code),
        })
    }

    fn lock(&self) -> Result<(u64, LockArguments), ParseError> {
        let abi::LkIn { fh, owner, lk, lk_flags, .. } = self.fixed()?;
        let abi::FileLock { start, end, kind, pid } = lk;
        let is_flock = lk_flags & abi::LK_FLOCK != 0;
        Ok((fh, LockArguments { owner, is_flock, start, end, kind, pid }))
    }

    fn rename(&mut self, new_parent: u64, flags: u32) -> Result<Operation, ParseError> {
        let name = self.name()?;
        let new_name = self.name()?;
        Ok(Operation::Rename { name, new_parent: InodeId(new_parent), new_name, flags })
    }

    fn fixed<T: Pod>(&self) -> Result<T, ParseError> {
        T::from_bytes(self.fixed).ok_or_else(|| self.truncated())
    }

    /// The next `size` bytes.
    fn data(&mut self, size: u32) -> Result<Bytes, ParseError> {
        let size = size as usize;
        if self.rest.len() < size {
            return Err(self.truncated());
        }
        Ok(self.rest.split_to(size))
    }

    /// The next NUL-terminated string.
    fn string(&mut self) -> Result<Bytes, ParseError> {
        let end = self.rest.iter().position(|&byte| byte == 0).ok_or_else(|| self.truncated())?;
        let string = self.rest.split_to(end);
        let _nul = self.rest.split_to(1);
        Ok(string)
    }

    /// The next string, which is the name of a directory entry.
    fn name(&mut self) -> Result<Bytes, ParseError> {
        let name = self.string()?;
        let opcode = self.header.opcode;
        if name.len() > NAME_MAX {
            return Err(ParseError::NameTooLong { opcode, len: name.len() });
        }
        if !is_entry_name(&name) {
            return Err(ParseError::BadName { opcode });
        }
        Ok(name)
    }

    fn truncated(&self) -> ParseError {
        ParseError::Truncated { opcode: self.header.opcode, len: self.fixed.len() + self.rest.len() }
    }
}

/// Whether bytes can stand between two slashes: the kernel rejects a whole listing that has one that cannot.
pub(crate) fn is_entry_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.iter().any(|&byte| byte == b'/' || byte == 0)
}

/// A name as a person reads it.
pub(crate) fn display(name: &[u8]) -> std::path::Display<'_> {
    std::path::Path::new(OsStr::from_bytes(name)).display()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(opcode: u32, body: &[u8]) -> Message {
        let header = InHeader {
            len: (40 + body.len()) as u32,
            opcode,
            unique: 2,
            nodeid: 1,
            uid: 10,
            gid: 20,
            pid: 30,
            ..InHeader::default()
        };
        Message::from_bytes(Bytes::from([header.as_bytes(), body].concat())).unwrap()
    }

    fn operation(opcode: u32, body: &[u8]) -> Result<Operation, ParseError> {
        Request::parse(&message(opcode, body)).map(|request| request.operation)
    }

    #[test]
    fn names_are_taken_apart_and_checked() {
        let body = [abi::Rename2In { newdir: 5, flags: 1, padding: 0 }.as_bytes(), b"old\0new\0"].concat();
        match operation(opcode::RENAME2, &body).unwrap() {
            Operation::Rename { name, new_parent, new_name, flags } => {
                assert_eq!(
                    (&name[..], &new_name[..], new_parent, flags),
                    (&b"old"[..], &b"new"[..], InodeId(5), 1)
                );
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(operation(opcode::LOOKUP, b"name"), Err(ParseError::Truncated { .. })));
        assert!(matches!(operation(opcode::LOOKUP, b"\0"), Err(ParseError::BadName { .. })));
        assert!(matches!(operation(opcode::LOOKUP, b"a/b\0"), Err(ParseError::BadName { .. })));
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(operation(opcode::LOOKUP, &long).unwrap_err().errno(), libc::ENAMETOOLONG);
        assert!(operation(opcode::LOOKUP, &long[1..]).is_ok());
    }

    #[test]
    fn write_takes_exactly_its_size() {
        let input = abi::WriteIn { fh: 3, offset: 9, size: 4, ..abi::WriteIn::default() };
        let body = [input.as_bytes(), b"abcdef"].concat();
        match operation(opcode::WRITE, &body).unwrap() {
            Operation::Write { fh: 3, offset: 9, data, .. } => assert_eq!(&data[..], b"abcd"),
            other => panic!("{other:?}"),
        }
        assert!(operation(opcode::WRITE, &body[..43]).is_err());
    }

    #[test]
    fn forget_counts_are_not_believed() {
        let one = abi::ForgetOne { nodeid: 8, nlookup: 1 };
        let body = [abi::BatchForgetIn { count: u32::MAX, dummy: 0 }.as_bytes(), one.as_bytes()].concat();
        match operation(opcode::BATCH_FORGET, &body).unwrap() {
            Operation::Forget(nodes) => assert_eq!(nodes, [(InodeId(8), 1)]),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn extensions_at_the_end_are_left_out() {
        let header = InHeader { opcode: opcode::LOOKUP, total_extlen: 1, ..InHeader::default() };
        let bytes = [header.as_bytes(), b"name\0", &[0xff; 8]].concat();
        let message = Message::from_bytes(Bytes::from(bytes)).unwrap();
        assert_eq!(&message.rest[..], b"name\0");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(code in 0u32..60, body in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = operation(code, &body);
        }

        #[test]
        fn no_message_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(message) = Message::from_bytes(Bytes::from(bytes)) {
                let _ = Request::parse(&message);
            }
        }
    }
}
