//! Names and attributes in memory, and the beginning of every file: what is written further on is dropped and reads as zeros.
//!
//! An inode has one name. Inodes go with it, also while they are open.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fjordfs_fuse::filesystem::{AttrChange, NewFile, NewNode};
use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{Attr, DirEntry, FileKind, ReadDirReply, Time};
use fjordfs_proto::{FsError, FsResult, InodeId};

pub(crate) const ROOT: InodeId = InodeId(1);
/// Size of the files that are there without having been made, bytes.
pub(crate) const GIVEN_SIZE: u64 = 16 << 30;
/// What is kept of a file's bytes: load generators look whether a file begins as they wrote it.
const HEAD: usize = 4096;
/// Longest answer to a read.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// All inodes by number.
pub(crate) struct Tree {
    inodes: HashMap<InodeId, Inode>,
    /// Never reused. Above the cookies that directories use for themselves: an entry's cookie is its inode.
    next: u64,
}

struct Inode {
    attr: Attr,
    content: Content,
}

enum Content {
    Directory(Directory),
    /// The first bytes of a file.
    File(Bytes),
}

struct Directory {
    parent: InodeId,
    inodes: HashMap<Vec<u8>, InodeId>,
    names: BTreeMap<InodeId, Vec<u8>>,
}

impl Directory {
    fn new(parent: InodeId) -> Directory {
        Directory { parent, inodes: HashMap::new(), names: BTreeMap::new() }
    }
}

fn error(errno: Errno) -> FsError {
    FsError::new(errno, "in memory")
}

/// A file cannot have so many bytes that they are none of its head.
fn in_head(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX).min(HEAD)
}

fn new_attr(kind: FileKind, mode: u32, uid: u32, gid: u32) -> Attr {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let now = Some(Time { sec: now.as_secs() as i64, nsec: now.subsec_nanos() });
    Attr {
        kind: kind as i32,
        mode,
        uid,
        gid,
        nlink: if kind == FileKind::Directory { 2 } else { 1 },
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        data_version: 1,
        ..Attr::default()
    }
}

fn resized(attr: &mut Attr, size: u64) {
    attr.size = size;
    attr.allocated = size;
    attr.data_version += 1;
}

impl Tree {
    pub(crate) fn new() -> Tree {
        let attr = Attr { ino: ROOT.0, ..new_attr(FileKind::Directory, 0o755, 0, 0) };
        let root = Inode { attr, content: Content::Directory(Directory::new(ROOT)) };
        Tree { inodes: HashMap::from([(ROOT, root)]), next: 3 }
    }

    /// How many inodes there are.
    pub(crate) fn len(&self) -> usize {
        self.inodes.len()
    }

    fn inode(&self, ino: InodeId) -> FsResult<&Inode> {
        self.inodes.get(&ino).ok_or_else(|| error(Errno::ESTALE))
    }

    fn inode_mut(&mut self, ino: InodeId) -> FsResult<&mut Inode> {
        self.inodes.get_mut(&ino).ok_or_else(|| error(Errno::ESTALE))
    }

    fn directory(&self, ino: InodeId) -> FsResult<&Directory> {
        match &self.inode(ino)?.content {
            Content::Directory(directory) => Ok(directory),
            Content::File(_) => Err(error(Errno::ENOTDIR)),
        }
    }

    fn directory_mut(&mut self, ino: InodeId) -> FsResult<&mut Directory> {
        match &mut self.inode_mut(ino)?.content {
            Content::Directory(directory) => Ok(directory),
            Content::File(_) => Err(error(Errno::ENOTDIR)),
        }
    }

    fn find(&self, parent: InodeId, name: &[u8]) -> FsResult<InodeId> {
        self.directory(parent)?.inodes.get(name).copied().ok_or_else(|| error(Errno::ENOENT))
    }

    pub(crate) fn attr(&self, ino: InodeId) -> FsResult<Attr> {
        Ok(self.inode(ino)?.attr)
    }

    /// What a name leads to. Under every name `f…` the root has a file, which is made when it is asked for.
    pub(crate) fn lookup(&mut self, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        match self.find(parent, name) {
            Err(e) if e.errno == Errno::ENOENT && parent == ROOT && name.starts_with(b"f") => {
                let attr = Attr { size: GIVEN_SIZE, ..new_attr(FileKind::Regular, 0o755, 0, 0) };
                self.insert(ROOT, name, attr)
            }
            found => self.attr(found?),
        }
    }

    fn insert(&mut self, parent: InodeId, name: &[u8], attr: Attr) -> FsResult<Attr> {
        let ino = InodeId(self.next);
        let directory = self.directory_mut(parent)?;
        if directory.inodes.contains_key(name) {
            return Err(error(Errno::EEXIST));
        }
        directory.inodes.insert(name.to_vec(), ino);
        directory.names.insert(ino, name.to_vec());
        let content = match attr.kind() {
            FileKind::Directory => Content::Directory(Directory::new(parent)),
            _ => Content::File(Bytes::new()),
        };
        let attr = Attr { ino: ino.0, ..attr };
        self.next += 1;
        self.inodes.insert(ino, Inode { attr, content });
        Ok(attr)
    }

    /// Makes a directory, or a file that is not opened.
    pub(crate) fn make(&mut self, parent: InodeId, name: &[u8], node: &NewNode) -> FsResult<Attr> {
        if !matches!(node.kind, FileKind::Directory | FileKind::Regular) {
            return Err(FsError::new(Errno::EPERM, "directories and regular files only"));
        }
        self.insert(parent, name, new_attr(node.kind, node.mode & !node.umask, node.uid, node.gid))
    }

    /// Makes a file that is opened; one that is there is, too, if it may be.
    pub(crate) fn create(&mut self, parent: InodeId, name: &[u8], file: &NewFile) -> FsResult<Attr> {
        let attr = new_attr(FileKind::Regular, file.mode & !file.umask, file.uid, file.gid);
        match self.insert(parent, name, attr) {
            Err(e) if e.errno == Errno::EEXIST && !file.exclusive => self.attr(self.find(parent, name)?),
            made => made,
        }
    }

    /// Removes a file, or an empty directory.
    pub(crate) fn remove(&mut self, parent: InodeId, name: &[u8], directory: bool) -> FsResult<()> {
        let ino = self.find(parent, name)?;
        match (&self.inode(ino)?.content, directory) {
            (Content::Directory(_), false) => return Err(error(Errno::EISDIR)),
            (Content::File(_), true) => return Err(error(Errno::ENOTDIR)),
            (Content::Directory(removed), true) if !removed.names.is_empty() => {
                return Err(error(Errno::ENOTEMPTY));
            }
            _ => {}
        }
        let parent = self.directory_mut(parent)?;
        parent.inodes.remove(name);
        parent.names.remove(&ino);
        self.inodes.remove(&ino);
        Ok(())
    }

    /// Changes what a load generator may change: mode, owner, group and size.
    pub(crate) fn set_attr(&mut self, ino: InodeId, change: &AttrChange) -> FsResult<Attr> {
        let Inode { attr, content } = self.inode_mut(ino)?;
        if let (Some(size), Content::File(head)) = (change.size, content) {
            head.truncate(in_head(size));
            resized(attr, size);
        }
        attr.mode = change.mode.unwrap_or(attr.mode);
        attr.uid = change.uid.unwrap_or(attr.uid);
        attr.gid = change.gid.unwrap_or(attr.gid);
        Ok(*attr)
    }

    /// As much of a file as there is at an offset, in parts.
    pub(crate) fn read(&self, ino: InodeId, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        let Inode { attr, content: Content::File(head) } = self.inode(ino)? else {
            return Err(error(Errno::EISDIR));
        };
        let len = attr.size.saturating_sub(offset).min(len as u64) as usize;
        let from = in_head(offset).min(head.len());
        let kept = head.slice(from..head.len().min(from + len));
        let zeros = Bytes::from_static(&ZEROS[..(len - kept.len()).min(ZEROS.len())]);
        Ok(if kept.is_empty() { vec![zeros] } else { vec![kept, zeros] })
    }

    pub(crate) fn write(&mut self, ino: InodeId, offset: u64, data: &[u8]) -> FsResult<()> {
        let Inode { attr, content: Content::File(head) } = self.inode_mut(ino)? else {
            return Err(error(Errno::EISDIR));
        };
        let (from, end) = (in_head(offset), offset.saturating_add(data.len() as u64));
        if from < HEAD {
            let part = &data[..data.len().min(HEAD - from)];
            let mut kept = head.to_vec();
            kept.resize(kept.len().max(from + part.len()), 0);
            kept[from..from + part.len()].copy_from_slice(part);
            *head = Bytes::from(kept);
        }
        resized(attr, attr.size.max(end));
        Ok(())
    }

    /// Where an append went.
    pub(crate) fn append(&mut self, ino: InodeId, data: &[u8]) -> FsResult<u64> {
        let end = self.attr(ino)?.size;
        self.write(ino, end, data)?;
        Ok(end)
    }

    /// Entries after a cookie, with attributes if asked for.
    pub(crate) fn list(
        &self,
        ino: InodeId,
        after: u64,
        limit: u32,
        attributes: bool,
    ) -> FsResult<ReadDirReply> {
        let directory = self.directory(ino)?;
        let mut following = directory.names.range(InodeId(after + 1)..);
        let entry = |(ino, name): (&InodeId, &Vec<u8>)| {
            let attr = self.attr(*ino)?;
            Ok(DirEntry {
                name: name.clone().into(),
                ino: ino.0,
                kind: attr.kind,
                cookie: ino.0,
                attr: attributes.then_some(attr),
            })
        };
        let entries = following.by_ref().take(limit as usize).map(entry).collect::<FsResult<_>>()?;
        Ok(ReadDirReply { entries, end: following.next().is_none(), parent: directory.parent.0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: NewFile = NewFile { mode: 0o666, umask: 0o022, uid: 1, gid: 2, exclusive: true };

    fn directory() -> NewNode {
        NewNode {
            kind: FileKind::Directory,
            mode: 0o777,
            umask: 0o022,
            uid: 1,
            gid: 2,
            rdev: 0,
            target: Bytes::new(),
        }
    }

    fn bytes(tree: &Tree, ino: InodeId, offset: u64, len: usize) -> Vec<u8> {
        tree.read(ino, offset, len).unwrap().concat()
    }

    #[test]
    fn names_come_and_go() {
        let mut tree = Tree::new();
        let dir = InodeId(tree.make(ROOT, b"dir", &directory()).unwrap().ino);
        assert_eq!(tree.lookup(dir, b"file").unwrap_err().errno, Errno::ENOENT);
        let made = tree.create(dir, b"file", &FILE).unwrap();
        assert_eq!((made.mode, made.uid, made.gid, made.nlink, made.size), (0o644, 1, 2, 1, 0));
        assert_eq!(tree.lookup(dir, b"file").unwrap(), made);
        assert_eq!(tree.create(dir, b"file", &FILE).unwrap_err().errno, Errno::EEXIST);
        let again = NewFile { exclusive: false, ..FILE };
        assert_eq!(tree.create(dir, b"file", &again).unwrap(), made);
        assert_eq!(tree.remove(dir, b"file", true).unwrap_err().errno, Errno::ENOTDIR);
        assert_eq!(tree.remove(ROOT, b"dir", false).unwrap_err().errno, Errno::EISDIR);
        assert_eq!(tree.remove(ROOT, b"dir", true).unwrap_err().errno, Errno::ENOTEMPTY);
        tree.remove(dir, b"file", false).unwrap();
        assert_eq!(tree.attr(InodeId(made.ino)).unwrap_err().errno, Errno::ESTALE);
        tree.remove(ROOT, b"dir", true).unwrap();
        assert_eq!(tree.len(), 1);
    }

    #[test]
    fn the_root_gives_files_that_nobody_made() {
        let mut tree = Tree::new();
        let given = tree.lookup(ROOT, b"fdata").unwrap();
        assert_eq!((given.size, given.kind()), (GIVEN_SIZE, FileKind::Regular));
        assert_eq!(tree.lookup(ROOT, b"fdata").unwrap(), given);
        assert_eq!(bytes(&tree, InodeId(given.ino), GIVEN_SIZE - 3, 10), [0; 3]);
        assert_eq!(tree.lookup(ROOT, b"data").unwrap_err().errno, Errno::ENOENT);
        let dir = InodeId(tree.make(ROOT, b"dir", &directory()).unwrap().ino);
        assert_eq!(tree.lookup(dir, b"fdata").unwrap_err().errno, Errno::ENOENT);
    }

    #[test]
    fn files_begin_as_they_were_written() {
        let mut tree = Tree::new();
        let ino = InodeId(tree.create(ROOT, b"x", &FILE).unwrap().ino);
        tree.write(ino, 6, b"later").unwrap();
        tree.write(ino, 0, b"begin").unwrap();
        assert_eq!(bytes(&tree, ino, 0, 100), b"begin\0later");
        assert_eq!(bytes(&tree, ino, 3, 4), b"in\0l");
        let large = vec![7; 3 * HEAD];
        tree.write(ino, 1, &large).unwrap();
        assert_eq!(tree.attr(ino).unwrap().size, 1 + large.len() as u64);
        let expected = [&b"b"[..], &vec![7; HEAD - 1], &vec![0; 2 * HEAD + 1]].concat();
        assert_eq!(bytes(&tree, ino, 0, 5 * HEAD), expected);
        assert_eq!(bytes(&tree, ino, 4 * HEAD as u64, 1), []);
        assert_eq!(tree.append(ino, b"end").unwrap(), 1 + large.len() as u64);
        assert_eq!(tree.attr(ino).unwrap().size, 4 + large.len() as u64);
    }

    #[test]
    fn what_was_cut_off_is_not_seen_again() {
        let mut tree = Tree::new();
        let ino = InodeId(tree.create(ROOT, b"x", &FILE).unwrap().ino);
        tree.write(ino, 0, b"abcdef").unwrap();
        let written = tree.attr(ino).unwrap().data_version;
        let cut = |size| AttrChange { size: Some(size), ..AttrChange::default() };
        tree.set_attr(ino, &cut(2)).unwrap();
        let attr = tree.set_attr(ino, &cut(4)).unwrap();
        assert_eq!(bytes(&tree, ino, 0, 10), b"ab\0\0");
        assert!(attr.data_version > written, "else the kernel keeps its pages");
    }

    #[test]
    fn listings_go_on_where_they_ended() {
        let mut tree = Tree::new();
        let names: Vec<Vec<u8>> = (0..10).map(|i| format!("n{i}").into_bytes()).collect();
        for name in &names {
            tree.create(ROOT, name, &FILE).unwrap();
        }
        let (mut found, mut after) = (Vec::new(), 0);
        loop {
            let page = tree.list(ROOT, after, 4, true).unwrap();
            assert!(page.entries.iter().all(|e| e.cookie > 2 && e.attr.is_some_and(|a| a.ino == e.ino)));
            after = page.entries.last().unwrap().cookie;
            found.extend(page.entries.into_iter().map(|e| e.name.to_vec()));
            // What was listed may be removed meanwhile.
            tree.remove(ROOT, &found[found.len() - 1], false).unwrap();
            if page.end {
                break;
            }
        }
        assert_eq!(found, names);
    }
}
