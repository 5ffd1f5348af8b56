//! Becoming the owner: raising the fence, finishing what the one before had begun.

use std::time::Instant;

use super::{
    Fault,
    owner::{self, INTENTS, Owner, STANDBYS},
    worker::{BACKOFF, PATIENCE, Step, Worker, patiently, send},
};
use crate::store::{Fence, Order, Pair, StoreError, StoreResult, successor};

/// Parts of a batch that are read at a time: each is up to half of what one transaction takes.
const PAGE: usize = 8;

impl Worker {
    pub(super) async fn take_over(&mut self) -> StoreResult<Fence> {
        let link = self.link.clone();
        let silent = self.shared.silent.lock().take();
        let begun = Instant::now();
        let mut tried = None;
        loop {
            let found = patiently(&link, || link.read_owner()).await?;
            if let Some(record) = tried.filter(|_| found == tried) {
                return self.own(record, begun, false).await;
            }
            if silent.is_some_and(|silent| silent != found) {
                return Err(StoreError::Fenced {
                    ours: Fence(0),
                    current: found.map_or(Fence(0), |o| o.fence()),
                });
            }
            let before = found.unwrap_or_default();
            let next =
                Owner { fence: before.fence + 1, holder: self.holder, released: false, ..before.next() };
            let step = Step { expected: found, next, writes: [].into() };
            let sent = Instant::now();
            match send(&link, &step).await {
                Ok(true) => return self.own(next, sent, true).await,
                Ok(false) => {}
                Err(Fault::Fatal(e)) => return Err(e),
                Err(Fault::Unavailable(why)) if begun.elapsed() > PATIENCE || self.shared.is_closing() => {
                    return Err(link.error(why));
                }
                // It happened if the record is there; nobody else writes this one.
                Err(Fault::Unavailable(_)) => {
                    tried = Some(next);
                    tokio::time::sleep(BACKOFF.1).await;
                }
            }
        }
    }

    /// The store is owned by the `record`, of which it is known or not that it is safe there.
    async fn own(&mut self, record: Owner, sent: Instant, safe: bool) -> StoreResult<Fence> {
        self.owner = Some(record);
        self.shared.begin(record, sent);
        if !safe {
            self.secure().await?;
        }
        self.finish_the_last_batch(record.parts).await?;
        self.forget_standbys().await?;
        Ok(record.fence())
    }

    /// Standbys that are gone have left their signs; the others give more.
    async fn forget_standbys(&mut self) -> StoreResult<()> {
        let link = self.link.clone();
        let signs = || link.scan(STANDBYS.0.to_vec()..STANDBYS.1.to_vec(), Order::Ascending, usize::MAX);
        let found = patiently(&link, signs).await?;
        self.spread(found.into_iter().map(|(key, _)| (key, None)).collect()).await
    }

    async fn finish_the_last_batch(&mut self, parts: u32) -> StoreResult<()> {
        let link = self.link.clone();
        let mut intents: Vec<Pair> = Vec::new();
        let mut from = INTENTS.0.to_vec();
        loop {
            let range = from.clone()..INTENTS.1.to_vec();
            let page = patiently(&link, || link.scan(range.clone(), Order::Ascending, PAGE)).await?;
            let more = page.len() == PAGE;
            intents.extend(page);
            match intents.last() {
                Some((last, _)) if more => from = successor(last),
                _ => break,
            }
        }
        if parts > 0 {
            let damaged = |what| StoreError::Damaged { folder: link.place().into(), what };
            if intents.len() < parts as usize {
                return Err(damaged(format!("a batch has {} of {parts} parts", intents.len())));
            }
            let writes = owner::decode_parts(&intents[..parts as usize])
                .ok_or_else(|| damaged("the parts of a batch make no sense".into()))?;
            return self.roll_forward(writes, intents.len() as u32).await;
        }
        self.spread(intents.into_iter().map(|(key, _)| (key, None)).collect()).await
    }
}
