//! What all cores share: the identity of this data server, its targets, and the buffers.

use std::{collections::BTreeMap, sync::Arc};

use fjordfs_proto::{
    ClusterMap, FsError, FsResult, ServerId, TargetId,
    error::Errno,
    pb::{self, meta::TargetReport},
};

use crate::{
    buffer::Pool,
    heal::{Checks, Copying, RebuildRate, Scrubs, Tidied},
    placing::Placing,
    store::{Store, files::Files, tables::Tables},
};

/// A target in service.
pub(crate) struct Target {
    pub(crate) id: TargetId,
    pub(crate) uuid: String,
    pub(crate) domain: String,
    pub(crate) store: Arc<Store<Files>>,
}

/// A data server that belongs to a cluster.
pub(crate) struct Node {
    pub(crate) cluster_id: String,
    pub(crate) server: ServerId,
    /// Of this process, at random.
    pub(crate) incarnation: u64,
    pub(crate) targets: BTreeMap<TargetId, Target>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) tables: Tables,
    /// The newest map that the metaserver has sent.
    pub(crate) placing: Placing,
    pub(crate) checks: Checks,
    pub(crate) copying: Copying,
    pub(crate) scrubs: Scrubs,
    pub(crate) tidied: Tidied,
    pub(crate) rebuild_rate: RebuildRate,
    /// Held by checks while they look what is there, and exclusively while shards of other targets are dropped.
    pub(crate) arranging: tokio::sync::RwLock<()>,
}

impl Node {
    /// The store of a target.
    ///
    /// # Errors
    /// `ENODEV` when it is not a target of this server: the asker's cluster map is old.
    pub(crate) fn store(&self, target: u64) -> FsResult<&Arc<Store<Files>>> {
        self.targets.get(&TargetId(target)).map(|t| &t.store).ok_or_else(|| {
            let server = self.server;
            FsError::new(
                Errno::ENODEV,
                format!("data server {server} has no target t{target}: get a new cluster map"),
            )
        })
    }

    /// The cluster map, once there is one.
    pub(crate) fn map(&self) -> Option<Arc<ClusterMap>> {
        self.placing.map()
    }

    /// Takes over a newer map.
    pub(crate) fn adopt(&self, map: pb::common::ClusterMap) {
        if let Err(e) = self.placing.adopt(map) {
            tracing::error!("the metaserver sent a map that makes no sense: {e}");
        }
    }

    /// What the metaserver is told of the targets.
    pub(crate) fn reports(&self) -> Vec<TargetReport> {
        let told = |t: &Target| TargetReport {
            scrub: self.scrubs.report(t.id),
            tidied: self.tidied.of(t.id).0,
            ..report(t.id, &t.uuid, &t.domain, &t.store)
        };
        self.targets.values().map(told).collect()
    }
}

/// What the metaserver is told of a target.
pub(crate) fn report(id: TargetId, uuid: &str, domain: &str, store: &Store<Files>) -> TargetReport {
    let stats = store.stats();
    let failure = store.failure().or_else(|| stats.as_ref().err().map(ToString::to_string));
    let stats = stats.unwrap_or_default();
    TargetReport {
        target: id.0,
        uuid: uuid.to_owned(),
        path: store.path().display().to_string(),
        domain: domain.to_owned(),
        capacity: stats.capacity,
        free: stats.free,
        shards: stats.shards,
        failed: failure.is_some(),
        message: failure.unwrap_or_default(),
        scrub: None,
        tidied: 0,
    }
}
