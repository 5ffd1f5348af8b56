//! A data server announces itself. Idempotent: targets are known by the uuid they were formatted with.
//!
//! # Foundlings
//! Metadata that was restored from a backup does not know the targets that were added since, nor their data servers. They say that
//! they are of this cluster, and may have the only copies of something: so they are taken in under the numbers that they have, which
//! a restore has left free (`backup.rs`). No group of before has them as members; what they have of such groups is found
//! there like on any target that lost a place (`healing.rs`, "Strays").

use std::{collections::BTreeSet, time::Instant};

use fjordfs_proto::{
    ClusterMap, PROTOCOL_VERSION, ServerId, TargetId,
    cluster::{Server, ServerState, Target, TargetState},
    pb::meta::{RegisterReply, RegisterRequest, TargetReport},
};

use super::{Membership, TargetInfo, event_of, is_full, states};
use crate::{keys, records::TargetRecord, refusal::Refusal, txn::Txn};

impl Membership {
    /// Adds or renews a server and its targets. On an error nothing has changed here; the caller rejects the
    /// transaction.
    pub(crate) fn register(
        &mut self,
        txn: &mut Txn,
        request: &RegisterRequest,
        now: Instant,
    ) -> Result<RegisterReply, Refusal> {
        self.check(request)?;
        let mut next = self.clone();
        let server = next.server_id(txn, request);
        let mut map = ClusterMap::clone(&next.map);
        let entry = Server {
            address: request.address.clone(),
            name: if request.name.is_empty() { request.address.clone() } else { request.name.clone() },
            state: ServerState::Up,
        };
        let domain = entry.name.clone();
        map.servers.insert(server, entry);
        let mut ids = Vec::with_capacity(request.targets.len());
        for report in &request.targets {
            let known = next.target_id(report);
            let id = known.unwrap_or_else(|| match report.target {
                0 => {
                    txn.counters().next_target += 1;
                    TargetId(txn.counters().next_target - 1)
                }
                foundling => {
                    let next = &mut txn.counters().next_target;
                    *next = foundling.saturating_add(1).max(*next);
                    tracing::warn!(
                        target = foundling,
                        path = report.path,
                        "a target of this cluster was not known, and is taken in"
                    );
                    TargetId(foundling)
                }
            });
            // By the map that a foundling comes with, it may have anything.
            let (displaced, unasked) = match known.and_then(|id| next.targets.get(&id)) {
                Some(info) => (info.record.displaced, info.record.unasked),
                None if report.target != 0 => (next.map.epoch.0 + 1, next.map.epoch.0 + 1),
                None => (0, 0),
            };
            let before = map.targets.get(&id);
            let record = TargetRecord {
                uuid: report.uuid.clone(),
                path: report.path.clone(),
                server: server.0,
                leaving: next.targets.get(&id).is_some_and(|info| info.record.leaving),
                removed: false,
                displaced,
                unasked,
            };
            let state = before.map_or(TargetState::Up, |t| t.state);
            let target = Target {
                server,
                domain: if report.domain.is_empty() { domain.clone() } else { report.domain.clone() },
                state: states::next(state, record.leaving, event_of(report)),
                full: is_full(report, before.is_some_and(|t| t.full)),
            };
            map.targets.insert(id, target);
            txn.put_record(keys::target(id), &record);
            let report = TargetReport { target: id.0, ..report.clone() };
            next.targets.insert(id, TargetInfo { record, report });
            ids.push(id.0);
        }
        next.heard.insert(server, now);
        next.publish(txn, map);
        *self = next;
        Ok(RegisterReply {
            cluster_id: self.map.cluster_id.clone(),
            server: server.0,
            targets: ids,
            heartbeat_ms: self.heartbeat.as_millis() as u64,
            map: Some(self.map.to_pb()),
            scrubs: txn.counters().scrubs,
        })
    }

    fn check(&self, request: &RegisterRequest) -> Result<(), Refusal> {
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(Refusal::Precondition(format!(
                "data server {} speaks protocol version {}, this metaserver {PROTOCOL_VERSION}: run the same release on both",
                request.address, request.protocol_version
            )));
        }
        self.check_cluster(&request.cluster_id, &request.address)?;
        if request.address.is_empty() || request.targets.is_empty() {
            return Err(Refusal::Invalid("a data server needs an address and at least one target".into()));
        }
        let mut uuids = BTreeSet::new();
        for report in &request.targets {
            if report.uuid.is_empty() {
                return Err(Refusal::Invalid(format!("target {} has no uuid", report.path)));
            }
            if !uuids.insert(&report.uuid) {
                return Err(Refusal::Invalid(format!(
                    "target {} has the uuid of another target of {}: was its folder copied?",
                    report.path, request.address
                )));
            }
            let known = self.target_id(report);
            if let Some(id) = known.filter(|id| self.targets.get(id).is_some_and(|info| info.record.removed))
            {
                return Err(Refusal::Precondition(format!(
                    "target {id} in {} was removed from the cluster: start without it, or empty its folder to use it as a new target",
                    report.path
                )));
            }
            let (claimed, path) = (TargetId(report.target), &report.path);
            let taken = known.is_none() && self.targets.contains_key(&claimed);
            if report.target != 0 && (taken || known.is_some_and(|id| id != claimed)) {
                return Err(Refusal::Precondition(format!(
                    "target {claimed} in {path} is another one in the metadata of cluster {}, which may have been restored from a backup \
                     that is too old: keep the folder, it may hold the only copy of something, and restore a newer backup, or start \
                     without it",
                    self.map.cluster_id
                )));
            }
            if report.target != 0 && known.is_none() && request.cluster_id.is_empty() {
                return Err(Refusal::Precondition(format!(
                    "target {claimed} in {path} does not say of which cluster it is: its label is damaged; keep the folder, it may \
                     hold the only copy of something"
                )));
            }
        }
        Ok(())
    }

    /// A data server of another cluster is refused: its shards would be mistaken for ours, and deleted.
    pub(super) fn check_cluster(&self, cluster_id: &str, who: &str) -> Result<(), Refusal> {
        if !cluster_id.is_empty() && cluster_id != self.map.cluster_id {
            return Err(Refusal::Precondition(format!(
                "data server {who} belongs to cluster {cluster_id}, this is cluster {}: check the metaserver address, or use an empty folder",
                self.map.cluster_id
            )));
        }
        Ok(())
    }

    fn target_id(&self, report: &TargetReport) -> Option<TargetId> {
        self.targets.iter().find(|(_, info)| info.record.uuid == report.uuid).map(|(id, _)| *id)
    }

    /// The id it has, else the one its targets remember, else that of the server that was there before with no target that is up:
    /// its only disk may have been replaced. Else a new one.
    fn server_id(&self, txn: &mut Txn, request: &RegisterRequest) -> ServerId {
        let ours = request.server != 0 && !request.cluster_id.is_empty();
        let claimed = Some(ServerId(request.server)).filter(|id| ours || self.map.servers.contains_key(id));
        if let Some(claimed) = claimed {
            let next = &mut txn.counters().next_server;
            *next = claimed.0.saturating_add(1).max(*next);
        }
        let remembered = || {
            let id = request.targets.iter().find_map(|report| self.target_id(report))?;
            Some(ServerId(self.targets.get(&id)?.record.server))
        };
        let gone = |id: &ServerId| {
            let mut targets = self.map.targets.values().filter(|target| target.server == *id);
            targets.all(|target| target.state != TargetState::Up)
        };
        let before = || {
            let same = |server: &Server| server.name == request.name && server.address == request.address;
            self.map.servers.iter().find(|(id, server)| same(server) && gone(id)).map(|(id, _)| *id)
        };
        claimed.or_else(remembered).or_else(before).unwrap_or_else(|| {
            txn.counters().next_server += 1;
            ServerId(txn.counters().next_server - 1)
        })
    }
}
