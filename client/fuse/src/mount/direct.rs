//! Mounting by system call, as root.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags};

use super::{MountError, TYPE};
use crate::options::MountOptions;
use crate::transport::dev_fuse;

pub(super) fn mount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let device = dev_fuse::open_device().map_err(MountError::Device)?;
    let failed = |source: io::Error| MountError::Mount { path: mountpoint.to_owned(), source };
    let data = CString::new(data(&device, options)).map_err(|e| failed(e.into()))?;
    rustix::mount::mount(options.source.as_str(), mountpoint, TYPE, flags(options), data.as_c_str())
        .map_err(|e| failed(e.into()))?;
    Ok(device)
}

fn flags(options: &MountOptions) -> MountFlags {
    [
        (options.read_only, MountFlags::RDONLY),
        (options.nosuid, MountFlags::NOSUID),
        (options.nodev, MountFlags::NODEV),
        (options.noexec, MountFlags::NOEXEC),
        (options.noatime, MountFlags::NOATIME),
        (options.sync, MountFlags::SYNCHRONOUS),
    ]
    .into_iter()
    .filter_map(|(wanted, flag)| wanted.then_some(flag))
    .collect()
}

/// What the kernel's FUSE module reads. `default_permissions`: the kernel checks access from mode and owner, so the
/// metadata server does not have to be asked.
pub(super) fn data(device: &OwnedFd, options: &MountOptions) -> String {
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let max_read = options.max_read.map_or(options.request_size_max, |max| max as usize);
    data.push_str(&format!(",max_read={}", max_read.min(options.request_size_max)));
    data
}

pub(super) fn unmount(path: &Path, lazy: bool) -> io::Result<()> {
    let flags = if lazy { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    Ok(rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW)?)
}
