//! FjordFS as a [`Filesystem`]: translation only, so that everything else is tested without FUSE.

use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::Bytes;
use fjordfs_client::{Client, File, LockUser, Recalled, SetTime, SetXattrMode, Unanswered};
use fjordfs_proto::pb::meta::{Attr, DirEntry, ReadDirReply};
use fjordfs_proto::{FsResult, InodeId};
use parking_lot::Mutex;
use tokio::sync::{broadcast::error::RecvError, mpsc};

use crate::filesystem::{
    Allocation, AttrChange, CopiedRange, Filesystem, KnownEntry, LeftBehind, Lock, LockOwner, NewFile,
    NewNode, Space, TimeChange,
};
use crate::mount::{Mount, MountError, mount_filesystem, mount_kept, resume_filesystem};
use crate::notify::Notifier;
use crate::options::MountOptions;
use crate::session::Agreed;

/// Mounts what a client is connected to. The client outlives the mount: after [`Mount::wait`] or [`Mount::unmount`] the caller
/// shuts it down, which writes back what is left and reports whether that succeeded.
pub fn mount(client: Client, options: MountOptions) -> Result<Mount, MountError> {
    mount_filesystem(Adapter { client, notifier: Mutex::new(None) }, &options)
}

/// As [`mount`], and hands the descriptors to a supervisor, so that a successor of this process can take over. Over /dev/fuse only.
pub fn mount_supervised(
    client: Client,
    options: MountOptions,
    keep: &mut dyn FnMut(&[OwnedFd], Agreed) -> io::Result<()>,
) -> Result<Mount, MountError> {
    mount_kept(Adapter { client, notifier: Mutex::new(None) }, &options, keep)
}

/// Goes on with the mount of a process that has ended. `client` is its successor, with the same session; `options` are the same.
pub fn resume(
    client: Client,
    options: MountOptions,
    devices: Vec<OwnedFd>,
    agreed: Agreed,
) -> Result<Mount, MountError> {
    let first_number = client.first_number();
    resume_filesystem(Adapter { client, notifier: Mutex::new(None) }, &options, devices, agreed, first_number)
}

struct Adapter {
    client: Client,
    /// Until the first worker takes it.
    notifier: Mutex<Option<Notifier>>,
}

impl Filesystem for Adapter {
    type File = File;
    type Unanswered = Unanswered;

    fn mounted(&self, notifier: Notifier) {
        *self.notifier.lock() = Some(notifier);
    }

    fn name_left(&self, parent: InodeId, name: &[u8], ino: Option<InodeId>) -> Duration {
        self.client.name_left(parent, name, ino)
    }

    fn attr_left(&self, attr: &Attr) -> Duration {
        self.client.attr_left(attr)
    }

    fn enter_worker(&self, index: usize) {
        // Data connections of this worker live on its own runtime.
        fjordfs_client::enter_lane(index);
        if let Some(notifier) = self.notifier.lock().take() {
            tokio::task::spawn_local(announce_recalls(self.client.recalls(), notifier.clone()));
            tokio::task::spawn_local(announce_moved_appends(self.client.clone(), notifier));
        }
    }

    async fn lookup(&self, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        self.client.lookup(parent, name).await
    }

    async fn getattr(&self, ino: InodeId) -> FsResult<Attr> {
        self.client.getattr(ino).await
    }

    async fn setattr(&self, ino: InodeId, change: AttrChange) -> FsResult<Attr> {
        let AttrChange { mode, uid, gid, size, atime, mtime, ctime, clear_suid } = change;
        let time = |time: TimeChange| match time {
            TimeChange::Now => SetTime::Now,
            TimeChange::At(time) => SetTime::To(time),
        };
        let change = fjordfs_client::AttrChange {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(time),
            mtime: mtime.map(time),
            ctime,
            clear_suid,
            policy: None,
        };
        self.client.setattr(ino, change).await
    }

    async fn readlink(&self, ino: InodeId) -> FsResult<Vec<u8>> {
        self.client.readlink(ino).await
    }

    async fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> FsResult<Attr> {
        let NewNode { kind, mode, umask, uid, gid, rdev, target } = node;
        let node = fjordfs_client::NewNode { kind, mode, umask, uid, gid, rdev, target: target.into() };
        self.client.make(parent, name, node).await
    }

    async fn create(&self, parent: InodeId, name: &[u8], file: NewFile) -> FsResult<(Attr, File)> {
        self.client.create(parent, name, new_file(file)).await
    }

    async fn create_unnamed(&self, parent: InodeId, file: NewFile) -> FsResult<(Attr, File)> {
        self.client.create_unnamed(parent, new_file(file)).await
    }

    async fn link(&self, ino: InodeId, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        self.client.link(ino, parent, name).await
    }

    async fn unlink(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.client.unlink(parent, name).await
    }

    async fn rmdir(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.client.rmdir(parent, name).await
    }

    async fn rename(
        &self,
        parent: InodeId,
        name: &[u8],
        new_parent: InodeId,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<()> {
        self.client.rename(parent, name, new_parent, new_name, flags).await
    }

    async fn get_xattr(&self, ino: InodeId, name: &[u8]) -> FsResult<Bytes> {
        self.client.get_xattr(ino, name).await
    }

    async fn set_xattr(&self, ino: InodeId, name: &[u8], value: Bytes, flags: u32) -> FsResult<()> {
        self.client.set_xattr(ino, name, value, SetXattrMode::from_flags(flags)?).await.map(drop)
    }

    async fn set_access_list(&self, ino: InodeId, value: Bytes) -> FsResult<()> {
        self.client.set_access_list(ino, value).await.map(drop)
    }

    async fn list_xattrs(&self, ino: InodeId) -> FsResult<Vec<Bytes>> {
        self.client.list_xattrs(ino).await
    }

    async fn remove_xattr(&self, ino: InodeId, name: &[u8]) -> FsResult<()> {
        self.client.remove_xattr(ino, name).await.map(drop)
    }

    async fn open(&self, ino: InodeId) -> FsResult<(Attr, File)> {
        self.client.open(ino).await
    }

    async fn read(&self, file: &File, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        file.read_at(offset, len).await
    }

    async fn read_into(&self, file: &File, offset: u64, buffer: &mut [u8]) -> FsResult<usize> {
        file.read_into(offset, buffer).await
    }

    fn keep_access_time(&self, file: &File) {
        file.keep_access_time();
    }

    fn size(&self, file: &File) -> u64 {
        file.size_told()
    }

    fn drop_suid(&self, file: &File) -> bool {
        file.drop_suid()
    }

    async fn write(&self, file: &File, offset: u64, data: Bytes) -> FsResult<()> {
        file.write_at(offset, data).await
    }

    async fn append(&self, file: &File, data: Bytes) -> FsResult<(u64, Unanswered)> {
        file.append_unanswered(data).await
    }

    async fn allocate(&self, file: &File, range: Range<u64>, how: Allocation) -> FsResult<()> {
        let Allocation { clear, keep_size, clear_suid } = how;
        file.allocate(range, fjordfs_client::Allocation { clear, keep_size, clear_suid }).await
    }

    async fn copy_range(&self, source: &File, target: &File, range: CopiedRange) -> FsResult<u64> {
        let CopiedRange { from, to, length, clear_suid } = range;
        let range = fjordfs_client::CopiedRange { from, to, length, clear_suid, same_as: None };
        target.copy_from(source, range).await
    }

    async fn seek(&self, file: &File, data: bool, offset: u64) -> FsResult<u64> {
        if data { file.seek_data(offset).await } else { file.seek_hole(offset).await }
    }

    async fn try_lock(&self, file: &File, lock: Lock) -> FsResult<u64> {
        Ok(file.try_lock(to_client(lock)).await?.data_version)
    }

    async fn lock(&self, file: &File, lock: Lock, given_up: impl Future<Output = ()>) -> FsResult<u64> {
        Ok(file.lock(to_client(lock), given_up).await?.data_version)
    }

    async fn unlock(&self, file: &File, lock: Lock) -> FsResult<()> {
        file.unlock(to_client(lock)).await
    }

    async fn unlock_flushed(&self, file: &File, lock: Lock) -> FsResult<()> {
        file.unlock_flushed(to_client(lock)).await
    }

    fn holds_flock(&self, file: &File) -> bool {
        file.has_flock()
    }

    async fn test_lock(&self, file: &File, lock: Lock) -> FsResult<Option<Lock>> {
        let held = file.test_lock(to_client(lock)).await?;
        Ok(held.map(|fjordfs_client::Lock { owner, start, end, write, pid }| {
            let fjordfs_client::LockOwner { id, flock } = owner;
            Lock { owner: LockOwner { id, flock }, start, end, write, pid }
        }))
    }

    fn may_hold_locks(&self, file: &File, owner: LockOwner) -> bool {
        let LockOwner { id, flock } = owner;
        file.may_hold_locks(fjordfs_client::LockOwner { id, flock })
    }

    async fn flush(&self, file: &File) -> FsResult<()> {
        file.flush().await
    }

    async fn fsync(&self, file: &File) -> FsResult<()> {
        file.fsync().await
    }

    fn come_again(&self, requests: &[u64]) {
        self.client.requests_come_again(requests);
    }

    fn for_request<T>(&self, unique: u64, work: impl Future<Output = T>) -> impl Future<Output = T> {
        self.client.for_request(unique, work)
    }

    fn request_answered(&self, unique: u64) {
        self.client.request_answered(unique);
    }

    fn leave_open(&self, number: u64, file: &File) {
        self.client.leave_open(number, file);
    }

    fn leave_closed(&self, number: u64) {
        self.client.leave_closed(number);
    }

    fn leave_lock_user(&self, ino: InodeId, owner: u64, number: u64, is_used: bool) {
        self.client.leave_lock_user(LockUser { ino, owner, number }, is_used);
    }

    async fn resume(&self, number: u64) -> FsResult<Option<(InodeId, File)>> {
        Ok(self.client.resume(number).await?.map(|file| (file.ino(), file)))
    }

    fn left_behind(&self) -> LeftBehind {
        LeftBehind {
            opens: self.client.left_open(),
            lock_users: left_lock_users(&self.client),
            stale: self.client.lost_bytes(),
        }
    }

    async fn release(&self, file: &File) -> FsResult<()> {
        file.clone().leave().await
    }

    fn own_versions(&self, file: &File) -> RangeInclusive<u64> {
        file.own_versions()
    }

    async fn read_dir(&self, ino: InodeId, cookie: u64, limit: u32, _: bool) -> FsResult<ReadDirReply> {
        // Who lists a directory mostly looks at what is in it: then the client knows the attributes already.
        self.client.readdir(ino, cookie, limit, true).await
    }

    fn known_entries(&self, parent: InodeId, entries: &[DirEntry]) -> Vec<Option<KnownEntry>> {
        let known = self.client.known_entries(parent, entries).into_iter();
        known
            .map(|known| known.map(|(attr, name_left, attr_left)| KnownEntry { attr, name_left, attr_left }))
            .collect()
    }

    async fn statfs(&self) -> FsResult<Space> {
        let space = self.client.statfs().await?;
        Ok(Space { capacity: space.capacity, free: space.free, files: space.files })
    }

    async fn sync_namespace(&self) -> FsResult<()> {
        self.client.sync_namespace().await
    }

    async fn sync_all(&self) -> FsResult<()> {
        self.client.sync_all().await
    }
}

fn left_lock_users(client: &Client) -> Vec<(InodeId, u64, u64)> {
    let users = client.left_lock_users().into_iter();
    users.map(|LockUser { ino, owner, number }| (ino, owner, number)).collect()
}

fn to_client(lock: Lock) -> fjordfs_client::Lock {
    let Lock { owner: LockOwner { id, flock }, start, end, write, pid } = lock;
    fjordfs_client::Lock { owner: fjordfs_client::LockOwner { id, flock }, start, end, write, pid }
}

fn new_file(file: NewFile) -> fjordfs_client::NewFile {
    let NewFile { mode, umask, uid, gid, exclusive } = file;
    fjordfs_client::NewFile { mode, umask, uid, gid, exclusive }
}

/// Names and attributes that the kernel caches are recalled when somebody else changes them.
async fn announce_recalls(mut recalls: mpsc::UnboundedReceiver<Recalled>, notifier: Notifier) {
    while let Some(Recalled { inodes, names, done }) = recalls.recv().await {
        notifier.recall(inodes, names, done);
    }
}

/// Appended bytes that another client's append pushed further on are cached by the kernel where they were written first.
async fn announce_moved_appends(client: Client, notifier: Notifier) {
    let mut moved = client.appends_moved();
    drop(client);
    loop {
        match moved.recv().await {
            Ok(ino) => notifier.invalidate_inode(ino),
            // Their data version has changed, so the next open drops their pages.
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "moved appends not announced to the kernel")
            }
            Err(RecvError::Closed) => return,
        }
    }
}
