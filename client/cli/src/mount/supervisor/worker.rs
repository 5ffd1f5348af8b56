//! A worker's side: what it begins with, and what it tells its supervisor.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use fjordfs_client::{Client, Handover};
use fjordfs_fuse::{Agreed, Departure, Mount, MountError, MountOptions, TransportChoice};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

use super::channel::{Channel, DEVICES_MAX, Kept, Message};
use crate::{mount::options::Settings, units};

/// Set for a worker: the process id of its supervisor. Its standard input is the channel.
pub(super) const SUPERVISOR_ENV: &str = "FJORD_SUPERVISOR";

/// Set for a worker: how many died before it. Absent from a supervisor of an older release.
pub(super) const RESTARTS_ENV: &str = "FJORD_RESTARTS";

/// How long requests under way may take before they are left to the next process. It gets them again.
const LEAVE_PATIENCE: Duration = Duration::from_secs(10);

/// The supervisor of this process, if it is a worker.
pub(crate) fn supervisor_pid() -> Option<u32> {
    std::env::var(SUPERVISOR_ENV).ok()?.parse().ok()
}

/// For `fjord status`, where the process named first is the supervisor.
pub(crate) fn served_by() -> String {
    let restarts = std::env::var(RESTARTS_ENV).ok().and_then(|n| n.parse().ok());
    let restarts = restarts.map_or(String::new(), |n| format!(", {}", units::count(n, "restart")));
    format!("served by process {}{restarts}", std::process::id())
}

/// A worker's end.
pub(crate) struct Worker {
    channel: Channel,
    left: Option<Kept>,
    supervised: bool,
}

impl Worker {
    /// Hears what there is to do, and arranges with the kernel to end in an orderly way when the supervisor is killed. Inside a runtime.
    pub(crate) async fn begin(supervisor: u32, settings: &mut Settings) -> anyhow::Result<Worker> {
        set_parent_process_death_signal(Some(Signal::TERM))
            .context("cannot ask to be told when the supervisor ends")?;
        // It may have died before we asked.
        let parent = getppid().map(|pid| pid.as_raw_nonzero().get().cast_unsigned());
        ensure!(parent == Some(supervisor), "the supervisor (process {supervisor}) has ended already");
        let socket = std::io::stdin().as_fd().try_clone_to_owned().context("no channel to the supervisor")?;
        let channel = Channel::of(socket).context("no channel to the supervisor")?;
        let begin = channel.receive().await.context("no word from the supervisor")?;
        let Some(Message::Begin { memory, left }) = begin else { bail!("no word from the supervisor") };
        let handover = Handover::take_over(memory).context("cannot take over the mount")?;
        settings.client.handover = Some(Arc::new(handover));
        settings.fuse.transport = TransportChoice::DevFuse;
        settings.fuse.threads = settings.fuse.threads.min(DEVICES_MAX);
        Ok(Worker { channel, left, supervised: true })
    }

    /// Mounts, or takes over what is mounted.
    pub(crate) fn mount(&mut self, client: Client, options: MountOptions) -> Result<Mount, MountError> {
        match self.left.take() {
            Some(Kept { devices, agreed }) => fjordfs_fuse::resume(client, options, devices, agreed),
            None => {
                let mut keep = |devices: &[OwnedFd], agreed| self.keep(devices, agreed);
                fjordfs_fuse::mount_supervised(client, options, &mut keep)
            }
        }
    }

    fn keep(&self, devices: &[OwnedFd], agreed: Agreed) -> io::Result<()> {
        let devices = devices.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
        self.channel.send(&Message::Keep(Kept { devices, agreed }))
    }

    /// Requests are served. A supervisor that has ended just now is noticed by who waits for its word: the mount goes on without.
    pub(crate) fn serving(&self) {
        if let Err(e) = self.channel.send(&Message::Serving) {
            tracing::debug!("cannot reach the supervisor: {e}");
        }
    }

    /// Returns when the supervisor wants another process in the place of this one.
    pub(crate) async fn told_to_leave(&mut self) {
        while self.supervised {
            match self.channel.receive().await {
                Ok(Some(Message::Leave)) => return,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => {
                    tracing::warn!("the supervisor is gone: the mount ends when nobody uses it any more");
                    self.supervised = false;
                }
            }
        }
        std::future::pending().await
    }

    /// Hands everything over and ends this process.
    pub(crate) async fn leave(&self, client: &Client, departure: Departure) -> ! {
        // Most of what there is to write, while requests are still served.
        if let Err(e) = client.sync_all().await {
            tracing::warn!("before the handover: {e}");
        }
        let departed = tokio::task::spawn_blocking(move || departure.leave(LEAVE_PATIENCE)).await;
        if !departed.unwrap_or(false) {
            tracing::info!("requests that take longer than {LEAVE_PATIENCE:?} are left to the next process");
        }
        if let Err(e) = client.hand_over().await {
            tracing::error!("not everything was written before the handover, its users are told: {e}");
        }
        let code = match self.channel.send(&Message::Left) {
            Ok(()) => 0,
            Err(e) => {
                tracing::error!("cannot tell the supervisor of the handover: {e}");
                1
            }
        };
        // Without unmounting, closing or giving up anything.
        std::process::exit(code)
    }
}
