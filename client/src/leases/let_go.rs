//! Waiting for those who use what is recalled.

use std::time::Duration;

use fjordfs_proto::InodeId;
use tokio::sync::oneshot;

/// How long is waited for those who use what is recalled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For caches below.
    pub(crate) caches: Duration,
    /// For what was written.
    pub(crate) written: Duration,
}

/// Ends when everybody who uses what is recalled has let go.
#[derive(Debug, Default)]
pub(crate) struct LetGo {
    pub(super) caches: Option<oneshot::Receiver<()>>,
    pub(super) keeper: Option<oneshot::Receiver<Vec<InodeId>>>,
}

impl LetGo {
    /// Waits for the end, for caches below as long as leases are good, since they run out by themselves, and for what was written
    /// until it would hold up the others for too long. Answers with the inodes that the keeper was asked about and has nothing to
    /// write to.
    pub(crate) async fn within(self, Patience { caches: lease, written: limit }: Patience) -> Vec<InodeId> {
        let caches = async {
            if let Some(caches) = self.caches {
                // Caches that are gone hold nothing.
                let _ = tokio::time::timeout(lease, caches).await;
            }
        };
        let keeper = async {
            match self.keeper {
                Some(keeper) => keeper.await.unwrap_or_default(),
                None => Vec::new(),
            }
        };
        let both = async { tokio::join!(caches, keeper).1 };
        tokio::time::timeout(limit, both).await.unwrap_or_else(|_| {
            tracing::warn!("others wait for what could not be written back within {limit:?}");
            Vec::new()
        })
    }
}
