//! Changing what a mount allows while it is in use: `mount -o remount,ro`.

use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount_remount};

use super::{MountError, mountinfo};

/// Flags to switch on or off; the others stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remount {
    changes: Vec<(MountFlags, bool)>,
}

/// Option, its opposite, and the flag that the first switches on.
const FLAGS: [(&str, &str, MountFlags); 4] = [
    ("ro", "rw", MountFlags::RDONLY),
    ("nosuid", "suid", MountFlags::NOSUID),
    ("nodev", "dev", MountFlags::NODEV),
    ("noexec", "exec", MountFlags::NOEXEC),
];

impl Remount {
    /// Reads a list of options with `remount` in it; `None` when that is not among them. Also answers with those that only the next
    /// mount takes: mount(8) passes on what a line of fstab has, whatever was asked for.
    pub fn parse(list: &str) -> Option<(Remount, Vec<&str>)> {
        let mut options: Vec<&str> = list.split(',').map(str::trim).filter(|o| !o.is_empty()).collect();
        if !options.contains(&"remount") {
            return None;
        }
        let mut changes = Vec::new();
        options.retain(|option| {
            let change = FLAGS.into_iter().find_map(|(on, off, flag)| match *option {
                o if o == on => Some((flag, true)),
                o if o == off => Some((flag, false)),
                _ => None,
            });
            changes.extend(change);
            change.is_none() && *option != "remount"
        });
        Some((Remount { changes }, options))
    }

    /// Changes the mount on this path. Needs root. What was written is with the servers when a mount has become read-only.
    ///
    /// # Errors
    /// [`MountError::Busy`] when it cannot become read-only because files are open for writing.
    pub fn apply(&self, mountpoint: &Path) -> Result<(), MountError> {
        let failed = |source: io::Error| MountError::Mount { path: mountpoint.to_owned(), source };
        let mount = mountinfo::top_at(mountpoint).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let mut flags = flags_of(&mount.options);
        for (flag, on) in &self.changes {
            flags.set(*flag, *on);
        }
        mount_remount(mountpoint, flags, c"").map_err(|e| match e {
            rustix::io::Errno::BUSY => MountError::Busy(mountpoint.to_owned()),
            e => failed(e.into()),
        })
    }
}

/// What is in force, since the kernel clears what it is not told again.
fn flags_of(options: &str) -> MountFlags {
    let others = [("noatime", MountFlags::NOATIME), ("sync", MountFlags::SYNCHRONOUS)];
    let known = FLAGS.into_iter().map(|(on, _, flag)| (on, flag)).chain(others);
    known.filter(|(name, _)| options.split(',').any(|option| option == *name)).map(|(_, flag)| flag).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_changes_and_the_rest_is_told() {
        let (remount, rest) = Remount::parse("rw,remount,ro,nosuid,memory=1GiB,exec,_netdev").unwrap();
        let expected = [
            (MountFlags::RDONLY, false),
            (MountFlags::RDONLY, true),
            (MountFlags::NOSUID, true),
            (MountFlags::NOEXEC, false),
        ];
        assert_eq!((&remount.changes[..], &rest[..]), (&expected[..], &["memory=1GiB", "_netdev"][..]));
        assert_eq!(Remount::parse("ro,nosuid"), None);
    }

    #[test]
    fn what_is_in_force_is_read_back() {
        let flags = flags_of("ro,nosuid,noatime,relatime");
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NOATIME);
    }
}
