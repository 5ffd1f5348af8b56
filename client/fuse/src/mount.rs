//! Mounting and unmounting.
//!
//! Root mounts directly; everybody else asks `fusermount3`, which is setuid. Either way the result is a descriptor of
//! /dev/fuse, and the rest is the session's.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::filesystem::Filesystem;
use crate::options::MountOptions;
use crate::session::{Agreed, Departure, Keep, Session, SessionError};
use crate::transport::selection::{self, TransportInfo};

mod direct;
mod folder;
mod fusermount;
mod mountinfo;
mod mountpoint;
mod remount;

use mountinfo::DeviceNumber;
pub use remount::Remount;

/// Type in /proc/mounts, and what `mount -t` is told.
pub(crate) const TYPE: &str = "fuse.fjord";
/// The part that fusermount3 is told.
const SUBTYPE: &str = "fjord";

/// Why a mount or unmount failed; the message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No such directory.
    #[error("mount point {0}: no such directory; create it first (mkdir -p {0})")]
    NotFound(PathBuf),
    /// Something else than a directory.
    #[error("mount point {0} is not a directory")]
    NotADirectory(PathBuf),
    /// Files would be hidden.
    #[error(
        "mount point {0} is not empty: mounting would hide what is in it; use another directory, or the option nonempty"
    )]
    NotEmpty(PathBuf),
    /// FjordFS is there already.
    #[error(
        "mount point {path} is already a FjordFS mount of {source_name}; unmount it first (fjord umount {path})"
    )]
    AlreadyMounted {
        /// The mount point.
        path: PathBuf,
        /// What is mounted there.
        source_name: String,
    },
    /// A mount whose process is gone.
    #[error(
        "mount point {0} is a mount whose process has died; unmount it first (umount {0}, or fusermount3 -u {0})"
    )]
    Dead(PathBuf),
    /// The directory cannot be looked at.
    #[error("mount point {path}: {source}")]
    Inaccessible {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// /dev/fuse is missing or closed to us.
    #[error(
        "cannot open /dev/fuse: {0}; load the module (modprobe fuse), and in a container pass the device in"
    )]
    Device(io::Error),
    /// mount(2) failed.
    #[error("mounting on {path}: {source}")]
    Mount {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be shown.
    #[error(
        "cannot mount the folder {folder} of the filesystem: {source}; `fjord mount` without it shows what there is"
    )]
    Folder {
        /// From the root of the filesystem.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Linux lets only root do that.
    #[error("only root can mount a folder of the filesystem: mount all of it, without {0}")]
    FolderNeedsRoot(PathBuf),
    /// Not root, and no helper.
    #[error(
        "mounting without root needs fusermount3, which could not be started ({0}); install fuse3, or mount as root"
    )]
    NoHelper(io::Error),
    /// The helper refused.
    #[error("fusermount3 on {path}: {message}")]
    Helper {
        /// The mount point.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// The connection to the kernel could not be set up.
    #[error("mounting on {path}: {source}")]
    Session {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: SessionError,
    },
    /// Somebody uses it.
    #[error(
        "{0} is in use: close its files and leave its directories (`fuser -vm {0}` lists who), or unmount lazily (umount -l)"
    )]
    Busy(PathBuf),
    /// umount2(2) failed.
    #[error("unmounting {path}: {source}")]
    Unmount {
        /// The mount point.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A mounted filesystem. Dropping it while mounted detaches it, so that no dead mount point is left behind.
#[derive(Debug)]
pub struct Mount {
    session: Session,
    unmounter: Unmounter,
}

/// Unmounts from any thread, as one that handles signals.
#[derive(Clone, Debug)]
pub struct Unmounter {
    place: Arc<Place>,
}

#[derive(Debug)]
struct Place {
    mountpoint: PathBuf,
    /// Which mount is ours, in case something is mounted over it, or it is gone and something else is there.
    device: Option<DeviceNumber>,
}

/// Mounts any filesystem and starts serving it.
pub fn mount_filesystem<F: Filesystem>(fs: F, options: &MountOptions) -> Result<Mount, MountError> {
    mount_new(fs, options, None)
}

/// As [`mount_filesystem`], and `keep` is handed what a successor of this process needs.
pub fn mount_kept<F: Filesystem>(
    fs: F,
    options: &MountOptions,
    keep: &mut dyn FnMut(&[OwnedFd], Agreed) -> io::Result<()>,
) -> Result<Mount, MountError> {
    mount_new(fs, options, Some(keep))
}

/// Goes on with a mount that `keep` was handed by a process that has ended.
pub fn resume_filesystem<F: Filesystem>(
    fs: F,
    options: &MountOptions,
    devices: Vec<OwnedFd>,
    agreed: Agreed,
    first_number: u64,
) -> Result<Mount, MountError> {
    // Nothing here may look into the mount: nobody answers yet.
    let mountpoint = options.mountpoint.clone();
    let session = Session::resume(fs, devices, options, agreed, first_number)
        .map_err(|source| MountError::Session { path: mountpoint.clone(), source })?;
    let place = Place { device: mountinfo::top_at(&mountpoint).map(|mount| mount.device), mountpoint };
    let unmounter = Unmounter { place: Arc::new(place) };
    tracing::info!(
        source = options.source,
        "took over {} from a process that has ended",
        unmounter.mountpoint().display()
    );
    Ok(Mount { session, unmounter })
}

fn mount_new<F: Filesystem>(
    fs: F,
    options: &MountOptions,
    keep: Option<Keep<'_>>,
) -> Result<Mount, MountError> {
    let mountpoint = mountpoint::check(&options.mountpoint, options.nonempty)?;
    let selection = selection::select(options).map_err(|reason| MountError::Session {
        path: mountpoint.clone(),
        source: SessionError::Transport(reason),
    })?;
    let (device, unseen) = open(&mountpoint, options)?;
    if let Some(unseen) = unseen {
        return mount_folder(fs, options, selection, keep, mountpoint, device, unseen);
    }
    let place = Place { device: mountinfo::top_at(&mountpoint).map(|mount| mount.device), mountpoint };
    let unmounter = Unmounter { place: Arc::new(place) };
    let session = Session::start(fs, device, options, selection, keep).map_err(|source| {
        if let Err(e) = unmounter.unmount(true) {
            tracing::warn!("after a failed start: {e}");
        }
        MountError::Session { path: unmounter.mountpoint().to_owned(), source }
    })?;
    Ok(mounted(session, unmounter, options))
}

/// The folder can be found once the filesystem is served.
fn mount_folder<F: Filesystem>(
    fs: F,
    options: &MountOptions,
    selection: selection::Selection,
    keep: Option<Keep<'_>>,
    mountpoint: PathBuf,
    device: OwnedFd,
    unseen: folder::Unseen,
) -> Result<Mount, MountError> {
    let started = Session::start(fs, device, options, selection, keep);
    let mut session = started.map_err(|source| MountError::Session { path: mountpoint.clone(), source })?;
    if let Err(e) = unseen.show(&options.folder, &mountpoint) {
        // Without a mount it ends by itself.
        session.join();
        return Err(e);
    }
    let place = Place { device: mountinfo::top_at(&mountpoint).map(|mount| mount.device), mountpoint };
    Ok(mounted(session, Unmounter { place: Arc::new(place) }, options))
}

fn mounted(session: Session, unmounter: Unmounter, options: &MountOptions) -> Mount {
    if let Some(kib) = options.read_ahead_kb {
        raise_read_ahead(unmounter.place.device, kib);
    }
    tracing::info!(
        source = options.source,
        "mounted on {} over {}",
        unmounter.mountpoint().display(),
        session.transport()
    );
    Mount { session, unmounter }
}

fn open(mountpoint: &Path, options: &MountOptions) -> Result<(OwnedFd, Option<folder::Unseen>), MountError> {
    let is_whole = options.folder == Path::new("/");
    match rustix::process::geteuid().is_root() {
        true if is_whole => Ok((direct::mount(mountpoint, options)?, None)),
        true => folder::mount_unseen(mountpoint, options).map(|(device, unseen)| (device, Some(unseen))),
        false if is_whole => Ok((fusermount::mount(mountpoint, options)?, None)),
        false => Err(MountError::FolderNeedsRoot(options.folder.clone())),
    }
}

impl Mount {
    /// Unmounts and waits until everything begun is done. Fails with [`MountError::Busy`] while files are open or a
    /// process works in it; the mount then goes on as before.
    pub fn unmount(&mut self) -> Result<(), MountError> {
        self.unmounter.unmount(false)?;
        self.wait();
        Ok(())
    }

    /// Waits until it is unmounted, by anyone, and everything begun is done.
    pub fn wait(&mut self) {
        self.session.join();
    }

    /// For the thread that handles signals.
    pub fn unmounter(&self) -> Unmounter {
        self.unmounter.clone()
    }

    /// For leaving it to another process.
    pub fn departure(&self) -> Departure {
        self.session.departure()
    }

    /// How the kernel's requests come.
    pub fn transport(&self) -> &TransportInfo {
        self.session.transport()
    }

    /// Where it is mounted, as an absolute path without symbolic links.
    pub fn mountpoint(&self) -> &Path {
        self.unmounter.mountpoint()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.session.has_ended() {
            return;
        }
        if let Err(e) = self.unmounter.unmount(true) {
            tracing::warn!("dropped while mounted: {e}");
        }
    }
}

impl Unmounter {
    /// Unmounts; [`Mount::wait`] then returns. `lazy` detaches a mount that is in use: it disappears from the tree at
    /// once, and ends when its last user does. A mount that is gone already is a success.
    pub fn unmount(&self, lazy: bool) -> Result<(), MountError> {
        let Place { mountpoint, device } = &*self.place;
        match (mountinfo::top_at(mountpoint), device) {
            (None, _) => return Ok(()),
            (Some(top), Some(device)) if top.device != *device => {
                if !mountinfo::is_mounted(*device) {
                    return Ok(());
                }
                tracing::warn!("{} is mounted over {}; unmount that first", top.source, mountpoint.display());
                return Err(MountError::Busy(mountpoint.clone()));
            }
            _ => {}
        }
        unmount_path(mountpoint, lazy)
    }

    /// Where it is mounted.
    pub fn mountpoint(&self) -> &Path {
        &self.place.mountpoint
    }
}

/// Unmounts whatever is mounted on `path`, by system call when allowed, else with fusermount3: what `fjord umount` does.
pub fn unmount_path(path: &Path, lazy: bool) -> Result<(), MountError> {
    match direct::unmount(path, lazy) {
        Ok(()) => Ok(()),
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => fusermount::unmount(path, lazy),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Err(MountError::Busy(path.to_owned())),
        Err(source) => Err(MountError::Unmount { path: path.to_owned(), source }),
    }
}

/// The kernel gives FUSE mounts 128 KiB of readahead whatever INIT says. Without root it stays so; said, not failed.
fn raise_read_ahead(device: Option<DeviceNumber>, kib: u32) {
    let Some(device) = device else { return };
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(e) = std::fs::write(&path, kib.to_string()) {
        tracing::info!("sequential reads keep the kernel's readahead of 128 KiB: {path}: {e}");
    }
}
