//! The cluster map that this server goes by, and which puts it lets in.
//!
//! A member of a placement group that is being replaced must not get another shard once its successor has compared itself with it:
//! that shard would be found by nobody. So a put into a place that the map gives to another target, or is about to, is refused,
//! and its writer, who goes by an older map, places the block anew. What older maps have let in may still be under way; each put
//! holds on to the map that let it in, and the metaserver is told when those of before are over ([`Placing::placed_epoch`]).
//! Only then does it have the successor compared.

use std::sync::{Arc, Weak};

use fjordfs_proto::{
    BlockId, ClusterMap, Epoch, FsError, FsResult, ShardNo, TargetId, cluster::MapError, error::Errno, pb,
};
use parking_lot::{Mutex, RwLock};

/// See the module.
#[derive(Default)]
pub(crate) struct Placing {
    current: RwLock<Current>,
    /// Maps of before that may have puts under way.
    older: Mutex<Vec<(Epoch, Weak<()>)>>,
}

#[derive(Default)]
struct Current {
    map: Option<Arc<ClusterMap>>,
    puts: Arc<()>,
}

impl Current {
    fn epoch(&self) -> Epoch {
        self.map.as_ref().map_or(Epoch(0), |map| map.epoch)
    }
}

/// Held while a put is under way.
pub(crate) struct Admitted {
    _by: Arc<()>,
}

impl Placing {
    /// The map, once there is one.
    pub(crate) fn map(&self) -> Option<Arc<ClusterMap>> {
        self.current.read().map.clone()
    }

    /// Takes over a newer map.
    ///
    /// # Errors
    /// When it contradicts itself.
    pub(crate) fn adopt(&self, map: pb::common::ClusterMap) -> Result<(), MapError> {
        let map = Arc::new(ClusterMap::from_pb(map)?);
        let mut older = self.older.lock();
        let new = Current { map: Some(map), puts: Arc::default() };
        let before = std::mem::replace(&mut *self.current.write(), new);
        older.push((before.epoch(), Arc::downgrade(&before.puts)));
        Ok(())
    }

    /// No put is under way that was let in by a map older than this.
    pub(crate) fn placed_epoch(&self) -> Epoch {
        let mut older = self.older.lock();
        older.retain(|(_, puts)| puts.strong_count() > 0);
        older.iter().map(|(epoch, _)| *epoch).min().unwrap_or_else(|| self.current.read().epoch())
    }

    /// Lets a put in. Without a map, and for a writer whose map is newer, nothing is known against it.
    ///
    /// # Errors
    /// `ESTALE` when the place is another target's, or about to be.
    pub(crate) fn admit(
        &self,
        target: TargetId,
        (block, shard, width): (BlockId, ShardNo, usize),
        epoch: Epoch,
    ) -> FsResult<Admitted> {
        let current = self.current.read();
        if let Some(map) = current.map.as_ref().filter(|map| map.epoch >= epoch)
            && let Some((table, pg)) = map.group_of(block, width)
            && (table.group(pg).get(usize::from(shard.0)) != Some(&target) || table.is_moving(pg, shard))
        {
            let what = format!(
                "{block} {shard} does not belong on target {target} in map {}: get a new cluster map",
                map.epoch
            );
            return Err(FsError::new(Errno::ESTALE, what));
        }
        Ok(Admitted { _by: current.puts.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{
        Policy, ServerId,
        cluster::{Era, PgTable, Server, ServerState, Target, TargetState},
    };
    use std::collections::BTreeMap;

    fn map(epoch: u64, members: [u64; 2], moves: &[(usize, u64)]) -> pb::common::ClusterMap {
        let server = Server { address: "a:1".into(), name: "a".into(), state: ServerState::Up };
        let target =
            || Target { server: ServerId(1), domain: "d".into(), state: TargetState::Up, full: false };
        let table = PgTable {
            width: 2,
            members: members.map(TargetId).to_vec(),
            moves: moves.iter().map(|(cell, t)| (*cell, TargetId(*t))).collect(),
        };
        ClusterMap {
            cluster_id: "c".into(),
            epoch: Epoch(epoch),
            servers: BTreeMap::from([(ServerId(1), server)]),
            targets: (1..=3).map(|id| (TargetId(id), target())).collect(),
            eras: vec![Era { first_block: BlockId(1), tables: BTreeMap::from([(2, table)]) }],
            default_policy: Policy::replica(2).unwrap(),
        }
        .to_pb()
    }

    #[test]
    fn a_place_that_is_given_away_takes_no_more_and_what_older_maps_let_in_is_known() {
        let placing = Placing::default();
        let put = |target: u64, shard: u8, epoch: u64| {
            let what = (BlockId(5), ShardNo(shard), 2);
            placing.admit(TargetId(target), what, Epoch(epoch))
        };
        let early = put(3, 1, 0).unwrap();
        assert_eq!(placing.placed_epoch(), Epoch(0));
        placing.adopt(map(4, [1, 2], &[])).unwrap();
        assert_eq!(placing.placed_epoch(), Epoch(0), "one without any map is under way");
        drop(early);
        assert_eq!(placing.placed_epoch(), Epoch(4));
        let slow = put(2, 1, 4).unwrap();
        assert!(put(2, 0, 4).is_err() && put(3, 1, 4).is_err());
        placing.adopt(map(5, [1, 2], &[(1, 3)])).unwrap();
        assert_eq!(put(2, 1, 4).err().map(|e| e.errno), Some(Errno::ESTALE), "it is leaving");
        assert!(put(2, 1, 5).is_err(), "also for who knows this map");
        assert!(put(1, 0, 4).is_ok(), "the other member stays");
        assert!(put(3, 1, 6).is_ok(), "the writer knows more than this server");
        assert_eq!(placing.placed_epoch(), Epoch(4), "the slow one");
        drop(slow);
        assert_eq!(placing.placed_epoch(), Epoch(5));
    }
}
