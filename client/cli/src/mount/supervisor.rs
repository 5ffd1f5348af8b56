//! A mount that outlives the process that serves it.
//!
//! The supervisor starts a worker, which mounts and hands over the descriptors of /dev/fuse and everything that a successor needs
//! ([`fjordfs_client::Handover`]). While anybody has the descriptors open, the kernel keeps the mount and what was asked of it: when the
//! worker dies, another is started, takes over, and gets all requests that were not answered once more. The supervisor itself
//! does next to nothing, in one thread, so it has little to die of.
//!
//! # Why not over io_uring
//! A successor can register rings anew (tried on Linux 6.18, as is the rest). But the kernel keeps what the dead process has taken over
//! its rings with the buffers in that process's memory: it neither sends it again, nor ends it before the mount is gone. Whoever
//! waits for such an answer cannot even be killed meanwhile.
//!
//! # What ends it
//! | the worker | then |
//! |---|---|
//! | ends with success | it was unmounted: the supervisor ends |
//! | ends otherwise before it has mounted, or after it was unmounted | it has said why: the supervisor ends, too |
//! | ends otherwise, or is killed | another, after a pause; too often within a minute, and the mount is given up |
//! | has handed over ([`control`]) | the new program's; if that does not come to serve, the former program's |
//!
//! SIGTERM, SIGINT and SIGHUP go to the worker, which unmounts. When the supervisor is killed, the worker unmounts as soon as nobody uses
//! the mount.

use std::{
    ffi::OsString,
    fs::File,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus, Stdio},
    time::Instant,
};

use anyhow::Context;
use fjordfs_client::Handover;
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::{
    daemon::{self, PARENT_ENV, Signals, Stop},
    holders::Fuse,
    mount::background,
    mounts::{self, MountEntry},
    umount,
    up::backoff::Backoff,
};

mod channel;
mod control;
mod crashes;
mod worker;

use channel::{Channel, Kept, Message};
pub(crate) use control::upgrade;
use control::{Control, Requester};
use crashes::Crashes;
pub(crate) use worker::{Worker, served_by, supervisor_pid};

/// A program, kept open: its file may be replaced while it is in use.
#[derive(Debug)]
struct Program {
    file: File,
    shown: PathBuf,
}

impl Program {
    fn open(path: &Path) -> std::io::Result<Program> {
        Ok(Program { file: File::open(path)?, shown: path.to_owned() })
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }
}

/// An upgrade under way.
#[derive(Debug)]
struct Upgrade {
    requester: Requester,
    /// What takes over; once it is started, what it replaces.
    other: Program,
}

struct Supervisor {
    dir: PathBuf,
    /// Arguments of `fjord mount -f`.
    args: Vec<OsString>,
    program: Program,
    memory: OwnedFd,
    kept: Option<Kept>,
    control: Option<Control>,
    upgrade: Option<Upgrade>,
    crashes: Crashes,
    backoff: Backoff,
    restarts: u64,
    /// Somebody wants the mount to end.
    stopping: bool,
    announced: bool,
}

/// A running worker.
struct Running {
    child: Child,
    channel: Channel,
    since: Instant,
    serving: bool,
    handed_over: bool,
}

/// What comes next.
enum Next {
    /// Start another worker.
    Start,
    /// The supervisor's own end.
    End(ExitCode),
}

/// Supervises `fjord mount -f ARGS` until it is unmounted.
pub(crate) fn run(dir: &Path, args: Vec<OsString>) -> anyhow::Result<ExitCode> {
    let program =
        Program::open(Path::new("/proc/self/exe")).context("cannot open this program's own file")?;
    let supervisor = Supervisor {
        dir: dir.to_owned(),
        args,
        program,
        memory: Handover::memory().context("no memory for what a mount process leaves to the next")?,
        kept: None,
        control: None,
        upgrade: None,
        crashes: Crashes::default(),
        backoff: Backoff::default(),
        restarts: 0,
        stopping: false,
        announced: false,
    };
    daemon::control_runtime()?.block_on(supervisor.supervise())
}

impl Supervisor {
    async fn supervise(mut self) -> anyhow::Result<ExitCode> {
        let mut signals = Signals::listen()?;
        loop {
            let started = self.start();
            let next = match started {
                Ok(mut worker) => {
                    let status = self.watch(&mut worker, &mut signals).await?;
                    self.ended(&worker, status, &mut signals).await
                }
                Err(e) if self.kept.is_none() => return Err(e),
                Err(e) => {
                    tracing::error!("cannot start a mount process: {e:#}");
                    self.crashed("it could not be started", Instant::now(), &mut signals).await
                }
            };
            match next {
                Next::Start => {}
                Next::End(code) => return Ok(code),
            }
        }
    }

    fn start(&self) -> anyhow::Result<Running> {
        let (channel, theirs) = Channel::pair().context("cannot make a socket pair")?;
        let memory = self.memory.try_clone().context("cannot duplicate a descriptor")?;
        let left = self.kept.as_ref().map(Kept::try_clone).transpose();
        let left = left.context("cannot duplicate the descriptors of /dev/fuse")?;
        let child = Command::new(self.program.path())
            .arg0(std::env::args_os().next().unwrap_or_else(|| "fjord".into()))
            .args(["mount", "-f"])
            .args(&self.args)
            .env(worker::SUPERVISOR_ENV, std::process::id().to_string())
            .env(worker::RESTARTS_ENV, self.restarts.to_string())
            .env_remove(background::DETACH_ENV)
            .env_remove(PARENT_ENV)
            .stdin(Stdio::from(theirs))
            // The terminal's Ctrl-C comes to the supervisor, which passes it on, once.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program.shown.display()))?;
        channel.send(&Message::Begin { memory, left }).context("cannot reach the mount process")?;
        Ok(Running { child, channel, since: Instant::now(), serving: false, handed_over: false })
    }

    /// Until the worker's end.
    async fn watch(&mut self, worker: &mut Running, signals: &mut Signals) -> anyhow::Result<ExitStatus> {
        let mut listening = true;
        let status = loop {
            tokio::select! {
                biased;
                message = worker.channel.receive(), if listening => match message {
                    Ok(Some(message)) => self.heard(worker, message).await,
                    Ok(None) => listening = false,
                    Err(e) => {
                        tracing::warn!("the channel to the mount process: {e}");
                        listening = false;
                    }
                },
                status = worker.child.wait() => break status.context("cannot wait for the mount process")?,
                why = signals.next() => {
                    self.stopping = true;
                    pass_on(&worker.child, why);
                }
                requester = request(self.control.as_ref()) => self.begin_upgrade(worker, requester).await,
            }
        };
        // What it said last.
        while let Ok(Ok(Some(message))) =
            tokio::time::timeout(std::time::Duration::ZERO, worker.channel.receive()).await
        {
            self.heard(worker, message).await;
        }
        Ok(status)
    }

    async fn heard(&mut self, worker: &mut Running, message: Message) {
        match message {
            Message::Keep(kept) => self.kept = Some(kept),
            Message::Serving => {
                worker.serving = true;
                let pid = worker.child.id().unwrap_or_default();
                tracing::info!(restarts = self.restarts, "{} is served by process {pid}", self.dir.display());
                if !std::mem::replace(&mut self.announced, true) {
                    self.control = self.listen();
                    daemon::announce(&format!("{}{}", background::READY, self.dir.display()));
                }
                if self.stopping {
                    // It was asked for when the process before this one did not listen any more.
                    pass_on(&worker.child, Stop::Asked);
                }
                if let Some(Upgrade { requester, .. }) = self.upgrade.take() {
                    tracing::info!("upgraded to {}", self.program.shown.display());
                    requester.answer(Ok(())).await;
                }
            }
            Message::Left => worker.handed_over = true,
            Message::Begin { .. } | Message::Leave => {}
        }
    }

    fn listen(&self) -> Option<Control> {
        let table = mounts::read().ok()?;
        let device = &mounts::at(&table, &self.dir)?.device;
        Control::listen(device)
            .inspect_err(|e| tracing::warn!("`fjord mount --upgrade` will not find this mount: {e}"))
            .ok()
    }

    async fn begin_upgrade(&mut self, worker: &Running, requester: Requester) {
        let refused = match Program::open(&requester.program) {
            Err(e) => format!("{}: {e}", requester.program.display()),
            Ok(_) if self.upgrade.is_some() => "another upgrade is under way".to_owned(),
            Ok(_) if self.stopping || !worker.serving => "it begins or ends just now: try again".to_owned(),
            Ok(other) => match worker.channel.send(&Message::Leave) {
                Ok(()) => {
                    tracing::info!("handing over to {}", other.shown.display());
                    self.upgrade = Some(Upgrade { requester, other });
                    return;
                }
                Err(e) => format!("the mount process cannot be reached: {e}"),
            },
        };
        requester.answer(Err(refused)).await;
    }

    async fn ended(&mut self, worker: &Running, status: ExitStatus, signals: &mut Signals) -> Next {
        if worker.handed_over {
            if let Some(upgrade) = &mut self.upgrade {
                std::mem::swap(&mut self.program, &mut upgrade.other);
            }
            return Next::Start;
        }
        if let Some(Upgrade { requester, other }) = self.upgrade.take() {
            let why = if worker.serving {
                // Its successor is a crash's.
                format!("the former process ended before it had handed over ({status})")
            } else {
                self.program = other;
                format!(
                    "the new program did not come to serve ({status}): see the mount's log. The former one goes on"
                )
            };
            tracing::error!("{why}");
            requester.answer(Err(why)).await;
            if !worker.serving && !self.stopping {
                return Next::Start;
            }
        }
        if status.success() {
            return Next::End(ExitCode::SUCCESS);
        }
        if self.kept.is_none() || !self.is_mounted() {
            return Next::End(ExitCode::FAILURE);
        }
        self.crashed(&status.to_string(), worker.since, signals).await
    }

    /// The mount has nobody who serves it.
    async fn crashed(&mut self, how: &str, since: Instant, signals: &mut Signals) -> Next {
        let dir = self.dir.display();
        if self.stopping {
            tracing::error!("the process of the mount on {dir} ended ({how}) before it was unmounted");
            return self.give_up();
        }
        if self.crashes.too_often(Instant::now()) {
            tracing::error!(
                "the process of the mount on {dir} has ended {} times within {:?}, at last so: {how}. Giving up and \
                 unmounting; whoever uses it gets ENOTCONN",
                self.crashes.count(),
                crashes::WITHIN,
            );
            return self.give_up();
        }
        let delay = self.backoff.next(since.elapsed());
        tracing::error!("the process of the mount on {dir} ended ({how}): starting another in {delay:?}");
        self.restarts += 1;
        tokio::select! {
            () = tokio::time::sleep(delay) => Next::Start,
            _ = signals.next() => {
                tracing::warn!("told to stop while nobody serves {dir}: detaching it");
                self.give_up()
            }
        }
    }

    /// Ends what waits in the mount, and the mount.
    fn give_up(&mut self) -> Next {
        // The last descriptors: the kernel ends every request. Only then can nothing about unmounting hang.
        let own = Fuse::of(std::process::id());
        self.kept = None;
        match umount::detach_own(&self.dir, own.as_ref(), true) {
            Ok(()) | Err(umount::Refused::NotMounted) => {}
            Err(e) => tracing::error!("cannot detach {}: {e}", self.dir.display()),
        }
        Next::End(ExitCode::FAILURE)
    }

    fn is_mounted(&self) -> bool {
        let own = Fuse::of(std::process::id());
        let is_own = |seen: &MountEntry| own.as_ref().is_none_or(|own| own.may_be(&seen.device));
        mounts::read().is_ok_and(|table| {
            mounts::at(&table, &self.dir).is_some_and(|seen| seen.is_ours() && is_own(seen))
        })
    }
}

async fn request(control: Option<&Control>) -> Requester {
    match control {
        Some(control) => control.next().await,
        None => std::future::pending().await,
    }
}

fn pass_on(child: &Child, why: Stop) {
    let signal = match why {
        Stop::Asked => Signal::TERM,
        Stop::Orphaned => Signal::USR1,
    };
    let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) else { return };
    if let Err(e) = kill_process(pid, signal) {
        tracing::warn!("cannot pass a signal on to the mount process: {e}");
    }
}
