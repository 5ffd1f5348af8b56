//! `fjord meta`: the metaserver.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use fjordfs_metaserver::{Config, MetaServer};
use fjordfs_proto::Policy;

use crate::{
    config::{self, MetaFile},
    daemon::{self, Signals, Stop},
    locate::DEFAULT_META,
    units::Span,
};

/// Run the metaserver: the namespace, the cluster map, the sessions.
///
/// Runs in the foreground, logs to standard error and says "listening on ADDRESS" on standard output once it serves.
/// SIGTERM or Ctrl-C stops it cleanly.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord meta --data /var/lib/fjord/meta --listen 0.0.0.0:7440
  fjord meta --config /etc/fjord/meta.toml")]
pub(crate) struct Args {
    /// Read settings from a TOML file (keys as the flags below, with _ for -); flags win
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder of the namespace; made when missing
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Address for clients and data servers [default: 127.0.0.1:7440]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Redundancy of new files in a new filesystem [default: replica:2]
    #[arg(long, value_name = "replica:N")]
    policy: Option<Policy>,
    /// Placement groups of a new filesystem
    #[arg(long, value_name = "N")]
    pg_count: Option<usize>,
    /// A client that is silent for this long is taken for dead
    #[arg(long, value_name = "TIME")]
    session_timeout: Option<Span>,
    /// How often data servers report
    #[arg(long, value_name = "TIME")]
    heartbeat: Option<Span>,
    /// A data server that is silent for this long counts as down
    #[arg(long, value_name = "TIME")]
    down_after: Option<Span>,
    /// A target that is down or failed for this long is out: its placement groups are rebuilt on others [default: 10m]
    #[arg(long, value_name = "TIME")]
    out_after: Option<Span>,
    /// Longest time between acknowledging a namespace change and having it on stable storage
    #[arg(long, value_name = "TIME")]
    log_sync: Option<Span>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = settings(args)?;
    let data = config.data.clone();
    daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        // Starting and stopping block.
        let server = tokio::task::spawn_blocking(move || MetaServer::start(config))
            .await?
            .context("the metaserver did not start")?;
        tracing::info!(
            cluster = server.cluster_id(),
            "metaserver on {}, data in {}",
            server.address(),
            data.display()
        );
        daemon::announce(&format!("listening on {}", server.address()));
        if signals.next().await == Stop::Orphaned {
            tokio::time::sleep(daemon::ORPHAN_GRACE).await;
        }
        tracing::info!("stopping");
        tokio::task::spawn_blocking(move || server.stop())
            .await?
            .context("the metaserver did not stop cleanly")?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Flags over file over defaults.
fn settings(args: Args) -> anyhow::Result<Config> {
    let file: MetaFile = config::load(args.config.as_deref())?;
    let data = args
        .data
        .or(file.data)
        .context("where is the namespace to be kept? Give --data DIR, or `data` in the configuration")?;
    let listen = args.listen.or(file.listen).unwrap_or_else(|| DEFAULT_META.to_owned());
    let mut config = Config::new(data);
    config.listen = daemon::listen_address(&listen)?;
    let set = |to: &mut std::time::Duration, flag: Option<Span>, key: Option<Span>| {
        if let Some(Span(time)) = flag.or(key) {
            *to = time;
        }
    };
    set(&mut config.session_timeout, args.session_timeout, file.session_timeout);
    set(&mut config.heartbeat, args.heartbeat, file.heartbeat);
    set(&mut config.down_after, args.down_after, file.down_after);
    set(&mut config.out_after, args.out_after, file.out_after);
    set(&mut config.log_sync, args.log_sync, file.log_sync);
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
    Ok(config)
}
