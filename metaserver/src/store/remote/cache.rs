//! What the owner of a store across a network remembers of it, under a cap.
//!
//! Since nobody else writes, whatever was read once stays true. The cache knows whole intervals of keys, with
//! all pairs in them, so that it answers for keys that are not there, too: most lookups of a metaserver are of that
//! kind. A miss reads a page from the missing key on. Behind the highest inode there is nothing, so the first new inode
//! makes the rest of its kind known, and those after it cost no reads.
//!
//! # Invariants
//! - Intervals are disjoint and do not touch; every pair lies in one of them.
//! - The overlay holds the writes that the store has not acknowledged. It wins over what is read from the store, and an
//!   entry leaves it only while no read is under way (one lock guards both).
//!
//! # Eviction
//! A hand moves over the pairs in runs. A run of which something was used since the hand's last visit stays; another is
//! dropped and its span becomes unknown again.

use std::{
    collections::BTreeMap,
    ops::{Bound, Range},
};

use bytes::Bytes;

use crate::store::{Order, Pair, StoreResult, successor};

type Key = Vec<u8>;

/// No key is above this one.
const END: &[u8] = &[0xff];
/// Pairs that one miss brings.
const PAGE_PAIRS: usize = 128;
const PAGE_PAIRS_MAX: usize = 2048;
/// Neighbours that are evicted together.
const RUN: usize = 128;
/// What an entry takes besides its bytes.
const ENTRY_OVERHEAD: usize = 96;

struct Entry {
    value: Bytes,
    used: bool,
}

/// See the module.
pub(super) struct Cache {
    /// Start of each known interval, with its end.
    known: BTreeMap<Key, Key>,
    pairs: BTreeMap<Key, Entry>,
    overlay: BTreeMap<Key, (u64, Option<Bytes>)>,
    bytes: usize,
    bytes_max: usize,
    hand: Key,
}

impl Cache {
    pub(super) fn new(bytes_max: usize) -> Cache {
        Cache {
            known: BTreeMap::new(),
            pairs: BTreeMap::new(),
            overlay: BTreeMap::new(),
            bytes: 0,
            bytes_max,
            hand: Key::new(),
        }
    }

    /// What it holds takes about so many bytes, unacknowledged writes not counted.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Cache::new(self.bytes_max);
    }

    /// A write that the store has yet to acknowledge as number `ticket`.
    pub(super) fn write(&mut self, key: Key, value: Option<Bytes>, ticket: u64) {
        if self.known_end(&key).is_some() {
            self.store(key.clone(), value.clone());
        }
        self.overlay.insert(key, (ticket, value));
        self.evict();
    }

    /// The store has these keys as of `ticket`.
    pub(super) fn acknowledged<'a>(&mut self, keys: impl Iterator<Item = &'a Key>, ticket: u64) {
        for key in keys {
            // A later write of the key is still under way.
            if self.overlay.get(key).is_some_and(|(at, _)| *at <= ticket) {
                self.overlay.remove(key);
            }
        }
    }

    /// Value of a key; `fetch` reads a range of the store.
    pub(super) fn get(
        &mut self,
        key: &[u8],
        fetch: impl Fn(Range<Key>, Order, usize) -> StoreResult<Vec<Pair>>,
    ) -> StoreResult<Option<Bytes>> {
        if let Some((_, value)) = self.overlay.get(key) {
            return Ok(value.clone());
        }
        if self.known_end(key).is_none() {
            self.fill(key, PAGE_PAIRS, &fetch)?;
        }
        let found = self.pairs.get_mut(key).map(|entry| {
            entry.used = true;
            entry.value.clone()
        });
        self.evict();
        Ok(found)
    }

    /// The first pairs of a range.
    pub(super) fn scan(
        &mut self,
        range: Range<&[u8]>,
        order: Order,
        limit: usize,
        fetch: impl Fn(Range<Key>, Order, usize) -> StoreResult<Vec<Pair>>,
    ) -> StoreResult<Vec<Pair>> {
        let mut out = Vec::new();
        let (mut from, mut to) = (range.start.to_vec(), range.end.min(END).to_vec());
        while from < to && out.len() < limit {
            let room = limit - out.len();
            let page = room.clamp(PAGE_PAIRS, PAGE_PAIRS_MAX);
            match order {
                Order::Ascending => match self.known_end(&from) {
                    Some(end) => {
                        let upto = end.min(to.clone());
                        self.copy(from..upto.clone(), order, room, &mut out);
                        from = upto;
                    }
                    None => self.fill(&from, page, &fetch)?,
                },
                Order::Descending => match self.known_start(&to) {
                    Some(start) => {
                        let down = start.max(from.clone());
                        self.copy(down.clone()..to, order, room, &mut out);
                        to = down;
                    }
                    None => self.fill_below(&to, page, &fetch)?,
                },
            }
        }
        self.evict();
        Ok(out)
    }

    fn copy(&mut self, range: Range<Key>, order: Order, limit: usize, out: &mut Vec<Pair>) {
        let pairs = self.pairs.range_mut(range).map(|(key, entry)| {
            entry.used = true;
            (key.clone(), entry.value.clone())
        });
        match order {
            Order::Ascending => out.extend(pairs.take(limit)),
            Order::Descending => out.extend(pairs.rev().take(limit)),
        }
    }

    /// End of the known interval around `key`.
    fn known_end(&self, key: &[u8]) -> Option<Key> {
        let (_, end) = self.known.range::<[u8], _>((Bound::Unbounded, Bound::Included(key))).next_back()?;
        (key < end.as_slice()).then(|| end.clone())
    }

    /// Start of the known interval that reaches up to `end`.
    fn known_start(&self, end: &[u8]) -> Option<Key> {
        let (start, known) =
            self.known.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(end))).next_back()?;
        (known.as_slice() >= end).then(|| start.clone())
    }

    /// Learns what follows an unknown key.
    fn fill(
        &mut self,
        from: &[u8],
        limit: usize,
        fetch: &impl Fn(Range<Key>, Order, usize) -> StoreResult<Vec<Pair>>,
    ) -> StoreResult<()> {
        let next = self.known.range::<[u8], _>((Bound::Excluded(from), Bound::Unbounded)).next();
        let mut end = next.map_or_else(|| END.to_vec(), |(start, _)| start.clone());
        let page = fetch(from.to_vec()..end.clone(), Order::Ascending, limit)?;
        if page.len() >= limit
            && let Some((last, _)) = page.last()
        {
            end = successor(last);
        }
        self.learn(from.to_vec()..end, page);
        Ok(())
    }

    /// Learns what precedes an unknown key.
    fn fill_below(
        &mut self,
        to: &[u8],
        limit: usize,
        fetch: &impl Fn(Range<Key>, Order, usize) -> StoreResult<Vec<Pair>>,
    ) -> StoreResult<()> {
        let before = self.known.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(to))).next_back();
        // Below 1 are the store's own.
        let mut start = before.map_or_else(|| vec![1], |(_, end)| end.clone());
        let page = fetch(start.clone()..to.to_vec(), Order::Descending, limit)?;
        if page.len() >= limit
            && let Some((last, _)) = page.last()
        {
            start = last.clone();
        }
        self.learn(start..to.to_vec(), page);
        Ok(())
    }

    /// The pairs of an interval that was unknown.
    fn learn(&mut self, interval: Range<Key>, page: Vec<Pair>) {
        for (key, value) in page {
            self.store(key, Some(value));
        }
        let unacknowledged: Vec<_> =
            self.overlay.range(interval.clone()).map(|(k, (_, v))| (k.clone(), v.clone())).collect();
        for (key, value) in unacknowledged {
            self.store(key, value);
        }
        let Range { mut start, mut end } = interval;
        if let Some(below) = self.known_start(&start) {
            start = below;
        }
        if let Some(beyond) = self.known.remove(&end) {
            end = beyond;
        }
        self.known.insert(start, end);
    }

    fn store(&mut self, key: Key, value: Option<Bytes>) {
        let cost = |key: &Key, value: &Bytes| 2 * key.len() + value.len() + ENTRY_OVERHEAD;
        let gone = match value {
            Some(value) => {
                self.bytes += cost(&key, &value);
                // A slice of a message that was received would keep all of it.
                let value = Bytes::copy_from_slice(&value);
                self.pairs.insert(key.clone(), Entry { value, used: true })
            }
            None => self.pairs.remove(&key),
        };
        if let Some(entry) = gone {
            self.bytes -= cost(&key, &entry.value);
        }
    }

    fn evict(&mut self) {
        let runs_max = 2 * (self.pairs.len() / RUN + 1);
        for _ in 0..runs_max {
            if self.bytes <= self.bytes_max {
                return;
            }
            let run: Vec<Key> =
                self.pairs.range(self.hand.clone()..).take(RUN).map(|(k, _)| k.clone()).collect();
            let (Some(first), Some(last)) = (run.first(), run.last()) else {
                self.hand = Key::new();
                continue;
            };
            let (first, end) = (first.clone(), successor(last));
            self.hand = end.clone();
            let mut used = false;
            for (_, entry) in self.pairs.range_mut(first.clone()..end.clone()) {
                used |= std::mem::take(&mut entry.used);
            }
            if !used {
                self.forget(&first, &end);
                for key in run {
                    self.store(key, None);
                }
            }
        }
    }

    /// Makes a span unknown.
    fn forget(&mut self, from: &[u8], to: &[u8]) {
        if let Some((start, end)) =
            self.known.range::<[u8], _>((Bound::Unbounded, Bound::Excluded(from))).next_back()
            && end.as_slice() > from
        {
            let (start, end) = (start.clone(), end.clone());
            self.known.insert(start, from.to_vec());
            if end.as_slice() > to {
                self.known.insert(to.to_vec(), end);
            }
        }
        let inside: Vec<Key> = self
            .known
            .range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)))
            .map(|(k, _)| k.clone())
            .collect();
        for start in inside {
            if let Some(end) = self.known.remove(&start)
                && end.as_slice() > to
            {
                self.known.insert(to.to_vec(), end);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u16) -> Key {
        let mut key = vec![b'k'];
        key.extend(n.to_be_bytes());
        key
    }

    fn read(store: &BTreeMap<Key, Bytes>, range: Range<Key>, order: Order, limit: usize) -> Vec<Pair> {
        if range.start >= range.end {
            return Vec::new();
        }
        let pairs = store.range(range).map(|(k, v)| (k.clone(), v.clone()));
        match order {
            Order::Ascending => pairs.take(limit).collect(),
            Order::Descending => pairs.rev().take(limit).collect(),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u16, Option<u8>),
        Acknowledge,
        Get(u16),
        Scan(u16, u16, bool, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let n = 0..2000u16;
        prop_oneof![
            4 => (n.clone(), any::<Option<u8>>()).prop_map(|(n, v)| Step::Write(n, v)),
            1 => Just(Step::Acknowledge),
            2 => n.clone().prop_map(Step::Get),
            2 => (n.clone(), n, any::<bool>(), 0..400usize).prop_map(|(a, b, up, l)| Step::Scan(a, b, up, l)),
        ]
    }

    proptest! {
        /// The oracle is the tree as it is once everything is acknowledged.
        #[test]
        fn it_answers_as_the_store_would(
            stored in proptest::collection::btree_set(0..2000u16, 0..1500),
            steps in proptest::collection::vec(step(), 1..120),
            bytes_max in prop_oneof![Just(1 << 30), 1000..100_000usize],
        ) {
            let mut store: BTreeMap<Key, Bytes> = stored.into_iter().map(|n| (key(n), Bytes::from_static(b"old"))).collect();
            let mut oracle = store.clone();
            let mut cache = Cache::new(bytes_max);
            let mut unacknowledged: Vec<(Key, Option<Bytes>)> = Vec::new();
            for (ticket, step) in (1u64..).zip(steps) {
                let fetch = |range, order, limit| Ok(read(&store, range, order, limit));
                match step {
                    Step::Write(n, value) => {
                        let value = value.map(|v| Bytes::from(vec![v]));
                        cache.write(key(n), value.clone(), ticket);
                        match &value { Some(v) => oracle.insert(key(n), v.clone()), None => oracle.remove(&key(n)) };
                        unacknowledged.push((key(n), value));
                    }
                    Step::Acknowledge => {
                        for (key, value) in &unacknowledged {
                            match value { Some(v) => store.insert(key.clone(), v.clone()), None => store.remove(key) };
                        }
                        cache.acknowledged(unacknowledged.iter().map(|(k, _)| k), ticket);
                        unacknowledged.clear();
                    }
                    Step::Get(n) => prop_assert_eq!(cache.get(&key(n), fetch).unwrap(), oracle.get(&key(n)).cloned()),
                    Step::Scan(a, b, up, limit) => {
                        let order = if up { Order::Ascending } else { Order::Descending };
                        let (a, b) = (key(a), key(b));
                        let found = cache.scan(&a..&b, order, limit, fetch).unwrap();
                        prop_assert_eq!(found, read(&oracle, a..b, order, limit));
                    }
                }
            }
        }
    }

    #[test]
    fn it_stays_below_its_cap_and_new_keys_at_the_end_cost_no_reads() {
        let store: BTreeMap<Key, Bytes> =
            (0..20_000u16).map(|n| (key(n), Bytes::from(vec![0; 50]))).collect();
        let reads = std::cell::Cell::new(0);
        let fetch = |range, order, limit| {
            reads.set(reads.get() + 1);
            Ok(read(&store, range, order, limit))
        };
        let mut cache = Cache::new(200_000);
        for n in 0..20_000 {
            assert!(cache.get(&key(n), fetch).unwrap().is_some());
            assert!(cache.bytes <= 200_000 + PAGE_PAIRS * 200);
        }
        let before = reads.get();
        for n in 20_000..20_100 {
            assert_eq!(cache.get(&key(n), fetch).unwrap(), None);
            cache.write(key(n), Some(Bytes::from_static(b"new")), n.into());
        }
        assert!(reads.get() <= before + 1);
    }
}
