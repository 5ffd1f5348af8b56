//! `fjord target add`: one more target for a data server of this host.
//!
//! The folder is listed beside the shards of a target that the server has ([`fjordfs_dataserver::added`]), and the server told by a signal.
//! It makes the folder a target while it still serves, and then starts again with it, within the same process: clients wait for
//! that moment as they do when a data server is restarted.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use fjordfs_dataserver::added::{self, Added};
use fjordfs_proto::{Domain, ServerId, TargetId, frame::local_name};
use rustix::{net::sockopt::socket_peercred, process::Pid};

use crate::{
    daemon::{self, Signals},
    data::TARGET_ADDED,
    locate::{self, MetaArg},
    report, rpc,
    status::Status,
};

/// How long a data server may take to start again.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// An empty folder on a flash device; made when missing
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Failure domain of the target [default: the data server's]
    #[arg(long, value_name = "rack=R[,host=H]")]
    domain: Option<String>,
    /// Name or number of the data server, where several run on this host
    #[arg(long, value_name = "NAME|sN")]
    server: Option<String>,
}

/// A data server of this host.
struct Here {
    id: u64,
    name: String,
    pid: Pid,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, None)?;
    let runtime = daemon::control_runtime()?;
    let status = || runtime.block_on(async { Status::new(meta.clone(), rpc::status(&meta).await?) });
    let before = status()?;
    let server = choose(&before, args.server.as_deref())?;
    let path = prepare(&args.path)?;
    refuse_foreign(&path, &before, &server)?;
    if let Some(domain) = &args.domain {
        Domain::of_server(domain, &server.name)?;
    }
    let of_server = |status: &Status| -> Vec<(u64, PathBuf)> {
        let targets = status.targets.iter().filter(|t| t.server == server.id);
        targets.map(|t| (t.id, PathBuf::from(&t.path))).collect()
    };
    let known = of_server(&before);
    if let Some((id, _)) = known.iter().find(|(_, known)| *known == path) {
        bail!("{} is target {} of {} already", path.display(), TargetId(*id), server.name);
    }
    let Some((_, folder)) = known.iter().find(|(_, folder)| added::is_target(folder)) else {
        bail!(
            "no target of {} can be seen from here: are its disks mounted, and may you read them?",
            server.name
        );
    };
    let entry = Added { path: path.clone(), domain: args.domain.clone() };
    let listed = || format!("cannot change {}", folder.join(added::LIST).display());
    let take_back = || added::change(folder, |all| all.retain(|one| one.path != path)).with_context(listed);
    let was_target = added::is_target(&path);
    let mut signals = runtime.block_on(async { Signals::listen() })?;
    added::change(folder, |all| {
        all.retain(|one| one.path != path);
        all.push(entry);
    })
    .with_context(listed)?;
    let told = rustix::process::kill_process(server.pid, TARGET_ADDED);
    let begun = Instant::now();
    let id = loop {
        if told.is_ok() {
            // It may be away for a moment.
            let now = status().ok();
            let up = |id: u64| now.iter().flat_map(|now| &now.targets).any(|t| t.id == id && t.state == "up");
            let found = now.as_ref().map(of_server).unwrap_or_default();
            if let Some((id, _)) = found.into_iter().find(|(id, known)| *known == path && up(*id)) {
                break id;
            }
        }
        if told.is_err() || begun.elapsed() > PATIENCE {
            take_back()?;
            told.with_context(|| {
                format!("cannot tell data server {} (process {})", server.name, server.pid.as_raw_nonzero())
            })?;
            bail!("{} does not serve {} after {PATIENCE:?}: its log says why", server.name, path.display());
        }
        if runtime.block_on(async { tokio::time::timeout(LOOK, signals.next()).await.is_ok() }) {
            // Once it has made the folder a target it starts again with it.
            if !was_target && added::is_target(&path) {
                bail!(
                    "{} begins to serve {}: `fjord target list` shows when it does",
                    server.name,
                    path.display()
                );
            }
            take_back()?;
            bail!("stopped before {} took {}: it is not added", server.name, path.display());
        }
    };
    report::print(&format!(
        "{} is target {} of {} now: new files use it, and `fjord rebalance` moves others to it\n",
        path.display(),
        TargetId(id),
        server.name
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// The data server meant: the only one here, or the one named.
fn choose(status: &Status, named: Option<&str>) -> anyhow::Result<Here> {
    let mut here: Vec<Here> =
        status.servers.iter().filter_map(|s| find(&status.cluster_id, s.id, &s.name)).collect();
    if let Some(named) = named {
        here.retain(|server| server.name == named || ServerId(server.id).to_string() == named);
    }
    let names = || here.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ");
    ensure!(here.len() < 2, "several data servers run on this host: choose one with --server ({})", names());
    here.pop().with_context(|| match named {
        Some(named) => {
            format!("no data server {named} of this cluster runs on this host: `fjord server list` shows all")
        }
        None => "no data server of this cluster runs on this host: run this where the disk is".to_owned(),
    })
}

/// A data server of this host listens on a Unix socket whose name is known.
fn find(cluster_id: &str, id: u64, name: &str) -> Option<Here> {
    use std::os::linux::net::SocketAddrExt;
    let address =
        std::os::unix::net::SocketAddr::from_abstract_name(local_name(cluster_id, ServerId(id))).ok()?;
    let pid = socket_peercred(UnixStream::connect_addr(&address).ok()?).ok()?.pid;
    Some(Here { id, name: name.to_owned(), pid })
}

/// A folder that is a target already must not be one that others have: the data server could not start with it.
fn refuse_foreign(path: &Path, status: &Status, server: &Here) -> anyhow::Result<()> {
    let known = |t: &&crate::status::Target| t.server == server.id && Path::new(&t.path) == path;
    // One that it has already is in use, by itself.
    if !added::is_target(path) || status.targets.iter().any(|t| known(&t)) {
        return Ok(());
    }
    let Some(owner) = added::owner(path)? else { return Ok(()) };
    let shown = path.display();
    ensure!(
        owner.cluster_id == status.cluster_id,
        "{shown} is a target of another cluster ({}): a target needs a folder of its own",
        owner.cluster_id
    );
    let of_other = status.targets.iter().find(|t| t.id == owner.target.0 && t.server != server.id);
    if let Some(other) = of_other {
        bail!("{shown} is target {} of data server {}", owner.target, ServerId(other.server));
    }
    Ok(())
}

/// Makes the folder if needed; its path without links. Other people's files are not to be in it.
fn prepare(path: &Path) -> anyhow::Result<PathBuf> {
    let shown = path.display();
    match fs::create_dir(path) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(e).with_context(|| format!("cannot make the folder {shown}"));
        }
        _ => {}
    }
    let path = path.canonicalize().with_context(|| format!("cannot use {shown}"))?;
    let entries = fs::read_dir(&path).with_context(|| format!("cannot use {shown}"))?;
    if !added::is_target(&path) {
        for entry in entries {
            let name = entry.with_context(|| format!("cannot read {shown}"))?.file_name();
            // Of a new ext4.
            ensure!(name == "lost+found", "{shown} is not empty: a target needs a folder of its own");
        }
    }
    Ok(path)
}
