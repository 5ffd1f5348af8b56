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

use std::{sync::Arc, time::Duration};

use fjordfs_proto::{ClusterMap, FsError, FsResult, TargetId, error::Errno};
use tokio::sync::watch;

pub(crate) use read::BlockRange;
pub(crate) use sync::Unsynced;
pub(crate) use write::Placed;

use connection::Connection;
use health::Health;
use local::LocalReads;
use parity::ParityBuffers;
use pool::Pool;

use crate::{Options, engine::Engine};

/// All data servers, as this client sees them.
pub(crate) struct DataClient {
    pool: Pool,
    local: LocalReads,
    map: watch::Receiver<Arc<ClusterMap>>,
    health: Health,
    parity: Arc<ParityBuffers>,
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
