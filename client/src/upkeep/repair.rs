//! Having the metaserver see to what a comparison has found, in requests that fit into a message.

use fjordfs_proto::{
    FsResult,
    pb::meta::{DeletedBlocks, MendRequest, MissingShards},
};

use super::{Findings, Missing, admin};
use crate::Client;

/// Blocks of one request; of those that lack shards each names up to 32 targets.
const GARBAGE: usize = 65_536;
const MISSING: usize = 16_384;

/// Has missing shards restored, and garbage deleted.
///
/// # Errors
/// When there is no metaserver, or it refuses. What it was asked for before is done.
pub async fn repair(client: &Client, found: &Findings) -> FsResult<()> {
    for request in of_missing(found).chain(of_garbage(found)) {
        admin::mend(client, request).await?;
    }
    Ok(())
}

fn of_missing(found: &Findings) -> impl Iterator<Item = MendRequest> {
    let shards = |m: &Missing| MissingShards { block: m.block, targets: m.targets.clone(), layout: m.layout };
    found.missing.chunks(MISSING).map(move |some| MendRequest {
        cluster_id: found.cluster_id.clone(),
        missing: some.iter().map(shards).collect(),
        ..MendRequest::default()
    })
}

pub(super) fn of_garbage(found: &Findings) -> impl Iterator<Item = MendRequest> {
    let of_target = |(target, blocks): (&u64, &'_ Vec<u64>)| (*target, blocks.clone());
    found
        .garbage
        .iter()
        .map(of_target)
        .flat_map(|(target, blocks)| {
            let some = |some: &[u64]| DeletedBlocks { target, blocks: some.to_vec() };
            blocks.chunks(GARBAGE).map(some).collect::<Vec<_>>()
        })
        .map(|garbage| MendRequest {
            cluster_id: found.cluster_id.clone(),
            garbage: vec![garbage],
            ..MendRequest::default()
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::META_MESSAGE_MAX;
    use prost::Message;

    #[test]
    fn what_was_found_is_said_once_however_much_it_is() {
        let last = u64::MAX;
        let missing =
            |i| Missing { block: last - i, targets: (0..32).map(|t| last - t).collect(), layout: u32::MAX };
        let found = Findings {
            missing: (0..40_000).map(missing).collect(),
            garbage: [(1, (0..150_000).map(|i| last - i).collect()), (2, vec![7])].into(),
            cluster_id: "c".into(),
            ..Findings::default()
        };
        let requests: Vec<MendRequest> = of_missing(&found).chain(of_garbage(&found)).collect();
        assert!(requests.iter().all(|r| r.encoded_len() < META_MESSAGE_MAX && r.cluster_id == "c"));
        let blocks: Vec<u64> = requests.iter().flat_map(|r| &r.missing).map(|m| m.block).collect();
        assert_eq!(blocks, found.missing.iter().map(|m| m.block).collect::<Vec<_>>());
        let garbage = requests.iter().flat_map(|r| &r.garbage);
        let garbage: Vec<(u64, u64)> =
            garbage.flat_map(|g| g.blocks.iter().map(|block| (g.target, *block))).collect();
        let expected = found.garbage.iter().flat_map(|(t, blocks)| blocks.iter().map(|block| (*t, *block)));
        assert_eq!(garbage, expected.collect::<Vec<_>>());
    }
}
