//! Batches that are too large for one transaction.
//!
//! The parts of a batch are written as intents first; the transaction that counts them in the owner's record decides the
//! batch. From then on it is rolled forward, by the next owner if need be: before that one reads anything. Each write
//! sets a key to a value, so applying some of them twice changes nothing.
//!
//! Within each of these phases the transactions go in rounds. While a round lasts the record stays as it is, and its transactions
//! expect just that: they may happen in any order, several at a time, and twice. The next round, and the next phase, begins with
//! another record, so none that is late can happen then.

use futures_util::{StreamExt, stream::FuturesUnordered};

use super::{
    owner::{self, Write},
    window::split,
    worker::{Step, Worker, insist},
};
use crate::store::StoreResult;

/// Transactions of a phase that are under way at a time.
const ABREAST: usize = 8;

impl Worker {
    /// Decides and applies a batch.
    pub(super) async fn step_in_parts(&mut self, writes: Vec<Write>, ticket: u64) -> StoreResult<()> {
        let bytes_max = self.link.limits().bytes / 2;
        let parts = owner::encode_parts(&writes, bytes_max);
        let count = parts.len() as u32;
        let intents = (0u32..).zip(parts).map(|(index, part)| (owner::intent(index), Some(part))).collect();
        self.spread(intents).await?;
        self.step(Vec::new(), |o| o.parts = count).await?;
        self.shared.acknowledge(ticket);
        self.roll_forward(writes.clone(), count).await?;
        // Only now do reads of the store show all of it.
        self.shared.land(writes.into(), ticket);
        Ok(())
    }

    /// Applies a batch that is decided; `parts` intents are left of it.
    pub(super) async fn roll_forward(&mut self, writes: Vec<Write>, parts: u32) -> StoreResult<()> {
        self.spread(writes).await?;
        // Intents without a decision are litter, a decision without them would be damage: both in one, or the decision first.
        let mut litter: Vec<Write> = (0..parts).map(|index| (owner::intent(index), None)).collect();
        let rest = litter.split_off(litter.len().min(self.link.limits().writes));
        self.step(litter, |o| o.parts = 0).await?;
        self.spread(rest).await
    }

    /// Applies writes, in any order, in rounds while each of which the record stays as it is. Between them it changes as often as an
    /// owner's does that has nothing to write: to standbys this one looked silent otherwise, and so would all who roll the batch
    /// forward after it.
    pub(super) async fn spread(&mut self, writes: Vec<Write>) -> StoreResult<()> {
        let mut steps = split(writes, self.link.limits()).into_iter().peekable();
        let mut under_way = FuturesUnordered::new();
        // However long it took to change the record, a round goes before it is changed again.
        let mut has_changed = false;
        loop {
            let Some(record) = self.owner else { return Ok(()) };
            let is_open = std::mem::take(&mut has_changed) || !self.shared.is_stale();
            while is_open
                && under_way.len() < ABREAST
                && let Some(writes) = steps.next()
            {
                let step = Step { expected: Some(record), next: record, writes };
                under_way.push(insist(self.link.clone(), self.shared.clone(), step));
            }
            match self.beside(under_way.next()).await {
                Some(done) => drop(done?),
                None if steps.peek().is_none() => return Ok(()),
                None => {
                    self.step(Vec::new(), |_| {}).await?;
                    has_changed = true;
                }
            }
        }
    }
}
