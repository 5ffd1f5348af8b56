//! What all cores share: the identity of this data server, its targets, and the buffers.

use std::{collections::BTreeMap, sync::Arc};

use fjordfs_proto::{FsError, FsResult, ServerId, TargetId, error::Errno, pb::meta::TargetReport};

use crate::{
    buffer::Pool,
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
    pub(crate) targets: BTreeMap<TargetId, Target>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) tables: Tables,
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

    /// What the metaserver is told of the targets.
    pub(crate) fn reports(&self) -> Vec<TargetReport> {
        self.targets.values().map(|t| report(t.id, &t.uuid, &t.domain, &t.store)).collect()
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
    }
}
