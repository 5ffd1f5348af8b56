//! Deleting shards that nothing reaches and nothing ever will.

use fjordfs_proto::{FsError, FsResult, TargetId, error::Errno};

use super::{Tell, admin, holdings, repair};
use crate::Client;

/// What a collection has found and done.
#[derive(Clone, Debug, Default)]
pub struct Collected {
    /// On the targets that were listed.
    pub shards_seen: u64,
    /// Shards that nothing reaches.
    pub garbage_shards: u64,
    /// Bytes of these.
    pub garbage_bytes: u64,
    /// Deletions that were queued for it.
    pub deletions: u64,
    /// Targets that could not be listed.
    pub unseen: Vec<TargetId>,
}

/// Compares what targets hold with what there is, and has the rest deleted unless it is a `dry_run`. At most `rate` bytes per second of
/// listings are read; 0 is no limit.
///
/// # Errors
/// When there is no metaserver; `EIO` when its records do not tell all blocks that are used.
pub async fn collect(client: &Client, dry_run: bool, rate: u64, tell: Tell<'_>) -> FsResult<Collected> {
    let found = holdings::compare(client, rate, tell).await?;
    if !found.unreadable.is_empty() {
        let what = format!(
            "nothing is collected while metadata cannot be read, for it may be of blocks in use; `fjord fsck` says more: {}",
            found.unreadable
        );
        return Err(FsError::new(Errno::EIO, what));
    }
    let mut collected = Collected {
        shards_seen: found.shards,
        garbage_shards: found.garbage_shards() as u64,
        garbage_bytes: found.garbage_bytes,
        deletions: 0,
        unseen: found.unseen.keys().copied().map(TargetId).collect(),
    };
    if !dry_run {
        for request in repair::of_garbage(&found) {
            collected.deletions += admin::mend(client, request).await?;
        }
    }
    Ok(collected)
}
