//! Operations by path.

use fjordfs_proto::{
    FsError, FsResult, InodeId, ROOT_INODE,
    error::Errno,
    pb::meta::{Attr, DirEntry, FileKind},
};

use crate::{
    client::Client,
    file::File,
    namespace::{AttrChange, NewFile, NewNode},
};

/// Symbolic links followed in one resolution, as Linux does.
const LINKS_MAX: usize = 40;

/// Entries asked for at a time when a directory is read whole.
const PAGE: u32 = 1024;

/// How to open a path. Like [`std::fs::OpenOptions`]; all files can be read and written.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Make the file when it is not there.
    pub create: bool,
    /// Fail when it is there.
    pub create_new: bool,
    /// Cut it to nothing.
    pub truncate: bool,
    /// Permission bits of a new file.
    pub mode: u32,
    /// Owner and group of a new file: this process's by default.
    pub owner: (u32, u32),
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions { create: false, create_new: false, truncate: false, mode: 0o644, owner: process_owner() }
    }
}

/// Effective user and group of this process.
fn process_owner() -> (u32, u32) {
    // SAFETY: both calls have no arguments, no preconditions and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

impl Client {
    /// Attributes of what a path names; symbolic links are followed, the last one only when `follow`.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR` and `ELOOP` as `stat(2)`, naming the component.
    pub async fn resolve(&self, path: &str, follow: bool) -> FsResult<Attr> {
        let mut links = 0;
        let mut trail: Vec<InodeId> = vec![ROOT_INODE];
        let mut attr = self.getattr(ROOT_INODE).await?;
        let mut rest: Vec<Vec<u8>> = components(path.as_bytes()).rev().collect();
        while let Some(name) = rest.pop() {
            if attr.kind() != FileKind::Directory {
                return Err(at(path, FsError::new(Errno::ENOTDIR, "a component is not a directory")));
            }
            if name == b".." {
                if trail.len() > 1 {
                    trail.pop();
                }
                attr = self.getattr(trail[trail.len() - 1]).await?;
                continue;
            }
            let found = self.lookup(trail[trail.len() - 1], &name).await.map_err(|e| at(path, e))?;
            if found.kind() == FileKind::Symlink && (follow || !rest.is_empty()) {
                links += 1;
                if links > LINKS_MAX {
                    return Err(at(path, FsError::new(Errno::ELOOP, "too many symbolic links")));
                }
                let target = self.readlink(InodeId(found.ino)).await?;
                if target.first() == Some(&b'/') {
                    trail.truncate(1);
                    attr = self.getattr(ROOT_INODE).await?;
                }
                rest.extend(components(&target).rev());
                continue;
            }
            trail.push(InodeId(found.ino));
            attr = found;
        }
        Ok(attr)
    }

    /// Attributes; symbolic links are followed.
    pub async fn stat(&self, path: &str) -> FsResult<Attr> {
        self.resolve(path, true).await
    }

    /// Directory and last name of a path.
    async fn parent_of<'a>(&self, path: &'a str) -> FsResult<(InodeId, &'a str)> {
        let trimmed = path.trim_end_matches('/');
        let (dir, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
        if name.is_empty() || name == "." || name == ".." {
            return Err(at(path, FsError::new(Errno::EINVAL, "does not end in a name")));
        }
        Ok((InodeId(self.resolve(dir, true).await?.ino), name))
    }

    /// Opens an existing file.
    pub async fn open_path(&self, path: &str) -> FsResult<File> {
        self.open_with(path, &OpenOptions::default()).await
    }

    /// Opens a file, making or emptying it.
    pub async fn create_path(&self, path: &str) -> FsResult<File> {
        self.open_with(path, &OpenOptions { create: true, truncate: true, ..OpenOptions::default() }).await
    }

    /// Opens a file as told.
    ///
    /// # Errors
    /// As `open(2)`: `ENOENT`, `EEXIST`, `EISDIR`, …
    pub async fn open_with(&self, path: &str, options: &OpenOptions) -> FsResult<File> {
        let existing = match self.resolve(path, true).await {
            Ok(_) if options.create_new => {
                return Err(at(path, FsError::new(Errno::EEXIST, "exists")));
            }
            Ok(attr) => Some(attr),
            Err(e) if e.errno == Errno::ENOENT && (options.create || options.create_new) => None,
            Err(e) => return Err(e),
        };
        let file = match existing {
            Some(attr) if attr.kind() == FileKind::Directory => {
                return Err(at(path, FsError::new(Errno::EISDIR, "is a directory")));
            }
            Some(attr) => self.open(InodeId(attr.ino)).await.map_err(|e| at(path, e))?.1,
            None => {
                let (parent, name) = self.parent_of(path).await?;
                let (uid, gid) = options.owner;
                let new = NewFile { mode: options.mode, umask: 0, uid, gid, exclusive: options.create_new };
                self.create(parent, name.as_bytes(), new).await.map_err(|e| at(path, e))?.1
            }
        };
        if options.truncate && file.attr().size > 0 {
            self.setattr(file.ino(), AttrChange { size: Some(0), ..AttrChange::default() }).await?;
        }
        Ok(file)
    }

    /// Makes a directory and those above it that are missing.
    pub async fn create_dir_all(&self, path: &str) -> FsResult<Attr> {
        let mut attr = self.getattr(ROOT_INODE).await?;
        let mut so_far = String::new();
        for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
            so_far.push('/');
            so_far.push_str(name);
            attr = match self.resolve(&so_far, true).await {
                Err(e) if e.errno == Errno::ENOENT => {
                    let (uid, gid) = process_owner();
                    let node = NewNode {
                        kind: FileKind::Directory,
                        mode: 0o755,
                        umask: 0,
                        uid,
                        gid,
                        rdev: 0,
                        target: Vec::new(),
                    };
                    match self.make(InodeId(attr.ino), name.as_bytes(), node).await {
                        Err(e) if e.errno == Errno::EEXIST => self.resolve(&so_far, true).await?,
                        made => made.map_err(|e| at(&so_far, e))?,
                    }
                }
                found => found?,
            };
        }
        if attr.kind() != FileKind::Directory {
            return Err(at(path, FsError::new(Errno::ENOTDIR, "is not a directory")));
        }
        Ok(attr)
    }

    /// All entries of a directory, with attributes.
    pub async fn read_dir(&self, path: &str) -> FsResult<Vec<DirEntry>> {
        let dir = InodeId(self.resolve(path, true).await?.ino);
        let (mut entries, mut cookie) = (Vec::new(), 0);
        loop {
            let page = self.readdir(dir, cookie, PAGE, true).await.map_err(|e| at(path, e))?;
            cookie = page.entries.last().map_or(cookie, |e| e.cookie);
            let done = page.end || page.entries.is_empty();
            entries.extend(page.entries);
            if done {
                return Ok(entries);
            }
        }
    }

    /// Renames a path, replacing what `to` names.
    pub async fn rename_path(&self, from: &str, to: &str) -> FsResult<()> {
        let (parent, name) = self.parent_of(from).await?;
        let (new_parent, new_name) = self.parent_of(to).await?;
        self.rename(parent, name.as_bytes(), new_parent, new_name.as_bytes(), 0)
            .await
            .map_err(|e| at(from, e))
    }

    /// Removes a file or symbolic link.
    pub async fn remove_file(&self, path: &str) -> FsResult<()> {
        let (parent, name) = self.parent_of(path).await?;
        self.unlink(parent, name.as_bytes()).await.map_err(|e| at(path, e))
    }

    /// Removes an empty directory.
    pub async fn remove_dir(&self, path: &str) -> FsResult<()> {
        let (parent, name) = self.parent_of(path).await?;
        self.rmdir(parent, name.as_bytes()).await.map_err(|e| at(path, e))
    }
}

fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> + '_ {
    path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".").map(<[u8]>::to_vec)
}

/// The error with the path that the user named.
fn at(path: &str, e: FsError) -> FsError {
    FsError::new(e.errno, format!("{path}: {}", e.message))
}
