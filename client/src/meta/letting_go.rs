//! Leases that end here, until everybody who uses them has let go and the server can be told.

use fjordfs_proto::{
    InodeId,
    pb::meta::{ClientMessage, GivenBack, Recall},
};
use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};

use crate::leases::{Dropped, Patience, Recalling};

/// What the server will be told.
#[derive(Default)]
pub(super) struct LettingGo(FuturesUnordered<BoxFuture<'static, ClientMessage>>);

impl LettingGo {
    /// These have been recalled; `patience` is how long that may take here.
    pub(super) fn recalled(&mut self, recalls: Vec<Recall>, recalling: Recalling, patience: Patience) {
        let recalled = recalls.into_iter().map(|recall| recall.id).collect();
        self.0.push(Box::pin(async move {
            let clean = recalling.let_go.within(patience).await;
            let demoted = (!clean.is_empty()).then(|| given_back(clean, recalling.as_of));
            ClientMessage { recalled, demoted, ..ClientMessage::default() }
        }));
    }

    /// These were dropped for want of room.
    pub(super) fn dropped(&mut self, dropped: Dropped, patience: Patience) {
        if dropped.inodes.is_empty() {
            return;
        }
        self.0.push(Box::pin(async move {
            dropped.let_go.within(patience).await;
            let given_back = Some(given_back(dropped.inodes, dropped.as_of));
            ClientMessage { given_back, ..ClientMessage::default() }
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

fn given_back(inodes: Vec<InodeId>, as_of: u64) -> GivenBack {
    GivenBack { inos: inodes.into_iter().map(|ino| ino.0).collect(), as_of }
}
