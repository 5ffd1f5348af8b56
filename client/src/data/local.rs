//! Shards of data servers on this host, read from their files: no socket, no other process. Hot path.
//!
//! # How it works
//! A data server that is reached through its Unix socket is asked once where a shard is ([`Opcode::LocateShard`]). From then on
//! the shard's pages are read with direct I/O from the volume file, on a ring of the calling thread's lane, and verified against the
//! checksums that came with its place. Blocks are immutable, so a place stays right until the shard is deleted.
//!
//! # Why it is safe
//! - The file must be the very one that the server has open (device and inode), in whatever mount namespace this process is.
//! - Whether this process may read it is decided by the kernel, as for any file.
//! - A deleted shard becomes a hole, a damaged page has other bytes: neither matches its checksum. Then the place is forgotten
//!   and the server is asked for the bytes, or says that there is no such shard.
//!
//! When anything is in the way, the caller is sent to the server, as if it were on another host.
//!
//! [`Opcode::LocateShard`]: fjordfs_proto::frame::Opcode::LocateShard

mod ring;

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    fs::{File, OpenOptions},
    io,
    num::NonZeroUsize,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, TargetId,
    block::{first_bad_page, pages},
    error::Errno,
    pb::data::LocateShardReply,
};
use lru::LruCache;
use parking_lot::Mutex;
use quick_cache::{Weighter, sync::Cache};

use self::ring::Ring;
use super::memory::Pool;
use crate::{
    Options,
    engine::{Engine, LaneId, lane},
};

/// Volume files that are open at a time.
const FILES_MAX: NonZeroUsize = NonZeroUsize::new(256).unwrap();

/// A target whose files could not be read is left to its server for this long.
const RETRY_PAUSE: Duration = Duration::from_secs(60);

/// What a place costs beside its checksums, bytes.
const OVERHEAD: u64 = 160;

/// A piece of a block on a target.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Shard {
    pub(super) target: TargetId,
    pub(super) block: BlockId,
    pub(super) no: u32,
}

/// Where a shard is.
struct Place {
    /// Closed when others were used more lately.
    file: Weak<File>,
    offset: u64,
    length: u32,
    page_crcs: Bytes,
}

#[derive(Clone)]
struct ByTable;

impl Weighter<Shard, Arc<Place>> for ByTable {
    fn weight(&self, _: &Shard, place: &Arc<Place>) -> u64 {
        place.page_crcs.len() as u64 + OVERHEAD
    }
}

/// Why a shard's place is not known.
enum Unknown {
    /// The server must be asked for the bytes.
    AskServer,
    /// The server's answer.
    Error(FsError),
}

/// See the module.
pub(super) struct LocalReads {
    is_on: bool,
    engine: Arc<Engine>,
    rings: Mutex<BTreeMap<LaneId, Option<Arc<Ring>>>>,
    places: Cache<Shard, Arc<Place>, ByTable>,
    /// By device and inode.
    files: Mutex<LruCache<(u64, u64), Arc<File>>>,
    /// Targets whose servers are asked, and since when.
    remote: Mutex<HashMap<TargetId, Instant>>,
    memory: Pool,
}

impl Drop for LocalReads {
    fn drop(&mut self) {
        for ring in self.rings.lock().values().flatten() {
            ring.close();
        }
    }
}

impl LocalReads {
    pub(super) fn new(engine: Arc<Engine>, memory: Pool, options: &Options) -> LocalReads {
        let tables_max = options.tables_max();
        LocalReads {
            is_on: options.local_reads && options.local_sockets,
            engine,
            rings: Mutex::default(),
            // Of whole blocks; the estimate only sizes the first allocation.
            places: Cache::with_weighter((tables_max >> 14) as usize, tables_max, ByTable),
            files: Mutex::new(LruCache::new(FILES_MAX)),
            remote: Mutex::default(),
            memory,
        }
    }

    /// False when the server of `target` has to be asked in any case.
    pub(super) fn may_read(&self, target: TargetId) -> bool {
        self.is_on && self.remote.lock().get(&target).is_none_or(|since| since.elapsed() > RETRY_PAUSE)
    }

    /// Reads `length` bytes at `offset`, both of whole pages, as far as the shard has them; `None` when the server has to be
    /// asked. `locate` asks a server on this host for the place, and answers with nothing when it is on another one.
    ///
    /// # Errors
    /// Those of `locate` that the server would answer to a read, too.
    pub(super) async fn read(
        &self,
        shard: Shard,
        offset: u32,
        length: u32,
        locate: impl AsyncFnOnce() -> FsResult<Option<LocateShardReply>>,
    ) -> FsResult<Option<Bytes>> {
        let locating = async {
            match locate().await {
                Ok(Some(reply)) => self.place(shard, reply),
                Ok(None) => {
                    self.leave_to_server(shard.target);
                    Err(Unknown::AskServer)
                }
                Err(e) if e.errno == Errno::ENOENT => Err(Unknown::Error(e)),
                // It will say the same to a read, or something better.
                Err(_) => Err(Unknown::AskServer),
            }
        };
        let place = match self.places.get(&shard) {
            Some(place) => place,
            None => match Box::pin(self.places.get_or_insert_async(&shard, locating)).await {
                Ok(place) => place,
                Err(Unknown::AskServer) => return Ok(None),
                Err(Unknown::Error(e)) => return Err(e),
            },
        };
        let bytes = self.read_at(&place, offset, length).await;
        if bytes.is_none() {
            self.places.remove(&shard);
        }
        Ok(bytes)
    }

    async fn read_at(&self, place: &Place, offset: u32, length: u32) -> Option<Bytes> {
        let end = offset.saturating_add(length).min(place.length);
        let wanted = end.saturating_sub(offset) as usize;
        if wanted == 0 {
            return Some(Bytes::new());
        }
        let (file, ring) = (place.file.upgrade()?, self.ring()?);
        let memory = self.memory.take(wanted.next_multiple_of(PAGE_SIZE));
        let mut read = match ring.read(file, place.offset + u64::from(offset), memory).await {
            Ok(read) if read.len() >= wanted => read,
            Ok(_) => return None,
            Err(e) => {
                tracing::warn!("reading a shard from its file failed, its server is asked: {e}");
                return None;
            }
        };
        read.cut(wanted);
        let first = offset as usize / PAGE_SIZE;
        let crcs = place.page_crcs.get(4 * first..4 * (first + pages(wanted)))?;
        first_bad_page(read.as_ref(), crcs).is_none().then(|| Bytes::from_owner(read))
    }

    /// The ring of the calling thread's lane; `None` when the kernel does not let us have one.
    fn ring(&self) -> Option<Arc<Ring>> {
        let lane = lane();
        match self.rings.lock().entry(lane) {
            Entry::Occupied(ring) => ring.get().clone(),
            Entry::Vacant(free) => {
                let ring = Ring::new(lane != 0, self.memory.arena())
                    .inspect_err(|e| tracing::info!("no io_uring for reads of local files: {e}"))
                    .ok();
                if let Some(ring) = &ring {
                    self.engine.spawn_here(Arc::clone(ring).drive());
                }
                free.insert(ring).clone()
            }
        }
    }

    fn place(&self, shard: Shard, reply: LocateShardReply) -> Result<Arc<Place>, Unknown> {
        let path = Path::new(std::ffi::OsStr::from_bytes(&reply.path));
        let is_sane = reply.offset.is_multiple_of(PAGE_SIZE as u64)
            && reply.page_crcs.len() == 4 * pages(reply.length as usize);
        let file = if is_sane {
            self.open(path, (reply.device, reply.inode))
        } else {
            Err(io::ErrorKind::InvalidData.into())
        };
        match file {
            Ok(file) => Ok(Arc::new(Place {
                file: Arc::downgrade(&file),
                offset: reply.offset,
                length: reply.length,
                page_crcs: reply.page_crcs,
            })),
            Err(e) => {
                let (target, path) = (shard.target, path.display());
                tracing::info!(
                    "target {target} is read through its server, because {path} is not to be read here: {e}"
                );
                self.leave_to_server(target);
                Err(Unknown::AskServer)
            }
        }
    }

    fn leave_to_server(&self, target: TargetId) {
        self.remote.lock().insert(target, Instant::now());
    }

    /// Opens a volume file, if it is the one with this device and inode.
    fn open(&self, path: &Path, identity: (u64, u64)) -> io::Result<Arc<File>> {
        if let Some(file) = self.files.lock().get(&identity) {
            return Ok(Arc::clone(file));
        }
        let file =
            OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_NOFOLLOW).open(path)?;
        let found = file.metadata()?;
        if (found.dev(), found.ino()) != identity {
            return Err(io::Error::new(io::ErrorKind::NotFound, "another file is there"));
        }
        let file = Arc::new(file);
        self.files.lock().put(identity, Arc::clone(&file));
        Ok(file)
    }
}
