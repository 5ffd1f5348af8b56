//! `fjord meta backup` and `restore`, and what they share with `dump` and `load`.

use std::{
    future::pending,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use anyhow::Context;
use fjordfs_metaserver::{
    backup::{self, About, BackupError, Form},
    store::Place,
};
use tokio::sync::oneshot;

use crate::{
    daemon::{self, Signals},
    locate::{self, MetaArg},
    report, rpc, units,
};

/// After a signal a thread ends within this time, unless it waits for others.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// Write all metadata into a file, as it is now, while clients go on
#[derive(clap::Args)]
pub(super) struct BackupArgs {
    /// The file; it appears when it is whole
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    meta: MetaArg,
}

/// Make metadata from a backup, in an empty folder or on an empty store; no metaserver runs on it meanwhile
#[derive(clap::Args)]
pub(super) struct RestoreArgs {
    /// What `fjord meta backup` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    into: Into,
}

/// Where metadata is made.
#[derive(clap::Args)]
pub(super) struct Into {
    /// Folder for `fjord meta --data`
    #[arg(long, value_name = "DIR", required_unless_present = "store")]
    data: Option<PathBuf>,
    /// Store for `fjord meta --store`
    #[arg(long, value_name = "URL", conflicts_with = "data")]
    store: Option<String>,
    /// Begin again where this was interrupted; whatever else is there stays as it is
    #[arg(long)]
    force: bool,
}

pub(super) fn run(args: &BackupArgs) -> anyhow::Result<ExitCode> {
    let address = locate::cluster(&args.meta, None)?;
    let mut writer = backup::Writer::create(Form::Backup, &args.file)?;
    let whole = daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        tokio::select! {
            written = rpc::backup(&address, async |piece| Ok(writer.write(&piece)?)) => written?,
            _ = signals.next() => return Err(BackupError::Stopped.into()),
        }
        until_stopped(&mut signals, pending(), |stop| writer.finish(stop)).await
    });
    say(Form::Backup, &whole?, &args.file)?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn restore(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    make(Form::Backup, &args.file, &args.into)
}

/// Makes metadata from a file, and says what is to be done next.
pub(super) fn make(form: Form, file: &Path, into: &Into) -> anyhow::Result<ExitCode> {
    let place = into.store.as_deref().map(super::place).transpose()?;
    let (data, place) = match (into.data.as_deref(), place) {
        (_, Some(Place::Fjall(data))) => (data, None),
        (data, place) => (data.map(Path::to_owned).unwrap_or_default(), place),
    };
    let (file, again) = (file.to_owned(), into.force);
    let made = daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        until_stopped(&mut signals, pending(), move |stop| {
            backup::restore(form, &file, &data, place.as_ref(), again, stop)
        })
        .await
    });
    let (about, records) = made?;
    let created = UNIX_EPOCH.checked_add(Duration::from_secs(about.created));
    let created = created.map(|time| humantime::format_rfc3339_seconds(time).to_string()).unwrap_or_default();
    report::print(&format!(
        "cluster {} as it was at {created}: {} records. Start `fjord meta` on it, then mount again and run `fjord fsck`\n",
        about.cluster_id,
        units::grouped(records)
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `work` on a thread of its own, beside `feed`, from which it has what it works on. A signal sets what `work` is given: then it ends
/// by itself, and cleans up.
pub(super) async fn until_stopped<T: Send + 'static>(
    signals: &mut Signals,
    feed: impl Future<Output = anyhow::Result<()>>,
    work: impl FnOnce(&AtomicBool) -> Result<T, BackupError> + Send + 'static,
) -> anyhow::Result<T> {
    let stop = Arc::new(AtomicBool::new(false));
    let (tell, mut told) = oneshot::channel();
    let worker = {
        let stop = stop.clone();
        std::thread::Builder::new().name("meta-file".into()).spawn(move || {
            // Whoever has gone does not listen.
            let _ = tell.send(work(&stop));
        })
    };
    worker.context("cannot start a thread")?;
    let mut feed = Box::pin(feed);
    let mut fed = None;
    let done = loop {
        tokio::select! {
            done = &mut told => break done,
            ended = &mut feed, if fed.is_none() => fed = Some(ended),
            _ = signals.next() => {
                stop.store(true, Ordering::Relaxed);
                // One who waits for what comes next hears that nothing does.
                drop(feed);
                let stopped = tokio::time::timeout(STOP_PATIENCE, told).await;
                break stopped.context("stopped; what it was waiting for did not answer")?;
            }
        }
    };
    match (done.context("the thread ended early")?, fed) {
        (Ok(done), _) => Ok(done),
        // What was broken off is told, and not that it is torn.
        (Err(_), Some(Err(broken_off))) => Err(broken_off),
        (Err(BackupError::Damaged { .. }), None) if stop.load(Ordering::Relaxed) => {
            Err(BackupError::Stopped.into())
        }
        (Err(e), _) => Err(e.into()),
    }
}

/// What has been made.
pub(super) fn say(form: Form, (about, records): &(About, u64), file: &Path) -> anyhow::Result<()> {
    let records = units::grouped(*records);
    report::print(&format!(
        "{form} of cluster {}: {records} records in {}\n",
        about.cluster_id,
        file.display()
    ))
}
