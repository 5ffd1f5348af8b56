//! Which placement groups are to be compared, by whom, and how far that is: rebuild and reconciliation.
//!
//! There is one mechanism for everything that can be missing. A **seat** is a target in a placement group, as a member or as
//! the one that is being filled for a member that goes (a move of the map). Checking a seat means: its data server lists what the
//! other members have of the group, and copies what it lacks. A seat is checked
//!
//! | when | why |
//! |---|---|
//! | the map names a new move | it has nothing of the group yet |
//! | its target comes back, or its data server starts again | it may have missed writes, or lost some in a power failure |
//! | another target of its group comes back | that one may have what nobody else has |
//! | a commit says that it could not be reached | it lacks shards of that block |
//! | a target outside of its group has something of it | that may be what it lacks |
//! | the metaserver starts | it does not know what was going on |
//! | an hour has passed | whatever else may have happened |
//!
//! Nothing of this is stored. What there is to do follows from the map, and what is missing from the listings; so whoever is
//! restarted in the middle, little is done twice and nothing is forgotten.
//!
//! Data servers fetch their checks with heartbeats and report with the next ones. Each attempt has a ticket, so that a late report
//! of another attempt is not taken for an answer. A target works on [`CHECKS_PER_TARGET`] seats at a time: a lost target is in
//! groups with nearly all others, so all of them work on it together.
//!
//! # Strays
//! A target may have shards whose places are others', and that those do not have: after metadata was restored from a backup that is older
//! than a move. Whoever looks through a target finds them (`dataserver/src/heal/tidy.rs`) and says of which groups they are. Checks of
//! these groups list that target beside the members, so what is there is copied to where it belongs, and dropped there then.
//!
//! # When a move is done
//! When a check of its seat has found nothing missing, and no block that a client has yet to commit or abandon. A writer may go
//! by a map of before, and a put with it be under way. Data servers refuse those from the moment when they know of the move, and say
//! up to which map nothing older is under way: a seat that is being filled is not checked before all members of its
//! group that can be reached have said so of the map that planned the move. So what the check lists is all there will ever be.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use fjordfs_proto::{
    BlockId, ClusterMap, Epoch, PgId, ServerId, TargetId,
    cluster::{ServerState, TargetState},
    pb::meta::{Check, CheckReport, Healing as Report, RebuildPace, StrayGroup},
};

use crate::ops::Missed;

/// Seats that a target works on at the same time.
const CHECKS_PER_TARGET: usize = 2;

/// Pause before a check that left something missing is made again.
const RETRY: Duration = Duration::from_secs(2);

/// Moves that are done become a new map together, this often: every client receives each map.
const MAP_INTERVAL: Duration = Duration::from_secs(1);

/// How often every seat is checked, whatever happens. Checks that find nothing cost listings only.
const AGAIN: Duration = Duration::from_secs(3600);

/// Problems told one by one in the status.
const PROBLEMS_LISTED: usize = 20;

/// A target in a placement group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Seat {
    pub(crate) target: TargetId,
    /// Of the era.
    pub(crate) first_block: BlockId,
    pub(crate) width: usize,
    pub(crate) pg: PgId,
}

impl Seat {
    fn group(&self) -> Group {
        (self.first_block, self.width, self.pg)
    }
}

/// First block of the era, width and number.
type Group = (BlockId, usize, PgId);

/// Why a seat is to be checked; the more urgent first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Why {
    Move,
    Return,
    Start,
}

/// A seat that is to be checked.
#[derive(Debug)]
struct Work {
    why: Why,
    not_before: Instant,
    /// Of a seat being filled: the map that planned it, or a later one. Nothing may be under way that an older one has let in.
    planned: Epoch,
    /// Ticket of the attempt under way.
    attempt: Option<u64>,
    /// Something has gone missing since that attempt began.
    again: bool,
    /// Of the attempt under way or the last one.
    report: CheckReport,
}

/// See the module.
pub(crate) struct Healing {
    work: BTreeMap<Seat, Work>,
    attempts: HashMap<u64, Seat>,
    next_ticket: u64,
    /// Targets outside of groups that have something of them.
    strays: BTreeMap<Group, BTreeSet<TargetId>>,
    /// No put is under way on a data server that an older map has let in.
    placed: HashMap<ServerId, Epoch>,
    /// What data servers said last of the rate at which they copy.
    paces: BTreeMap<ServerId, RebuildPace>,
    /// Moves whose seats are full, for the next map.
    filled: BTreeSet<Seat>,
    map_made: Option<Instant>,
    all_checked: Instant,
    since: Instant,
    moves_done: u64,
    shards_copied: u64,
    bytes_copied: u64,
}

impl Healing {
    /// After a start every seat is checked. `seed` keeps tickets apart from those given before it.
    pub(crate) fn new(map: &ClusterMap, seed: u64, now: Instant) -> Healing {
        let mut healing = Healing {
            work: BTreeMap::new(),
            attempts: HashMap::new(),
            next_ticket: seed,
            strays: BTreeMap::new(),
            placed: HashMap::new(),
            paces: BTreeMap::new(),
            filled: BTreeSet::new(),
            map_made: None,
            all_checked: now,
            since: now,
            moves_done: 0,
            shards_copied: 0,
            bytes_copied: 0,
        };
        for (seat, moving) in seats(map) {
            healing.add(seat, if moving { Why::Move } else { Why::Start }, map.epoch, now);
        }
        healing
    }

    /// Sees to it that every seat is checked now and then.
    pub(crate) fn tick(&mut self, map: &ClusterMap, now: Instant) {
        if now.saturating_duration_since(self.all_checked) >= AGAIN {
            self.all_checked = now;
            for (seat, moving) in seats(map) {
                if self.filled.contains(&seat) {
                    continue;
                }
                self.add(seat, if moving { Why::Move } else { Why::Start }, map.epoch, now);
            }
        }
    }

    fn add(&mut self, seat: Seat, why: Why, planned: Epoch, now: Instant) {
        let report = CheckReport::default();
        let new = Work { why, not_before: now, planned, attempt: None, again: false, report };
        let work = self.work.entry(seat).or_insert(new);
        work.why = work.why.min(why);
    }

    /// The map has changed.
    pub(crate) fn notice(&mut self, before: &ClusterMap, map: &ClusterMap, now: Instant) {
        let none_before = move_count(before) == 0;
        if none_before && move_count(map) > 0 {
            (self.since, self.moves_done, self.shards_copied, self.bytes_copied) = (now, 0, 0, 0);
        }
        self.work.retain(|seat, _| place_of(map, seat) != Place::Gone);
        self.filled.retain(|seat| place_of(map, seat) == Place::Moves);
        self.attempts.retain(|_, seat| self.work.contains_key(seat));
        self.strays.retain(|(first_block, width, pg), targets| {
            targets.retain(|id| map.targets.contains_key(id));
            !targets.is_empty() && map.group(*first_block, *width, *pg).is_some()
        });
        let up =
            |map: &ClusterMap, id: &TargetId| map.targets.get(id).is_some_and(|t| t.state == TargetState::Up);
        let returned: BTreeSet<TargetId> = (map.targets.keys())
            .filter(|id| before.targets.contains_key(id) && up(map, id) && !up(before, id))
            .copied()
            .collect();
        let all = seats(map);
        let groups: BTreeSet<Group> = (all.iter())
            .filter(|(seat, _)| returned.contains(&seat.target))
            .map(|(seat, _)| seat.group())
            .collect();
        let were: BTreeMap<Seat, bool> = seats(before).into_iter().collect();
        let tables: BTreeSet<(BlockId, usize)> =
            were.keys().map(|seat| (seat.first_block, seat.width)).collect();
        for (seat, moving) in all {
            let was = were.get(&seat).copied();
            if moving && was != Some(true) {
                self.give_up(&seat);
                self.work.remove(&seat);
                self.add(seat, Why::Move, map.epoch, now);
            } else if groups.contains(&seat.group()) {
                self.check_again(seat, if moving { Why::Move } else { Why::Return }, map.epoch, now);
            } else if !moving && was.is_none() && tables.contains(&(seat.first_block, seat.width)) {
                // In the place of one that was given up: it has nothing yet.
                self.add(seat, Why::Return, map.epoch, now);
            } else if !moving
                && was == Some(true)
                && let Some(work) = self.work.get_mut(&seat)
            {
                // The same, where it was already on its way.
                work.why = Why::Return;
            }
        }
    }

    /// A data server has started again: what its targets have is to be compared.
    pub(crate) fn restarted(&mut self, map: &ClusterMap, server: ServerId, now: Instant) {
        // It has forgotten its map, and may let in anything until it has one again.
        self.placed.remove(&server);
        let of_server = |id: &TargetId| map.targets.get(id).is_some_and(|t| t.server == server);
        for (seat, moving) in seats(map) {
            let group =
                map.group(seat.first_block, seat.width, seat.pg).map(|(table, _)| table.group(seat.pg));
            if !moving && of_server(&seat.target) {
                self.check_again(seat, Why::Return, map.epoch, now);
            } else if moving && group.is_some_and(|group| group.iter().any(of_server)) {
                self.check_again(seat, Why::Move, map.epoch, now);
            }
        }
    }

    /// What a data server says of the maps that its puts go by.
    pub(crate) fn placed(&mut self, server: ServerId, epoch: Epoch) {
        self.placed.insert(server, epoch);
    }

    /// What a data server says of the rate at which it copies; `None` when it does not.
    pub(crate) fn paced(&mut self, server: ServerId, pace: Option<RebuildPace>) {
        match pace {
            Some(pace) => self.paces.insert(server, RebuildPace { server: server.0, ..pace }),
            None => self.paces.remove(&server),
        };
    }

    /// A commit says that members of groups could not be given shards of some blocks.
    pub(crate) fn missed(&mut self, map: &ClusterMap, missed: &[Missed], now: Instant) {
        for Missed { block, width, targets } in missed {
            let Some(era) = map.era_of(*block) else { continue };
            let Some((table, pg)) = map.group_of(*block, *width) else { continue };
            let group = table.group(pg);
            let coming = table.moves_of(pg).map(|(_, target)| (target, Why::Move));
            let lacking = targets.iter().filter(|t| group.contains(t)).map(|t| (*t, Why::Return));
            for (target, why) in lacking.chain(coming) {
                let seat = Seat { target, first_block: era.first_block, width: *width, pg };
                self.look_again(seat, why, map.epoch, now);
            }
        }
    }

    /// A target was looked through: these are the groups that it is outside of, as far as what it has of them goes, and all of them.
    pub(crate) fn strayed(
        &mut self,
        map: &ClusterMap,
        target: TargetId,
        groups: &[StrayGroup],
        now: Instant,
    ) {
        self.strays.retain(|_, targets| {
            targets.remove(&target);
            !targets.is_empty()
        });
        for StrayGroup { first_block, width, pg } in groups {
            let (first_block, width, pg) = (BlockId(*first_block), *width as usize, PgId(*pg));
            let Some((table, _)) = map.group(first_block, width, pg) else { continue };
            self.strays.entry((first_block, width, pg)).or_default().insert(target);
            let members = table.group(pg).iter().map(|member| (*member, Why::Return));
            let coming = table.moves_of(pg).map(|(_, coming)| (coming, Why::Move));
            for (member, why) in members.chain(coming) {
                self.look_again(Seat { target: member, first_block, width, pg }, why, map.epoch, now);
            }
        }
    }

    /// There may be more for a seat now.
    fn look_again(&mut self, seat: Seat, why: Why, planned: Epoch, now: Instant) {
        let why = if self.filled.contains(&seat) { Why::Return } else { why };
        self.add(seat, why, planned, now);
        if let Some(work) = self.work.get_mut(&seat) {
            // The attempt under way may have looked already. It is not given up: a stream of such reasons would end none.
            work.again = work.attempt.is_some();
        }
    }

    /// Readable targets beside the members that have something for a seat.
    fn strays_for(&self, map: &ClusterMap, seat: &Seat) -> Vec<TargetId> {
        let known = self.strays.get(&seat.group()).into_iter().flatten();
        known.filter(|id| **id != seat.target && is_readable(map, id)).copied().collect()
    }

    /// Also when it is being checked: that attempt may have looked too early.
    fn check_again(&mut self, seat: Seat, why: Why, planned: Epoch, now: Instant) {
        self.give_up(&seat);
        self.filled.remove(&seat);
        self.add(seat, why, planned, now);
    }

    fn give_up(&mut self, seat: &Seat) {
        if let Some(ticket) = self.work.get_mut(seat).and_then(|work| work.attempt.take()) {
            self.attempts.remove(&ticket);
        }
    }

    /// What a data server says of its checks.
    pub(crate) fn take_in(&mut self, reports: &[CheckReport], map: &ClusterMap, now: Instant) {
        for report in reports {
            let Some(seat) = self.attempts.get(&report.ticket).copied() else { continue };
            let Some(work) = self.work.get_mut(&seat) else { continue };
            self.shards_copied += report.shards_copied.saturating_sub(work.report.shards_copied);
            self.bytes_copied += report.bytes_copied.saturating_sub(work.report.bytes_copied);
            work.report = report.clone();
            if !report.done {
                continue;
            }
            self.attempts.remove(&report.ticket);
            work.attempt = None;
            let complete = report.problem.is_empty()
                && report.shards_missing + report.shards_unsettled + report.shards_lost == 0;
            let again = std::mem::take(&mut work.again);
            if report.shards_lost > 0 {
                let (target, group) = (seat.target, seat.pg);
                tracing::warn!(%target, %group, problem = report.problem, "shards could not be restored");
            }
            match (complete, again) {
                (true, false) => {
                    self.work.remove(&seat);
                    if place_of(map, &seat) == Place::Moves {
                        self.filled.insert(seat);
                    }
                }
                (true, true) => {
                    // Of what went missing the member that goes has no more than this one: it need not be waited for.
                    if place_of(map, &seat) == Place::Moves {
                        self.filled.insert(seat);
                        work.why = Why::Return;
                    }
                    work.not_before = now;
                }
                (false, _) => work.not_before = now + RETRY,
            }
        }
    }

    /// All checks that a data server shall have under way.
    pub(crate) fn orders(&mut self, map: &ClusterMap, server: ServerId, now: Instant) -> Vec<Check> {
        let mine = map.targets.iter().filter(|(_, t)| t.server == server && t.state == TargetState::Up);
        let mut orders = Vec::new();
        for (target, _) in mine {
            let of_target = Seat { target: *target, first_block: BlockId(0), width: 0, pg: PgId(0) }..Seat {
                target: TargetId(target.0.saturating_add(1)),
                first_block: BlockId(0),
                width: 0,
                pg: PgId(0),
            };
            let gone: Vec<Seat> = (self.work.range(of_target.clone()))
                .map(|(seat, _)| *seat)
                .filter(|seat| is_pointless(map, seat) && self.strays_for(map, seat).is_empty())
                .collect();
            for seat in gone {
                self.give_up(&seat);
                self.work.remove(&seat);
            }
            let running = || self.work.range(of_target.clone()).filter(|(_, work)| work.attempt.is_some());
            let free = CHECKS_PER_TARGET.saturating_sub(running().count());
            let mut waiting: Vec<(Why, Seat)> = (self.work.range(of_target.clone()))
                .filter(|(seat, work)| {
                    work.attempt.is_none()
                        && work.not_before <= now
                        && self.is_closed(map, seat, work.planned)
                })
                .map(|(seat, work)| (work.why, *seat))
                .collect();
            waiting.sort_unstable();
            for (_, seat) in waiting.into_iter().take(free) {
                self.next_ticket += 1;
                let ticket = self.next_ticket;
                if let Some(work) = self.work.get_mut(&seat) {
                    work.attempt = Some(ticket);
                    work.report = CheckReport::default();
                    self.attempts.insert(ticket, seat);
                }
            }
            let running = self.work.range(of_target).filter_map(|(seat, work)| Some((seat, work.attempt?)));
            orders.extend(running.map(|(seat, ticket)| Check {
                ticket,
                target: seat.target.0,
                first_block: seat.first_block.0,
                width: seat.width as u32,
                pg: seat.pg.0,
                strays: self.strays_for(map, seat).into_iter().map(|id| id.0).collect(),
            }));
        }
        orders
    }

    /// Whether nothing can come any more to the members of a group for whom the seat is being filled.
    fn is_closed(&self, map: &ClusterMap, seat: &Seat, planned: Epoch) -> bool {
        let Some((table, _)) = map.group(seat.first_block, seat.width, seat.pg) else { return true };
        place_of(map, seat) != Place::Moves
            || (table.group(seat.pg).iter())
                .filter_map(|id| map.targets.get(id).filter(|t| t.readable()))
                .all(|t| self.placed.get(&t.server).is_some_and(|placed| *placed >= planned))
    }

    /// Seats that are full and take their places now: together, and not too often.
    pub(crate) fn take_filled(&mut self, now: Instant) -> Vec<Seat> {
        let early = self.map_made.is_some_and(|made| now.saturating_duration_since(made) < MAP_INTERVAL);
        if self.filled.is_empty() || early {
            return Vec::new();
        }
        self.map_made = Some(now);
        self.moves_done += self.filled.len() as u64;
        std::mem::take(&mut self.filled).into_iter().collect()
    }

    /// For people.
    pub(crate) fn report(&self, map: &ClusterMap, now: Instant) -> Report {
        let moves_left = move_count(map) as u64;
        let elapsed_ms = now.saturating_duration_since(self.since).as_millis() as u64;
        let waiting = || self.work.values().filter(|work| !work.report.problem.is_empty());
        let checks = self.work.iter().filter(|(seat, work)| {
            work.why != Why::Move && place_of(map, seat) != Place::Gone && reachable(map, seat)
        });
        let mut problems: Vec<String> = (self.work.iter())
            .filter(|(_, work)| !work.report.problem.is_empty())
            .take(PROBLEMS_LISTED)
            .map(|(seat, work)| {
                format!("{} of {} on {}: {}", seat.pg, seat.first_block, seat.target, work.report.problem)
            })
            .collect();
        if waiting().count() > problems.len() {
            problems.push(format!("and {} more", waiting().count() - problems.len()));
        }
        Report {
            moves_left,
            moves_done: self.moves_done,
            checks_left: checks.count() as u64,
            bytes_copied: self.bytes_copied,
            shards_copied: self.shards_copied,
            elapsed_ms,
            eta_ms: if moves_left == 0 {
                0
            } else {
                (elapsed_ms * moves_left).checked_div(self.moves_done).unwrap_or(0)
            },
            shards_lost: self.work.values().map(|work| work.report.shards_lost).sum(),
            problems,
            rebalancing: false,
            paces: (self.paces.iter())
                .filter(|(id, _)| map.servers.get(id).is_some_and(|s| s.state == ServerState::Up))
                .map(|(_, pace)| *pace)
                .collect(),
        }
    }
}

/// How a seat stands in the map.
#[derive(PartialEq, Eq, Debug)]
enum Place {
    Gone,
    Member,
    /// Being filled for a member.
    Moves,
}

fn place_of(map: &ClusterMap, seat: &Seat) -> Place {
    let Some((table, _)) = map.group(seat.first_block, seat.width, seat.pg) else { return Place::Gone };
    let group = table.group(seat.pg);
    if table.moves_of(seat.pg).any(|(_, target)| target == seat.target) {
        return Place::Moves;
    }
    if group.contains(&seat.target) { Place::Member } else { Place::Gone }
}

/// Whether there is nobody to compare with, now or for good. When others are back, their groups are checked anyway.
fn is_pointless(map: &ClusterMap, seat: &Seat) -> bool {
    match (place_of(map, seat), map.group(seat.first_block, seat.width, seat.pg)) {
        (Place::Gone, _) | (_, None) => true,
        (Place::Moves, _) => false,
        (Place::Member, Some((table, _))) => {
            !table.group(seat.pg).iter().any(|id| *id != seat.target && is_readable(map, id))
        }
    }
}

fn is_readable(map: &ClusterMap, id: &TargetId) -> bool {
    map.targets.get(id).is_some_and(|t| t.readable())
}

fn reachable(map: &ClusterMap, seat: &Seat) -> bool {
    map.targets.get(&seat.target).is_some_and(|t| t.state == TargetState::Up)
}

fn move_count(map: &ClusterMap) -> usize {
    map.eras.iter().flat_map(|era| era.tables.values()).map(|table| table.moves.len()).sum()
}

/// All seats of a map, and whether they are being filled.
fn seats(map: &ClusterMap) -> Vec<(Seat, bool)> {
    let mut seats = Vec::new();
    for era in &map.eras {
        for (width, table) in &era.tables {
            let seat = |cell: usize, target: TargetId| Seat {
                target,
                first_block: era.first_block,
                width: *width,
                pg: PgId((cell / width) as u32),
            };
            seats.extend(table.members.iter().enumerate().map(|(cell, target)| (seat(cell, *target), false)));
            seats.extend(table.moves.iter().map(|(cell, target)| (seat(*cell, *target), true)));
        }
    }
    seats
}
