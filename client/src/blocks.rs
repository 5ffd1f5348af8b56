//! Block ids: leased from the metaserver in ranges, handed out one by one.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use fjordfs_proto::{
    BlockId, ClusterMap, FsError, FsResult, Layout, PgId, SessionId, ShardNo, TargetId,
    cluster::{PgTable, TargetState},
    error::Errno,
    pb::meta::{Commit, LeaseBlocks, request::Op, response},
};
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::meta::{MetaClient, unexpected};

/// Ids asked for at a time.
const LEASE: u32 = 1024;

/// Runs of ids that are kept when they could not be used.
const LEFTOVERS_MAX: usize = 256;

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

impl State {
    /// Takes the first suitable id; ids passed over stay for others.
    fn search(
        &mut self,
        map: &ClusterMap,
        layout: Layout,
        avoid: &HashSet<TargetId>,
        missing_max: usize,
    ) -> Option<BlockId> {
        let found = self.ranges.iter().enumerate().find_map(|(i, range)| {
            let id = range.clone().find(|&id| {
                let group = map.group_of(BlockId(id), layout.width());
                group.and_then(|group| missing(map, group, layout, avoid)).is_some_and(|n| n <= missing_max)
            })?;
            Some((i, id))
        });
        let (i, id) = found?;
        let range = self.ranges.remove(i)?;
        for rest in [id + 1..range.end, range.start..id] {
            if !rest.is_empty() {
                self.ranges.insert(i, rest);
            }
        }
        Some(BlockId(id))
    }

    /// The oldest of what is left of former leases, to be given back when that is much: ids of groups with a full target are good
    /// for nothing while it is full, the metaserver keeps account of every lease that is not used up, and `search` goes over all.
    fn leftovers(&mut self) -> Vec<u64> {
        if self.ranges.len() <= LEFTOVERS_MAX {
            return Vec::new();
        }
        let surplus = self.ranges.len() - LEFTOVERS_MAX / 2;
        self.ranges.drain(..surplus).flatten().collect()
    }
}

impl BlockIds {
    pub(crate) fn new(meta: Arc<MetaClient>, timeout: Duration) -> BlockIds {
        BlockIds { meta, state: Mutex::default(), lease: tokio::sync::Mutex::new(()), timeout }
    }

    /// The next id without waiting, when it is there and its whole group takes blocks: consecutive calls give
    /// consecutive ids, which makes one extent of a file's full blocks.
    pub(crate) fn take_now(&self, layout: Layout) -> Option<BlockId> {
        let map = self.meta.map();
        let mut state = self.current();
        let range = state.ranges.front_mut()?;
        let id = BlockId(range.start);
        if !map.can_place(id, layout) {
            return None;
        }
        range.start += 1;
        if range.is_empty() {
            state.ranges.pop_front();
        }
        Some(id)
    }

    /// An id whose group takes blocks and has none of the targets to `avoid`: one where no member is missing, else one
    /// where as few are as anywhere and the others are enough to read the block.
    ///
    /// # Errors
    /// `ENOSPC` when all groups have a full target, `EIO` when too few targets are reachable in time, and at once when only
    /// the targets to avoid stand in the way.
    pub(crate) async fn take(&self, layout: Layout, avoid: &HashSet<TargetId>) -> FsResult<BlockId> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let map = self.meta.map();
            let Some(missing) = least_missing(&map, layout, avoid) else {
                if least_missing(&map, layout, &HashSet::new()).is_some() {
                    return Err(FsError::new(
                        Errno::EIO,
                        format!(
                            "every placement group for {} has a target that failed just now",
                            layout.policy()
                        ),
                    ));
                }
                if no_room(&map, layout) {
                    return Err(FsError::new(
                        Errno::ENOSPC,
                        format!(
                            "no placement group for {} has room: delete something or add targets",
                            layout.policy()
                        ),
                    ));
                }
                if Instant::now() >= deadline {
                    return Err(FsError::new(Errno::EIO, no_group(&map, layout)));
                }
                tokio::time::sleep(ROOM_PAUSE).await;
                continue;
            };
            if let Some(id) = self.current().search(&map, layout, avoid, missing) {
                return Ok(id);
            }
            self.refill().await?;
        }
    }

    /// Whether another group than those with targets to `avoid` has all its members.
    pub(crate) fn has_whole_group(&self, layout: Layout, avoid: &HashSet<TargetId>) -> bool {
        least_missing(&self.meta.map(), layout, avoid) == Some(0)
    }

    fn current(&self) -> parking_lot::MutexGuard<'_, State> {
        let mut state = self.state.lock();
        let session = self.meta.session();
        if state.session != session {
            *state = State { session, ranges: VecDeque::new() };
        }
        state
    }

    async fn refill(&self) -> FsResult<()> {
        let abandoned = self.current().leftovers();
        if !abandoned.is_empty() {
            // Nobody waits: what is not given back goes with the session.
            drop(self.meta.submit(Op::Commit(Commit { abandoned, ..Commit::default() })));
        }
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

/// A group: its table, and which of it.
type Group<'a> = (&'a PgTable, PgId);

/// Members of a group that take no shard now, those being replaced among them; `None` when it must not be used: it has a target
/// to `avoid`, or one that is full, which would go on lacking its shards, or too few are left to read what they store.
fn missing(
    map: &ClusterMap,
    (table, pg): Group<'_>,
    layout: Layout,
    avoid: &HashSet<TargetId>,
) -> Option<usize> {
    let group = table.group(pg);
    let mut missing = 0;
    for (id, shard) in group.iter().zip(0..) {
        if table.is_moving(pg, ShardNo(shard)) {
            missing += 1;
            continue;
        }
        let target = map.targets.get(id)?;
        if avoid.contains(id) || (target.state == TargetState::Up && target.full) {
            return None;
        }
        missing += usize::from(!target.writable());
    }
    (group.len() - missing >= layout.needed()).then_some(missing)
}

/// Of the newest era's groups that may be used, the fewest members that are missing.
fn least_missing(map: &ClusterMap, layout: Layout, avoid: &HashSet<TargetId>) -> Option<usize> {
    newest_groups(map, layout).filter_map(|group| missing(map, group, layout, avoid)).min()
}

/// Whether fullness alone keeps every group from taking a block.
fn no_room(map: &ClusterMap, layout: Layout) -> bool {
    let mut groups = newest_groups(map, layout).peekable();
    let full = |t: &TargetId| map.targets.get(t).is_some_and(|t| t.full);
    groups.peek().is_some() && groups.all(|(table, pg)| table.group(pg).iter().any(full))
}

fn no_group(map: &ClusterMap, layout: Layout) -> String {
    let (policy, needed) = (layout.policy(), layout.needed());
    match newest_groups(map, layout).next() {
        Some(_) => format!(
            "no placement group for {policy} has the {needed} targets up that a block needs; see `fjord status`"
        ),
        None => format!(
            "{policy} needs {} targets and the cluster has {}: add data servers",
            layout.width(),
            map.targets.len()
        ),
    }
}

fn newest_groups(map: &ClusterMap, layout: Layout) -> impl Iterator<Item = Group<'_>> {
    let table = map.eras.last().and_then(|era| era.tables.get(&layout.width()));
    table.into_iter().flat_map(|table| (0..table.pg_count() as u32).map(move |pg| (table, PgId(pg))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{
        Epoch, Policy, ServerId,
        cluster::{Era, Server, ServerState, Target},
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
                tables: BTreeMap::from([(2, PgTable { width: 2, members, moves: BTreeMap::new() })]),
            }],
            default_policy: Policy::replica(2).unwrap(),
        }
    }

    fn layout(policy: &str) -> Layout {
        Layout::of(policy.parse().unwrap(), 1 << 20)
    }

    #[test]
    fn full_and_unreachable_are_told_apart() {
        let (two, none) = (layout("replica:2"), HashSet::new());
        assert_eq!(least_missing(&map(&[], &[1]), two, &none), Some(0));
        assert_eq!(least_missing(&map(&[], &[1, 2]), two, &none), Some(1), "one copy is enough to read");
        assert_eq!(least_missing(&map(&[], &[1, 2, 3]), two, &none), None);
        assert!(!no_room(&map(&[], &[1, 2, 3]), two));
        assert_eq!(least_missing(&map(&[1, 2], &[]), two, &none), None, "full is not missing");
        assert!(no_room(&map(&[1, 2], &[]), two));
        assert_eq!(least_missing(&map(&[], &[]), two, &[TargetId(1), TargetId(2)].into()), None);
        assert!(!no_room(&map(&[], &[]), layout("replica:3")));
        assert!(
            no_group(&map(&[], &[]), layout("replica:3")).contains("needs 3 targets and the cluster has 3")
        );
    }

    #[test]
    fn groups_in_motion_are_for_want_of_others_and_without_who_leaves() {
        let none = HashSet::new();
        let mut map = map(&[], &[]);
        let moves = &mut map.eras[0].tables.get_mut(&2).unwrap().moves;
        moves.extend([(1, TargetId(3)), (2, TargetId(1))]);
        assert_eq!(least_missing(&map, layout("replica:2"), &none), Some(0), "the third group is whole");
        let table = &map.eras[0].tables[&2];
        let of = |pg, avoid: &[u64]| {
            let avoid = avoid.iter().copied().map(TargetId).collect();
            missing(&map, (table, PgId(pg)), layout("replica:2"), &avoid)
        };
        assert_eq!([of(0, &[]), of(1, &[]), of(2, &[])], [Some(1), Some(1), Some(0)]);
        assert_eq!(of(0, &[2]), Some(1), "who leaves takes no shard anyway");
        assert_eq!(of(0, &[1]), None);
        // No group of three is whole, and the one there is has its K.
        let members = [1, 2, 3].map(TargetId).to_vec();
        let moves = BTreeMap::from([(2, TargetId(4))]);
        map.eras[0].tables.insert(3, PgTable { width: 3, members, moves });
        assert_eq!(least_missing(&map, layout("ec:2+1"), &none), Some(1));
        map.eras[0].tables.get_mut(&3).unwrap().moves.insert(0, TargetId(5));
        assert_eq!(least_missing(&map, layout("ec:2+1"), &none), None);
    }

    #[test]
    fn ids_of_groups_with_a_full_target_are_given_back() {
        let (map, layout, none) = (map(&[1], &[]), layout("replica:2"), HashSet::new());
        let (mut state, mut leased) = (State::default(), 0);
        let (mut used, mut given_back) = (HashSet::new(), HashSet::new());
        while used.len() < 20_000 {
            let Some(id) = state.search(&map, layout, &none, 0) else {
                given_back.extend(state.leftovers());
                state.ranges.push_back(leased..leased + u64::from(LEASE));
                leased += u64::from(LEASE);
                continue;
            };
            assert!(used.insert(id.0));
        }
        let held: u64 = state.ranges.iter().map(|range| range.end - range.start).sum();
        assert!(used.is_disjoint(&given_back));
        assert_eq!(used.len() as u64 + given_back.len() as u64 + held, leased);
        assert!(state.ranges.len() <= LEFTOVERS_MAX + LEASE as usize, "{} runs", state.ranges.len());
        assert!(held < leased / 4, "{held} of {leased} are held");
    }

    #[test]
    fn an_encoded_block_needs_its_k_targets() {
        let mut map = map(&[], &[1]);
        let members = [1, 2, 3].map(TargetId).to_vec();
        map.eras[0].tables.insert(3, PgTable { width: 3, members, moves: BTreeMap::new() });
        let (ec, none) = (layout("ec:2+1"), HashSet::new());
        assert_eq!(least_missing(&map, ec, &none), Some(1));
        map.targets.get_mut(&TargetId(2)).unwrap().state = TargetState::Down;
        assert_eq!(least_missing(&map, ec, &none), None);
        assert!(no_group(&map, ec).contains("the 2 targets up"));
    }
}
