//! A connected client: what it is made of, and how it begins and ends.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Weak, atomic::AtomicUsize},
    time::Duration,
};

use fjordfs_proto::{ClusterMap, FsError, FsResult, InodeId, SessionId, error::Errno};
use parking_lot::Mutex;
use tokio::{
    sync::{broadcast, mpsc},
    time::Instant,
};

use crate::{
    Options, batch,
    blocks::BlockIds,
    cache::BlockCache,
    data::{DataClient, Unsynced},
    engine::Engine,
    file::FileState,
    habits::Habits,
    inode_ids::InodeIds,
    keeper,
    memory::DirtyBudget,
    meta::{MetaClient, owner::Metaservers},
    streams::Streams,
    successor::Successor,
    write::{packer, spawn_flusher},
};

/// How long the end of a session waits for servers that have all that is to be kept: as long as a metaserver may take to start
/// again. A session that is not ended ends by itself.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// A step of the end that takes longer is mentioned in the log, each time again.
const LONG: Duration = Duration::from_secs(10);

/// A session with a FjordFS cluster. Clones share it.
///
/// Works from any tokio runtime: connections and background work live on threads of the client's own. Dropping the
/// last clone abandons what is not committed; [`Client::shutdown`] writes it back and reports failures.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

/// The parts.
pub(crate) struct Inner {
    /// For calls beside the session.
    pub(crate) metaservers: Metaservers,
    pub(crate) options: Options,
    pub(crate) meta: Arc<MetaClient>,
    pub(crate) data: Arc<DataClient>,
    pub(crate) cache: BlockCache,
    pub(crate) blocks: BlockIds,
    pub(crate) inodes: InodeIds,
    pub(crate) budget: Arc<DirtyBudget>,
    /// Inodes that are open or dirty.
    pub(crate) files: Mutex<HashMap<InodeId, Weak<FileState>>>,
    /// Size of `files` at which dead entries are swept.
    pub(crate) files_sweep: AtomicUsize,
    /// Files with data that is not committed; keeps them alive.
    pub(crate) dirty: Mutex<HashMap<InodeId, Arc<FileState>>>,
    /// Write-back failures that no user of the file has been told of, who may have closed it.
    pub(crate) untold: Mutex<BTreeMap<InodeId, FsError>>,
    /// Stored shards that are not known to be power-safe, by the inode that has bytes in them.
    pub(crate) unsynced: Mutex<HashMap<InodeId, Vec<Unsynced>>>,
    /// Where batches are read.
    pub(crate) lanes: batch::Lanes,
    /// Memory of their results until they are taken.
    pub(crate) batch_room: Arc<batch::Room>,
    pub(crate) packer: mpsc::UnboundedSender<packer::Request>,
    moved: broadcast::Sender<InodeId>,
    pub(crate) habits: Habits,
    pub(crate) streams: Streams,
    pub(crate) successor: Option<Successor>,
    /// Last: the others' tasks run on it.
    pub(crate) engine: Arc<Engine>,
}

impl Client {
    /// Connects to the metaserver at `meta` (`HOST:PORT`) and begins a session.
    ///
    /// # Errors
    /// `ETIMEDOUT` when nobody answers there, `EPROTO` when the metaserver refuses this client.
    pub async fn connect(meta: &str, options: Options) -> FsResult<Client> {
        let engine = match options.network {
            Some(_) => Engine::of_caller()?,
            None => Engine::start(options.threads)?,
        };
        let engine = Arc::new(engine);
        let metaservers = Metaservers::over(options.network.clone(), meta, options.operation_timeout);
        let (to, session_options, alive) = (meta.to_owned(), options.clone(), engine.alive());
        let session =
            engine.spawn_session(async move { MetaClient::connect(&to, &session_options, alive).await });
        let (meta, _) = session
            .await
            .map_err(|e| FsError::new(Errno::EIO, format!("connecting was interrupted: {e}")))??;
        let meta = Arc::new(meta);
        let data = Arc::new(DataClient::new(engine.clone(), meta.map_changes(), &options));
        let (packer, queue) = mpsc::unbounded_channel();
        let inner = Arc::new(Inner {
            metaservers,
            cache: BlockCache::new(data.clone(), options.cache_max(), options.prefetch_max()),
            blocks: BlockIds::new(meta.clone(), options.operation_timeout),
            inodes: InodeIds::new(meta.clone(), engine.clone()),
            budget: Arc::new(DirtyBudget::new(options.dirty_max())),
            files: Mutex::default(),
            files_sweep: AtomicUsize::new(1024),
            dirty: Mutex::default(),
            untold: Mutex::default(),
            unsynced: Mutex::default(),
            lanes: batch::Lanes::new(options.threads),
            batch_room: Arc::new(batch::Room::new(options.batch_max())),
            packer,
            moved: broadcast::Sender::new(1024),
            habits: Habits::default(),
            streams: Streams::default(),
            successor: options.handover.as_ref().and_then(Successor::new),
            meta,
            data,
            options,
            engine,
        });
        if inner.successor.is_some() {
            inner.clear_former_losses();
        }
        inner.engine.spawn(packer::run(Arc::downgrade(&inner), queue));
        spawn_flusher(&inner);
        inner.engine.spawn(keeper::run(Arc::downgrade(&inner), inner.meta.leases().keeper()));
        if inner.options.defer {
            inner.inodes.refill();
        }
        Ok(Client { inner })
    }

    /// Writes everything back, makes it power-safe and ends the session. Where nothing is left that only this client has, servers that do
    /// not answer are not waited for as long as an operation may take.
    ///
    /// # Errors
    /// The first failure; the session is ended nevertheless, or ends by itself.
    pub async fn shutdown(&self) -> FsResult<()> {
        let patience = END_PATIENCE.min(self.inner.options.operation_timeout);
        let syncing = mentioned("writing back and syncing", self.sync_all());
        let synced = match self.has_unsent() {
            true => syncing.await,
            false => tokio::time::timeout(patience, syncing).await.unwrap_or_else(|_| {
                let why =
                    "the servers do not answer; what they had answered last may not survive a power failure";
                Err(FsError::new(Errno::ETIMEDOUT, why))
            }),
        };
        let ended = mentioned("ending the session", self.inner.meta.goodbye(patience)).await;
        synced.and(ended)
    }

    /// Whether anything that was written or decided here is with no server yet.
    pub fn has_unsent(&self) -> bool {
        self.dirty_bytes() > 0 || self.inner.meta.leases().has_unanswered()
    }

    /// The newest cluster map.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.inner.meta.map()
    }

    /// Number of the session.
    pub fn session(&self) -> SessionId {
        self.inner.meta.session()
    }

    /// Bytes of written data that are not stored yet.
    pub fn dirty_bytes(&self) -> u64 {
        self.inner.budget.used()
    }

    /// Inodes in which appended bytes turned out to lie further on than they were written, because another client
    /// appended first: whoever caches their bytes has to drop them.
    pub fn appends_moved(&self) -> broadcast::Receiver<InodeId> {
        self.inner.moved.subscribe()
    }
}

/// Whoever waits for the end of a client finds in the log for what.
async fn mentioned<T>(what: &str, step: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let mut step = std::pin::pin!(step);
    loop {
        match tokio::time::timeout(LONG, &mut step).await {
            Ok(done) => return done,
            Err(_) => tracing::warn!("{what} has taken {} s so far", begun.elapsed().as_secs()),
        }
    }
}

impl Inner {
    pub(crate) fn tell_moved(&self, ino: InodeId) {
        // Nobody listens unless a mount caches.
        let _ = self.moved.send(ino);
    }
}
