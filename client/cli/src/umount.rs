//! `fjord umount`, and taking a mount down for the other verbs.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use fjordfs_fuse::MountError;

use crate::{
    holders::{self, Fuse},
    mount::outcome::{Note, Outcome},
    mounts,
};

/// Unmount a FjordFS mount. Waits until everything written is with the servers, and fails when that cannot be.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord umount /mnt/fjord
  fjord umount --lazy /mnt/fjord     detach now, finish when the last user is gone")]
pub(crate) struct Args {
    /// The mount point
    dir: PathBuf,
    /// Detach at once even if it is in use; it is gone for good when the last user is
    #[arg(short, long)]
    lazy: bool,
}

/// How long a mount process may take to hand its last data to the servers.
const FLUSH_PATIENCE: Duration = Duration::from_secs(120);
/// From here on it is worth a word.
const QUIET: Duration = Duration::from_secs(3);

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let dir =
        mounts::absolute(&args.dir).with_context(|| format!("no such folder: {}", args.dir.display()))?;
    let table = mounts::read().context("cannot read /proc/self/mountinfo")?;
    let mount = match mounts::at(&table, &dir) {
        None => bail!("nothing is mounted on {}", dir.display()),
        Some(mount) if !mount.is_ours() => {
            bail!("{} is not a FjordFS mount but {}: use umount(8)", dir.display(), mount.fstype)
        }
        Some(mount) => mount,
    };
    let servers = holders::servers_of(&dir, &mount.device);
    let note = Note::of(&servers);
    match detach(&dir, args.lazy) {
        Ok(()) => {}
        Err(Refused::Busy) => bail!(
            "{} is in use by {}: end that, or detach it with --lazy",
            dir.display(),
            holders::describe(&holders::of(&dir))
        ),
        Err(e) => return Err(e).with_context(|| format!("cannot unmount {}", dir.display())),
    }
    // A bind mount of it keeps the process, and so do the users of a lazily detached one: that is no failure.
    let left = mounts::read().context("cannot read /proc/self/mountinfo")?;
    let shown_elsewhere = left.iter().any(|m| m.device == mount.device);
    if args.lazy || shown_elsewhere {
        return Ok(ExitCode::SUCCESS);
    }
    if !holders::wait_gone(&servers, QUIET) {
        // As a container does that was started while it was mounted, and has mounts of its own.
        let elsewhere = holders::in_other_namespaces(&mount.device);
        if !elsewhere.is_empty() {
            eprintln!(
                "{} is unmounted here, and still mounted for {}, with a mount namespace of its own: its process {servers:?} goes on \
                 until that is unmounted or ends",
                dir.display(),
                holders::describe(&elsewhere)
            );
            return Ok(ExitCode::SUCCESS);
        }
        wait_for_the_last_data(&dir, &servers)?;
    }
    match note.map(Note::read) {
        None | Some(Outcome::Clean) => Ok(ExitCode::SUCCESS),
        Some(Outcome::Failed(why)) => bail!("{why} ({} is unmounted)", dir.display()),
        Some(Outcome::Died) => bail!(
            "{} is unmounted, but its process {servers:?} died before it could say that everything written there had reached \
             the servers: see its log",
            dir.display()
        ),
    }
}

/// Until the processes that served the mount are gone.
fn wait_for_the_last_data(dir: &Path, servers: &[u32]) -> anyhow::Result<()> {
    eprintln!(
        "waiting for process {servers:?}, which has data for the servers: at most {FLUSH_PATIENCE:?}; its log says more"
    );
    ensure!(
        holders::wait_gone(servers, FLUSH_PATIENCE),
        "{} is unmounted, but its process {servers:?} still has data for the servers after {FLUSH_PATIENCE:?}: see its log and \
         `fjord status`",
        dir.display()
    );
    Ok(())
}

/// What umount2(2) says about a path that is no mount point.
const ENOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
const EINVAL: i32 = rustix::io::Errno::INVAL.raw_os_error();

/// Why a mount could not be taken down.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Something uses it.
    Busy,
    /// It is not there any more.
    NotMounted,
    /// The system said no.
    Other(MountError),
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refused::Busy => f.write_str("it is in use"),
            Refused::NotMounted => f.write_str("it is not mounted"),
            Refused::Other(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for Refused {}

/// Unmounts what this process serves; another mount that is seen there by now is left alone.
pub(crate) fn detach_own(dir: &Path, own: Option<&Fuse>, lazy: bool) -> Result<(), Refused> {
    let table = mounts::read().unwrap_or_default();
    let seen = mounts::at(&table, dir);
    if seen.zip(own).is_some_and(|(seen, own)| !own.may_be(&seen.device)) {
        return Err(Refused::NotMounted);
    }
    detach(dir, lazy)
}

/// Unmounts; `lazy` takes it out of sight at once even if it is in use.
pub(crate) fn detach(dir: &Path, lazy: bool) -> Result<(), Refused> {
    match fjordfs_fuse::unmount_path(dir, lazy) {
        Ok(()) => Ok(()),
        Err(MountError::Busy(_)) => Err(Refused::Busy),
        Err(MountError::Unmount { source, .. }) if matches!(source.raw_os_error(), Some(ENOENT | EINVAL)) => {
            Err(Refused::NotMounted)
        }
        Err(e) => Err(Refused::Other(e)),
    }
}
