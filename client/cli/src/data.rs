//! `fjord data`: a data server.

use std::{ops::RangeInclusive, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, bail, ensure};
use fjordfs_dataserver::{
    Config, DataServer, TargetConfig,
    added::{self, Added},
};
use fjordfs_proto::{Domain, domain::DomainError};
use rustix::process::Signal as SignalNumber;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::{self, DataFile, TargetEntry},
    daemon::{self, Signals, Stop},
    report,
    units::{self, ByteSize, Span, within},
};

/// Sent by `fjord target add`.
pub(crate) const TARGET_ADDED: SignalNumber = SignalNumber::USR2;

/// Run a data server: the shards on one or more flash devices.
///
/// Runs in the foreground, logs to standard error and says "listening on ADDRESS" on standard output once it serves.
/// SIGTERM or Ctrl-C stops it cleanly. Adding a data server to a running cluster is just this command: new files use
/// it from then on.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord data --meta meta1:7440 --target /mnt/nvme0 --target /mnt/nvme1
  fjord data --meta meta1:7440 --advertise storage1:7441 --domain rack=r7 --target /mnt/nvme0
  fjord data --config /etc/fjord/data.toml")]
pub(crate) struct Args {
    /// Read settings from a TOML file (keys as the flags below, with _ for -; `targets` is a list); flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address of the metaserver
    #[arg(long, env = "FJORD_META", value_name = "HOST:PORT")]
    meta: Option<String>,
    /// Address for clients [default: 0.0.0.0:7441]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address that clients are told, when it is not the one listened on
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Name in `fjord status`, and host of the failure domain [default: the host name]
    #[arg(long)]
    name: Option<String>,
    /// What fails with others: shards of a block go to different racks where there are enough, else to different hosts.
    /// [default: a rack of its own, and --name]
    #[arg(long, value_name = "rack=R[,host=H]")]
    domain: Option<String>,
    /// Folder on a flash device, with its failure domain if not the server's; repeat for more; made when missing
    #[arg(long = "target", value_name = "PATH[@DOMAIN]")]
    targets: Vec<TargetEntry>,
    /// Threads, each with its own io_uring; 0 is one for each core [default: 0]
    #[arg(long, value_name = "N")]
    cores: Option<usize>,
    /// How long a thread looks for requests before it sleeps, microseconds: quicker answers for that much more CPU [default: 0]
    #[arg(long, value_name = "N")]
    poll_us: Option<u32>,
    /// Size of the preallocated volume files [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    volume_size: Option<ByteSize>,
    /// How often the index is checkpointed [default: 60s]
    #[arg(long, value_name = "TIME")]
    checkpoint_interval: Option<Span>,
    /// Use at most this much of each device [default: all of it]
    #[arg(long, value_name = "SIZE")]
    capacity_max: Option<ByteSize>,
    /// Copy at most this much per second from other servers to complete placement groups; 0 is no limit [default: 256MiB]
    #[arg(long, value_name = "SIZE")]
    rebuild_rate: Option<ByteSize>,
    /// Verify everything this often; 0s is only when `fjord scrub start` says so [default: 14days]
    #[arg(long, value_name = "TIME")]
    scrub_interval: Option<Span>,
    /// Read at most this much per second of each target for that; 0 is no limit [default: 16MiB]
    #[arg(long, value_name = "SIZE")]
    scrub_rate: Option<ByteSize>,
}

/// What a target has to have room for: a volume of the smallest kind.
const CAPACITIES: RangeInclusive<ByteSize> = ByteSize(64 << 20)..=ByteSize(1 << 60);
const CORES_MAX: usize = 1024;
const NO_LIMIT: (ByteSize, &str) = (ByteSize(0), "no limit");

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut config = settings(args)?;
    daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        let mut added =
            signal(SignalKind::from_raw(TARGET_ADDED.as_raw())).context("cannot listen to signals")?;
        take_in_added(&mut config, false)?;
        loop {
            let server = start(&config, &mut signals).await?;
            let stop = tokio::select! {
                stop = signals.next() => Some(stop),
                () = until_added(&mut config, &mut added) => None,
            };
            if stop == Some(Stop::Orphaned) {
                tokio::time::sleep(daemon::ORPHAN_GRACE).await;
            }
            tracing::info!(
                "{}",
                if stop.is_some() { "stopping" } else { "starting again, with one more target" }
            );
            tokio::task::spawn_blocking(move || server.stop())
                .await?
                .context("the data server did not stop cleanly")?;
            if stop.is_some() {
                return Ok(ExitCode::SUCCESS);
            }
        }
    })
}

async fn start(config: &Config, signals: &mut Signals) -> anyhow::Result<DataServer> {
    let (config, meta) = (config.clone(), config.meta.clone());
    // Starting waits for the metaserver, perhaps for long; a signal ends the wait.
    let start = tokio::task::spawn_blocking(move || DataServer::start(config));
    let server = tokio::select! {
        started = start => started?.context("the data server did not start")?,
        _ = signals.next() => {
            tracing::info!("stopped before the metaserver {meta} answered");
            // The thread that still starts holds nothing that needs an orderly end.
            std::process::exit(0);
        }
    };
    tracing::info!("data server on {}, metaserver {meta}", server.address());
    daemon::announce(&format!("listening on {}", server.address()));
    Ok(server)
}

/// Returns when `fjord target add` has listed one more target that can be used.
async fn until_added(config: &mut Config, added: &mut Signal) {
    loop {
        if added.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
        match take_in_added(config, true) {
            Ok(0) => tracing::warn!("no target was added"),
            Ok(_) => return,
            Err(e) => tracing::error!("a target cannot be added: {}", report::causes(&e)),
        }
    }
}

/// Adds what was added since the configuration was written; how many. `fresh`: a folder that is no target yet is made one. What cannot
/// be used is left out: a server that does not start for it would keep the others from being read.
fn take_in_added(config: &mut Config, fresh: bool) -> anyhow::Result<usize> {
    // Links are followed, as when the server starts.
    let path_of = |target: &TargetConfig| target.path.canonicalize().unwrap_or_else(|_| target.path.clone());
    let mut known: Vec<PathBuf> = config.targets.iter().map(path_of).collect();
    let mut more = Vec::new();
    for folder in known.clone() {
        let list = folder.join(added::LIST);
        let listed = added::list(&folder).with_context(|| format!("cannot read {}", list.display()))?;
        for added in listed {
            if known.contains(&added.path) {
                continue;
            }
            match usable(&added, &known, &config.name, fresh) {
                Ok(target) => {
                    known.push(added.path);
                    more.push(target);
                }
                Err(e) => tracing::error!(
                    "target {} was added and cannot be used: going on without it; it is listed in {}: {}",
                    added.path.display(),
                    list.display(),
                    report::causes(&e)
                ),
            }
        }
    }
    let count = more.len();
    config.targets.extend(more);
    Ok(count)
}

/// Whether a target that was added can be one of this server now.
fn usable(added: &Added, known: &[PathBuf], name: &str, fresh: bool) -> anyhow::Result<TargetConfig> {
    let path = &added.path;
    if let Some(other) = known.iter().find(|other| path.starts_with(other) || other.starts_with(path)) {
        bail!("it and {} lie one inside the other", other.display());
    }
    // A folder that was one and is empty now: its disk is not there.
    ensure!(fresh || added::is_target(path), "it is not there");
    added::make_target(path)?;
    let domain = added.domain.as_deref().map(|text| Domain::of_server(text, name)).transpose()?;
    Ok(TargetConfig { path: path.clone(), domain })
}

/// Flags over file over defaults.
fn settings(args: Args) -> anyhow::Result<Config> {
    let file: DataFile = config::load(args.config.as_deref())?;
    let targets = if args.targets.is_empty() { file.targets } else { args.targets };
    ensure!(
        !targets.is_empty(),
        "where are the shards to be kept? Give --target PATH, or `targets` in the configuration"
    );
    let meta = args
        .meta
        .or(file.meta)
        .context("which metaserver? Give --meta HOST:PORT, or `meta` in the configuration")?;
    let listen = args.listen.or(file.listen).unwrap_or_else(|| "0.0.0.0:7441".to_owned());
    let mut config = Config::new(meta, []);
    config.listen = daemon::listen_address(&listen)?;
    config.advertise = args.advertise.or(file.advertise);
    config.name = args.name.or(file.name).unwrap_or_else(hostname);
    let name = config.name.clone();
    let in_full = |text: String| Domain::of_server(&text, &name);
    config.domain = args.domain.or(file.domain).map(in_full).transpose()?;
    let target =
        |t: TargetEntry| Ok(TargetConfig { path: t.path, domain: t.domain.map(in_full).transpose()? });
    let targets: Result<Vec<TargetConfig>, DomainError> = targets.into_iter().map(target).collect();
    config.targets = targets?;
    if let Some(size) = args.capacity_max.or(file.capacity_max) {
        config.capacity_max = Some(within("capacity-max", size, CAPACITIES)?.0);
    }
    if let Some(cores) = args.cores.or(file.cores) {
        config.cores = within("cores", cores, 0..=CORES_MAX)?;
    }
    if let Some(us) = args.poll_us.or(file.poll_us) {
        config.poll = Duration::from_micros(us.into());
    }
    if let Some(size) = args.volume_size.or(file.volume_size) {
        config.volume_size = size.0;
    }
    if let Some(rate) = args.rebuild_rate.or(file.rebuild_rate) {
        config.rebuild_rate = units::zero_or_within("rebuild-rate", rate, NO_LIMIT, units::RATES)?.0;
    }
    if let Some(time) = args.scrub_interval.or(file.scrub_interval) {
        config.scrub_interval = time.0;
    }
    if let Some(rate) = args.scrub_rate.or(file.scrub_rate) {
        config.scrub_rate = units::zero_or_within("scrub-rate", rate, NO_LIMIT, units::RATES)?.0;
    }
    if let Some(time) = args.checkpoint_interval.or(file.checkpoint_interval) {
        config.checkpoint_interval = time.0;
    }
    Ok(config)
}

pub(crate) fn hostname() -> String {
    let uname = rustix::system::uname();
    uname.nodename().to_string_lossy().into_owned()
}
