//! Block ids: leased from the metaserver in ranges, handed out one by one.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use fjordfs_proto::{
    BlockId, ClusterMap, FsError, FsResult, Policy, SessionId, TargetId,
    error::Errno,
    pb::meta::{LeaseBlocks, request::Op, response},
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::meta::{MetaClient, unexpected};

/// Ids asked for at a time.
const LEASE: u32 = 1024;

/// How often a cluster without room is looked at again while an operation waits.
const ROOM_PAUSE: Duration = Duration::from_millis(200);

/// Ids of this session that no block has yet.
pub(crate) struct BlockIds {
    meta: Arc<MetaClient>,
    state: Mutex<State>,
    /// Held while a lease is asked for, so that one request serves all who wait.
    lease: tokio::sync::Mutex<()>,
    timeout: Duration,
}

#[derive(Default)]
struct State {
    session: SessionId,
    ranges: VecDeque<Range<u64>>,
}

impl BlockIds {
    pub(crate) fn new(meta: Arc<MetaClient>, timeout: Duration) -> BlockIds {
        BlockIds { meta, state: Mutex::default(), lease: tokio::sync::Mutex::new(()), timeout }
    }

    /// The next id without waiting, when it is there and its group takes blocks: consecutive calls give consecutive
    /// ids, which makes one extent of a file's full blocks.
    pub(crate) fn take_now(&self, policy: Policy) -> Option<BlockId> {
        let map = self.meta.map();
        let mut state = self.current();
        let range = state.ranges.front_mut()?;
        let id = BlockId(range.start);
        if !map.can_place(id, policy) {
            return None;
        }
        range.start += 1;
        if range.is_empty() {
            state.ranges.pop_front();
        }
        Some(id)
    }

    /// An id whose group takes blocks and has none of the targets to `avoid`.
    ///
    /// # Errors
    /// `ENOSPC` when all groups have a full target, `EIO` when none is reachable in time, and at once when only the
    /// targets to avoid stand in the way.
    pub(crate) async fn take(&self, policy: Policy, avoid: &HashSet<TargetId>) -> FsResult<BlockId> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let map = self.meta.map();
            if let Some(id) = self.search(&map, policy, avoid) {
                return Ok(id);
            }
            if !some_group(&map, policy, avoid) {
                if some_group(&map, policy, &HashSet::new()) {
                    return Err(FsError::new(
                        Errno::EIO,
                        format!("every placement group for {policy} has a target that failed just now"),
                    ));
                }
                if no_room(&map, policy) {
                    return Err(FsError::new(
                        Errno::ENOSPC,
                        format!("no placement group for {policy} has room: delete something or add targets"),
                    ));
                }
                if Instant::now() >= deadline {
                    return Err(FsError::new(
                        Errno::EIO,
                        format!("no placement group for {policy} has all its targets up; see `fjord status`"),
                    ));
                }
                tokio::time::sleep(ROOM_PAUSE).await;
                continue;
            }
            self.refill().await?;
        }
    }

    fn current(&self) -> parking_lot::MutexGuard<'_, State> {
        let mut state = self.state.lock();
        let session = self.meta.session();
        if state.session != session {
            *state = State { session, ranges: VecDeque::new() };
        }
        state
    }

    /// Takes the first suitable id; ids passed over stay for others.
    fn search(&self, map: &ClusterMap, policy: Policy, avoid: &HashSet<TargetId>) -> Option<BlockId> {
        let mut state = self.current();
        let found = state.ranges.iter().enumerate().find_map(|(i, range)| {
            let id = range.clone().find(|&id| suitable(map, BlockId(id), policy, avoid))?;
            Some((i, id))
        });
        let (i, id) = found?;
        let range = state.ranges[i].clone();
        state.ranges.remove(i);
        for rest in [id + 1..range.end, range.start..id] {
            if !rest.is_empty() {
                state.ranges.insert(i, rest);
            }
        }
        Some(BlockId(id))
    }

    async fn refill(&self) -> FsResult<()> {
        let before = self.current().ranges.len();
        let _one = self.lease.lock().await;
        if self.current().ranges.len() > before {
            return Ok(());
        }
        match self.meta.call(Op::LeaseBlocks(LeaseBlocks { count: LEASE })).await? {
            response::Result::LeaseBlocks(lease) if lease.count > 0 => {
                let end = lease.first.saturating_add(lease.count.into());
                self.current().ranges.push_back(lease.first..end);
                Ok(())
            }
            _ => Err(unexpected("a lease of block ids")),
        }
    }
}

fn suitable(map: &ClusterMap, id: BlockId, policy: Policy, avoid: &HashSet<TargetId>) -> bool {
    map.can_place(id, policy)
        && map.placement(id, policy).is_some_and(|group| !group.iter().any(|target| avoid.contains(target)))
}

/// Whether the newest era has any group that would do.
fn some_group(map: &ClusterMap, policy: Policy, avoid: &HashSet<TargetId>) -> bool {
    newest_groups(map, policy).any(|group| {
        group.iter().all(|t| !avoid.contains(t) && map.targets.get(t).is_some_and(|t| t.writable()))
    })
}

/// Whether fullness alone keeps every group from taking a block.
fn no_room(map: &ClusterMap, policy: Policy) -> bool {
    let mut groups = newest_groups(map, policy).peekable();
    groups.peek().is_some()
        && groups.all(|group| group.iter().any(|t| map.targets.get(t).is_some_and(|t| t.full)))
}

fn newest_groups(map: &ClusterMap, policy: Policy) -> impl Iterator<Item = &[TargetId]> {
    let table = map.eras.last().and_then(|era| era.tables.get(&policy.width()));
    table.into_iter().flat_map(|table| table.members.chunks(table.width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{
        Epoch, ServerId,
        cluster::{Era, PgTable, Server, ServerState, Target, TargetState},
    };
    use std::collections::BTreeMap;

    fn map(full: &[u64], down: &[u64]) -> ClusterMap {
        let target = |id: u64| Target {
            server: ServerId(1),
            domain: id.to_string(),
            state: if down.contains(&id) { TargetState::Down } else { TargetState::Up },
            full: full.contains(&id),
        };
        let members = [1, 2, 2, 3, 3, 1].map(TargetId).to_vec();
        ClusterMap {
            cluster_id: String::new(),
            epoch: Epoch(1),
            servers: [(
                ServerId(1),
                Server { address: String::new(), name: String::new(), state: ServerState::Up },
            )]
            .into(),
            targets: (1..=3).map(|id| (TargetId(id), target(id))).collect(),
            eras: vec![Era {
                first_block: BlockId(1),
                tables: BTreeMap::from([(2, PgTable { width: 2, members })]),
            }],
            default_policy: Policy::replica(2).unwrap(),
        }
    }

    #[test]
    fn full_and_unreachable_are_told_apart() {
        let two = Policy::replica(2).unwrap();
        let none = HashSet::new();
        assert!(some_group(&map(&[], &[1]), two, &none));
        assert!(!some_group(&map(&[], &[1, 2]), two, &none));
        assert!(!no_room(&map(&[], &[1, 2]), two));
        assert!(no_room(&map(&[1, 2], &[]), two));
        assert!(!some_group(&map(&[], &[]), two, &[TargetId(1), TargetId(2)].into()));
        assert!(!no_room(&map(&[], &[]), Policy::replica(3).unwrap()));
    }
}
