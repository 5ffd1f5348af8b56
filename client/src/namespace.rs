//! Operations on inodes and directories: each is one round trip to the metaserver.

use std::{sync::Arc, time::Duration};

use fjordfs_proto::{
    Extent, FsError, FsResult, InodeId, NAME_MAX, Policy, ROOT_INODE,
    error::Errno,
    mode::{SETGID, SETUID},
    pb::meta::{
        Attr, DirEntry, Entry, FileKind, GetAttr, GetParent, Link, Lookup, Make, ReadDir, ReadDirReply,
        ReadLink, Remove, Rename, SetAttr, StatFs as StatFsOp, Time, request::Op, response,
    },
};

use tokio::sync::mpsc;

use crate::{
    client::{Client, Inner},
    file::{File, now},
    leases::Recalled,
    meta::unexpected,
    write,
};

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SetTime {
    /// The server's now.
    Now,
    /// This time.
    To(Time),
}

/// Attributes to change; the others stay.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of Attr")]
pub struct AttrChange {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
    pub ctime: Option<Time>,
    /// Whoever changes the file may not keep its suid and sgid.
    pub clear_suid: bool,
    /// Directories only: redundancy of what is made in it from now on.
    pub policy: Option<Policy>,
}

/// Anything but an opened regular file.
#[derive(Clone, Debug)]
pub struct NewNode {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, suid, sgid, sticky.
    pub mode: u32,
    /// Bits to take from the mode, unless the directory has a default access control list.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group; replaced by the parent's when the parent is setgid.
    pub gid: u32,
    /// Device number, for devices.
    pub rdev: u32,
    /// Target, for symbolic links.
    pub target: Vec<u8>,
}

/// A regular file to be made and opened.
#[derive(Clone, Copy, Debug)]
pub struct NewFile {
    /// Permission bits, suid, sgid, sticky.
    pub mode: u32,
    /// Bits to take from the mode, unless the directory has a default access control list.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group; replaced by the parent's when the parent is setgid.
    pub gid: u32,
    /// An existing name is `EEXIST`; otherwise an existing regular file is opened.
    pub exclusive: bool,
}

/// Space and inodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes that fit under the root directory's policy.
    pub capacity: u64,
    /// Bytes that still fit.
    pub free: u64,
    /// Inodes in use.
    pub files: u64,
    /// Bytes of all devices, redundancy not counted off.
    pub raw_capacity: u64,
    /// Free bytes of all devices.
    pub raw_free: u64,
}

impl Client {
    /// The entry `name` of directory `parent`.
    pub async fn lookup(&self, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        let attr = match self.inner.meta.leases().lookup(parent, name) {
            Some(Some(attr)) => attr,
            Some(None) => return Err(absent(parent, name)),
            None => {
                let op = Lookup {
                    parent: parent.0,
                    name: name_of(name)?,
                    extents: self.inner.habits.looks_up(),
                    neighbours: self.inner.meta.leases().neighbours(parent),
                };
                self.inner.entry(Op::Lookup(op)).await?
            }
        };
        Ok(self.inner.with_local(attr))
    }

    /// Attributes, this client's uncommitted writes included.
    pub async fn getattr(&self, ino: InodeId) -> FsResult<Attr> {
        let attr = match self.inner.meta.leases().attr(ino) {
            Some(attr) => attr,
            None => self.inner.entry(Op::GetAttr(GetAttr { ino: ino.0 })).await?,
        };
        Ok(self.inner.with_local(attr))
    }

    /// How long `name` in `parent` is sure to lead to `ino`, or to nothing, unless a recall says otherwise. Zero when
    /// that is not known.
    pub fn name_left(&self, parent: InodeId, name: &[u8], ino: Option<InodeId>) -> Duration {
        self.inner.meta.leases().name_left(parent, name, ino)
    }

    /// How long these are sure to be the attributes of their inode, unless a recall says otherwise. Zero when this
    /// client has written to the file and not committed it.
    pub fn attr_left(&self, attr: &Attr) -> Duration {
        self.inner.meta.leases().attr_left(attr)
    }

    /// What leases say of entries of a directory: attributes, this client's uncommitted writes included, and as [`Client::name_left`] and
    /// [`Client::attr_left`] how long name and attributes are good.
    pub fn known_entries(
        &self,
        parent: InodeId,
        entries: &[DirEntry],
    ) -> Vec<Option<(Attr, Duration, Duration)>> {
        let (left, known) = self.inner.meta.leases().entries(parent, entries);
        let with_local = |leased: Attr| {
            let attr = self.inner.with_local(leased);
            (attr, left, if attr == leased { left } else { Duration::ZERO })
        };
        known.into_iter().map(|leased| leased.map(with_local)).collect()
    }

    /// Who caches names and attributes below this client must listen to recalls, and answer each. One listener.
    pub fn recalls(&self) -> mpsc::UnboundedReceiver<Recalled> {
        self.inner.meta.leases().listen()
    }

    /// Changes attributes; a size truncates or extends.
    pub async fn setattr(&self, ino: InodeId, change: AttrChange) -> FsResult<Attr> {
        if let Some(size) = change.size {
            crate::file::too_big(ino, Some(size))?;
        }
        let size = change.size;
        let mut op = change.into_op(ino);
        if let Some(attr) = self.inner.set_attr_here(&op) {
            return Ok(attr);
        }
        let known = self.inner.known_file(ino);
        let sets_times = op.atime.is_some() || op.mtime.is_some() || op.atime_now || op.mtime_now;
        let sets_suid = op.mode.is_some_and(|mode| mode & (SETUID | SETGID) != 0);
        let commits = match size {
            // A commit that comes later would put the time of the last write in place of the one set now, and drop suid.
            None => sets_times || sets_suid,
            // A crash before it would leave a file of the right length without its bytes.
            Some(size) => size > 0,
        };
        if let Some(state) = known.as_ref().filter(|_| commits) {
            self.inner.flush(state).await?;
        }
        let (Some(size), Some(state)) = (size, known) else {
            let attr = self.inner.entry(Op::SetAttr(op)).await?;
            return Ok(self.inner.with_local(attr));
        };
        // Under the file's lock: commits are submitted under it too, so the two arrive in the order of their effect.
        let (freed, pending) = {
            let mut inner = state.lock();
            let freed = inner.view.begin_truncate(size);
            // The commit of what is left must not go back behind the truncate.
            let now = now();
            // The server's own now would be another one.
            op.mtime = op.mtime.filter(|_| !std::mem::take(&mut op.mtime_now)).or(Some(now));
            op.ctime.get_or_insert(now);
            inner.view.set_times(op.mtime, op.ctime);
            if !inner.view.has_local() {
                inner.dirty_since = None;
                self.inner.is_clean(ino);
            }
            (freed, self.inner.meta.submit(Op::SetAttr(op)))
        };
        self.inner.budget.release(freed);
        let outcome = pending.wait().await.and_then(entry_of);
        let mut inner = state.lock();
        inner.view.end_truncate(size, outcome.as_ref().ok().cloned());
        outcome.map(|_| inner.view.attr())
    }

    /// Makes a directory, symbolic link, device, fifo, socket, or an unopened regular file.
    pub async fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> FsResult<Attr> {
        let op = Make {
            parent: parent.0,
            name: name_of(name)?,
            kind: node.kind.into(),
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            rdev: node.rdev,
            target: node.target.into(),
            handle: 0,
            exclusive: true,
            umask: node.umask,
            ..Make::default()
        };
        match self.inner.make_here(&op) {
            Some(attr) => Ok(attr),
            None => self.inner.entry(Op::Make(op)).await,
        }
    }

    /// Makes and opens a regular file.
    pub async fn create(&self, parent: InodeId, name: &[u8], new: NewFile) -> FsResult<(Attr, File)> {
        self.inner.create(Make { parent: parent.0, name: name_of(name)?, ..new.into_op() }).await
    }

    /// Makes and opens a regular file without a name, in the filesystem of `parent` and with what it passes on:
    /// `O_TMPFILE`. It is gone with its last close unless [`Client::link`] gives it a name.
    pub async fn create_unnamed(&self, parent: InodeId, new: NewFile) -> FsResult<(Attr, File)> {
        self.inner.create(Make { parent: parent.0, unnamed: true, ..new.into_op() }).await
    }

    /// Opens a file. The caller has checked that it may.
    pub async fn open(&self, ino: InodeId) -> FsResult<(Attr, File)> {
        File::open(&self.inner, ino).await
    }

    /// Another name for an inode.
    pub async fn link(&self, ino: InodeId, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        let op = Link { ino: ino.0, parent: parent.0, name: name_of(name)? };
        self.inner.commit_before_naming(ino).await?;
        let attr = self.inner.entry(Op::Link(op)).await?;
        Ok(self.inner.with_local(attr))
    }

    /// Removes a name that is not a directory's.
    pub async fn unlink(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.inner.remove(parent, name, false).await
    }

    /// Removes an empty directory.
    pub async fn rmdir(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.inner.remove(parent, name, true).await
    }

    /// Renames; `flags` as `renameat2(2)`: `RENAME_NOREPLACE`, `RENAME_EXCHANGE`.
    pub async fn rename(
        &self,
        parent: InodeId,
        name: &[u8],
        new_parent: InodeId,
        new_name: &[u8],
        flags: u32,
    ) -> FsResult<()> {
        let op = Rename {
            parent: parent.0,
            name: name_of(name)?,
            new_parent: new_parent.0,
            new_name: name_of(new_name)?,
            flags,
            time: None,
        };
        let source = match self.inner.meta.leases().lookup(parent, name) {
            None if self.inner.has_written() => match self.lookup(parent, name).await {
                Ok(source) => Some(source),
                // The answer to the renaming says so as well.
                Err(e) if e.errno == Errno::ENOENT => None,
                Err(e) => return Err(e),
            },
            known => known.flatten(),
        };
        if let Some(source) = source {
            self.inner.commit_before_naming(InodeId(source.ino)).await?;
        }
        if self.inner.rename_here(&op) {
            return Ok(());
        }
        self.inner.empty(Op::Rename(op)).await
    }

    /// Target of a symbolic link.
    pub async fn readlink(&self, ino: InodeId) -> FsResult<Vec<u8>> {
        self.inner.note_access(ino);
        if let Some(target) = self.inner.meta.leases().target(ino) {
            return Ok(target.into());
        }
        match self.inner.meta.call(Op::ReadLink(ReadLink { ino: ino.0 })).await? {
            response::Result::ReadLink(reply) => Ok(reply.target.into()),
            _ => Err(unexpected("a readlink")),
        }
    }

    /// A page of a directory after `cookie` (0: from the beginning), with attributes when asked for.
    pub async fn readdir(
        &self,
        ino: InodeId,
        cookie: u64,
        limit: u32,
        attributes: bool,
    ) -> FsResult<ReadDirReply> {
        if cookie == 0 {
            self.inner.note_access(ino);
        }
        match self.inner.meta.call(Op::ReadDir(ReadDir { ino: ino.0, cookie, limit, attributes })).await? {
            response::Result::ReadDir(mut page) => {
                for entry in &mut page.entries {
                    let newest = |attr| self.inner.meta.leases().newest(attr);
                    entry.attr = entry.attr.take().map(|attr| self.inner.with_local(newest(attr)));
                }
                Ok(page)
            }
            _ => Err(unexpected("a readdir")),
        }
    }

    /// Parent directory and name of a directory.
    pub async fn parent(&self, ino: InodeId) -> FsResult<(InodeId, Vec<u8>)> {
        match self.inner.meta.call(Op::GetParent(GetParent { ino: ino.0 })).await? {
            response::Result::GetParent(reply) => Ok((InodeId(reply.parent), reply.name.into())),
            _ => Err(unexpected("a parent lookup")),
        }
    }

    /// Space and inodes.
    pub async fn statfs(&self) -> FsResult<StatFs> {
        let reply = match self.inner.meta.call(Op::StatFs(StatFsOp {})).await? {
            response::Result::StatFs(reply) => reply,
            _ => return Err(unexpected("a statfs")),
        };
        // What a byte costs: its copies, or its share of the parity.
        let usable = |raw: u64| match Policy::from_code(reply.policy) {
            Some(policy) => policy.usable(raw),
            None => raw,
        };
        Ok(StatFs {
            capacity: usable(reply.capacity),
            free: usable(reply.free),
            files: reply.inodes,
            raw_capacity: reply.capacity,
            raw_free: reply.free,
        })
    }

    /// Commits everything this client has written and returns when data and namespace survive power failure.
    pub async fn sync_all(&self) -> FsResult<()> {
        let files: Vec<_> = self.inner.dirty.lock().values().cloned().collect();
        write::flush_files(&self.inner, files).await;
        // Told here, and kept for the users of the files.
        let failed = self.inner.tell_lost();
        let (data, log) = tokio::join!(self.inner.sync_stored(), self.inner.sync_log());
        failed.and(data).and(log)
    }

    /// Returns when the metaserver has executed everything that this client has decided by itself. Who asks by name need not wait
    /// for that.
    pub async fn publish(&self) -> FsResult<()> {
        self.inner.entry(Op::GetAttr(GetAttr { ino: ROOT_INODE.0 })).await.map(drop)
    }

    /// Returns when every namespace operation that this client has been answered survives power failure: what `fsync`
    /// of a directory promises.
    pub async fn sync_namespace(&self) -> FsResult<()> {
        self.inner.sync_log().await
    }

    /// Extents of a file by offset; what this client has written to it is committed first.
    pub async fn extents(&self, ino: InodeId) -> FsResult<Vec<(u64, Extent)>> {
        if let Some(state) = self.inner.known_file(ino) {
            self.inner.flush(&state).await?;
        }
        self.inner.all_extents(ino).await
    }
}

impl AttrChange {
    fn into_op(self, ino: InodeId) -> SetAttr {
        let split = |t: Option<SetTime>| match t {
            None => (None, false),
            Some(SetTime::Now) => (None, true),
            Some(SetTime::To(t)) => (Some(t), false),
        };
        let (atime, atime_now) = split(self.atime);
        let (mtime, mtime_now) = split(self.mtime);
        SetAttr {
            ino: ino.0,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            size: self.size,
            atime,
            mtime,
            ctime: self.ctime,
            atime_now,
            mtime_now,
            policy: self.policy.map(|p| p.code().into()),
            clear_suid: self.clear_suid,
        }
    }
}

impl NewFile {
    fn into_op(self) -> Make {
        let NewFile { mode, umask, uid, gid, exclusive } = self;
        Make { kind: FileKind::Regular.into(), mode, umask, uid, gid, exclusive, ..Make::default() }
    }
}

impl Inner {
    /// Makes a regular file and opens it.
    async fn create(self: &Arc<Self>, make: Make) -> FsResult<(Attr, File)> {
        let handle = self.meta.new_handle();
        let make = Make { handle: handle.0, ..make };
        let attr = match self.make_here(&make) {
            Some(attr) => attr,
            None => self.entry(Op::Make(make)).await?,
        };
        self.meta.remember_handle(handle, InodeId(attr.ino));
        let file = File::of_handle(self, handle, attr);
        Ok((file.attr(), file))
    }

    /// A directory or symbolic link is being read. One of which nothing is known here was not looked at either.
    fn note_access(&self, ino: InodeId) {
        if self.options.access_times {
            self.meta.leases().accessed(ino);
        }
    }

    pub(crate) async fn entry(&self, op: Op) -> FsResult<Attr> {
        let attr = entry_of(self.meta.call(op).await?)?;
        Ok(self.meta.leases().newest(attr))
    }

    /// A file is often given its name when it is complete: a crash must not leave it there without its bytes.
    async fn commit_before_naming(self: &Arc<Self>, ino: InodeId) -> FsResult<()> {
        match self.known_file(ino) {
            Some(state) => self.flush(&state).await,
            None => Ok(()),
        }
    }

    async fn remove(&self, parent: InodeId, name: &[u8], directory: bool) -> FsResult<()> {
        let op = Remove { parent: parent.0, name: name_of(name)?, directory, time: None };
        if self.remove_here(&op) {
            return Ok(());
        }
        self.empty(Op::Remove(op)).await
    }

    async fn empty(&self, op: Op) -> FsResult<()> {
        match self.meta.call(op).await? {
            response::Result::Empty(_) => Ok(()),
            _ => Err(unexpected("an operation")),
        }
    }

    /// Attributes from the server with what this client has written on top.
    pub(crate) fn with_local(self: &Arc<Self>, attr: Attr) -> Attr {
        match self.known_file(InodeId(attr.ino)) {
            None => attr,
            Some(state) => {
                let mut inner = state.lock();
                inner.view.learn_attr(attr);
                inner.view.attr()
            }
        }
    }
}

fn entry_of(result: response::Result) -> FsResult<Attr> {
    match result {
        response::Result::Entry(Entry { attr: Some(attr), .. }) => Ok(attr),
        _ => Err(unexpected("an operation on an inode")),
    }
}

fn absent(parent: InodeId, name: &[u8]) -> FsError {
    let shown = String::from_utf8_lossy(name).escape_debug().to_string();
    FsError::new(Errno::ENOENT, format!("'{shown}' in directory {parent} does not exist"))
}

/// A name as it travels. The server checks it too; this spares a round trip.
fn name_of(name: &[u8]) -> FsResult<bytes::Bytes> {
    if name.len() > NAME_MAX {
        let shown = String::from_utf8_lossy(&name[..32]).into_owned();
        return Err(FsError::new(
            Errno::ENAMETOOLONG,
            format!("'{shown}…': names have at most {NAME_MAX} bytes"),
        ));
    }
    Ok(bytes::Bytes::copy_from_slice(name))
}
