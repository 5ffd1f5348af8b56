//! A data server reports, and fetches what to delete.

use std::time::Instant;

use fjordfs_proto::{
    BlockId, ClusterMap, FsResult, ServerId, TargetId,
    cluster::{ServerState, TargetState},
    pb::meta::{DeletedBlocks, HeartbeatReply, HeartbeatRequest, TargetReport},
};

use super::{Membership, event_of, is_full, states::Event};
use crate::{keys, refusal::Refusal, store::Order, txn::Txn};

/// Deletions of one reply.
const DELETES_MAX: usize = 4096;

impl Membership {
    /// Notes a report. A reply that carries a map or deletions must not leave before the log is synced.
    pub(crate) fn heartbeat(
        &mut self,
        txn: &mut Txn,
        request: &HeartbeatRequest,
        now: Instant,
    ) -> Result<HeartbeatReply, Refusal> {
        self.check_cluster(&request.cluster_id, &format!("s{}", request.server))?;
        let server = ServerId(request.server);
        if !self.map.servers.contains_key(&server) {
            return Ok(HeartbeatReply { unknown: true, ..HeartbeatReply::default() });
        }
        let mine = |membership: &Membership, target: u64| {
            membership.targets.get(&TargetId(target)).is_some_and(|info| info.record.server == server.0)
        };
        // One that was removed is no stranger: its server just has not been told to do without it.
        let (reports, strangers): (Vec<_>, Vec<_>) =
            request.targets.iter().partition(|report| mine(self, report.target));
        let reports: Vec<_> =
            reports.into_iter().filter(|r| self.map.targets.contains_key(&TargetId(r.target))).collect();
        self.heard.insert(server, now);
        self.note(txn, server, &reports);

        for deleted in &request.deleted {
            if mine(self, deleted.target) {
                self.confirm(txn, deleted)?;
            }
        }
        let mut reply = HeartbeatReply { unknown: !strangers.is_empty(), ..HeartbeatReply::default() };
        let healthy: Vec<TargetId> =
            reports.iter().filter(|report| !report.failed).map(|report| TargetId(report.target)).collect();
        let mut room = DELETES_MAX;
        for target in healthy {
            let (blocks, more) = self.deletes(txn, target, room)?;
            room -= blocks.len();
            reply.more |= more;
            if !blocks.is_empty() {
                reply.deletes.push(DeletedBlocks { target: target.0, blocks });
            }
        }
        if self.map.epoch.0 > request.epoch {
            reply.map = Some(self.map.to_pb());
        }
        Ok(reply)
    }

    /// The server is up, and its targets are as they say. One that it does not mention it does not serve: it was started without, or the
    /// disk is not there.
    fn note(&mut self, txn: &mut Txn, server: ServerId, reports: &[&TargetReport]) {
        let mut map = ClusterMap::clone(&self.map);
        if let Some(server) = map.servers.get_mut(&server) {
            server.state = ServerState::Up;
        }
        let absent: Vec<TargetId> = (map.targets.iter())
            .filter(|(id, target)| target.server == server && reports.iter().all(|r| r.target != id.0))
            .map(|(id, _)| *id)
            .collect();
        for id in absent {
            let before = map.targets.get(&id).map(|target| target.state);
            self.step(&mut map, id, Event::Silent);
            if before == Some(TargetState::Up) {
                tracing::warn!(target = %id, %server, "its data server does without this target");
            }
        }
        for report in reports {
            let id = TargetId(report.target);
            let before = map.targets.get(&id).map(|target| target.state);
            self.step(&mut map, id, event_of(report));
            if let Some(target) = map.targets.get_mut(&id) {
                if target.state == TargetState::Failed && before != Some(target.state) {
                    tracing::warn!(target = %id, path = report.path, why = report.message, "target failed");
                }
                target.full = is_full(report, target.full);
            }
            if let Some(info) = self.targets.get_mut(&id) {
                info.report = TargetReport { uuid: info.record.uuid.clone(), ..TargetReport::clone(report) };
            }
        }
        self.publish(txn, map);
    }

    /// A confirmed deletion leaves the queue; one that is not in it was confirmed before.
    fn confirm(&mut self, txn: &mut Txn, deleted: &DeletedBlocks) -> FsResult<()> {
        let target = TargetId(deleted.target);
        for block in deleted.blocks.iter().copied().map(BlockId) {
            let key = keys::delete(target, block);
            if txn.get(&key)?.is_some() {
                txn.remove(key);
                let queued = &mut txn.counters().queued;
                *queued = queued.saturating_sub(1);
            }
        }
        if let Some(last) = deleted.blocks.iter().max() {
            self.delete_from.insert(target, BlockId(last.saturating_add(1)));
        }
        Ok(())
    }

    /// What a target should delete next, and whether there is more.
    ///
    /// Goes on behind what was confirmed last, because stepping over the tombstones of confirmed deletions again and
    /// again is what would make a long queue slow; starts over at the end, since ids are not queued in order.
    fn deletes(&mut self, txn: &mut Txn, target: TargetId, limit: usize) -> FsResult<(Vec<u64>, bool)> {
        let from = self.delete_from.get(&target).copied().unwrap_or_default();
        let range = keys::delete(target, from)..keys::deletes(target).end;
        let mut rows = txn.scan(&range, Order::Ascending, limit + 1)?;
        let mut more = rows.len() > limit;
        rows.truncate(limit);
        if !more && from != BlockId(0) {
            self.delete_from.remove(&target);
            more = rows.is_empty() && !txn.is_empty(&keys::deletes(target))?;
        }
        Ok((rows.iter().filter_map(|(key, _)| keys::second_id(key)).collect(), more))
    }
}
