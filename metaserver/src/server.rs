//! Starting and stopping a metaserver.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::{Arc, atomic::AtomicBool, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use fjordfs_proto::{FsError, FsResult};
use futures_util::Stream;
use tokio::{
    runtime::Runtime,
    sync::{Notify, oneshot},
};

use crate::{
    Config,
    core::{Core, cluster_of},
    executor::{Executor, Job, Jobs, moment},
    label::{Folder, FolderError},
    service::{self, Connection},
    store::{FjallStore, Late, MetaStore, Place, RemoteStore, StoreError},
    syncer::Syncer,
    upkeep::Upkeep,
};

/// Connections get this long to end when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a metaserver did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Somebody else listens there.
    #[error("{0} is in use: stop what listens there, or choose another address with --listen")]
    AddressInUse(SocketAddr),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The storage engine did not open.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The records in it make no sense, or could not be written.
    #[error("metadata in {store}: {source}")]
    Metadata {
        /// The data folder, or the store's address.
        store: String,
        /// What is wrong.
        source: FsError,
    },
    /// It was told to stop while another metaserver owned the store.
    #[error("stopped while standing by")]
    Stopped,
    /// Of several metaservers that stood by, another was faster.
    #[error("another metaserver took the store over first")]
    Overtaken,
    /// No threads.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// Why a metaserver did not stop cleanly.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// What was acknowledged last may not survive a power failure.
    #[error("the metadata log could not be synced: {0}")]
    Sync(FsError),
}

/// A running metaserver. Dropping it stops it.
pub struct MetaServer {
    address: SocketAddr,
    cluster_id: String,
    ended: Arc<Notify>,
    running: Option<Running>,
}

struct Running {
    jobs: Jobs,
    serving: JoinHandle<FsResult<()>>,
    /// Held until everything else has ended.
    folder: Option<Folder>,
}

impl MetaServer {
    /// Opens the data folder, listens, and serves on threads of its own.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running.
    pub fn start(config: Config) -> Result<MetaServer, StartError> {
        MetaServer::start_unless(config, &Arc::default())
    }

    /// Like [`MetaServer::start`]; waits while another metaserver owns the store, until `stop` is set.
    ///
    /// # Errors
    /// See [`StartError`]; nothing is left running.
    pub fn start_unless(config: Config, stop: &Arc<AtomicBool>) -> Result<MetaServer, StartError> {
        let Opened { folder, store, cluster_id, listener } = match &config.store {
            None => open_folder(&config)?,
            Some(place) => open_place(&config, place, stop)?,
        };
        let address = listener.local_addr().map_err(|e| listen_error(&config, e))?;
        let core = Core::open(store.clone(), &cluster_id, &config, moment()).map_err(|source| match store
            .late()
            .map(Late::acknowledged)
        {
            Some(Err(StoreError::Fenced { .. })) => StartError::Overtaken,
            _ => metadata_error(&config, source),
        })?;
        let syncer = Syncer::start(store.clone(), config.log_sync).map_err(StartError::Thread)?;
        let watched = folder.is_some().then(|| config.data.clone());
        let (jobs, executor) = Executor::new(core, store, syncer, watched, named(&config));
        let ended = Arc::new(Notify::new());
        let serving =
            start_serving(listener, executor, jobs.clone(), ended.clone()).map_err(StartError::Thread)?;
        tracing::info!(%address, cluster = cluster_id, store = %named(&config), "metaserver started");
        Ok(MetaServer { address, cluster_id, ended, running: Some(Running { jobs, serving, folder }) })
    }

    /// Resolves when it has ended by itself: another metaserver took the store over, or it was handed over.
    pub async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where garbage collection says how far it is, and hears when it is wanted.
    pub fn upkeep(&self) -> Option<Arc<Upkeep>> {
        self.running.as_ref().map(|running| running.jobs.upkeep().clone())
    }

    /// UUID of the cluster.
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Ends all streams, finishes what has arrived, and syncs the log.
    ///
    /// # Errors
    /// When the log cannot be synced.
    pub fn stop(mut self) -> Result<(), StopError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), StopError> {
        let Some(Running { jobs, serving, folder }) = self.running.take() else { return Ok(()) };
        jobs.submit(Job::Stop);
        let result = serving.join().unwrap_or_else(|_| {
            Err(FsError::new(fjordfs_proto::error::Errno::EIO, "the serving thread panicked"))
        });
        drop(folder);
        tracing::info!(address = %self.address, "metaserver stopped");
        result.map_err(StopError::Sync)
    }
}

impl Drop for MetaServer {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            tracing::error!(error = %e, "metaserver");
        }
    }
}

struct Opened {
    folder: Option<Folder>,
    store: Arc<dyn MetaStore>,
    cluster_id: String,
    listener: TcpListener,
}

fn open_folder(config: &Config) -> Result<Opened, StartError> {
    // First: the store's journal may take a while, and a wrong address should show at once, and leave no folder behind.
    let listener = listen(config)?;
    let mut folder = Folder::claim(&config.data)?;
    let store = Arc::new(FjallStore::open(&folder.store, config.engine)?);
    folder.label()?;
    Ok(Opened { cluster_id: folder.cluster_id.clone(), folder: Some(folder), store, listener })
}

/// Waits for the ownership. Listens only then: clients try the next address when nobody listens.
fn open_place(config: &Config, place: &Place, stop: &Arc<AtomicBool>) -> Result<Opened, StartError> {
    drop(listen(config)?);
    let store = RemoteStore::open(place, config.engine.cache_bytes)?;
    if !store.await_silence(stop.clone(), Some(&config.listen.to_string()))? {
        return Err(StartError::Stopped);
    }
    let known = cluster_of(&store).map_err(|source| metadata_error(config, source))?;
    let cluster_id = known.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let listener = listen(config)?;
    Ok(Opened { folder: None, store: Arc::new(store), cluster_id, listener })
}

fn listen(config: &Config) -> Result<TcpListener, StartError> {
    let listener = TcpListener::bind(config.listen).map_err(|e| listen_error(config, e))?;
    listener.set_nonblocking(true).map_err(|e| listen_error(config, e))?;
    Ok(listener)
}

fn metadata_error(config: &Config, source: FsError) -> StartError {
    StartError::Metadata { store: named(config), source }
}

/// The store as the user named it.
fn named(config: &Config) -> String {
    config.store.as_ref().map_or_else(|| config.data.display().to_string(), Place::to_string)
}

/// Serves on a thread of its own. The runtime is made and dropped there, so that a caller may itself be asynchronous.
fn start_serving(
    listener: TcpListener,
    executor: Executor,
    jobs: Jobs,
    ended: Arc<Notify>,
) -> io::Result<JoinHandle<FsResult<()>>> {
    let (ready, started) = mpsc::channel();
    let thread = std::thread::Builder::new().name("meta-serve".into());
    let serving = thread.spawn(move || {
        let prepared = runtime().and_then(|runtime| {
            let context = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            drop(context);
            Ok((runtime, listener))
        });
        match prepared {
            Ok((runtime, listener)) => {
                // The starter waits for this.
                let _ = ready.send(Ok(()));
                let result = serve(runtime, listener, executor, jobs);
                // For one who waits, now or later.
                ended.notify_one();
                result
            }
            Err(e) => {
                let _ = ready.send(Err(e));
                Ok(())
            }
        }
    })?;
    started.recv().unwrap_or_else(|_| Err(io::Error::other("the serving thread ended at once")))?;
    Ok(serving)
}

/// One thread: a request passes from its connection's task to its stream's, to the executor and back, and with more
/// threads each of these steps could be a wake-up of another core, which costs more than the work itself.
fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// Runs until the executor stops.
fn serve(
    runtime: Runtime,
    listener: tokio::net::TcpListener,
    executor: Executor,
    jobs: Jobs,
) -> FsResult<()> {
    let result = runtime.block_on(serve_connections(service::connections(listener), executor, jobs));
    runtime.shutdown_timeout(STOP_TIMEOUT);
    result
}

/// Runs until the executor stops. It ends the streams, without which connections would never drain.
async fn serve_connections<I, IO>(connections: I, executor: Executor, jobs: Jobs) -> FsResult<()>
where
    I: Stream<Item = Result<IO, Infallible>> + Send + 'static,
    IO: Connection,
{
    let (stop, stopping) = oneshot::channel();
    let server = tokio::spawn(async { report(service::serve(connections, jobs, stopping).await) });
    let result = executor.run().await;
    // A server that ended by itself does not listen any more.
    let _ = stop.send(());
    let _ = tokio::time::timeout(STOP_TIMEOUT, server).await;
    result
}

/// Serves the metadata in `store` over `connections`, in the runtime of the caller, until the store is lost; a metaserver for
/// programs that have an engine or a network of their own. Of `config` it takes what is said about sessions, data servers and
/// the default policy. Dropped, it ends as by a kill.
///
/// # Errors
/// When the records in the store make no sense, or when it fails.
pub async fn serve_store<I, IO>(
    store: Arc<dyn MetaStore>,
    cluster_id: &str,
    config: &Config,
    connections: I,
) -> FsResult<()>
where
    I: Stream<Item = Result<IO, Infallible>> + Send + 'static,
    IO: Connection,
{
    let core = Core::open(store.clone(), cluster_id, config, moment())?;
    let syncer = Syncer::start(store.clone(), config.log_sync).map_err(|e| {
        FsError::new(fjordfs_proto::error::Errno::EAGAIN, format!("cannot start a thread: {e}"))
    })?;
    let place = store.name().to_owned();
    let (jobs, executor) = Executor::new(core, store, syncer, None, place);
    serve_connections(connections, executor, jobs).await
}

fn report(ended: Result<(), tonic::transport::Error>) {
    if let Err(e) = ended {
        tracing::error!(error = %e, "the gRPC server ended");
    }
}

fn listen_error(config: &Config, source: io::Error) -> StartError {
    match source.kind() {
        io::ErrorKind::AddrInUse => StartError::AddressInUse(config.listen),
        _ => StartError::Listen { address: config.listen, source },
    }
}
