//! A filesystem in memory, and a mount of it.

#![allow(
    dead_code,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "shared by several test programs"
)]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fjordfs_fuse::filesystem::{AttrChange, Filesystem, KnownEntry, NewFile, NewNode, Space, TimeChange};
use fjordfs_fuse::notify::Notifier;
use fjordfs_fuse::{Mount, MountOptions, TransportChoice, TransportKind, mount_filesystem};
use fjordfs_proto::error::Errno;
use fjordfs_proto::mode::without_suid;
use fjordfs_proto::pb::meta::{Attr, DirEntry, FileKind, ReadDirReply, Time};
use fjordfs_proto::{FsError, FsResult, InodeId};
use parking_lot::Mutex;

/// What tests see and steer from outside the mount.
#[derive(Default)]
pub struct Control {
    pub inodes: Mutex<HashMap<u64, Inode>>,
    next: AtomicU64,
    pub reads: AtomicU64,
    pub appends: AtomicU64,
    pub lookups: AtomicU64,
    pub getattrs: AtomicU64,
    pub flushes: AtomicU64,
    pub fsyncs: AtomicU64,
    pub opens: AtomicU64,
    pub releases: AtomicU64,
    /// Largest read or write seen, bytes.
    pub size_max: AtomicU64,
    /// Reads, writes and appends of files whose names begin with "slow", lookups of "slowname", and making directories whose names begin
    /// with "late" take this long.
    pub slow: Mutex<Duration>,
    pub panic_on_read: AtomicBool,
    pub fail_flush: AtomicBool,
    pub notifier: Mutex<Option<Notifier>>,
    /// How long names and attributes may be cached, under leases.
    pub left: Mutex<Duration>,
    /// Requests that change names, and those that a former process has left.
    pub served: Mutex<Vec<u64>>,
    pub again: Mutex<Vec<u64>>,
}

#[derive(Clone, Default)]
pub struct Inode {
    pub attr: Attr,
    pub data: Vec<u8>,
    pub target: Vec<u8>,
    pub entries: BTreeMap<u64, (Vec<u8>, u64)>,
    pub parent: u64,
    pub is_slow: bool,
}

/// The filesystem.
pub struct MemFs(pub Arc<Control>);

/// An open file.
pub struct MemFile(u64, Arc<Control>);

impl Drop for MemFile {
    fn drop(&mut self) {
        self.1.releases.fetch_add(1, Ordering::SeqCst);
    }
}

fn error(errno: Errno) -> FsError {
    FsError::new(errno, "in memory")
}

fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Time { sec: since.as_secs() as i64, nsec: since.subsec_nanos() }
}

/// Like the server: cookies are a hash of the name, never 0 to 2.
fn cookie(name: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in name {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    (hash >> 1).max(3)
}

impl Control {
    pub fn new() -> Arc<Control> {
        let control = Control::default();
        control.next.store(2, Ordering::SeqCst);
        let mut root = Inode { parent: 1, ..Inode::default() };
        let uid = rustix::process::geteuid().as_raw();
        root.attr = Attr { ino: 1, mode: 0o755, uid, nlink: 2, ..new_attr(FileKind::Directory) };
        control.inodes.lock().insert(1, root);
        Arc::new(control)
    }

    /// Recalls and waits until the kernel has obeyed.
    pub fn recall(&self, inodes: &[u64], names: bool) {
        let notifier = self.notifier.lock().clone().unwrap();
        let (done, obeyed) = tokio::sync::oneshot::channel();
        notifier.recall(inodes.iter().copied().map(InodeId).collect(), names, done);
        obeyed.blocking_recv().unwrap();
    }

    /// What another client would do: makes a file in the root.
    pub fn make_file(&self, name: &str, data: &[u8]) {
        let attr = Attr { mode: 0o644, ..new_attr(FileKind::Regular) };
        self.insert(1, name.as_bytes(), FileKind::Regular, attr, b"").unwrap();
        self.overwrite(name, data);
    }

    pub fn find(&self, parent: u64, name: &[u8]) -> FsResult<u64> {
        let inodes = self.inodes.lock();
        let directory = inodes.get(&parent).ok_or(error(Errno::ESTALE))?;
        directory.entries.get(&cookie(name)).map(|(_, ino)| *ino).ok_or(error(Errno::ENOENT))
    }

    /// What another client would do: changes the bytes behind the mount's back.
    pub fn overwrite(&self, name: &str, data: &[u8]) {
        let ino = self.find(1, name.as_bytes()).unwrap();
        let mut inodes = self.inodes.lock();
        let inode = inodes.get_mut(&ino).unwrap();
        inode.data = data.to_vec();
        changed(inode);
    }

    fn insert(&self, parent: u64, name: &[u8], kind: FileKind, attr: Attr, target: &[u8]) -> FsResult<Attr> {
        let mut inodes = self.inodes.lock();
        let directory = inodes.get_mut(&parent).ok_or(error(Errno::ESTALE))?;
        if directory.entries.contains_key(&cookie(name)) {
            return Err(error(Errno::EEXIST));
        }
        let ino = self.next.fetch_add(1, Ordering::SeqCst);
        directory.entries.insert(cookie(name), (name.to_vec(), ino));
        let nlink = if kind == FileKind::Directory { 2 } else { 1 };
        let attr = Attr { ino, nlink, size: target.len() as u64, ..attr };
        let inode = Inode {
            attr,
            target: target.to_vec(),
            parent,
            is_slow: name.starts_with(b"slow"),
            ..Inode::default()
        };
        inodes.insert(ino, inode);
        Ok(attr)
    }

    async fn be_slow(&self, ino: u64) {
        let slow = *self.slow.lock();
        let is_slow = self.inodes.lock().get(&ino).is_some_and(|inode| inode.is_slow);
        if is_slow {
            tokio::time::sleep(slow).await;
        }
    }
}

fn new_attr(kind: FileKind) -> Attr {
    let now = Some(now());
    Attr {
        kind: kind as i32,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        data_version: 1,
        ..Attr::default()
    }
}

fn changed(inode: &mut Inode) {
    inode.attr.size = inode.data.len() as u64;
    inode.attr.allocated = inode.attr.size;
    inode.attr.mtime = Some(now());
    inode.attr.data_version += 1;
}

impl MemFs {
    fn with<T>(&self, ino: InodeId, f: impl FnOnce(&mut Inode) -> T) -> FsResult<T> {
        self.0.inodes.lock().get_mut(&ino.0).map(f).ok_or(error(Errno::ESTALE))
    }

    fn remove(&self, parent: InodeId, name: &[u8], directory: bool) -> FsResult<()> {
        let ino = self.0.find(parent.0, name)?;
        let mut inodes = self.0.inodes.lock();
        let inode = inodes.get_mut(&ino).unwrap();
        match (inode.attr.kind() == FileKind::Directory, directory) {
            (true, false) => return Err(error(Errno::EISDIR)),
            (false, true) => return Err(error(Errno::ENOTDIR)),
            _ if !inode.entries.is_empty() => return Err(error(Errno::ENOTEMPTY)),
            _ => inode.attr.nlink -= if directory { 2 } else { 1 },
        }
        inodes.get_mut(&parent.0).unwrap().entries.remove(&cookie(name));
        Ok(())
    }
}

impl Filesystem for MemFs {
    type File = MemFile;
    type Unanswered = ();

    fn mounted(&self, notifier: Notifier) {
        *self.0.notifier.lock() = Some(notifier);
    }

    fn name_left(&self, _: InodeId, _: &[u8], _: Option<InodeId>) -> Duration {
        *self.0.left.lock()
    }

    fn attr_left(&self, _: &Attr) -> Duration {
        *self.0.left.lock()
    }

    fn for_request<T>(&self, unique: u64, work: impl Future<Output = T>) -> impl Future<Output = T> {
        self.0.served.lock().push(unique);
        work
    }

    fn come_again(&self, requests: &[u64]) {
        self.0.again.lock().extend(requests);
    }

    async fn lookup(&self, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        self.0.lookups.fetch_add(1, Ordering::SeqCst);
        if name == b"slowname" {
            let slow = *self.0.slow.lock();
            tokio::time::sleep(slow).await;
        }
        let ino = self.0.find(parent.0, name)?;
        self.with(InodeId(ino), |inode| inode.attr)
    }

    async fn getattr(&self, ino: InodeId) -> FsResult<Attr> {
        self.0.getattrs.fetch_add(1, Ordering::SeqCst);
        self.with(ino, |inode| inode.attr)
    }

    async fn setattr(&self, ino: InodeId, change: AttrChange) -> FsResult<Attr> {
        self.with(ino, |inode| {
            if let Some(size) = change.size {
                inode.data.resize(size as usize, 0);
                changed(inode);
            }
            let attr = &mut inode.attr;
            if change.clear_suid || change.uid.is_some() || change.gid.is_some() {
                attr.mode = without_suid(attr.mode);
            }
            attr.mode = change.mode.unwrap_or(attr.mode);
            attr.uid = change.uid.unwrap_or(attr.uid);
            attr.gid = change.gid.unwrap_or(attr.gid);
            let time = |change| match change {
                TimeChange::Now => now(),
                TimeChange::At(time) => time,
            };
            attr.atime = change.atime.map(time).or(attr.atime);
            attr.mtime = change.mtime.map(time).or(attr.mtime);
            attr.ctime = Some(now());
            *attr
        })
    }

    async fn readlink(&self, ino: InodeId) -> FsResult<Vec<u8>> {
        self.with(ino, |inode| inode.target.clone())
    }

    async fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> FsResult<Attr> {
        let NewNode { kind, mode, umask, uid, gid, rdev, target } = node;
        let mode = mode & !umask;
        if name.starts_with(b"late") {
            let slow = *self.0.slow.lock();
            tokio::time::sleep(slow).await;
        }
        self.0.insert(parent.0, name, kind, Attr { mode, uid, gid, rdev, ..new_attr(kind) }, &target)
    }

    async fn create(&self, parent: InodeId, name: &[u8], file: NewFile) -> FsResult<(Attr, MemFile)> {
        let NewFile { mode, umask, uid, gid, exclusive } = file;
        let attr = Attr { mode: mode & !umask, uid, gid, ..new_attr(FileKind::Regular) };
        match self.0.insert(parent.0, name, FileKind::Regular, attr, b"") {
            Err(e) if e.errno == Errno::EEXIST && !exclusive => {
                self.open(InodeId(self.0.find(parent.0, name)?)).await
            }
            made => self.open(InodeId(made?.ino)).await,
        }
    }

    async fn link(&self, ino: InodeId, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        if self.0.find(parent.0, name).is_ok() {
            return Err(error(Errno::EEXIST));
        }
        self.with(parent, |directory| directory.entries.insert(cookie(name), (name.to_vec(), ino.0)))?;
        self.with(ino, |inode| {
            inode.attr.nlink += 1;
            inode.attr
        })
    }

    async fn unlink(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.remove(parent, name, false)
    }

    async fn rmdir(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.remove(parent, name, true)
    }

    async fn rename(
        &self,
        parent: InodeId,
        name: &[u8],
        new_parent: InodeId,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<()> {
        let ino = self.0.find(parent.0, name)?;
        let target = self.0.find(new_parent.0, new_name).ok();
        match (flags, target) {
            (1, Some(_)) => return Err(error(Errno::EEXIST)),
            (2, None) => return Err(error(Errno::ENOENT)),
            _ => {}
        }
        self.with(parent, |directory| directory.entries.remove(&cookie(name)))?;
        self.with(new_parent, |directory| {
            directory.entries.insert(cookie(new_name), (new_name.to_vec(), ino))
        })?;
        if let (2, Some(target)) = (flags, target) {
            self.with(parent, |directory| directory.entries.insert(cookie(name), (name.to_vec(), target)))?;
        }
        Ok(())
    }

    async fn open(&self, ino: InodeId) -> FsResult<(Attr, MemFile)> {
        self.0.opens.fetch_add(1, Ordering::SeqCst);
        Ok((self.getattr(ino).await?, MemFile(ino.0, Arc::clone(&self.0))))
    }

    async fn read(&self, file: &MemFile, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        self.0.reads.fetch_add(1, Ordering::SeqCst);
        self.0.size_max.fetch_max(len as u64, Ordering::SeqCst);
        assert!(!self.0.panic_on_read.load(Ordering::SeqCst), "asked to panic");
        let parts = self.with(InodeId(file.0), |inode| {
            let start = (offset as usize).min(inode.data.len());
            let end = (start + len).min(inode.data.len());
            // Many parts, as striped data comes.
            inode.data[start..end].chunks(60_000).map(Bytes::copy_from_slice).collect()
        });
        // As of when it was asked for.
        self.0.be_slow(file.0).await;
        parts
    }

    fn size(&self, file: &MemFile) -> u64 {
        self.with(InodeId(file.0), |inode| inode.data.len() as u64).unwrap_or_default()
    }

    async fn write(&self, file: &MemFile, offset: u64, data: Bytes) -> FsResult<()> {
        self.0.size_max.fetch_max(data.len() as u64, Ordering::SeqCst);
        self.0.be_slow(file.0).await;
        self.with(InodeId(file.0), |inode| {
            let end = offset as usize + data.len();
            if inode.data.len() < end {
                inode.data.resize(end, 0);
            }
            inode.data[offset as usize..end].copy_from_slice(&data);
            changed(inode);
        })
    }

    fn drop_suid(&self, file: &MemFile) -> bool {
        let drop = |inode: &mut Inode| {
            let kept = without_suid(inode.attr.mode);
            std::mem::replace(&mut inode.attr.mode, kept) != kept
        };
        self.with(InodeId(file.0), drop).unwrap_or_default()
    }

    async fn append(&self, file: &MemFile, data: Bytes) -> FsResult<(u64, ())> {
        self.0.appends.fetch_add(1, Ordering::SeqCst);
        self.0.be_slow(file.0).await;
        self.with(InodeId(file.0), |inode| {
            let at = inode.data.len() as u64;
            inode.data.extend_from_slice(&data);
            changed(inode);
            (at, ())
        })
    }

    async fn flush(&self, _file: &MemFile) -> FsResult<()> {
        self.0.flushes.fetch_add(1, Ordering::SeqCst);
        if self.0.fail_flush.load(Ordering::SeqCst) { Err(error(Errno::ENOSPC)) } else { Ok(()) }
    }

    async fn fsync(&self, _file: &MemFile) -> FsResult<()> {
        self.0.fsyncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn release(&self, _file: &MemFile) -> FsResult<()> {
        Ok(())
    }

    async fn read_dir(
        &self,
        ino: InodeId,
        after: u64,
        limit: u32,
        attributes: bool,
    ) -> FsResult<ReadDirReply> {
        let inodes = self.0.inodes.lock();
        let directory = inodes.get(&ino.0).ok_or(error(Errno::ESTALE))?;
        // Small pages, so that their boundaries are met often.
        let limit = limit.min(100) as usize;
        let mut entries: Vec<DirEntry> = directory
            .entries
            .range(after + 1..)
            .take(limit + 1)
            .filter_map(|(cookie, (name, ino))| {
                let attr = &inodes.get(ino)?.attr;
                Some(DirEntry {
                    name: name.clone().into(),
                    ino: *ino,
                    kind: attr.kind,
                    cookie: *cookie,
                    attr: attributes.then_some(*attr),
                })
            })
            .collect();
        let end = entries.len() <= limit;
        entries.truncate(limit);
        Ok(ReadDirReply { entries, end, parent: directory.parent })
    }

    fn known_entries(&self, _: InodeId, entries: &[DirEntry]) -> Vec<Option<KnownEntry>> {
        let (inodes, left) = (self.0.inodes.lock(), *self.0.left.lock());
        let known = |entry: &DirEntry| {
            let attr = inodes.get(&entry.ino).filter(|_| !left.is_zero())?.attr;
            Some(KnownEntry { attr, name_left: left, attr_left: left })
        };
        entries.iter().map(known).collect()
    }

    async fn statfs(&self) -> FsResult<Space> {
        Ok(Space { capacity: 1 << 40, free: 1 << 39, files: self.0.inodes.lock().len() as u64 })
    }

    async fn sync_namespace(&self) -> FsResult<()> {
        self.0.fsyncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn sync_all(&self) -> FsResult<()> {
        self.0.fsyncs.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// Size by `stat(2)`. Unlike the standard library it does not ask for the birth time, which only answers to STATX bring.
pub fn size(path: &Path) -> u64 {
    rustix::fs::stat(path).unwrap().st_size as u64
}

/// Makes two tests of each function, one for each transport.
#[macro_export]
macro_rules! over_each_transport {
    ($($test:ident)*) => {
        mod over_io_uring {
            $(#[test] fn $test() { super::$test(fjordfs_fuse::TransportChoice::IoUring); })*
        }
        mod over_dev_fuse {
            $(#[test] fn $test() { super::$test(fjordfs_fuse::TransportChoice::DevFuse); })*
        }
    };
}

/// Why a transport cannot be tested here. Only what the machine lacks: everything else is to fail.
pub fn lacking(transport: TransportChoice) -> Option<&'static str> {
    if !Path::new("/dev/fuse").exists() {
        return Some("no /dev/fuse here");
    }
    let uring = Path::new("/sys/module/fuse/parameters/enable_uring");
    (transport == TransportChoice::IoUring && !uring.exists())
        .then_some("no FUSE over io_uring in this kernel")
}

/// A mount that a test can use; unmounted and checked at its end.
pub struct Mounted {
    pub control: Arc<Control>,
    pub mount: Mount,
    pub dir: tempfile::TempDir,
}

impl Mounted {
    /// `None`, with the reason printed, where that does not exist.
    pub fn new(transport: TransportChoice, options: &str) -> Option<Mounted> {
        let mut mount_options = MountOptions::new("memory,with comma", "");
        assert!(mount_options.apply(options, &[]).unwrap().is_empty());
        mount_options.transport = transport;
        let mounted = Mounted::with(mount_options)?;
        let is_uring = matches!(mounted.mount.transport().kind, TransportKind::IoUring { .. });
        match transport {
            TransportChoice::IoUring => assert!(is_uring),
            TransportChoice::DevFuse => assert!(!is_uring),
            TransportChoice::Auto => {}
        }
        Some(mounted)
    }

    /// Mounts on a folder of its own.
    pub fn with(mut options: MountOptions) -> Option<Mounted> {
        if let Some(reason) = lacking(options.transport) {
            #[allow(clippy::print_stdout, reason = "why a test did nothing")]
            {
                println!("skipped: {reason}");
            }
            return None;
        }
        let control = Control::new();
        let dir = tempfile::tempdir().unwrap();
        options.mountpoint = dir.path().to_owned();
        let mount = mount_filesystem(MemFs(Arc::clone(&control)), &options).unwrap();
        Some(Mounted { control, mount, dir })
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Unmounts; every open was released.
    pub fn end(mut self) {
        self.mount.unmount().unwrap();
        assert!(self.dir.path().read_dir().unwrap().next().is_none(), "still mounted");
        assert_eq!(self.control.opens.load(Ordering::SeqCst), self.control.releases.load(Ordering::SeqCst));
    }
}
