//! What administrators ask of targets: drain, keep, remove, replace.

use fjordfs_proto::{
    ClusterMap, TargetId,
    cluster::TargetState,
    pb::meta::{ChangeTargetRequest, TargetChange},
};

use super::{Membership, eras, states::Event};
use crate::{keys, refusal::Refusal, store::Order, txn::Txn};

/// Queued deletions of a removed target that are dropped at a time.
const DROPS_PER_STEP: usize = 4096;

impl Membership {
    /// Carries a change out. The answer is a sentence for people. On an error nothing has changed here; the caller rejects
    /// the transaction.
    pub(crate) fn change(&mut self, txn: &mut Txn, request: &ChangeTargetRequest) -> Result<String, Refusal> {
        let id = TargetId(request.target);
        if !self.map.targets.contains_key(&id) {
            return Err(Refusal::NotFound(format!(
                "there is no target {id}: `fjord target list` shows those there are"
            )));
        }
        match request.change() {
            TargetChange::Drain => {
                self.check_spare(id)?;
                self.leave(txn, id, true, |_| {});
                Ok(format!("target {id} is being drained: {}", self.what_is_left(id)))
            }
            TargetChange::Keep => {
                self.leave(txn, id, false, |_| {});
                Ok(format!("target {id} stays in service"))
            }
            TargetChange::Replace => {
                let new = self.substitute(id, TargetId(request.with))?;
                self.leave(txn, id, true, |map| eras::replace(map, id, new));
                Ok(format!("target {new} takes the place of {id}: {}", self.what_is_left(id)))
            }
            TargetChange::Remove => self.remove(txn, id, request.force),
            TargetChange::Unspecified => Err(Refusal::Invalid(format!(
                "it is not said what shall become of target {id}: use the same release"
            ))),
        }
    }

    /// Whether the others are enough for groups of every width.
    fn check_spare(&self, id: TargetId) -> Result<(), Refusal> {
        let others = eras::usable(&self.map).keys().filter(|other| **other != id).count();
        let width = self.map.eras.iter().flat_map(|era| era.tables.keys()).max().copied().unwrap_or(0);
        if others >= width {
            return Ok(());
        }
        Err(Refusal::Precondition(format!(
            "{id} cannot be drained: {others} other targets are left, and there are files on groups of {width}; add a target first"
        )))
    }

    fn what_is_left(&self, id: TargetId) -> String {
        match eras::groups_of(&self.map, id) {
            0 => format!("no group needs it, `fjord target remove {id}` forgets it"),
            n => format!("{n} groups still have it as a member, `fjord status` shows how they get on"),
        }
    }

    fn leave(&mut self, txn: &mut Txn, id: TargetId, leaving: bool, also: impl FnOnce(&mut ClusterMap)) {
        if let Some(info) = self.targets.get_mut(&id) {
            info.record.leaving = leaving;
            txn.put_record(keys::target(id), &info.record);
        }
        let mut map = ClusterMap::clone(&self.map);
        also(&mut map);
        self.step(&mut map, id, if leaving { Event::Drain } else { Event::Keep });
        self.publish(txn, map);
    }

    /// The target that replaces another one: the one named, or the newest of the same server and path.
    fn substitute(&self, old: TargetId, named: TargetId) -> Result<TargetId, Refusal> {
        let place = |id: &TargetId| self.targets.get(id).map(|info| (info.record.server, &info.record.path));
        let new = match named {
            TargetId(0) => {
                let same = |id: &&TargetId| **id != old && place(id) == place(&old);
                *self.map.targets.keys().rev().find(same).ok_or_else(|| {
                    let path = place(&old).map(|(_, path)| path.as_str()).unwrap_or_default();
                    Refusal::Precondition(format!(
                        "no other target of the same data server lies in {path}: start the server with the new disk there, or name \
                         the target that replaces {old}"
                    ))
                })?
            }
            named => named,
        };
        match self.map.targets.get(&new) {
            _ if new == old => Err(Refusal::Invalid(format!("target {old} cannot replace itself"))),
            Some(target) if target.state == TargetState::Up => Ok(new),
            Some(_) => Err(Refusal::Precondition(format!("target {new} is not up: it cannot replace {old}"))),
            None => Err(Refusal::NotFound(format!("there is no target {new} to replace {old}"))),
        }
    }

    /// Forgets a target that no group needs; with `force` also one that cannot be reached and is still needed.
    fn remove(&mut self, txn: &mut Txn, id: TargetId, force: bool) -> Result<String, Refusal> {
        let groups = eras::groups_of(&self.map, id);
        let state = self.map.targets.get(&id).map(|t| t.state);
        let reachable = matches!(state, Some(TargetState::Up | TargetState::Draining));
        if groups > 0 && state == Some(TargetState::Draining) {
            return Err(Refusal::Precondition(format!(
                "target {id} is being drained, {groups} groups still have it as a member: `fjord status` shows how far that is, then it \
                 can be removed"
            )));
        }
        if groups > 0 && reachable {
            return Err(Refusal::Precondition(format!(
                "target {id} is in use by {groups} groups: `fjord target drain {id}` moves them, then it can be removed"
            )));
        }
        if groups > 0 && !force {
            return Err(Refusal::Precondition(format!(
                "{groups} groups have not been rebuilt without target {id} yet, and it may hold the only copy of some of their blocks: \
                 wait until `fjord status` says that it is not needed, or give it up with --force, which can LOSE DATA"
            )));
        }
        if reachable && self.is_unasked(id) {
            return Err(Refusal::Precondition(format!(
                "target {id} was away while its groups were rebuilt, and what only it has is being copied from it: it can be removed in \
                 a few minutes, or at once when its data server is stopped, which can LOSE DATA"
            )));
        }
        let mut map = ClusterMap::clone(&self.map);
        if groups > 0 {
            self.step(&mut map, id, Event::Overdue);
            eras::mend(&mut map, &Default::default());
            for table in map.eras.iter_mut().flat_map(|era| era.tables.values_mut()) {
                for cell in 0..table.members.len() {
                    if table.members[cell] == id {
                        table.members[cell] = table.moves.remove(&cell).ok_or_else(|| {
                            Refusal::Precondition(format!(
                                "there are not enough targets to do without {id}: add one first"
                            ))
                        })?;
                    }
                }
            }
        }
        let gone = map.targets.remove(&id);
        for table in map.eras.iter_mut().flat_map(|era| era.tables.values_mut()) {
            table.moves.retain(|_, coming| *coming != id);
        }
        if let Some(server) = gone.map(|t| t.server)
            && map.targets.values().all(|t| t.server != server)
        {
            map.servers.remove(&server);
            self.heard.remove(&server);
        }
        if let Some(info) = self.targets.get_mut(&id) {
            info.record.removed = true;
            self.dropping.insert(id);
            txn.put_record(keys::target(id), &info.record);
        }
        self.publish(txn, map);
        Ok(format!("target {id} is removed"))
    }

    /// Drops some deletions that were queued for targets removed since. Says whether there may be more.
    pub(crate) fn drop_deletions(&mut self, txn: &mut Txn) -> fjordfs_proto::FsResult<bool> {
        let Some(id) = self.dropping.first().copied() else { return Ok(false) };
        let rows = txn.scan(&keys::deletes(id), Order::Ascending, DROPS_PER_STEP)?;
        if rows.is_empty() {
            self.dropping.remove(&id);
        }
        let queued = &mut txn.counters().queued;
        *queued = queued.saturating_sub(rows.len() as u64);
        for (key, _) in rows {
            txn.remove(key);
        }
        Ok(!self.dropping.is_empty())
    }
}
