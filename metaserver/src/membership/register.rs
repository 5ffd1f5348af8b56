//! A data server announces itself. Idempotent: targets are known by the uuid they were formatted with.

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
            let id = next.target_id(report).unwrap_or_else(|| {
                txn.counters().next_target += 1;
                TargetId(txn.counters().next_target - 1)
            });
            let before = map.targets.get(&id);
            let record = TargetRecord {
                uuid: report.uuid.clone(),
                path: report.path.clone(),
                server: server.0,
                leaving: next.targets.get(&id).is_some_and(|info| info.record.leaving),
                removed: false,
                displaced: next.targets.get(&id).map_or(0, |info| info.record.displaced),
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
            if report.target != 0 && known != Some(TargetId(report.target)) {
                return Err(Refusal::Precondition(format!(
                    "target t{} in {} is not known to cluster {}: its folder belongs to other metadata; use an empty folder",
                    report.target, report.path, self.map.cluster_id
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
        let claimed = Some(ServerId(request.server)).filter(|id| self.map.servers.contains_key(id));
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
