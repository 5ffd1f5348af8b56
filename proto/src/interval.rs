//! Non-overlapping runs over a u64 line: the base of extent maps (server and client) and of dirty maps (client).
//!
//! Invariants: runs never overlap, none is empty, and `offset + len` never overflows.

use std::{collections::BTreeMap, ops::Range};

/// What a run carries. A run may be cut anywhere and joined with the next when both say so.
pub trait Run: Clone {
    /// Length, in the unit of the line (bytes).
    fn len(&self) -> u64;
    /// True for a run of no bytes; none is ever stored.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The part `range` of this run; `range` lies within `0..len`.
    fn slice(&self, range: Range<u64>) -> Self;
    /// Appends `next`, which follows directly, if the two are one run; else gives it back.
    fn join(&mut self, next: Self) -> Result<(), Self>;
}

/// Runs by offset.
#[derive(Clone, Debug)]
pub struct IntervalMap<R> {
    runs: BTreeMap<u64, R>,
}

impl<R> Default for IntervalMap<R> {
    fn default() -> Self {
        IntervalMap { runs: BTreeMap::new() }
    }
}

impl<R: Run> IntervalMap<R> {
    /// Number of runs.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// True when there are no runs.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        self.runs.clear();
    }

    /// End of the last run, 0 when there is none.
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(at, run)| at + run.len())
    }

    /// All runs in order, whole.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (u64, &R)> {
        self.runs.iter().map(|(at, run)| (*at, run))
    }

    /// Whole runs that intersect `range`, in order.
    pub fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &R)> {
        let before = self.runs.range(..range.start).next_back();
        let first = before.filter(|(at, run)| *at + run.len() > range.start && range.start < range.end);
        let rest = if range.start < range.end { Some(self.runs.range(range)) } else { None };
        first.into_iter().chain(rest.into_iter().flatten()).map(|(at, run)| (*at, run))
    }

    /// What lies in `range`, cut to it, in order.
    pub fn get(&self, range: Range<u64>) -> impl Iterator<Item = (u64, R)> {
        let cut = range.clone();
        self.overlapping(range).map(move |(at, run)| {
            let (from, to) = (at.max(cut.start), (at + run.len()).min(cut.end));
            (from, run.slice(from - at..to - at))
        })
    }

    /// Takes out what lies in `range`, cut to it; the parts outside stay.
    pub fn remove(&mut self, range: Range<u64>) -> Vec<(u64, R)> {
        let hit: Vec<(u64, R)> = self.overlapping(range.clone()).map(|(at, run)| (at, run.clone())).collect();
        let mut removed = Vec::with_capacity(hit.len());
        for (at, run) in hit {
            let end = at + run.len();
            self.runs.remove(&at);
            if at < range.start {
                self.runs.insert(at, run.slice(0..range.start - at));
            }
            if end > range.end {
                self.runs.insert(range.end, run.slice(range.end - at..run.len()));
            }
            let (from, to) = (at.max(range.start), end.min(range.end));
            removed.push((from, run.slice(from - at..to - at)));
        }
        removed
    }

    /// Puts `run` at `offset`, replacing what lies there, and joins it with its neighbours where they agree.
    /// Gives back what it replaced, cut to the new run's range.
    pub fn insert(&mut self, offset: u64, run: R) -> Vec<(u64, R)> {
        if run.is_empty() {
            return Vec::new();
        }
        let end =
            offset.checked_add(run.len()).expect("a run ends below 2^64: offsets are checked at the edges");
        let removed = self.remove(offset..end);
        let mut at = offset;
        let mut run = run;
        if let Some((&before, left)) = self.runs.range_mut(..offset).next_back()
            && before + left.len() == offset
        {
            match left.join(run) {
                Ok(()) => {
                    at = before;
                    run = self.runs.remove(&before).expect("just seen");
                }
                Err(unjoined) => run = unjoined,
            }
        }
        if let Some(right) = self.runs.remove(&end)
            && let Err(right) = run.join(right)
        {
            self.runs.insert(end, right);
        }
        self.runs.insert(at, run);
        removed
    }

    /// Covers `range` completely: runs cut to it, and `None` with a length for the holes between.
    pub fn cover(&self, range: Range<u64>) -> Vec<(Range<u64>, Option<R>)> {
        let mut out = Vec::new();
        let mut at = range.start;
        for (offset, run) in self.get(range.clone()) {
            if offset > at {
                out.push((at..offset, None));
            }
            at = offset + run.len();
            out.push((offset..at, Some(run)));
        }
        if at < range.end {
            out.push((at..range.end, None));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A run of consecutive numbers: joins when the numbers go on.
    #[derive(Clone, Debug, PartialEq)]
    struct Count {
        first: u64,
        len: u64,
    }

    impl Run for Count {
        fn len(&self) -> u64 {
            self.len
        }
        fn slice(&self, range: Range<u64>) -> Self {
            Count { first: self.first + range.start, len: range.end - range.start }
        }
        fn join(&mut self, next: Self) -> Result<(), Self> {
            if self.first + self.len != next.first {
                return Err(next);
            }
            self.len += next.len;
            Ok(())
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u64, u64),
        Remove(u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..60u64, 0..20u64, prop_oneof![Just(0u64), 0..4u64]).prop_map(|(at, len, shift)| Op::Insert(
                at,
                len,
                at + 100 * shift
            )),
            (0..60u64, 0..30u64).prop_map(|(at, len)| Op::Remove(at, len)),
        ]
    }

    proptest! {
        /// The oracle is an array of cells.
        #[test]
        fn behaves_like_an_array(ops in proptest::collection::vec(op(), 1..40)) {
            let mut cells = [None; 100];
            let mut map = IntervalMap::default();
            for op in ops {
                let (range, removed) = match op {
                    Op::Insert(at, len, first) => (at..at + len, map.insert(at, Count { first, len })),
                    Op::Remove(at, len) => (at..at + len, map.remove(at..at + len)),
                };
                let gone: Vec<(u64, u64)> = removed.iter().flat_map(|(at, r)| (0..r.len).map(move |i| (at + i, r.first + i))).collect();
                let expected: Vec<(u64, u64)> = range.clone().filter_map(|i| cells[i as usize].map(|v| (i, v))).collect();
                prop_assert_eq!(gone, expected);
                for i in range.clone() {
                    cells[i as usize] = match op { Op::Insert(at, _, first) => Some(first + i - at), Op::Remove(..) => None };
                }
                let mut last_end = None;
                for (at, run) in map.iter() {
                    prop_assert!(run.len > 0);
                    prop_assert!(last_end.is_none_or(|(end, next)| end < at || next != run.first), "unjoined neighbours at {at}");
                    last_end = Some((at + run.len, run.first + run.len));
                }
                for (r, run) in map.cover(0..100) {
                    for i in r.clone() {
                        prop_assert_eq!(cells[i as usize], run.as_ref().map(|run| run.first + i - r.start));
                    }
                }
            }
        }
    }
}
