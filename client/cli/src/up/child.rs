//! One child of `fjord up`: started, watched, started again, stopped.

use std::{
    ffi::OsString,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time,
};

use super::backoff::Backoff;
use crate::{daemon, mount::background, umount};

/// A stopped child may take this long to write down what it holds.
const STOP_PATIENCE: Duration = Duration::from_secs(120);

/// What to run.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// In log lines and as the name of the log file.
    pub(crate) name: String,
    /// Of the program `fjord`.
    pub(crate) args: Vec<OsString>,
    /// Its standard error.
    pub(crate) log: PathBuf,
    /// For the mount process: where. A clean end of it is somebody's wish, and what a crash leaves is cleared away.
    pub(crate) mountpoint: Option<PathBuf>,
}

/// A child ended and is not started again: somebody unmounted.
#[derive(Debug)]
pub(crate) struct Unmounted;

/// A child that is kept running until it is told to stop.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) name: String,
    stop: watch::Sender<bool>,
    task: JoinHandle<bool>,
}

impl Kept {
    /// Starts it. The receiver hears when it serves for the first time, or why it does not; in that case it is
    /// not started again.
    ///
    /// Must be called on the thread that lives longest: the kernel tells children of the end of the *thread* that
    /// started them.
    pub(crate) fn start(
        spec: Spec,
        events: mpsc::UnboundedSender<Unmounted>,
    ) -> (Kept, oneshot::Receiver<anyhow::Result<()>>) {
        let (stop, stopped) = watch::channel(false);
        let (ready, is_ready) = oneshot::channel();
        let name = spec.name.clone();
        let task = tokio::spawn(keep(spec, ready, stopped, events));
        (Kept { name, stop, task }, is_ready)
    }

    /// SIGTERM, and waits for the end; SIGKILL when that takes too long. Whether it ended well.
    pub(crate) async fn stop(self) -> bool {
        self.begin_stop();
        self.ended().await
    }

    /// Asks it to end.
    pub(crate) fn begin_stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits for the end, and says whether it was a good one.
    pub(crate) async fn ended(self) -> bool {
        self.task.await.unwrap_or_else(|e| {
            tracing::error!("{}: its keeper failed: {e}", self.name);
            false
        })
    }
}

async fn keep(
    spec: Spec,
    ready: oneshot::Sender<anyhow::Result<()>>,
    mut stop: watch::Receiver<bool>,
    events: mpsc::UnboundedSender<Unmounted>,
) -> bool {
    let mut child = match first_start(&spec, &mut stop).await {
        Ok(Some(child)) => child,
        Ok(None) => return true,
        Err(e) => {
            let _ = ready.send(Err(e));
            return false;
        }
    };
    // Whoever started us may have given up waiting; `stop` will say so.
    let _ = ready.send(Ok(()));
    let mut backoff = Backoff::default();
    loop {
        let began = Instant::now();
        let ended = tokio::select! {
            status = child.wait() => Some(status),
            () = told(&mut stop) => None,
        };
        let Some(status) = ended else { return end(&spec.name, &mut child).await };
        if spec.mountpoint.is_some() && status.as_ref().is_ok_and(ExitStatus::success) {
            let _ = events.send(Unmounted);
            return true;
        }
        let mut how = status.map_or_else(|e| e.to_string(), |s| s.to_string());
        child = loop {
            let delay = backoff.next(began.elapsed());
            tracing::warn!(
                "{} ended ({how}): starting it again in {delay:?}; log: {}",
                spec.name,
                spec.log.display()
            );
            tokio::select! {
                () = time::sleep(delay) => {}
                () = told(&mut stop) => return false,
            }
            match spawn(&spec, Stdio::null()) {
                Ok(child) => break child,
                Err(e) => how = format!("{e:#}"),
            }
        };
    }
}

/// Waits until told to stop; also when nobody is left who could tell.
async fn told(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Starts it and waits until it serves. `None` when told to stop before that.
async fn first_start(spec: &Spec, stop: &mut watch::Receiver<bool>) -> anyhow::Result<Option<Child>> {
    let begin = std::fs::metadata(&spec.log).map_or(0, |m| m.len());
    let mut child = spawn(spec, Stdio::piped())?;
    let output = child.stdout.take().context("no standard output")?;
    // Any line means ready. The end of the output without one means that it failed.
    let mut line = String::new();
    let mut output = BufReader::new(output);
    let read = tokio::select! {
        read = output.read_line(&mut line) => Some(read),
        () = told(stop) => None,
    };
    match read {
        Some(read) if read.as_ref().is_ok_and(|n| *n > 0) => return Ok(Some(child)),
        Some(_) => {}
        None => {
            end(&spec.name, &mut child).await;
            return Ok(None);
        }
    }
    let status = child.wait().await.with_context(|| format!("cannot wait for {}", spec.name))?;
    let said = read_from(&spec.log, begin).unwrap_or_default();
    let reason = background::reason(&said).unwrap_or_else(|| format!("it ended with {status}"));
    anyhow::bail!("{} did not start: {reason}\n(log: {})", spec.name, spec.log.display())
}

fn spawn(spec: &Spec, stdout: Stdio) -> anyhow::Result<Child> {
    if let Some(dir) = &spec.mountpoint {
        clear_dead_mount(dir);
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let log = File::options()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("cannot write the log {}", spec.log.display()))?;
    Command::new(program)
        .args(&spec.args)
        .env(daemon::PARENT_ENV, std::process::id().to_string())
        .env_remove("FJORD_META")
        // Ctrl-C at the terminal reaches a whole process group; the children are to end in order, when we say so.
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", spec.name))
}

/// Takes down a FjordFS mount whose process is gone. A living one is left alone.
pub(crate) fn clear_dead_mount(dir: &Path) {
    const ENOTCONN: i32 = 107;
    let dead = std::fs::metadata(dir).is_err_and(|e| e.raw_os_error() == Some(ENOTCONN));
    let ours = || {
        let table = crate::mounts::read().unwrap_or_default();
        crate::mounts::at(&table, dir).is_some_and(crate::mounts::MountEntry::is_ours)
    };
    if dead && ours() {
        match umount::detach(dir, true) {
            Ok(()) => tracing::info!("cleared away the dead mount on {}", dir.display()),
            Err(e) => tracing::warn!("cannot clear away the dead mount on {}: {e}", dir.display()),
        }
    }
}

/// Ends it; whether it ended well.
async fn end(name: &str, child: &mut Child) -> bool {
    if let Some(pid) =
        child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw)
        && let Err(e) = rustix::process::kill_process(pid, rustix::process::Signal::TERM)
    {
        tracing::warn!("cannot signal {name}: {e}");
    }
    match time::timeout(STOP_PATIENCE, child.wait()).await {
        Ok(Ok(status)) if status.success() => return true,
        Ok(Ok(status)) => tracing::warn!("{name} did not stop cleanly: {status}"),
        Ok(Err(e)) => tracing::warn!("cannot wait for {name}: {e}"),
        Err(_) => {
            tracing::error!("{name} has not stopped after {STOP_PATIENCE:?}: killing it");
            if let Err(e) = child.kill().await {
                tracing::warn!("cannot kill {name}: {e}");
            }
        }
    }
    false
}

fn read_from(path: &Path, offset: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut raw = Vec::new();
    file.read_to_end(&mut raw)?;
    Ok(String::from_utf8_lossy(&raw).into_owned())
}
