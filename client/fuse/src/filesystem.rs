//! What a filesystem must be able to do to be mounted.
//!
//! The FUSE layer is generic over [`Filesystem`], so that it is tested with a filesystem in memory and FjordFS's
//! adapter stays thin. Attributes and directory entries are the metadata protocol's own messages: no conversion on
//! the way from the server to the kernel's structures.
//!
//! Futures run to completion on the thread that received the request and need not be `Send`. A future of a method that
//! changes nothing (`lookup`, `getattr`, `readlink`, `read`, `read_dir`, `statfs`) is dropped when its caller dies.

use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use bytes::Bytes;
use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{Attr, DirEntry, FileKind, ReadDirReply, Time};
use fjordfs_proto::{FsError, FsResult, InodeId};

use crate::notify::Notifier;

/// Attributes to change; `None` leaves one as it is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttrChange {
    /// Permission bits with suid, sgid and sticky; no file type.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncate or extend to this many bytes.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<TimeChange>,
    /// Modification time.
    pub mtime: Option<TimeChange>,
    /// Change time; `None` is the moment of the change.
    pub ctime: Option<Time>,
    /// Whoever changes the file may not keep its suid and sgid.
    pub clear_suid: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimeChange {
    /// The filesystem's own clock.
    Now,
    /// This one.
    At(Time),
}

/// An inode to make that is not a regular file being opened.
#[derive(Clone, Debug, PartialEq)]
pub struct NewNode {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits with suid, sgid and sticky.
    pub mode: u32,
    /// Bits to take from the mode, unless the directory has a default access control list.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group, unless the parent directory is setgid.
    pub gid: u32,
    /// Device number as the kernel encodes it; 0 for everything but devices.
    pub rdev: u32,
    /// Target of a symbolic link; empty for everything else.
    pub target: Bytes,
}

/// Who asks for a new file, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Permission bits.
    pub mode: u32,
    /// Bits to take from the mode, unless the directory has a default access control list.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group, unless the parent directory is setgid.
    pub gid: u32,
    /// An existing name is `EEXIST`; otherwise an existing regular file is opened.
    pub exclusive: bool,
}

/// What `fallocate` shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The range reads as zeros afterwards and takes no space.
    pub clear: bool,
    /// The file does not become longer.
    pub keep_size: bool,
    /// Whoever changes the file may not keep its suid and sgid.
    pub clear_suid: bool,
}

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
}

/// An entry of a directory that can be told without asking anybody.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KnownEntry {
    /// Attributes as of now: a listing may be older than a write of this mount.
    pub attr: Attr,
    /// How long the name leads there, as [`Filesystem::name_left`].
    pub name_left: Duration,
    /// How long these stay its attributes, as [`Filesystem::attr_left`].
    pub attr_left: Duration,
}

/// Whose lock, and of what kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner {
    /// The kernel's number of a process or an open file.
    pub id: u64,
    /// `flock(2)`: the whole file, and of no concern to `fcntl(2)`.
    pub flock: bool,
}

/// A lock, or a range to be unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// Whose.
    pub owner: LockOwner,
    /// First byte.
    pub start: u64,
    /// Last byte; `u64::MAX` for all there will ever be.
    pub end: u64,
    /// Nobody else may have it.
    pub write: bool,
    /// The process, for who asks; 0 when it is on another machine.
    pub pid: u32,
}

/// Space in a filesystem, in bytes that a user can write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes in all.
    pub capacity: u64,
    /// Bytes that can still be written.
    pub free: u64,
    /// Inodes in use.
    pub files: u64,
}

/// What a former process of the mount has left in the kernel's hands.
#[derive(Clone, Debug, Default)]
pub struct LeftBehind {
    /// Numbers of open files, and what they stand for.
    pub opens: Vec<(u64, InodeId)>,
    /// Owners of locks, other than those of `flock(2)`, and a number of an open file through which each was taken.
    pub lock_users: Vec<(InodeId, u64, u64)>,
    /// Files of which the kernel may cache bytes that are lost.
    pub stale: Vec<InodeId>,
}

/// What the kernel takes as "do not ask again": it then goes its own way.
fn not_served() -> FsError {
    FsError::new(Errno::ENOSYS, "not an operation of this filesystem")
}

/// A filesystem that can be mounted; see the module's text for how its futures are run.
pub trait Filesystem: Send + Sync + 'static {
    /// An open regular file. Dropping it must release it; [`Filesystem::release`] is the orderly way.
    type File: Send + Sync + 'static;
    /// To be dropped when the kernel has the answer to an append.
    type Unanswered: Send + 'static;

    /// Called once, before any request. `notifier` tells the kernel what it caches that is stale: appended data that moved when
    /// it was committed, names and attributes that were recalled.
    fn mounted(&self, notifier: Notifier) {
        drop(notifier);
    }

    /// Called once on each worker thread before its first request, inside its tokio runtime.
    fn enter_worker(&self, index: usize) {
        let _ = index;
    }

    /// The inode called `name` in `parent`.
    fn lookup(&self, parent: InodeId, name: &[u8]) -> impl Future<Output = FsResult<Attr>>;
    /// Attributes, including what this mount wrote and has not yet committed.
    fn getattr(&self, ino: InodeId) -> impl Future<Output = FsResult<Attr>>;
    /// How long the kernel may take it that `name` leads to `ino`, or to nothing, unless the notifier recalls it.
    fn name_left(&self, parent: InodeId, name: &[u8], ino: Option<InodeId>) -> Duration {
        let _ = (parent, name, ino);
        Duration::ZERO
    }
    /// How long the kernel may take these for the attributes of their inode, unless the notifier recalls them.
    fn attr_left(&self, attr: &Attr) -> Duration {
        let _ = attr;
        Duration::ZERO
    }
    /// Changes attributes; answers with the new ones.
    fn setattr(&self, ino: InodeId, change: AttrChange) -> impl Future<Output = FsResult<Attr>>;
    /// Target of a symbolic link.
    fn readlink(&self, ino: InodeId) -> impl Future<Output = FsResult<Vec<u8>>>;
    /// Makes a directory, symbolic link, device, socket, FIFO or an unopened regular file.
    fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> impl Future<Output = FsResult<Attr>>;
    /// Makes and opens a regular file in one step.
    fn create(
        &self,
        parent: InodeId,
        name: &[u8],
        file: NewFile,
    ) -> impl Future<Output = FsResult<(Attr, Self::File)>>;
    /// Makes and opens a regular file without a name, which [`Filesystem::link`] may give it (`O_TMPFILE`).
    fn create_unnamed(
        &self,
        parent: InodeId,
        file: NewFile,
    ) -> impl Future<Output = FsResult<(Attr, Self::File)>> {
        let _ = (parent, file);
        async { Err(not_served()) }
    }
    /// Another name for an inode.
    fn link(&self, ino: InodeId, parent: InodeId, name: &[u8]) -> impl Future<Output = FsResult<Attr>>;
    /// Removes a name that is not a directory's.
    fn unlink(&self, parent: InodeId, name: &[u8]) -> impl Future<Output = FsResult<()>>;
    /// Removes an empty directory.
    fn rmdir(&self, parent: InodeId, name: &[u8]) -> impl Future<Output = FsResult<()>>;
    /// Renames; `flags` are `RENAME_NOREPLACE` (1) or `RENAME_EXCHANGE` (2) or none.
    fn rename(
        &self,
        parent: InodeId,
        name: &[u8],
        new_parent: InodeId,
        new_name: &[u8],
        flags: u32,
    ) -> impl Future<Output = FsResult<()>>;

    /// Value of an extended attribute; `ENODATA` when there is none.
    fn get_xattr(&self, ino: InodeId, name: &[u8]) -> impl Future<Output = FsResult<Bytes>> {
        let _ = (ino, name);
        async { Err(not_served()) }
    }
    /// Sets an extended attribute; `flags` are `XATTR_CREATE` (1) or `XATTR_REPLACE` (2) or none.
    fn set_xattr(
        &self,
        ino: InodeId,
        name: &[u8],
        value: Bytes,
        flags: u32,
    ) -> impl Future<Output = FsResult<()>> {
        let _ = (ino, name, value, flags);
        async { Err(not_served()) }
    }
    /// Sets the access control list, for somebody who may not give the group's rights away: sgid is dropped.
    fn set_access_list(&self, ino: InodeId, value: Bytes) -> impl Future<Output = FsResult<()>> {
        let _ = (ino, value);
        async { Err(not_served()) }
    }
    /// Names of all extended attributes.
    fn list_xattrs(&self, ino: InodeId) -> impl Future<Output = FsResult<Vec<Bytes>>> {
        let _ = ino;
        async { Err(not_served()) }
    }
    /// Removes an extended attribute; `ENODATA` when there is none.
    fn remove_xattr(&self, ino: InodeId, name: &[u8]) -> impl Future<Output = FsResult<()>> {
        let _ = (ino, name);
        async { Err(not_served()) }
    }

    /// Opens a regular file for reading and writing; permissions were checked by the kernel. The attributes are at
    /// least as new as the last change that another client committed before.
    fn open(&self, ino: InodeId) -> impl Future<Output = FsResult<(Attr, Self::File)>>;
    /// Bytes at `offset`, in order, at most `len`; fewer only at the end of the file.
    fn read(&self, file: &Self::File, offset: u64, len: usize) -> impl Future<Output = FsResult<Vec<Bytes>>>;
    /// Whoever writes next may not keep the file's suid and sgid: they go with the write. Says whether there were any.
    fn drop_suid(&self, file: &Self::File) -> bool {
        let _ = file;
        false
    }
    /// Reads through this handle leave the access time as it is.
    fn keep_access_time(&self, file: &Self::File) {
        let _ = file;
    }
    /// Bytes in the file, as far as attributes or reads have told. What nobody else can extend may leave it at 0.
    fn size(&self, file: &Self::File) -> u64 {
        let _ = file;
        0
    }
    /// As [`Filesystem::read`], but into the memory that the kernel takes the bytes from: at most as many as fit, from its start on.
    /// Answers with how many they are. Asked for where the transport has such memory; worth implementing for data that
    /// is not in memory yet.
    fn read_into(
        &self,
        file: &Self::File,
        offset: u64,
        buffer: &mut [u8],
    ) -> impl Future<Output = FsResult<usize>> {
        async move {
            let mut filled = 0;
            for part in self.read(file, offset, buffer.len()).await? {
                let room = &mut buffer[filled..];
                let len = part.len().min(room.len());
                room[..len].copy_from_slice(&part[..len]);
                filled += len;
            }
            Ok(filled)
        }
    }
    /// Writes all of `data` at `offset`.
    fn write(&self, file: &Self::File, offset: u64, data: Bytes) -> impl Future<Output = FsResult<()>>;
    /// Writes all of `data` at the end of the file, wherever that is by now; answers with where it went. A request that is sent again
    /// to another process, because this one died before it had answered, must not have had an effect: nothing of it may be seen
    /// elsewhere while the second is there.
    fn append(
        &self,
        file: &Self::File,
        data: Bytes,
    ) -> impl Future<Output = FsResult<(u64, Self::Unanswered)>>;
    /// Extends the file, or clears a range of it (`fallocate`).
    fn allocate(
        &self,
        file: &Self::File,
        range: Range<u64>,
        how: Allocation,
    ) -> impl Future<Output = FsResult<()>> {
        let _ = (file, range, how);
        async { Err(not_served()) }
    }
    /// Copies bytes between two open files; answers with how many, which may be fewer than asked for.
    fn copy_range(
        &self,
        source: &Self::File,
        target: &Self::File,
        range: CopiedRange,
    ) -> impl Future<Output = FsResult<u64>> {
        let _ = (source, target, range);
        async { Err(not_served()) }
    }
    /// The next byte from `offset` on that is data, or that is in a hole; `ENXIO` when there is none.
    fn seek(&self, file: &Self::File, data: bool, offset: u64) -> impl Future<Output = FsResult<u64>> {
        let _ = (file, data, offset);
        async { Err(not_served()) }
    }
    /// Takes a lock that is free; `EAGAIN` when it is not. Answers with the version of the file's bytes as of then.
    fn try_lock(&self, file: &Self::File, lock: Lock) -> impl Future<Output = FsResult<u64>> {
        let _ = (file, lock);
        async { Err(not_served()) }
    }
    /// As [`Filesystem::try_lock`], but waits for it, until `given_up` ends: then with `EINTR`, unless it was granted already.
    fn lock(
        &self,
        file: &Self::File,
        lock: Lock,
        given_up: impl Future<Output = ()>,
    ) -> impl Future<Output = FsResult<u64>> {
        let _ = (file, lock, given_up);
        async { Err(not_served()) }
    }
    /// Gives up what the owner has in a range. Whoever locks it next sees what was written before.
    fn unlock(&self, file: &Self::File, lock: Lock) -> impl Future<Output = FsResult<()>> {
        let _ = (file, lock);
        async { Err(not_served()) }
    }
    /// As [`Filesystem::unlock`], of what was flushed. It has taken effect before what is asked for after the first poll of it.
    fn unlock_flushed(&self, file: &Self::File, lock: Lock) -> impl Future<Output = FsResult<()>> {
        let _ = (file, lock);
        async { Err(not_served()) }
    }
    /// Whether anybody on this mount may hold a `flock` on the file.
    fn holds_flock(&self, file: &Self::File) -> bool {
        let _ = file;
        false
    }
    /// The first lock that is in the way of this one.
    fn test_lock(&self, file: &Self::File, lock: Lock) -> impl Future<Output = FsResult<Option<Lock>>> {
        let _ = (file, lock);
        async { Err(not_served()) }
    }
    /// Whether an owner may hold locks on the file.
    fn may_hold_locks(&self, file: &Self::File, owner: LockOwner) -> bool {
        let _ = (file, owner);
        false
    }
    /// What `close` promises: clients that open the file afterwards see what was written.
    fn flush(&self, file: &Self::File) -> impl Future<Output = FsResult<()>>;
    /// What `fsync` promises: what was written survives power failure.
    fn fsync(&self, file: &Self::File) -> impl Future<Output = FsResult<()>>;
    /// A former process has left these requests unanswered, and no others: they are about to be served.
    fn come_again(&self, requests: &[u64]) {
        let _ = requests;
    }
    /// Runs what changes names or extended attributes for a request of the kernel. A successor that gets the request again is to do it once.
    fn for_request<T>(&self, unique: u64, work: impl Future<Output = T>) -> impl Future<Output = T> {
        let _ = unique;
        work
    }
    /// The kernel has taken in the answer to such a request.
    fn request_answered(&self, unique: u64) {
        let _ = unique;
    }
    /// The kernel is about to know an open file by this number. To be noted where a successor of this process finds it.
    fn leave_open(&self, number: u64, file: &Self::File) {
        let _ = (number, file);
    }
    /// The kernel has given the number up.
    fn leave_closed(&self, number: u64) {
        let _ = number;
    }
    /// The open file that a former process has given this number, with its inode; `None` when there is none. One caller at a time.
    fn resume(&self, number: u64) -> impl Future<Output = FsResult<Option<(InodeId, Self::File)>>> {
        let _ = number;
        async { Ok(None) }
    }
    /// An owner of locks, other than those of `flock(2)`, is about to lock through an open file, or does not use it any more.
    fn leave_lock_user(&self, ino: InodeId, owner: u64, number: u64, is_used: bool) {
        let _ = (ino, owner, number, is_used);
    }
    /// What a former process has left.
    fn left_behind(&self) -> LeftBehind {
        LeftBehind::default()
    }
    /// The last descriptor was closed.
    fn release(&self, file: &Self::File) -> impl Future<Output = FsResult<()>>;

    /// Data versions between which only this mount changed the file: pages cached as of the first are right as of the
    /// last. An empty range when that is not known.
    fn own_versions(&self, file: &Self::File) -> RangeInclusive<u64> {
        let _ = file;
        RangeInclusive::new(1, 0)
    }

    /// Entries after `cookie` (0 begins), without "." and ".."; at most `limit`, with attributes if asked for. Cookies are
    /// at least 3 and stay valid while entries come and go.
    fn read_dir(
        &self,
        ino: InodeId,
        cookie: u64,
        limit: u32,
        attributes: bool,
    ) -> impl Future<Output = FsResult<ReadDirReply>>;
    /// What can be told of these entries of a directory without asking anybody: as many, or none of them.
    fn known_entries(&self, parent: InodeId, entries: &[DirEntry]) -> Vec<Option<KnownEntry>> {
        let _ = (parent, entries);
        Vec::new()
    }
    /// Space left.
    fn statfs(&self) -> impl Future<Output = FsResult<Space>>;
    /// Every name this mount changed survives power failure (`fsync` of a directory).
    fn sync_namespace(&self) -> impl Future<Output = FsResult<()>>;
    /// Everything this mount wrote and every name it changed survives power failure (`syncfs`).
    fn sync_all(&self) -> impl Future<Output = FsResult<()>>;
}
