//! `fjord meta`: the metaserver.

mod backup;
mod dump;
mod migrate;
mod status;
mod upkeep;

use std::{
    ops::RangeInclusive,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use fjordfs_metaserver::{
    Config, MetaServer, StartError,
    store::{PASSWORD_VARIABLE, Place},
};
use fjordfs_proto::Policy;

use self::upkeep::Schedule;
use crate::{
    config::{self, MetaFile},
    daemon::{self, Signals, Stop},
    locate::{self, DEFAULT_META, MetaArg},
    report, rpc,
    units::{self, ByteSize, Span, within},
};

/// Run the metaserver: the namespace, the cluster map, the sessions.
///
/// Runs in the foreground, logs to standard error and says "listening on ADDRESS" on standard output once it serves.
/// SIGTERM or Ctrl-C stops it cleanly.
///
/// With --store on etcd or PostgreSQL any number of metaservers can run: one owns the store and serves, the others say
/// "standing by" and one of them takes over when it falls silent. Clients and data servers are given all addresses,
/// with commas between.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "\
Examples:
  fjord meta --data /var/lib/fjord/meta --listen 0.0.0.0:7440
  fjord meta --store etcd://a:2379,b:2379,c:2379/fjord --listen 0.0.0.0:7440
  fjord meta --store postgres://fjord@a,b/fjord --listen 0.0.0.0:7440
  fjord meta handover --meta a:7440,b:7440
  fjord meta backup /backup/meta-monday
  fjord meta restore /backup/meta-monday --data /var/lib/fjord/meta
  fjord meta dump /backup/meta.jsonl
  fjord meta status --meta a:7440,b:7440
  fjord meta migrate fjall:/var/lib/fjord/meta etcd://a:2379,b:2379,c:2379/fjord
  fjord meta --config /etc/fjord/meta.toml")]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    /// Read settings from a TOML file (keys as the flags below, with _ for -); flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the namespace; made when missing
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where the namespace is kept instead: fjall:DIR, etcd://HOST:PORT,.../PREFIX, postgres://USER@HOST,.../DATABASE
    #[arg(long, value_name = "URL", conflicts_with = "data")]
    store: Option<String>,
    /// Address for clients and data servers [default: 127.0.0.1:7440]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Redundancy of new files in a new filesystem [default: replica:2]
    #[arg(long, value_name = "replica:N|ec:K+M")]
    policy: Option<Policy>,
    /// Placement groups of a new filesystem [default: 64]
    #[arg(long, value_name = "N")]
    pg_count: Option<usize>,
    /// A client that is silent for this long is taken for dead [default: 30s]
    #[arg(long, value_name = "TIME")]
    session_timeout: Option<Span>,
    /// How often data servers report [default: 1s]
    #[arg(long, value_name = "TIME")]
    heartbeat: Option<Span>,
    /// A data server that is silent for this long counts as down [default: 5s]
    #[arg(long, value_name = "TIME")]
    down_after: Option<Span>,
    /// A target that is down or failed for this long is out: its placement groups are rebuilt on others [default: 10m]
    #[arg(long, value_name = "TIME")]
    out_after: Option<Span>,
    /// Longest time between acknowledging a namespace change and having it on stable storage [default: 100ms]
    #[arg(long, value_name = "TIME")]
    log_sync: Option<Span>,
    /// Memory for what it remembers of the namespace [default: 256MiB]
    #[arg(long, value_name = "SIZE")]
    cache: Option<ByteSize>,
    /// How often garbage is collected and mostly dead blocks are compacted, counted from 1970 in UTC; 0s: only by `fjord gc` [default: 7d]
    #[arg(long, value_name = "TIME")]
    gc_interval: Option<Span>,
    /// Collecting and compacting read at most this much per second; 0 is no limit [default: 16MiB]
    #[arg(long, value_name = "SIZE")]
    gc_rate: Option<ByteSize>,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Have the metaserver that owns the store let go of it: a standby goes on at once
    Handover {
        #[command(flatten)]
        meta: MetaArg,
    },
    Backup(backup::BackupArgs),
    Restore(backup::RestoreArgs),
    Dump(dump::DumpArgs),
    Load(dump::LoadArgs),
    Status(status::Args),
    Migrate(migrate::Args),
}

/// Clients renew their sessions three times within that.
const SESSION_TIMEOUTS: RangeInclusive<Span> =
    Span(Duration::from_secs(1))..=Span(Duration::from_secs(24 * 3600));
const HEARTBEATS: RangeInclusive<Span> = Span(Duration::from_millis(100))..=Span(Duration::from_secs(60));
const DOWN_AFTER_MAX: Span = Span(Duration::from_secs(3600));
const LOG_SYNCS: RangeInclusive<Span> = Span(Duration::from_millis(1))..=Span(Duration::from_secs(60));
const GC_INTERVALS: RangeInclusive<Span> =
    Span(Duration::from_secs(1))..=Span(Duration::from_secs(366 * 24 * 3600));

/// With a smaller cache hardly anything is found in it.
const CACHE_MIN: u64 = 8 << 20;

/// After it was the owner, a metaserver leaves the store to others for so long.
const YIELD: Duration = Duration::from_secs(2);

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match &args.verb {
        Some(Verb::Handover { meta }) => {
            let address = locate::cluster(meta, None)?;
            daemon::runtime()?.block_on(rpc::hand_over(&address))?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Verb::Backup(args)) => return backup::run(args),
        Some(Verb::Restore(args)) => return backup::restore(args),
        Some(Verb::Dump(args)) => return dump::run(args),
        Some(Verb::Load(args)) => return dump::load(args),
        Some(Verb::Status(args)) => return status::run(args),
        Some(Verb::Migrate(args)) => return migrate::run(args),
        None => {}
    }
    let (config, schedule) = settings(args)?;
    daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        while let Some(server) = own(&config, &mut signals).await? {
            daemon::announce(&format!("listening on {}", server.address()));
            let collecting = server
                .upkeep()
                .map(|upkeep| AbortOnDrop::spawn(upkeep::run(server.address(), upkeep, schedule)));
            let stop = tokio::select! {
                stop = signals.next() => Some(stop),
                () = server.ended() => None,
            };
            drop(collecting);
            if stop == Some(Stop::Orphaned) {
                tokio::time::sleep(daemon::ORPHAN_GRACE).await;
            }
            if stop.is_some() {
                tracing::info!("stopping");
            }
            let stopped = tokio::task::spawn_blocking(move || server.stop()).await?;
            match (stop, stopped) {
                (Some(_), stopped) => {
                    stopped.context("the metaserver did not stop cleanly")?;
                    break;
                }
                (None, Ok(())) => tracing::info!("handed over"),
                (None, Err(e)) if config.store.is_none() => return Err(e).context("the metaserver ended"),
                (None, Err(e)) => tracing::error!("not the owner any more: {}", report::causes(&e.into())),
            }
            tokio::time::sleep(YIELD).await;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl AbortOnDrop {
    fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDrop {
        AbortOnDrop(tokio::spawn(task))
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts the server, when nobody else owns the store; `None` when it was told to stop before.
async fn own(config: &Config, signals: &mut Signals) -> anyhow::Result<Option<MetaServer>> {
    if let Some(store) = &config.store {
        daemon::announce(&format!("standing by for {store}"));
    }
    let stop = Arc::new(AtomicBool::new(false));
    loop {
        // Starting and stopping block.
        let mut starting = tokio::task::spawn_blocking({
            let (config, stop) = (config.clone(), stop.clone());
            move || MetaServer::start_unless(config, &stop)
        });
        let started = tokio::select! {
            started = &mut starting => started?,
            _ = signals.next() => {
                stop.store(true, Ordering::Relaxed);
                // It may have become the owner just now.
                if let Ok(server) = starting.await? {
                    tokio::task::spawn_blocking(move || server.stop()).await??;
                }
                return Ok(None);
            }
        };
        match started {
            Err(StartError::Overtaken) => tracing::info!("another metaserver took over, standing by"),
            other => return other.map(Some).context("the metaserver did not start"),
        }
    }
}

/// A store named on the command line.
pub(crate) fn place(text: &str) -> anyhow::Result<Place> {
    anyhow::ensure!(
        !Place::shows_password(text),
        "a password on the command line is seen by everybody on this host: put it into {PASSWORD_VARIABLE}, or into a \
         file that the address names with ?password-file="
    );
    Ok(text.parse()?)
}

/// Flags over file over defaults.
fn settings(args: Args) -> anyhow::Result<(Config, Schedule)> {
    let file: MetaFile = config::load(args.config.as_deref())?;
    let on_command_line = args.store.is_some();
    // A flag wins over either key of the file.
    let (data, store) = if args.data.is_some() || args.store.is_some() {
        (args.data, args.store)
    } else {
        anyhow::ensure!(
            file.data.is_none() || file.store.is_none(),
            "the configuration has both `data` and `store`: the namespace is in one place"
        );
        (file.data, file.store)
    };
    let place = |store: String| if on_command_line { place(&store) } else { Ok(store.parse()?) };
    let (data, store) = match store.map(place).transpose()? {
        Some(Place::Fjall(data)) => (data, None),
        Some(place) => (PathBuf::new(), Some(place)),
        None => {
            let data = data.context(
                "where is the namespace to be kept? Give --data DIR or --store URL, or `data` or `store` in the \
                 configuration",
            )?;
            (data, None)
        }
    };
    let listen = args.listen.or(file.listen).unwrap_or_else(|| DEFAULT_META.to_owned());
    let mut config = Config::new(data);
    config.store = store;
    config.listen = daemon::listen_address(&listen)?;
    if let Some(time) = args.session_timeout.or(file.session_timeout) {
        config.session_timeout = within("session-timeout", time, SESSION_TIMEOUTS)?.0;
    }
    if let Some(time) = args.heartbeat.or(file.heartbeat) {
        config.heartbeat = within("heartbeat", time, HEARTBEATS)?.0;
    }
    if let Some(Span(time)) = args.down_after.or(file.down_after) {
        config.down_after = time;
    }
    // One that is late is not one that is missing.
    let down_after = Span(2 * config.heartbeat)..=DOWN_AFTER_MAX;
    within("down-after (at least two heartbeats)", Span(config.down_after), down_after)?;
    if let Some(Span(time)) = args.out_after.or(file.out_after) {
        config.out_after = time;
    }
    if let Some(time) = args.log_sync.or(file.log_sync) {
        config.log_sync = within("log-sync", time, LOG_SYNCS)?.0;
    }
    if let Some(ByteSize(cache)) = args.cache.or(file.cache) {
        anyhow::ensure!(
            cache >= CACHE_MIN,
            "cache is {}: at least {} is possible",
            ByteSize(cache),
            ByteSize(CACHE_MIN)
        );
        config.engine.cache_bytes = cache;
    }
    if let Some(policy) = args.policy.or(file.policy) {
        config.default_policy = policy;
    }
    if let Some(pg_count) = args.pg_count.or(file.pg_count) {
        anyhow::ensure!(
            (1..=1 << 20).contains(&pg_count),
            "pg-count is {pg_count}: from 1 to 1048576 is possible"
        );
        config.pg_count = pg_count;
    }
    let mut schedule = Schedule::default();
    if let Some(time) = args.gc_interval.or(file.gc_interval) {
        let never = (Span(Duration::ZERO), "only by `fjord gc`");
        schedule.interval = units::zero_or_within("gc-interval", time, never, GC_INTERVALS)?.0;
    }
    if let Some(rate) = args.gc_rate.or(file.gc_rate) {
        let no_limit = (ByteSize(0), "no limit");
        schedule.rate = units::zero_or_within("gc-rate", rate, no_limit, units::RATES)?.0;
    }
    Ok((config, schedule))
}
