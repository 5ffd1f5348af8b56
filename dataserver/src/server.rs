//! Starting and stopping: the order in which the parts come up and go down.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use fjordfs_proto::{Domain, ServerId, TargetId};
use tokio::sync::{mpsc, watch};

use crate::{
    buffer::Pool,
    config::{Config, TargetConfig},
    connection,
    cores::{Acceptor, Cores, Jobs},
    error::{StartError, StopError},
    heal::{Healer, RebuildRate, Scrubs},
    listen::{Listener, Socket},
    membership::{Beating, Candidate, First, Identity, Membership},
    node::{Node, Target},
    runtime,
    store::{
        Store, StoreOptions,
        error::StoreError,
        files::Files,
        label::{Folder, Label},
        tables::Tables,
    },
};

/// Buffer memory, bytes: this for each core, and once more. A core with 128 MiB has eight whole blocks in flight, which
/// keeps a device busy.
const BUFFER_BYTES_PER_CORE: usize = 128 << 20;

/// Memory for integrity tables, bytes: those of 128 GiB of shards.
const TABLE_BYTES: u64 = 128 << 20;

/// How long a stop waits for requests in flight.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// A running data server.
///
/// It runs on threads of its own; dropping it stops it like [`DataServer::stop`], with errors only logged.
pub struct DataServer {
    address: SocketAddr,
    running: Option<Running>,
}

struct Running {
    acceptors: Vec<Acceptor>,
    cores: Cores,
    membership: Beating,
    healer: Healer,
    node: Arc<Node>,
    stopping: watch::Sender<bool>,
    /// Yields `None` once every connection is done.
    connections: mpsc::Receiver<()>,
    /// Locks, held to the end.
    folders: Vec<Folder>,
}

impl DataServer {
    /// Claims the targets, recovers their shards, registers with the metaserver and begins to serve.
    ///
    /// Blocks. With targets that have never been registered it waits for the metaserver, as long as it takes; with
    /// registered ones it serves also while the metaserver is away. Not to be called from an async task.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running, and nothing has been changed but for new folders and their labels.
    pub fn start(config: Config) -> Result<DataServer, StartError> {
        let targets = config.validate()?;
        raise_descriptor_limit();
        let mut folders = targets.iter().map(|t| Folder::claim(&t.path)).collect::<Result<Vec<_>, _>>()?;
        let (cluster_id, server) = common_identity(&folders)?;
        let (listener, address) = Listener::tcp(config.listen)
            .map_err(|source| StartError::Listen { address: config.listen, source })?;
        let cores = Cores::start(config.core_count(), config.poll)?;
        let stores = open_stores(&config, &folders)?;

        let candidates = folders.iter().zip(&targets).zip(&stores);
        let identity = Identity {
            meta: config.meta.clone(),
            cluster_id: cluster_id.clone(),
            server,
            name: config.name.clone(),
            advertise: config.advertise.clone(),
            listen: address,
            candidates: candidates.map(|((f, t), s)| candidate(&config, f.label(), t, s)).collect(),
        };
        let (membership, first) = Membership::start(identity)?;
        let (scrubs, mut map) = (Scrubs::default(), None);
        let (cluster_id, server) = match first {
            First::Refused(e) => return Err(e),
            First::Later => (cluster_id, server),
            First::Registered(reply) => {
                for (folder, target) in folders.iter_mut().zip(&reply.targets) {
                    folder.assign(&reply.cluster_id, reply.server, *target)?;
                }
                scrubs.asked(reply.scrubs);
                map = reply.map;
                (reply.cluster_id, reply.server)
            }
        };
        let in_service = folders.iter().zip(&targets).zip(stores).map(|((f, t), store)| {
            let c = candidate(&config, f.label(), t, &store);
            (c.target, Target { id: c.target, uuid: c.uuid, domain: c.domain, store })
        });
        let node = Arc::new(Node {
            targets: in_service.collect(),
            cluster_id,
            server: ServerId(server),
            incarnation: uuid::Uuid::new_v4().as_u64_pair().0,
            pool: Pool::new((config.core_count() + 1) * BUFFER_BYTES_PER_CORE),
            tables: Tables::new(TABLE_BYTES),
            placing: Default::default(),
            checks: Default::default(),
            copying: Default::default(),
            scrubs,
            tidied: Default::default(),
            rebuild_rate: RebuildRate::new(config.rebuild_rate),
            arranging: Default::default(),
        });
        if let Some(map) = map {
            node.adopt(map);
        }

        let (stopping, stop) = watch::channel(false);
        let jobs = cores.jobs();
        for target in node.targets.values() {
            keep_checkpoints(&jobs, target.store.clone(), config.checkpoint_interval, stop.clone());
        }
        let (alive, connections) = mpsc::channel(1);
        let (serving, served) = (node.clone(), jobs.clone());
        let serve = move |socket: Socket, peer: String| {
            let (node, stop, alive) = (serving.clone(), stop.clone(), alive.clone());
            served.start(move || connection::serve(node, socket, peer, stop, alive));
        };
        let mut acceptors = vec![Acceptor::start(listener, serve.clone())?];
        let local = Listener::local(&node.cluster_id, node.server).map_err(|e| e.to_string());
        match local.and_then(|local| Acceptor::start(local, serve).map_err(|e| e.to_string())) {
            Ok(local) => acceptors.push(local),
            Err(e) => tracing::warn!("no Unix socket for clients on this host, they come over TCP: {e}"),
        }
        let healer = Healer::start(node.clone(), jobs.clone(), &config)?;
        let membership = membership.serve(node.clone(), jobs);
        tracing::info!("data server s{server} serves {} targets at {address}", node.targets.len());
        let running = Running { acceptors, cores, membership, healer, node, stopping, connections, folders };
        Ok(DataServer { address, running: Some(running) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What it serves, to be looked at.
    #[cfg(test)]
    pub(crate) fn node(&self) -> &Node {
        &self.running.as_ref().unwrap().node
    }

    /// Finishes what is in flight, makes everything power-safe, saves the index, and ends. Blocks.
    ///
    /// # Errors
    /// When a target could not be synced or its index not saved.
    pub fn stop(mut self) -> Result<(), StopError> {
        self.running.take().map_or(Ok(()), Running::stop)
    }
}

impl Drop for DataServer {
    fn drop(&mut self) {
        if let Some(running) = self.running.take()
            && let Err(e) = running.stop()
        {
            tracing::error!("{e}");
        }
    }
}

impl Running {
    fn stop(self) -> Result<(), StopError> {
        let Running { acceptors, cores, membership, healer, node, stopping, mut connections, folders } = self;
        acceptors.into_iter().for_each(Acceptor::stop);
        stopping.send_replace(true);
        membership.stop();
        healer.stop();
        let jobs = cores.jobs();
        let (answer, outcome) = std::sync::mpsc::channel();
        jobs.start(move || async move {
            let mut problems = Vec::new();
            if runtime::timeout(DRAIN_MAX, connections.recv()).await.is_err() {
                problems.push("some requests were still running".to_owned());
            }
            for target in node.targets.values() {
                if let Err(e) = target.store.checkpoint().await {
                    problems.push(e.to_string());
                }
            }
            // The stopping thread waits for exactly this.
            let _ = answer.send(problems);
        });
        drop(jobs);
        let problems = outcome.recv().unwrap_or_else(|_| vec!["its threads have died".to_owned()]);
        cores.stop();
        drop(folders);
        if problems.is_empty() { Ok(()) } else { Err(StopError(problems.join("; "))) }
    }
}

/// Every volume is an open file, and a target of some TB has thousands: the usual limit of 1,024 would not do.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(
            "cannot raise the limit of open files from {:?} to {:?}: {e}",
            limit.current,
            limit.maximum
        );
    }
}

/// Cluster and server that the labels name; empty and 0 when no target was ever registered.
fn common_identity(folders: &[Folder]) -> Result<(String, u64), StartError> {
    let mut registered = folders.iter().filter(|f| f.label().target != 0);
    let Some(first) = registered.next() else { return Ok((String::new(), 0)) };
    let (path, label) = (first.path().display(), first.label());
    for other in registered {
        let (other_path, other) = (other.path().display(), other.label());
        if other.cluster_id != label.cluster_id {
            return Err(StartError::Config(format!(
                "target {path} belongs to cluster {}, target {other_path} to cluster {}: give each its own data server",
                label.cluster_id, other.cluster_id
            )));
        }
        if other.server != label.server {
            return Err(StartError::Config(format!(
                "target {path} belongs to data server s{}, target {other_path} to s{}: run two data servers",
                label.server, other.server
            )));
        }
        if other.target == label.target {
            return Err(StartError::Config(format!(
                "targets {path} and {other_path} are copies of each other"
            )));
        }
    }
    Ok((label.cluster_id.clone(), label.server))
}

fn candidate(config: &Config, label: &Label, target: &TargetConfig, store: &Arc<Store<Files>>) -> Candidate {
    Candidate {
        target: TargetId(label.target),
        uuid: label.uuid.to_string(),
        domain: target
            .domain
            .as_ref()
            .or(config.domain.as_ref())
            .map_or_else(|| config.name.clone(), Domain::to_string),
        store: store.clone(),
    }
}

/// Recovers all targets at the same time: each has its own device.
fn open_stores(config: &Config, folders: &[Folder]) -> Result<Vec<Arc<Store<Files>>>, StartError> {
    let options = StoreOptions { volume_size: config.volume_size, capacity_max: config.capacity_max };
    let open = |folder: &Folder| {
        let files = Files::new(folder.path()).map_err(|source| StoreError::Io {
            path: folder.path().to_owned(),
            what: "opening".to_owned(),
            source,
        })?;
        Store::open(Arc::new(files), *folder.label().uuid.as_bytes(), options).map(Arc::new)
    };
    let results: Vec<Result<_, StoreError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = folders.iter().map(|folder| scope.spawn(move || open(folder))).collect();
        let joined = threads.into_iter().zip(folders).map(|(thread, folder)| {
            thread.join().unwrap_or_else(|_| {
                Err(StoreError::Failed {
                    path: folder.path().to_owned(),
                    why: "recovery has panicked".to_owned(),
                })
            })
        });
        joined.collect()
    });
    Ok(results.into_iter().collect::<Result<_, _>>()?)
}

/// Saves the index every `interval` until `stopping`.
fn keep_checkpoints(
    jobs: &Jobs,
    store: Arc<Store<Files>>,
    interval: Duration,
    mut stopping: watch::Receiver<bool>,
) {
    jobs.start(move || async move {
        loop {
            tokio::select! {
                () = runtime::sleep(interval) => {}
                _ = stopping.wait_for(|stop| *stop) => return,
            }
            if let Err(e) = store.checkpoint().await {
                tracing::error!("saving the index: {e}");
            }
        }
    });
}
