//! `fjord mount`: a mount of a cluster, in the background or in the foreground.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use fjordfs_client::Client;
use fjordfs_fuse::Remount;

use crate::{
    daemon::{self, Signals, Stop},
    holders::{self, Fuse},
    mounts, rpc,
    umount::{self, Refused},
};

use outcome::Note;
use supervisor::Worker;

pub(crate) mod background;
pub(crate) mod helper;
pub(crate) mod options;
pub(crate) mod outcome;
mod supervisor;

/// Mount a FjordFS.
///
/// Returns when it is mounted and goes on in the background, with a log in /var/log/fjord (or ~/.local/state/fjord).
/// With -f it stays in the foreground; SIGTERM or Ctrl-C unmounts cleanly, a second one detaches a mount in use.
///
/// A supervised mount (-o supervise=on) is served by a process of its own. When that dies, another takes over within moments: the
/// mount, open files and locks stay, and what was asked of it is asked again.
#[derive(clap::Args)]
#[command(after_help = options::HELP)]
pub(crate) struct Args {
    /// Address of the metaserver, and the folder of the filesystem to mount if that is not all of it
    #[arg(value_name = "HOST:PORT[:/FOLDER]", required_unless_present = "upgrade")]
    meta: Option<String>,
    /// The mount point: an empty folder; made when missing
    #[arg(required_unless_present = "upgrade")]
    dir: Option<PathBuf>,
    /// Mount options, separated by commas
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Stay in the foreground
    #[arg(short, long)]
    foreground: bool,
    /// Let this program take over a supervised mount. Whoever uses it notices nothing
    #[arg(long, value_name = "MOUNTPOINT", exclusive = true)]
    upgrade: Option<PathBuf>,
    /// Ignore unknown options (mount -s)
    #[arg(long, hide = true)]
    sloppy: bool,
    /// Check everything, mount nothing (mount -f)
    #[arg(long, hide = true)]
    fake: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    if let Some(dir) = args.upgrade {
        let dir = mounts::absolute(&dir).with_context(|| format!("no such folder: {}", dir.display()))?;
        return supervisor::upgrade(&dir);
    }
    let (Some(source), Some(dir)) = (args.meta, args.dir) else {
        bail!("name the metaserver and the mount point: fjord mount HOST:PORT DIR");
    };
    let list = args.options.join(",");
    let change = Remount::parse(&list);
    // What a worker takes over must not be looked into: nobody answers there yet.
    if change.is_none() && !args.fake && supervisor::supervisor_pid().is_none() {
        make_mountpoint(&dir)?;
    }
    let dir = mounts::absolute(&dir).with_context(|| format!("cannot mount on {}", dir.display()))?;
    if let Some((change, rest)) = change {
        return remount(&dir, &change, &rest);
    }
    let (meta, folder) = split_source(&source);
    rpc::check_address(meta)?;
    let mut settings = options::parse(&list, meta, &dir, args.sloppy)?;
    settings.fuse.folder = folder.into();
    if let Some(pid) = supervisor::supervisor_pid() {
        return serve_until_unmounted(meta, &dir, settings, Some(pid));
    }
    check_mountpoint(&dir, settings.fuse.nonempty)?;
    if args.fake {
        return Ok(ExitCode::SUCCESS);
    }
    let mut again: Vec<OsString> = vec![source.clone().into(), dir.clone().into()];
    for options in args.options {
        again.extend(["-o".into(), options.into()]);
    }
    if args.sloppy {
        again.push("--sloppy".into());
    }
    if args.foreground {
        if std::env::var_os(background::DETACH_ENV).is_some() {
            rustix::process::setsid().context("cannot leave the terminal's session")?;
            std::env::set_current_dir("/").context("cannot change to /")?;
        }
        return match settings.is_supervised()? {
            true => supervisor::run(&dir, again),
            false => serve_until_unmounted(meta, &dir, settings, None),
        };
    }
    // What is not possible is said here, not in the log.
    settings.is_supervised()?;
    let log = settings.log.unwrap_or_else(|| background::default_log(&dir));
    background::start(again, &log)?;
    Ok(ExitCode::SUCCESS)
}

/// Address of the metaserver, and the folder.
fn split_source(source: &str) -> (&str, &str) {
    match source.find(":/") {
        Some(at) => (&source[..at], &source[at + 1..]),
        None => (source, "/"),
    }
}

/// Changes what a mount allows. Options that only a new mount takes are left out: mount(8) passes on whole lines of fstab.
fn remount(dir: &Path, change: &Remount, rest: &[&str]) -> anyhow::Result<ExitCode> {
    let table = mounts::read().context("cannot read /proc/self/mountinfo")?;
    ensure!(
        mounts::at(&table, dir).is_some_and(mounts::MountEntry::is_ours),
        "no FjordFS is mounted on {0}, so it cannot be remounted: fjord mount HOST:PORT {0}",
        dir.display()
    );
    if !rest.is_empty() {
        tracing::info!("options that the next mount takes, not this one: {}", rest.join(","));
    }
    change.apply(dir).with_context(|| format!("cannot remount {}", dir.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Makes the folder when it is missing. What is there is left as it is: it may be a mount whose process is gone.
pub(crate) fn make_mountpoint(dir: &Path) -> anyhow::Result<()> {
    match std::fs::metadata(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => std::fs::create_dir_all(dir)
            .with_context(|| format!("cannot make the mount point {}", dir.display())),
        _ => Ok(()),
    }
}

/// Refuses what would surprise: a folder that is missing, hides files, or carries a FjordFS already.
pub(crate) fn check_mountpoint(dir: &Path, allow_nonempty: bool) -> anyhow::Result<()> {
    let table = mounts::read().context("cannot read /proc/self/mountinfo")?;
    let ours = mounts::at(&table, dir).filter(|m| m.is_ours());
    let metadata = match std::fs::metadata(dir) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("the mount point {0} does not exist: mkdir -p {0}", dir.display())
        }
        Err(_) if ours.is_some() => bail!(
            "{0} is a FjordFS mount whose process is gone: clear it away with fjord umount --lazy {0}",
            dir.display()
        ),
        Err(e) => return Err(e).with_context(|| format!("cannot look at the mount point {}", dir.display())),
    };
    if let Some(mount) = ours {
        bail!("{0} is mounted already, from {1}: fjord umount {0}", dir.display(), mount.source);
    }
    ensure!(metadata.is_dir(), "the mount point {} is not a folder", dir.display());
    let mut entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot look into the mount point {}", dir.display()))?;
    ensure!(
        allow_nonempty || entries.next().is_none(),
        "the mount point {} is not empty: its files would be hidden. Choose another folder, or mount with -o nonempty",
        dir.display()
    );
    Ok(())
}

/// From here on it is worth a word that the end takes long.
const QUIET: Duration = Duration::from_secs(3);

fn serve_until_unmounted(
    meta: &str,
    dir: &Path,
    settings: options::Settings,
    supervisor: Option<u32>,
) -> anyhow::Result<ExitCode> {
    let runtime = daemon::runtime()?;
    let served = runtime.block_on(serve(meta, dir, settings, supervisor));
    // After a lazy unmount a thread still waits for the last user; the end of the process ends that.
    runtime.shutdown_background();
    served
}

/// Mounts, serves until unmounted by anyone, flushes. With a supervisor, it may also take over a mount, and leave it to another process.
async fn serve(
    meta: &str,
    dir: &Path,
    mut settings: options::Settings,
    supervisor: Option<u32>,
) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    let worker = match supervisor {
        Some(pid) => Some(Worker::begin(pid, &mut settings).await?),
        None => None,
    };
    // For `fjord status`. A transport that is not possible is the mount's to report.
    if let Ok(transport) = fjordfs_fuse::planned_transport(&settings.fuse) {
        settings.client.description.push_str(&format!(" over {transport}"));
    }
    if worker.is_some() {
        settings.client.description.push_str(&format!(", {}", supervisor::served_by()));
    }
    let client = tokio::select! {
        client = Client::connect(meta, settings.client) => {
            client.with_context(|| format!("cannot mount the FjordFS at {meta}"))?
        }
        _ = signals.next() => bail!("stopped before the metaserver {meta} answered"),
    };
    let handle = client.clone();
    let mounting = tokio::task::spawn_blocking(move || match worker {
        Some(mut worker) => worker.mount(handle, settings.fuse).map(|mount| (mount, Some(worker))),
        None => fjordfs_fuse::mount(handle, settings.fuse).map(|mount| (mount, None)),
    });
    let (mut mount, mut worker) =
        mounting.await?.with_context(|| format!("cannot mount on {}", dir.display()))?;
    let mut note = Note::new().context("no memory for a note to `fjord umount`")?;
    match &worker {
        // The supervisor says so.
        Some(worker) => worker.serving(),
        None => daemon::announce(&format!("{}{}", background::READY, dir.display())),
    }
    let departure = mount.departure();
    let own = Fuse::of(std::process::id());

    let mut gone = tokio::task::spawn_blocking(move || {
        mount.wait();
        mount
    });
    let mut leaving = Leaving::default();
    loop {
        tokio::select! {
            _ = &mut gone => break,
            why = signals.next() => {
                leaving.asked += 1;
                // Nobody is left who would ask a second time.
                leaving.lazy |= leaving.asked > 1 || why == Stop::Orphaned;
            }
            () = tokio::time::sleep(Duration::from_millis(500)), if leaving.asked > 0 => {}
            worker = told_to_leave(worker.as_mut()) => worker.leave(&client, departure).await,
        }
        if leaving.asked > 0 && leaving.attempt(dir, own.as_ref()) {
            break;
        }
    }
    tracing::info!("{} is unmounted, handing the last data to the servers", dir.display());
    let ended = finish(&client, dir, &mut signals).await;
    note.write(&ended);
    ended.map(|()| ExitCode::SUCCESS)
}

/// Ends the session. When servers do not answer it says so, and from then on a signal gives up what they do not have.
async fn finish(client: &Client, dir: &Path, signals: &mut Signals) -> anyhow::Result<()> {
    let mut ending = pin!(client.shutdown());
    let lost = || format!("not everything written below {} reached the servers", dir.display());
    match tokio::time::timeout(QUIET, &mut ending).await {
        Ok(ended) => return ended.with_context(lost),
        Err(_) if client.has_unsent() => tracing::warn!(
            "servers do not take what is left of what was written below {} ({} bytes, and names): waiting for them as long as \
             -o timeout= says. A signal gives it up",
            dir.display(),
            client.dirty_bytes()
        ),
        Err(_) => {}
    }
    tokio::select! {
        ended = ending => ended.with_context(lost),
        _ = signals.next() => bail!("{}: told to stop while they did not answer", lost()),
    }
}

async fn told_to_leave(worker: Option<&mut Worker>) -> &Worker {
    match worker {
        Some(worker) => {
            worker.told_to_leave().await;
            worker
        }
        None => std::future::pending().await,
    }
}

/// An unmount under way.
#[derive(Default)]
struct Leaving {
    asked: u32,
    lazy: bool,
    holders: Vec<holders::Holder>,
}

impl Leaving {
    /// Tries once; true when there is nothing left to wait for.
    fn attempt(&mut self, dir: &Path, own: Option<&Fuse>) -> bool {
        match umount::detach_own(dir, own, self.lazy) {
            // A plain unmount ends the session with the kernel, and `gone` reports that. After a lazy one users may
            // go on for as long as they like: end it here.
            Ok(()) => self.lazy,
            Err(Refused::NotMounted) => true,
            Err(Refused::Busy) => {
                let holders = holders::of(dir);
                if holders != self.holders {
                    tracing::warn!(
                        "{} is in use by {}: waiting; a second signal detaches it",
                        dir.display(),
                        holders::describe(&holders)
                    );
                    self.holders = holders;
                }
                false
            }
            Err(Refused::Other(e)) => {
                tracing::error!("cannot unmount {}: {e}; ending anyway", dir.display());
                true
            }
        }
    }
}
