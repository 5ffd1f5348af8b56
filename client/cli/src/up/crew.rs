//! The processes of a cluster on one machine: started in order, stopped in order.

use std::{
    ffi::OsString,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use tokio::{sync::mpsc, time};

use super::{
    child::{Kept, Spec, Unmounted},
    folder::Folder,
    plan::Plan,
};
use crate::{daemon::Signals, holders, mounts, report, rpc, status::Status, umount};

/// How long the data servers may take to register.
const HEALTHY_PATIENCE: Duration = Duration::from_secs(90);

/// The running processes.
pub(crate) struct Crew {
    /// What the metaserver listens on.
    listen: String,
    /// What everybody else connects to.
    meta_address: String,
    meta: Option<Kept>,
    data: Vec<Kept>,
    mount: Option<Kept>,
    events: (mpsc::UnboundedSender<Unmounted>, mpsc::UnboundedReceiver<Unmounted>),
}

/// What is to run.
pub(crate) struct Orders<'a> {
    pub(crate) folder: &'a Folder,
    pub(crate) plan: &'a Plan,
    /// Bytes for all data servers together.
    pub(crate) room: u64,
    pub(crate) dir: &'a Path,
    pub(crate) options: &'a [String],
}

impl Crew {
    pub(crate) fn new(listen: SocketAddr) -> Crew {
        // 0.0.0.0 is every address of this host, and none that can be connected to.
        let dial = match listen.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::from((Ipv4Addr::LOCALHOST, listen.port())),
            IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::from((Ipv6Addr::LOCALHOST, listen.port())),
            _ => listen,
        };
        Crew {
            listen: listen.to_string(),
            meta_address: dial.to_string(),
            meta: None,
            data: Vec::new(),
            mount: None,
            events: mpsc::unbounded_channel(),
        }
    }

    /// Starts everything and waits until it is healthy and mounted. Can be cancelled; [`Crew::stop`] then stops what
    /// has been started.
    pub(crate) async fn start(&mut self, orders: &Orders<'_>) -> anyhow::Result<Status> {
        let (meta, ready) = Kept::start(self.meta_spec(orders)?, self.events.0.clone());
        self.meta = Some(meta);
        ready.await.context("the metaserver's keeper ended")??;
        let mut waits = Vec::new();
        for server in 1..=orders.plan.servers {
            let (data, ready) = Kept::start(self.data_spec(orders, server), self.events.0.clone());
            self.data.push(data);
            waits.push(ready);
        }
        for ready in waits {
            ready.await.context("a data server's keeper ended")??;
        }
        let status = self.healthy(orders.plan.servers).await?;
        let (mount, ready) = Kept::start(self.mount_spec(orders), self.events.0.clone());
        self.mount = Some(mount);
        ready.await.context("the mount's keeper ended")??;
        Ok(status)
    }

    /// Waits until somebody else has unmounted.
    pub(crate) async fn unmounted(&mut self) {
        // A sender is in `self`, so the channel stays open.
        let _ = self.events.1.recv().await;
        self.mount = None;
    }

    async fn healthy(&self, servers: usize) -> anyhow::Result<Status> {
        let deadline = Instant::now() + HEALTHY_PATIENCE;
        loop {
            let seen = match rpc::status(&self.meta_address).await {
                Ok(reply) => {
                    let status = Status::new(self.meta_address.clone(), reply)?;
                    let up = status.targets.iter().filter(|t| t.state == "up").count();
                    // A full disk of the metaserver is made room on through the mount.
                    if up >= servers && status.is_up() {
                        return Ok(status);
                    }
                    format!("{up} of {servers} targets are up")
                }
                Err(e) => report::causes(&e),
            };
            if Instant::now() >= deadline {
                bail!(
                    "the cluster is not healthy after {HEALTHY_PATIENCE:?}: {seen}; the *.log files in the data folder say more"
                );
            }
            time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Unmounts, then stops the data servers, then the metaserver. While the mount is in use it says by whom and
    /// waits; a second signal detaches it. Whether all ended well.
    pub(crate) async fn stop(self, dir: &Path, signals: &mut Signals) -> bool {
        let mut well = true;
        if let Some(mount) = self.mount {
            unmount(dir, signals).await;
            // It hands its last data to the servers now.
            well &= mount.stop().await;
        }
        for data in &self.data {
            data.begin_stop();
        }
        for data in self.data {
            well &= data.ended().await;
        }
        if let Some(meta) = self.meta {
            well &= meta.stop().await;
        }
        well
    }

    fn meta_spec(&self, orders: &Orders<'_>) -> anyhow::Result<Spec> {
        let policy = orders.plan.policy()?.to_string();
        let place = match &orders.plan.store {
            Some(store) => ["--store".into(), OsString::from(store)],
            None => ["--data".into(), orders.folder.meta().into()],
        };
        Ok(Spec {
            name: "metaserver".into(),
            args: words(&["meta", "--listen", &self.listen, "--policy", &policy]).chain(place).collect(),
            log: orders.folder.log("meta"),
            mountpoint: None,
        })
    }

    fn data_spec(&self, orders: &Orders<'_>, server: usize) -> Spec {
        let name = format!("data-{server}");
        let share = (orders.room / orders.plan.servers as u64).to_string();
        let volume_size = orders.plan.volume_size.to_string();
        // The processes share the cores, but one thread is the least a server has.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let cores = cores.div_ceil(orders.plan.servers).to_string();
        Spec {
            args: words(&["data", "--meta", &self.meta_address, "--listen", "127.0.0.1:0", "--name", &name])
                .chain(words(&["--capacity-max", &share, "--volume-size", &volume_size, "--cores", &cores]))
                .chain([OsString::from("--target"), orders.folder.data(server).into()])
                .collect(),
            log: orders.folder.log(&name),
            name: format!("data server {name}"),
            mountpoint: None,
        }
    }

    fn mount_spec(&self, orders: &Orders<'_>) -> Spec {
        let options = orders.options.iter().flat_map(|o| [OsString::from("-o"), o.into()]);
        Spec {
            name: "mount".into(),
            args: words(&["mount", "-f", &self.meta_address])
                .chain([orders.dir.as_os_str().to_owned()])
                // It is watched here; whoever wants open files to outlive a crash says so.
                .chain(words(&["-o", "supervise=off"]))
                .chain(options)
                .collect(),
            log: orders.folder.log("mount"),
            mountpoint: Some(PathBuf::from(orders.dir)),
        }
    }
}

fn words<'a>(words: &'a [&'a str]) -> impl Iterator<Item = OsString> + 'a {
    words.iter().map(|w| OsString::from(*w))
}

/// Unmounts; while that is refused because of users, names them whenever they change.
async fn unmount(dir: &Path, signals: &mut Signals) {
    // It may have ended, or failed to begin.
    if mounts::read().is_ok_and(|table| !mounts::at(&table, dir).is_some_and(mounts::MountEntry::is_ours)) {
        return;
    }
    let mut known = None;
    let mut lazy = false;
    loop {
        match umount::detach(dir, lazy) {
            Ok(()) | Err(umount::Refused::NotMounted) => return,
            Err(umount::Refused::Busy) => {
                let holders = holders::of(dir);
                if known.as_ref() != Some(&holders) {
                    tracing::warn!(
                        "{} is in use by {}: waiting for it; Ctrl-C again detaches it",
                        dir.display(),
                        holders::describe(&holders)
                    );
                    known = Some(holders);
                }
            }
            Err(e) => {
                tracing::error!("cannot unmount {}: {e}", dir.display());
                return;
            }
        }
        tokio::select! {
            _ = signals.next() => lazy = true,
            () = time::sleep(Duration::from_millis(500)) => {}
        }
    }
}
