//! A mount that shows one folder of the filesystem. Linux mounts the whole where nobody sees it, and puts a view of the folder in
//! place, as `mount --bind` does. What is above the folder cannot be reached from there.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::path::Arg;

use super::{MountError, SUBTYPE, direct};
use crate::options::MountOptions;
use crate::transport::dev_fuse;

const NOTHING: &CStr = c"";

/// A mount that nobody sees yet.
#[derive(Debug)]
pub(super) struct Unseen(OwnedFd);

/// Mounts the whole. What is returned first is the session's.
pub(super) fn mount_unseen(
    mountpoint: &Path,
    options: &MountOptions,
) -> Result<(OwnedFd, Unseen), MountError> {
    let device = dev_fuse::open_device().map_err(MountError::Device)?;
    let mounted = mount(&device, options);
    let unseen = mounted.map_err(|source| MountError::Mount { path: mountpoint.to_owned(), source })?;
    Ok((device, unseen))
}

fn mount(device: &OwnedFd, options: &MountOptions) -> io::Result<Unseen> {
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&fs, "source", options.source.as_str())?;
    fsconfig_set_string(&fs, "subtype", SUBTYPE)?;
    for option in direct::data(device, options).split(',') {
        match option.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&fs, key, value)?,
            None => fsconfig_set_flag(&fs, option)?,
        }
    }
    let flags = [(options.read_only, "ro"), (options.sync, "sync")];
    flags.iter().filter(|(wanted, _)| *wanted).try_for_each(|(_, flag)| fsconfig_set_flag(&fs, *flag))?;
    fsconfig_create(&fs)?;
    let attributes = [
        (options.read_only, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (options.nosuid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (options.nodev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (options.noexec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (options.noatime, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ];
    let attributes = attributes.into_iter().filter_map(|(wanted, flag)| wanted.then_some(flag)).collect();
    Ok(Unseen(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?))
}

impl Unseen {
    /// Puts a folder in place; the filesystem must be served already. Nothing of the mount is left when this fails.
    pub(super) fn show(self, folder: &Path, mountpoint: &Path) -> Result<(), MountError> {
        let relative = folder.strip_prefix("/").unwrap_or(folder);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        // Links are followed as long as they stay within: an absolute one begins at the root of this filesystem.
        let opened = openat2(self.0.as_fd(), relative, flags, Mode::empty(), ResolveFlags::IN_ROOT);
        let opened =
            opened.map_err(|e| MountError::Folder { folder: folder.to_owned(), source: e.into() })?;
        let view =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        open_tree(&opened, NOTHING, view)
            .and_then(|view| {
                let target = mountpoint.into_c_str()?;
                let place = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                move_mount(&view, NOTHING, rustix::fs::CWD, &*target, place)
            })
            .map_err(|e| MountError::Mount { path: mountpoint.to_owned(), source: e.into() })
    }
}
