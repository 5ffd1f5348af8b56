//! Shards over the framed protocol: connections, whole-block writes, verified reads.
//!
//! # Verification
//! Page CRCs are computed before a block leaves this process and checked when its pages come back. A page that does
//! not match is a miss: the next copy is asked, or the range decoded from other shards, each of them verified. Bytes
//! that did not verify are never handed out.
//!
//! # Servers that cannot be reached
//! `EHOSTUNREACH` says that a server could not be reached and may be there again soon: it was killed, is being upgraded, or the
//! network is cut. Whoever can wait does so, as long as an operation may take; programs get `EIO` then. From a target that is
//! out or has failed nothing is expected any more, nor from a server that has been away for as long as an operation may take, and
//! the error is `EIO` at once.

mod connection;
mod gather;
mod health;
mod list;
mod local;
mod memory;
mod parity;
mod pool;
mod read;
mod socket;
mod sync;
mod write;

use std::{
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use fjordfs_proto::{ClusterMap, FsError, FsResult, TargetId, error::Errno};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::{sync::watch, time::Instant};

pub(crate) use read::BlockRange;
pub(crate) use sync::{Place, Synced, Unsynced};
pub(crate) use write::Placed;

use connection::Connection;
use health::Health;
use local::LocalReads;
use parity::ParityBuffers;
use pool::Pool;

use crate::{Options, engine::Engine};

/// Where others have done enough, those who have not answered this many hedge delays later are not waited for.
const STRAGGLE: u32 = 10;

/// All data servers, as this client sees them.
pub(crate) struct DataClient {
    pool: Pool,
    local: LocalReads,
    map: watch::Receiver<Arc<ClusterMap>>,
    health: Health,
    parity: Arc<ParityBuffers>,
    /// How often it was looked what others have put.
    looks: AtomicU32,
    hedge_delay: Duration,
    timeout: Duration,
}

impl DataClient {
    pub(crate) fn new(
        engine: Arc<Engine>,
        map: watch::Receiver<Arc<ClusterMap>>,
        options: &Options,
    ) -> DataClient {
        let cluster_id = map.borrow().cluster_id.clone();
        let memory = memory::Pool::new(options.arena_max(), options.memory_max);
        DataClient {
            local: LocalReads::new(engine.clone(), memory.clone(), options),
            pool: Pool::new(engine, memory, cluster_id, options),
            map,
            parity: ParityBuffers::new(options.parity_max()),
            looks: AtomicU32::new(0),
            health: Health::new(options.hedge_delay),
            hedge_delay: options.hedge_delay,
            timeout: options.operation_timeout,
        }
    }

    pub(crate) fn map(&self) -> Arc<ClusterMap> {
        self.map.borrow().clone()
    }

    /// A connection of this thread's lane to the server of `target`.
    ///
    /// # Errors
    /// `EHOSTUNREACH` when there is none now, `EIO` when none is expected.
    async fn connection(&self, target: TargetId) -> FsResult<Arc<Connection>> {
        let map = self.map();
        let (id, server) = map
            .server_of(target)
            .ok_or_else(|| FsError::new(Errno::EIO, format!("target {target} is not in the cluster map")))?;
        self.pool.get(id, &server.address).await.map_err(|e| {
            let may_return = map.targets.get(&target).is_some_and(|target| target.may_return());
            if may_return { e } else { e.to_users() }
        })
    }

    /// How long a target is waited for when others have done enough.
    fn patience(&self) -> Duration {
        self.hedge_delay * STRAGGLE
    }

    /// Does all of `works` at once and hands each outcome to `take`, which says whether there is `enough`. From then on the rest is
    /// waited for as long as `patience` only: a server that this client alone does not reach is up for everybody else, and
    /// the network says nothing for minutes.
    async fn until_enough<W: Future>(
        &self,
        works: impl IntoIterator<Item = W>,
        enough: bool,
        patience: Duration,
        mut take: impl FnMut(W::Output) -> bool,
    ) {
        let mut works: FuturesUnordered<W> = works.into_iter().collect();
        let mut end = enough.then(|| Instant::now() + patience);
        loop {
            let next = match end {
                None => works.next().await,
                Some(end) => tokio::time::timeout_at(end, works.next()).await.unwrap_or(None),
            };
            let Some(outcome) = next else { return };
            if take(outcome) && end.is_none() {
                end = Some(Instant::now() + patience);
            }
        }
    }

    /// Runs `work` with a target, giving up when the metaserver no longer takes the target for reachable, or after
    /// the operation timeout.
    async fn while_up<T>(&self, target: TargetId, work: impl Future<Output = FsResult<T>>) -> FsResult<T> {
        let mut map = self.map.clone();
        let down = map.wait_for(|map| !map.targets.get(&target).is_some_and(|t| t.readable()));
        let why = tokio::select! {
            biased;
            result = work => return result,
            _ = down => "it is down".to_owned(),
            () = tokio::time::sleep(self.timeout) => format!("no answer within {:?}", self.timeout),
        };
        Err(FsError::new(Errno::EIO, format!("target {target}: {why}")))
    }
}
