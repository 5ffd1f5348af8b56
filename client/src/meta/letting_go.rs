//! Leases that end here, until the caches below have let go of them and the server can be told.

use std::time::Duration;

use fjordfs_proto::pb::meta::{ClientMessage, GivenBack, Recall};
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};

use crate::leases::{Dropped, LetGo};

/// What the server will be told.
#[derive(Default)]
pub(super) struct LettingGo(FuturesUnordered<BoxFuture<'static, ClientMessage>>);

impl LettingGo {
    /// These have been recalled. Caches below run out by themselves after `lease`.
    pub(super) fn recalled(&mut self, recalls: Vec<Recall>, let_go: LetGo, lease: Duration) {
        let recalled = recalls.into_iter().map(|recall| recall.id).collect();
        self.push(ClientMessage { recalled, ..ClientMessage::default() }, let_go, lease);
    }

    /// These were dropped for want of room.
    pub(super) fn dropped(&mut self, dropped: Dropped, lease: Duration) {
        if dropped.inodes.is_empty() {
            return;
        }
        let inos = dropped.inodes.into_iter().map(|ino| ino.0).collect();
        let given_back = Some(GivenBack { inos, as_of: dropped.as_of });
        self.push(ClientMessage { given_back, ..ClientMessage::default() }, dropped.let_go, lease);
    }

    fn push(&mut self, message: ClientMessage, let_go: LetGo, lease: Duration) {
        self.0.push(Box::pin(async move {
            wait(let_go, lease).await;
            message
        }));
    }

    /// The next message that can be sent; never, while there is none.
    pub(super) async fn next(&mut self) -> ClientMessage {
        match self.0.next().await {
            Some(message) => message,
            None => std::future::pending().await,
        }
    }
}

/// Waits until the caches below have let go, or have run out.
pub(super) async fn wait(let_go: LetGo, lease: Duration) {
    if let Some(let_go) = let_go {
        // A listener that is gone caches nothing.
        let _ = tokio::time::timeout(lease, let_go).await;
    }
}
