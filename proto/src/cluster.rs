//! The cluster map: which servers and targets there are, and which placement group holds a block.
//!
//! A map is immutable and has an epoch; a newer one replaces it whole. Blocks are placed by the **era** of their id:
//! when targets are added, a new era begins at the next unleased block id, so new blocks use the new targets and no
//! old block has to move.
//!
//! # Moves
//! A member of a group that has to go is not replaced in the table at once: its shards are still where they were. The table
//! names beside it the target that comes in its place ([`PgTable::moves`]), and only when that one has every shard of the group
//! the map of the next epoch names it as the member. So readers need to know nothing of rebuilding: they ask the members,
//! and where one does not answer, the others. A group with moves takes no new blocks, so that what has to be copied does not grow.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Layout, Policy,
    ids::{BlockId, Epoch, PgId, ServerId, ShardNo, TargetId},
    pb,
};

pub use pb::common::{ServerState, TargetState};

/// A data server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    /// `host:port` that clients connect to.
    pub address: String,
    /// For people.
    pub name: String,
    /// Whether it answers heartbeats.
    pub state: ServerState,
}

/// A target of a data server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Whose it is.
    pub server: ServerId,
    /// Failure domain: placement groups take members from different ones.
    pub domain: String,
    /// What may be done with it.
    pub state: TargetState,
    /// No room for new blocks.
    pub full: bool,
}

impl Target {
    /// Whether new shards may be put there.
    pub fn writable(&self) -> bool {
        self.state == TargetState::Up && !self.full
    }

    /// Whether it is worth asking for a shard.
    pub fn readable(&self) -> bool {
        matches!(self.state, TargetState::Up | TargetState::Draining)
    }

    /// Whether it is worth waiting for while it cannot be reached.
    pub fn may_return(&self) -> bool {
        self.readable() || self.state == TargetState::Down
    }
}

/// Placement groups of one width.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PgTable {
    /// Targets per group.
    pub width: usize,
    /// `width` targets of each group, one group after the other.
    pub members: Vec<TargetId>,
    /// Who is being filled to take the place of a member, by index into `members`.
    pub moves: BTreeMap<usize, TargetId>,
}

impl PgTable {
    /// Number of groups.
    pub fn pg_count(&self) -> usize {
        self.members.len() / self.width
    }

    /// Targets of a group in shard order.
    pub fn group(&self, pg: PgId) -> &[TargetId] {
        let at = pg.0 as usize * self.width;
        &self.members[at..at + self.width]
    }

    /// The group of a block.
    pub fn pg_of(&self, block: BlockId) -> PgId {
        PgId((mix(block.0) % self.pg_count() as u64) as u32)
    }

    /// Members of a group that are being replaced: shard number, and by whom.
    pub fn moves_of(&self, pg: PgId) -> impl Iterator<Item = (ShardNo, TargetId)> {
        let at = pg.0 as usize * self.width;
        self.moves.range(at..at + self.width).map(move |(cell, target)| (ShardNo((cell - at) as u8), *target))
    }

    /// Whether a member of a group is being replaced.
    pub fn is_moving(&self, pg: PgId, shard: ShardNo) -> bool {
        self.moves.contains_key(&(pg.0 as usize * self.width + usize::from(shard.0)))
    }

    /// Members of a group, and those about to be.
    pub fn holders(&self, pg: PgId) -> BTreeSet<TargetId> {
        self.group(pg).iter().copied().chain(self.moves_of(pg).map(|(_, target)| target)).collect()
    }

    /// Members of a group as they will be once all moves are done.
    pub fn group_to_be(&self, pg: PgId) -> Vec<TargetId> {
        let mut group = self.group(pg).to_vec();
        for (shard, target) in self.moves_of(pg) {
            group[usize::from(shard.0)] = target;
        }
        group
    }
}

/// The blocks of one placement group, told without a map: as they travel in listings.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupSpan {
    /// First block id of the era.
    pub first_block: BlockId,
    /// First block id of the next era.
    pub end_block: BlockId,
    /// Targets of the group.
    pub width: usize,
    /// Groups of the table, not 0.
    pub pg_count: u32,
    /// The group.
    pub pg: PgId,
}

impl GroupSpan {
    /// Whether a block of this policy belongs to the group.
    pub fn contains(&self, block: BlockId, policy: Policy) -> bool {
        (self.first_block..self.end_block).contains(&block)
            && policy.width() == self.width
            && mix(block.0) % u64::from(self.pg_count) == u64::from(self.pg.0)
    }

    /// As it travels.
    pub fn to_pb(&self) -> pb::data::Group {
        pb::data::Group {
            first_block: self.first_block.0,
            end_block: self.end_block.0,
            width: self.width as u32,
            pg_count: self.pg_count,
            pg: self.pg.0,
        }
    }

    /// From the wire; `None` when there can be no such group.
    pub fn from_pb(group: &pb::data::Group) -> Option<GroupSpan> {
        (group.width > 0 && group.pg < group.pg_count).then_some(GroupSpan {
            first_block: BlockId(group.first_block),
            end_block: BlockId(group.end_block),
            width: group.width as usize,
            pg_count: group.pg_count,
            pg: PgId(group.pg),
        })
    }
}

/// Tables for blocks from `first_block` up to the next era's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Era {
    /// First block id of the era.
    pub first_block: BlockId,
    /// By width.
    pub tables: BTreeMap<usize, PgTable>,
}

/// The whole map.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterMap {
    /// UUID of the cluster.
    pub cluster_id: String,
    /// Grows with every change.
    pub epoch: Epoch,
    /// Data servers.
    pub servers: BTreeMap<ServerId, Server>,
    /// Targets of all data servers.
    pub targets: BTreeMap<TargetId, Target>,
    /// Ascending by first block.
    pub eras: Vec<Era>,
    /// Of a newly made cluster's root directory.
    pub default_policy: Policy,
}

/// A map that contradicts itself.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("cluster map of epoch {epoch}: {what}")]
pub struct MapError {
    /// Epoch it claims.
    pub epoch: u64,
    /// What is wrong.
    pub what: String,
}

/// Spreads consecutive ids over groups: the finaliser of splitmix64 (Steele, Lea, Flood 2014), a bijection.
pub fn mix(id: u64) -> u64 {
    let mut z = id.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl ClusterMap {
    /// Targets of a block in shard order, or `None` when its era has no groups of that width (too few targets).
    pub fn placement(&self, block: BlockId, layout: Layout) -> Option<&[TargetId]> {
        let (table, pg) = self.group_of(block, layout.width())?;
        Some(table.group(pg))
    }

    /// The table and the group of a block in a policy of that width, or `None` when its era has no groups of that width.
    pub fn group_of(&self, block: BlockId, width: usize) -> Option<(&PgTable, PgId)> {
        let table = self.era_of(block)?.tables.get(&width)?;
        Some((table, table.pg_of(block)))
    }

    /// Whether every target of the block's group takes new shards, and stays in it.
    pub fn can_place(&self, block: BlockId, layout: Layout) -> bool {
        let Some((table, pg)) = self.group_of(block, layout.width()) else { return false };
        table.moves_of(pg).next().is_none()
            && table.group(pg).iter().all(|t| self.targets.get(t).is_some_and(Target::writable))
    }

    /// Targets that may have shards of a block: members of its group, and those about to be.
    pub fn holders(&self, block: BlockId, layout: Layout) -> BTreeSet<TargetId> {
        self.group_of(block, layout.width()).map(|(table, pg)| table.holders(pg)).unwrap_or_default()
    }

    /// The era of a block.
    pub fn era_of(&self, block: BlockId) -> Option<&Era> {
        self.eras.iter().rev().find(|era| era.first_block <= block)
    }

    /// A placement group of the era that begins at `first_block`: its table and its blocks.
    pub fn group(&self, first_block: BlockId, width: usize, pg: PgId) -> Option<(&PgTable, GroupSpan)> {
        let at = self.eras.binary_search_by_key(&first_block, |era| era.first_block).ok()?;
        let table = self.eras[at].tables.get(&width)?;
        let pg_count = table.pg_count() as u32;
        let end_block = self.eras.get(at + 1).map_or(BlockId(u64::MAX), |next| next.first_block);
        (pg.0 < pg_count).then_some((table, GroupSpan { first_block, end_block, width, pg_count, pg }))
    }

    /// The server of a target.
    pub fn server_of(&self, target: TargetId) -> Option<(ServerId, &Server)> {
        let id = self.targets.get(&target)?.server;
        Some((id, self.servers.get(&id)?))
    }

    /// As it travels.
    pub fn to_pb(&self) -> pb::common::ClusterMap {
        pb::common::ClusterMap {
            cluster_id: self.cluster_id.clone(),
            epoch: self.epoch.0,
            servers: (self.servers.iter())
                .map(|(id, s)| pb::common::Server {
                    id: id.0,
                    address: s.address.clone(),
                    name: s.name.clone(),
                    state: s.state.into(),
                })
                .collect(),
            targets: (self.targets.iter())
                .map(|(id, t)| pb::common::Target {
                    id: id.0,
                    server: t.server.0,
                    domain: t.domain.clone(),
                    state: t.state.into(),
                    full: t.full,
                })
                .collect(),
            eras: (self.eras.iter())
                .map(|era| pb::common::Era {
                    first_block: era.first_block.0,
                    tables: (era.tables.values())
                        .map(|t| pb::common::PgTable {
                            width: t.width as u32,
                            pg_count: t.pg_count() as u32,
                            members: t.members.iter().map(|t| t.0).collect(),
                            moves: (t.moves.iter())
                                .map(|(cell, t)| pb::common::Move { cell: *cell as u32, target: t.0 })
                                .collect(),
                        })
                        .collect(),
                })
                .collect(),
            default_policy: self.default_policy.code().into(),
        }
    }

    /// From the wire or the disk.
    ///
    /// # Errors
    /// When a table's size is not its width times its count, a member or a server is not listed, a move is of no member,
    /// eras are out of order, or the policy is unknown.
    pub fn from_pb(map: pb::common::ClusterMap) -> Result<ClusterMap, MapError> {
        let bad = |what: String| MapError { epoch: map.epoch, what };
        let default_policy = Policy::from_code(map.default_policy)
            .ok_or_else(|| bad(format!("unknown policy code {}", map.default_policy)))?;
        let servers: BTreeMap<ServerId, Server> = (map.servers.iter())
            .map(|s| {
                (
                    ServerId(s.id),
                    Server { address: s.address.clone(), name: s.name.clone(), state: s.state() },
                )
            })
            .collect();
        let mut targets = BTreeMap::new();
        for t in &map.targets {
            let server = ServerId(t.server);
            if !servers.contains_key(&server) {
                return Err(bad(format!("target t{} of an unknown server {server}", t.id)));
            }
            let target = Target { server, domain: t.domain.clone(), state: t.state(), full: t.full };
            targets.insert(TargetId(t.id), target);
        }
        let mut eras: Vec<Era> = Vec::with_capacity(map.eras.len());
        for era in &map.eras {
            let first_block = BlockId(era.first_block);
            if eras.last().is_some_and(|last| last.first_block >= first_block) {
                return Err(bad(format!("era at {first_block} is out of order")));
            }
            let mut tables = BTreeMap::new();
            for t in &era.tables {
                let (width, cells) = (t.width as usize, t.members.len());
                if width == 0 || cells == 0 || Some(cells) != width.checked_mul(t.pg_count as usize) {
                    return Err(bad(format!(
                        "table of width {width} has {cells} members in {} groups",
                        t.pg_count
                    )));
                }
                let members: Vec<TargetId> = t.members.iter().map(|t| TargetId(*t)).collect();
                let moves: BTreeMap<usize, TargetId> =
                    t.moves.iter().map(|m| (m.cell as usize, TargetId(m.target))).collect();
                if let Some(stranger) =
                    members.iter().chain(moves.values()).find(|t| !targets.contains_key(t))
                {
                    return Err(bad(format!("unknown target {stranger} in a group of width {width}")));
                }
                if let Some(cell) = moves.keys().find(|cell| **cell >= cells) {
                    return Err(bad(format!("member {cell} of a table of {cells} is to move")));
                }
                tables.insert(width, PgTable { width, members, moves });
            }
            eras.push(Era { first_block, tables });
        }
        Ok(ClusterMap {
            cluster_id: map.cluster_id.clone(),
            epoch: Epoch(map.epoch),
            servers,
            targets,
            eras,
            default_policy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> ClusterMap {
        let server = Server { address: "127.0.0.1:1".into(), name: "one".into(), state: ServerState::Up };
        let target = |domain: &str| Target {
            server: ServerId(1),
            domain: domain.into(),
            state: TargetState::Up,
            full: false,
        };
        let table = |members: &[u64]| {
            BTreeMap::from([(
                2,
                PgTable {
                    width: 2,
                    members: members.iter().map(|t| TargetId(*t)).collect(),
                    moves: BTreeMap::new(),
                },
            )])
        };
        ClusterMap {
            cluster_id: "c".into(),
            epoch: Epoch(4),
            servers: [(ServerId(1), server)].into(),
            targets: [(TargetId(1), target("a")), (TargetId(2), target("b")), (TargetId(3), target("c"))]
                .into(),
            eras: vec![
                Era { first_block: BlockId(1), tables: table(&[1, 2, 2, 1]) },
                Era { first_block: BlockId(100), tables: table(&[1, 3, 3, 2]) },
            ],
            default_policy: Policy::replica(2).unwrap(),
        }
    }

    fn layout(copies: u8) -> Layout {
        Layout::of(Policy::replica(copies).unwrap(), 1)
    }

    #[test]
    fn the_wire_form_round_trips() {
        assert_eq!(ClusterMap::from_pb(sample().to_pb()), Ok(sample()));
    }

    #[test]
    fn a_block_is_placed_by_its_era() {
        let map = sample();
        let two = layout(2);
        assert!(map.placement(BlockId(0), two).is_none());
        for b in 1..100 {
            assert!(!map.placement(BlockId(b), two).unwrap().contains(&TargetId(3)));
        }
        for b in 100..200 {
            assert!(map.placement(BlockId(b), two).unwrap().contains(&TargetId(3)));
        }
        assert!(map.placement(BlockId(5), layout(3)).is_none());
    }

    #[test]
    fn a_group_with_a_member_down_takes_no_new_block() {
        let mut map = sample();
        let two = layout(2);
        assert!(map.can_place(BlockId(7), two));
        map.targets.get_mut(&TargetId(1)).unwrap().state = TargetState::Down;
        assert!(!map.can_place(BlockId(7), two));
    }

    #[test]
    fn a_group_that_changes_takes_no_new_block_and_is_read_as_before() {
        let mut map = sample();
        let two = layout(2);
        let (block, group) = (BlockId(7), map.placement(BlockId(7), two).unwrap().to_vec());
        let table = map.eras[0].tables.get_mut(&2).unwrap();
        let pg = table.pg_of(block);
        table.moves.insert(2 * pg.0 as usize + 1, TargetId(3));
        assert_eq!(table.moves_of(pg).collect::<Vec<_>>(), [(ShardNo(1), TargetId(3))]);
        assert_eq!(table.group_to_be(pg), [group[0], TargetId(3)]);
        assert!(!map.can_place(block, two));
        assert_eq!(map.placement(block, two).unwrap(), group);
        assert_eq!(ClusterMap::from_pb(map.to_pb()), Ok(map));
    }

    #[test]
    fn a_group_is_found_by_era_and_knows_its_blocks() {
        let map = sample();
        let two = Policy::replica(2).unwrap();
        assert!(map.group(BlockId(2), 2, PgId(0)).is_none() && map.group(BlockId(1), 2, PgId(2)).is_none());
        for block in (1..300).map(BlockId) {
            let holds: Vec<bool> = [(1, 0), (1, 1), (100, 0), (100, 1)]
                .map(|(era, pg)| map.group(BlockId(era), 2, PgId(pg)).unwrap().1.contains(block, two))
                .into();
            assert_eq!(holds.iter().filter(|h| **h).count(), 1, "{block} {holds:?}");
            assert_eq!(holds[0] || holds[1], block < BlockId(100));
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let mut stranger = sample().to_pb();
        stranger.eras[0].tables[0].members[0] = 9;
        let mut ragged = sample().to_pb();
        ragged.eras[0].tables[0].members.pop();
        let mut disorder = sample().to_pb();
        disorder.eras.swap(0, 1);
        let mut empty = sample().to_pb();
        empty.eras[0].tables[0] = Default::default();
        let (mut to_a_stranger, mut of_nobody) = (sample().to_pb(), sample().to_pb());
        to_a_stranger.eras[0].tables[0].moves = vec![pb::common::Move { cell: 0, target: 9 }];
        of_nobody.eras[0].tables[0].moves = vec![pb::common::Move { cell: 4, target: 1 }];
        for map in [stranger, ragged, disorder, empty, to_a_stranger, of_nobody] {
            assert!(ClusterMap::from_pb(map).is_err());
        }
    }
}
