//! `fjord up`: a whole filesystem on this machine, as separate processes that are kept running.
//!
//! | file | what it holds |
//! |---|---|
//! | `plan` | how many servers and which policy, kept in `up.json` |
//! | `folder` | the data folder: claimed, laid out, measured |
//! | `crew` | all processes, started and stopped in order |
//! | `child`, `backoff` | one process, kept running |
//!
//! # When something dies
//! - A child: it is started again, after a wait that grows when it keeps dying. Programs in the mount wait meanwhile.
//! - `fjord up` itself, even by kill -9: the kernel tells the children, and they stop as if asked to; the mount first.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use fjordfs_proto::Policy;

use crate::{
    daemon::{self, Signals},
    locate::DEFAULT_META,
    mount, mounts, report,
    status::Status,
    units::ByteSize,
};

pub(crate) mod backoff;
mod child;
mod crew;
mod folder;
mod plan;

use crew::{Crew, Orders};
use folder::Folder;
use plan::{Plan, Wish};

/// Run a whole FjordFS on this machine and mount it.
///
/// Starts a metaserver and data servers as processes of their own, mounts the filesystem, and keeps all of it running
/// until Ctrl-C or SIGTERM. The data stays: the same command goes on with it. More --servers than before add to it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord up /mnt/fjord
  fjord up ~/fjord --data /nvme/fjord --servers 4 --policy replica:3
  fjord up /mnt/scratch --data /nvme/scratch --meta-listen 127.0.0.1:0   a second one beside it")]
pub(crate) struct Args {
    /// The mount point; made when missing
    dir: PathBuf,
    /// Data servers [default: 3, or as many as there are]
    #[arg(long, value_name = "N")]
    servers: Option<usize>,
    /// Redundancy of files in a new filesystem [default: ec:2+1, with 1 or 2 servers replica:1 or replica:2]
    #[arg(long, value_name = "replica:N|ec:K+M")]
    policy: Option<Policy>,
    /// Folder for everything stored, and for logs [default: /var/lib/fjord for root, else ~/.local/share/fjord]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Where the namespace is kept instead of the data folder: etcd://HOST:PORT,.../PREFIX, postgres://USER@HOST,.../DATABASE
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Address of the metaserver; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_META)]
    meta_listen: String,
    /// Mount options, as for `fjord mount`
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,
}

/// A data server with less room than this is of no use.
const SHARE_MIN: u64 = 256 << 20;

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    // The children hang on this thread: one that ended would take them along. See `child::Kept::start`.
    daemon::control_runtime()?.block_on(cluster(args))
}

async fn cluster(args: Args) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::listen()?;
    if let Some(store) = &args.store {
        crate::meta::place(store)?;
    }
    let dir = prepare_mountpoint(&args.dir)?;
    let settings = mount::options::parse(&args.options.join(","), &args.meta_listen, &dir, false)?;
    mount::check_mountpoint(&dir, settings.fuse.nonempty)?;

    let path = args.data.map_or_else(folder::default_path, Ok)?;
    let folder = Folder::claim(&path)?;
    let stored = Plan::load(folder.path())?;
    let is_new = stored.is_none();
    let room = folder.room()?;
    let wish = Wish { servers: args.servers, policy: args.policy, store: args.store };
    let plan = Plan::reconcile(stored, wish, room, folder.path())?;
    let share = room / plan.servers as u64;
    if share < SHARE_MIN {
        bail!(
            "{} has room for {} a server, and {} is the least: free some space, or give another --data folder",
            folder.path().display(),
            ByteSize(share),
            ByteSize(SHARE_MIN)
        );
    }
    let listen = free_address(&args.meta_listen)?;
    plan.store(folder.path())?;
    tracing::info!(
        "{} a filesystem of {} data servers in {}",
        if is_new { "making" } else { "starting" },
        plan.servers,
        folder.path().display()
    );

    let mut crew = Crew::new(listen);
    let orders = Orders { folder: &folder, plan: &plan, room, dir: &dir, options: &args.options };
    let started = tokio::select! {
        started = crew.start(&orders) => Some(started),
        _ = signals.next() => None,
    };
    let status = match started {
        Some(Ok(status)) => status,
        failed => {
            crew.stop(&dir, &mut signals).await;
            return failed.map_or(Ok(ExitCode::SUCCESS), |e| e.map(|_| ExitCode::SUCCESS));
        }
    };
    report::print(&welcome(&dir, &folder, &plan, &status))?;
    loop {
        tokio::select! {
            _ = signals.next() => break,
            () = crew.unmounted() => tracing::info!(
                "{0} was unmounted; the servers go on. Mount again with: fjord mount {1} {0}",
                dir.display(),
                status.meta
            ),
        }
    }
    tracing::info!("stopping: unmounting {}, then the servers", dir.display());
    if !crew.stop(&dir, &mut signals).await {
        bail!(
            "stopped, but not everything ended well: what was written last may be missing; the *.log files in {} say more",
            folder.path().display()
        );
    }
    tracing::info!("stopped; the data is in {}", folder.path().display());
    Ok(ExitCode::SUCCESS)
}

/// Makes the folder when it is missing, and clears away what a crashed mount left there.
fn prepare_mountpoint(dir: &Path) -> anyhow::Result<PathBuf> {
    if let Ok(known) = mounts::absolute(dir) {
        child::clear_dead_mount(&known);
    }
    mount::make_mountpoint(dir)?;
    mounts::absolute(dir).with_context(|| format!("cannot mount on {}", dir.display()))
}

/// The address to listen on, with a free port for port 0.
fn free_address(text: &str) -> anyhow::Result<SocketAddr> {
    let address = daemon::listen_address(text)?;
    match TcpListener::bind(address).and_then(|listener| listener.local_addr()) {
        Ok(bound) => Ok(bound),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => bail!(
            "something listens on {address} already, perhaps another `fjord up`: stop it, or give another port, for \
             example --meta-listen {}:{}",
            address.ip(),
            address.port().checked_add(1).unwrap_or(0)
        ),
        Err(e) => Err(e).with_context(|| format!("cannot listen on {address}: give another --meta-listen")),
    }
}

fn welcome(dir: &Path, folder: &Folder, plan: &Plan, status: &Status) -> String {
    let policy = plan.policy().ok();
    let usable = policy.map_or(status.free, |policy| policy.usable(status.free));
    let dir = dir.display();
    let meta = if status.meta == DEFAULT_META { String::new() } else { format!(" --meta {}", status.meta) };
    let redundancy = match policy {
        Some(policy @ Policy::Ec { .. }) => {
            let lost = crate::units::count(policy.losses_survived() as u64, "server");
            format!("{policy} (nothing is lost with {lost})")
        }
        Some(Policy::Replica(n)) if n.get() > 1 => format!("{n} copies of everything"),
        _ => "one copy of everything".to_owned(),
    };
    let usable = ByteSize(usable);
    let next = [
        (format!("cp -r ~/dataset {dir}/"), "it is a folder like any other"),
        (format!("fjord import ~/dataset {dir}/dataset"), "parallel, resumable copy"),
        (format!("fjord status{meta}"), "servers, targets, capacity"),
        (format!("fjord mount {} /mnt/second", status.meta), "a second mount"),
        ("Ctrl-C".to_owned(), "unmount and stop; the same command goes on with the data"),
    ];
    let width = next.iter().map(|(command, _)| command.chars().count()).max().unwrap_or_default();
    let next: String = next.iter().map(|(command, what)| format!("  {command:<width$}  {what}\n")).collect();
    let (servers, data) = (plan.servers, folder.path().display());
    format!(
        "\nFjordFS is mounted on {dir}: {servers} data servers, {redundancy}, {usable} usable.\n\
         Data and logs are in {data}.\n\n{next}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_port_is_explained() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let error = free_address(&taken.local_addr().unwrap().to_string()).unwrap_err().to_string();
        assert!(error.contains("--meta-listen 127.0.0.1:"), "{error}");
        assert_ne!(free_address("127.0.0.1:0").unwrap().port(), 0);
    }
}
