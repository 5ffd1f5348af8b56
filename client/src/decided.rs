//! Operations that this client decides by itself, where it holds the delegations for that: what they do to its files. What they do
//! to names and attributes is in [`crate::leases`].

use std::sync::Arc;

use fjordfs_proto::{
    InodeId,
    mode::{SETGID, SETUID},
    pb::meta::{Attr, Make, Remove, Rename, SetAttr, request::Op},
};

use crate::{client::Inner, leases::Removed};

impl Inner {
    /// Makes an inode, if that can be decided here.
    pub(crate) fn make_here(&self, make: &Make) -> Option<Attr> {
        let leases = self.meta.leases();
        if !leases.is_delegated(InodeId(make.parent)) {
            return None;
        }
        let ino = self.inodes.take_now()?;
        leases.decide(None, |table, now, sequence| {
            let mut make = Make { ino, ..make.clone() };
            let attr = table.make_here(&mut make, now, sequence)?;
            Some((Op::Make(make), attr))
        })
    }

    /// Removes a name, if that can be decided here; whether it was.
    pub(crate) fn remove_here(&self, remove: &Remove) -> bool {
        let name = (InodeId(remove.parent), &remove.name[..]);
        let removed = self.meta.leases().decide(Some(name), |table, now, sequence| {
            let mut remove = remove.clone();
            let removed = table.remove_here(&mut remove, now, sequence)?;
            Some((Op::Remove(remove), removed))
        });
        if let Some(removed) = removed {
            self.name_is_gone(removed);
        }
        removed.is_some()
    }

    /// Renames, if that can be decided here; whether it was. What was written to a file that is replaced is committed all the same:
    /// somebody may be about to open it, and the server keeps it for that long.
    pub(crate) fn rename_here(&self, rename: &Rename) -> bool {
        let name = (InodeId(rename.new_parent), &rename.new_name[..]);
        let renamed = self.meta.leases().decide(Some(name), |table, now, sequence| {
            let mut rename = rename.clone();
            table.rename_here(&mut rename, now, sequence)?;
            Some((Op::Rename(rename), ()))
        });
        renamed.is_some()
    }

    /// Changes attributes other than the size, if that can be decided here.
    pub(crate) fn set_attr_here(self: &Arc<Self>, set: &SetAttr) -> Option<Attr> {
        let file = self.known_file(InodeId(set.ino));
        // Under the file's lock: the commit of what was written here carries the times of the last write, or those set since.
        let mut file = file.as_ref().map(|file| file.lock());
        if let Some(file) = &file
            && file.view.drops_suid()
            && set.mode.is_some_and(|mode| mode & (SETUID | SETGID) != 0)
        {
            // The commit that is to come would take away what is set now.
            return None;
        }
        let uncommitted = file.as_ref().is_some_and(|file| file.view.has_local());
        let attr = self.meta.leases().decide(None, |table, now, sequence| {
            let mut set = *set;
            let attr = table.set_attr_here(&mut set, now, sequence)?;
            if uncommitted {
                // It goes with the bytes: a crash must not leave the time of bytes that are not there.
                set.mtime = None;
            }
            Some((Op::SetAttr(set), attr))
        })?;
        Some(match &mut file {
            Some(file) => {
                let sets_mtime = set.mtime.is_some() || set.mtime_now;
                file.view.set_times(attr.mtime.filter(|_| sets_mtime), attr.ctime);
                file.view.set_attr(set, attr);
                file.view.attr()
            }
            None => attr,
        })
    }

    /// What was written to a file without a name that is not open will never be read.
    fn name_is_gone(&self, Removed { ino, last }: Removed) {
        if !last {
            return;
        }
        let dirty = self.dirty.lock();
        // The list's own share, and no handle's.
        if dirty.get(&ino).is_none_or(|file| Arc::strong_count(file) > 1) {
            return;
        }
        drop(dirty);
        if let Some(file) = self.is_clean(ino) {
            self.budget.release(file.lock().forget_written());
        }
    }
}
