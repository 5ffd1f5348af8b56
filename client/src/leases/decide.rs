//! Operations that this client decides by itself, on inodes that are delegated to it. Pure, as the table.
//!
//! Each takes its effect on what is cached at once, exactly as the server's will be when it executes the operation with the
//! number and the times that are put into it here. An operation is decided only when it is sure to succeed there: whatever
//! is unusual, unknown or wrong goes to the server.

use fjordfs_proto::{
    InodeId, SYMLINK_MAX,
    mode::without_suid,
    operation::{UMASK, new_attr},
    pb::meta::{Attr, FileKind, Make, Remove, Rename, SetAttr, Time, request::Op},
};

use super::table::{Cached, EXCHANGE, Table};
use bytes::Bytes;

/// RENAME_NOREPLACE of `renameat2(2)`.
const NOREPLACE: u32 = 1;

/// What became of the inode whose name was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Removed {
    pub(crate) ino: InodeId,
    /// It has no name any more.
    pub(crate) last: bool,
}

impl Table {
    /// Makes an inode under the number in `make`.
    pub(crate) fn make_here(&mut self, make: &mut Make, now: Time, sequence: u64) -> Option<Attr> {
        let parent = InodeId(make.parent);
        if make.unnamed || !is_sound(make) || !self.is_known_absent(parent, &make.name) {
            return None;
        }
        let directory = self.decidable(parent)?;
        let parent_attr = directory.attr.filter(|attr| attr.kind() == FileKind::Directory)?;
        // An access control list that would be inherited is among the extended attributes.
        if parent_attr.xattrs || parent_attr.nlink == 0 {
            return None;
        }
        make.time = Some(now);
        let mut attr = new_attr(make, &parent_attr, make.ino, now);
        if attr.kind() != FileKind::Symlink {
            attr.mode &= !(make.umask & UMASK);
        }
        let is_dir = attr.kind() == FileKind::Directory;
        self.touch(parent, i32::from(is_dir), now, sequence);
        self.set_name(parent, make.name.clone(), Some(InodeId(make.ino)));
        if !make.target.is_empty() {
            self.set_target(InodeId(make.ino), &make.target);
        }
        self.insert(
            InodeId(make.ino),
            Cached {
                attr: Some(attr),
                complete: is_dir,
                delegated: true,
                decided: sequence,
                ..Cached::default()
            },
        );
        Some(attr)
    }

    /// Removes a name.
    pub(crate) fn remove_here(&mut self, remove: &mut Remove, now: Time, sequence: u64) -> Option<Removed> {
        let parent = InodeId(remove.parent);
        self.decidable(parent)?;
        let ino = self.known_name(parent, &remove.name)?;
        let victim = self.decidable(ino)?;
        let is_dir = victim.attr?.kind() == FileKind::Directory;
        if is_dir != remove.directory || (is_dir && !victim.is_known_empty()) {
            return None;
        }
        remove.time = Some(now);
        self.touch(parent, -i32::from(is_dir), now, sequence);
        self.set_absent(parent, &remove.name);
        Some(Removed { ino, last: self.lose_link(ino, now, sequence) })
    }

    /// Gives a name to what is under another, in place of what has it now, if anything.
    pub(crate) fn rename_here(&mut self, rename: &mut Rename, now: Time, sequence: u64) -> Option<()> {
        let (from, to) = (InodeId(rename.parent), InodeId(rename.new_parent));
        if rename.flags & !NOREPLACE != 0 {
            return None;
        }
        self.decidable(from)?;
        self.decidable(to)?;
        let ino = self.known_name(from, &rename.name)?;
        let is_dir = self.decidable(ino)?.attr?.kind() == FileKind::Directory;
        // Whether a directory would come to lie below itself takes all directories above to say.
        if is_dir && from != to {
            return None;
        }
        let replaced = match self.known_name(to, &rename.new_name) {
            None if self.is_known_absent(to, &rename.new_name) => None,
            None => return None,
            // Two names of one file, or something that may not be replaced.
            Some(old) if old == ino || rename.flags & NOREPLACE != 0 || is_dir => return None,
            Some(old) => {
                let kind = self.decidable(old)?.attr?.kind();
                (kind != FileKind::Directory).then_some(Some(old))?
            }
        };
        rename.time = Some(now);
        self.touch(from, 0, now, sequence);
        self.touch(to, 0, now, sequence);
        self.set_absent(from, &rename.name);
        self.set_name(to, rename.new_name.clone(), Some(ino));
        self.change(ino, sequence, |attr| attr.ctime = Some(now));
        if let Some(replaced) = replaced {
            self.lose_link(replaced, now, sequence);
        }
        Some(())
    }

    /// Changes attributes other than the size.
    pub(crate) fn set_attr_here(&mut self, set: &mut SetAttr, now: Time, sequence: u64) -> Option<Attr> {
        let attr = self.decidable(InodeId(set.ino))?.attr?;
        // The permissions of an access control list change with the mode.
        if set.size.is_some() || set.policy.is_some() || (set.mode.is_some() && attr.xattrs) {
            return None;
        }
        for (time, is_now) in [(&mut set.atime, &mut set.atime_now), (&mut set.mtime, &mut set.mtime_now)] {
            if std::mem::take(is_now) {
                *time = Some(now);
            }
        }
        set.ctime.get_or_insert(now);
        let changes_owner = set.uid.is_some() || set.gid.is_some();
        self.change(InodeId(set.ino), sequence, |attr| {
            if attr.kind() != FileKind::Directory && (changes_owner || set.clear_suid) {
                attr.mode = without_suid(attr.mode);
            }
            attr.mode = set.mode.map_or(attr.mode, |mode| mode & fjordfs_proto::mode::PERMISSIONS);
            attr.uid = set.uid.unwrap_or(attr.uid);
            attr.gid = set.gid.unwrap_or(attr.gid);
            attr.atime = set.atime.or(attr.atime);
            attr.mtime = set.mtime.or(attr.mtime);
            attr.ctime = set.ctime;
        })
    }

    /// An inode that nobody but this client can change, and of which no operation is under way.
    fn decidable(&mut self, ino: InodeId) -> Option<&Cached> {
        if self.is_busy(ino) {
            return None;
        }
        self.get(ino).filter(|cached| cached.delegated && cached.attr.is_some())
    }

    fn is_known_absent(&mut self, parent: InodeId, name: &[u8]) -> bool {
        self.name(parent, name) == Some(None)
    }

    fn known_name(&mut self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        self.name(parent, name).flatten()
    }

    /// A directory gained or lost an entry, and `links` subdirectories.
    fn touch(&mut self, directory: InodeId, links: i32, now: Time, sequence: u64) {
        self.change(directory, sequence, |attr| {
            attr.nlink = attr.nlink.saturating_add_signed(links);
            (attr.mtime, attr.ctime) = (Some(now), Some(now));
        });
    }

    /// One name of an inode is gone; whether it was the last.
    fn lose_link(&mut self, ino: InodeId, now: Time, sequence: u64) -> bool {
        let attr = self.change(ino, sequence, |attr| {
            attr.nlink = if attr.kind() == FileKind::Directory { 0 } else { attr.nlink.saturating_sub(1) };
            attr.ctime = Some(now);
        });
        let last = attr.is_none_or(|attr| attr.nlink == 0);
        if last {
            self.forget(ino);
        }
        last
    }

    fn set_absent(&mut self, parent: InodeId, name: &Bytes) {
        if self.is_complete(parent) {
            self.drop_name(parent, name);
        } else {
            self.set_name(parent, name.clone(), None);
        }
    }
}

/// Inodes that a decided operation is about.
pub(super) fn inodes_of(op: &Op) -> Vec<InodeId> {
    let inodes = match op {
        Op::Make(op) => vec![op.parent, op.ino],
        Op::Remove(op) => vec![op.parent],
        Op::Rename(op) => vec![op.parent, op.new_parent],
        Op::SetAttr(op) => vec![op.ino],
        _ => Vec::new(),
    };
    inodes.into_iter().map(InodeId).collect()
}

/// Whether the server would find nothing wrong with the request as such.
fn is_sound(make: &Make) -> bool {
    let target = &make.target;
    match make.kind() {
        FileKind::Unspecified => false,
        FileKind::Symlink => !target.is_empty() && target.len() <= SYMLINK_MAX && !target.contains(&0),
        _ => target.is_empty(),
    }
}

const _: () = assert!(NOREPLACE & EXCHANGE == 0);

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
