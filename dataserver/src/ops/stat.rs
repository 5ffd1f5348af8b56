//! Capacity and counters of all targets.

use fjordfs_proto::{
    FsResult,
    pb::data::{StatReply, TargetStat},
};

use crate::node::Node;

pub(super) fn run(node: &Node) -> FsResult<StatReply> {
    let stat = |(id, target): (&fjordfs_proto::TargetId, &crate::node::Target)| {
        let s = target.store.stats()?;
        Ok(TargetStat {
            target: id.0,
            capacity: s.capacity,
            free: s.free,
            shards: s.shards,
            shard_bytes: s.shard_bytes,
            volumes: s.volumes,
            reads: s.reads,
            puts: s.puts,
            bad_pages: s.bad_pages,
        })
    };
    Ok(StatReply { targets: node.targets.iter().map(stat).collect::<FsResult<_>>()? })
}
