//! Reading a few keys of a large range.
//!
//! etcd looks at every key of the range that it is asked for, whatever the limit, since its answer counts them; backwards it even reads
//! them all. So it is asked for windows of the range that hold a few times what is wanted, one after the other. How wide those are is
//! learnt, for each kind of key (its first byte): keys are prefix bytes and big-endian numbers, and their density differs by kind.

use std::ops::Range;

use parking_lot::Mutex;

use crate::store::Order;

/// Bytes of a key that a window's bounds are made of; what follows is of no account.
const DIGITS: usize = 16;
/// A window is 2^n wide, of this n at most: half of everything.
const WIDEST: u8 = 127;
/// At first: 128 numbers behind the first byte.
const WIDTH_DEFAULT: u8 = 63;
/// A window shall hold so many times what is wanted.
const SURPLUS: u64 = 4;
/// A window that held none is followed by one so much wider, in powers of two; if that holds none either, by one that is wider by twice
/// that, and so on.
const GROWTH: u8 = 6;
/// What was not answered in time is tried again so much narrower, in powers of two.
const SHRINK: u8 = 8;

/// What is known of the density of keys.
pub(super) struct Widths(Mutex<[u8; 256]>);

impl Default for Widths {
    fn default() -> Widths {
        Widths(Mutex::new([WIDTH_DEFAULT; 256]))
    }
}

/// The way through a range.
pub(super) struct Windows<'a> {
    widths: &'a Widths,
    rest: Range<Vec<u8>>,
    order: Order,
    /// Width that the next window has, once there was one, for which the learnt one served; and how many before it held none.
    wider: Option<(u8, u8)>,
    last: Option<Last>,
}

/// The last window.
#[derive(Clone, Copy)]
struct Last {
    width: u8,
    /// First byte of the keys at its beginning.
    kind: u8,
    /// It can hold keys of other kinds, too, and tells only of too great a width.
    mixed: bool,
}

impl Widths {
    pub(super) fn windows(&self, range: Range<Vec<u8>>, order: Order) -> Windows<'_> {
        Windows { widths: self, rest: range, order, wider: None, last: None }
    }
}

fn number(key: &[u8]) -> u128 {
    let mut digits = [0; DIGITS];
    let len = key.len().min(DIGITS);
    digits[..len].copy_from_slice(&key[..len]);
    u128::from_be_bytes(digits)
}

impl Windows<'_> {
    /// The next window; none when the range is at its end.
    pub(super) fn next(&mut self) -> Option<Range<Vec<u8>>> {
        if self.rest.start >= self.rest.end {
            return None;
        }
        let near = if self.order == Order::Ascending { &self.rest.start } else { &self.rest.end };
        let kind = near.first().copied().unwrap_or(0);
        let width = self.wider.map_or_else(|| self.widths.0.lock()[usize::from(kind)], |(width, _)| width);
        let span = 1u128 << width;
        let window = match self.order {
            Order::Ascending => {
                let end = number(near).checked_add(span).map(|end| end.to_be_bytes().to_vec());
                let end = end.filter(|end| *end < self.rest.end).unwrap_or_else(|| self.rest.end.clone());
                let start = std::mem::replace(&mut self.rest.start, end.clone());
                start..end
            }
            Order::Descending => {
                let start = number(near).checked_sub(span).map(|start| start.to_be_bytes().to_vec());
                let start =
                    start.filter(|start| *start > self.rest.start).unwrap_or_else(|| self.rest.start.clone());
                let end = std::mem::replace(&mut self.rest.end, start.clone());
                start..end
            }
        };
        self.last = Some(Last { width, kind, mixed: window.start.first() != window.end.first() });
        Some(window)
    }

    /// The last window held so many keys, and so many were wanted.
    pub(super) fn held(&mut self, count: u64, wanted: u64) {
        let Some(Last { width, kind, mixed }) = self.last else { return };
        self.wider = Some(if count == 0 {
            let empties = self.wider.map_or(0, |(_, empties)| empties);
            let growth = u32::from(GROWTH) << u32::from(empties).min(4);
            ((u32::from(width) + growth).min(WIDEST.into()) as u8, empties + 1)
        } else {
            let fitting = |wanted: u64| {
                let fitting = i64::from(wanted.saturating_mul(SURPLUS).max(1).ilog2())
                    - i64::from(count.ilog2())
                    + i64::from(width);
                fitting.clamp(0, WIDEST.into()) as u8
            };
            let learnt = &mut self.widths.0.lock()[usize::from(kind)];
            *learnt = if mixed { fitting(wanted).min(*learnt) } else { fitting(wanted) };
            (fitting(wanted.saturating_sub(count).max(1)), 0)
        });
    }

    /// The last window was not answered.
    pub(super) fn failed(&self) {
        if let Some(Last { width, kind, .. }) = self.last {
            self.widths.0.lock()[usize::from(kind)] = width.saturating_sub(SHRINK);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    type Keys = BTreeSet<Vec<u8>>;

    /// As etcd does it; the keys, and the most that a window held.
    fn read(
        keys: &Keys,
        widths: &Widths,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> (Vec<Vec<u8>>, usize) {
        let (mut found, mut most) = (Vec::new(), 0);
        let mut windows = widths.windows(range, order);
        while found.len() < limit {
            let Some(window) = windows.next() else { break };
            let mut held: Vec<Vec<u8>> = keys.range(window).cloned().collect();
            most = most.max(held.len());
            windows.held(held.len() as u64, (limit - found.len()) as u64);
            if order == Order::Descending {
                held.reverse();
            }
            held.truncate(limit - found.len());
            found.extend(held);
        }
        (found, most)
    }

    fn key() -> impl Strategy<Value = Vec<u8>> {
        let id = prop_oneof![0..300u64, any::<u64>()];
        (prop::sample::select(b"ADEZ".to_vec()), id, prop::option::of(any::<u64>()), "[a-z]{0,4}").prop_map(
            |(kind, id, second, name)| {
                let mut key = [&[kind], &id.to_be_bytes()[..]].concat();
                key.extend(second.map(u64::to_be_bytes).iter().flatten());
                key.extend(name.bytes());
                key
            },
        )
    }

    proptest! {
        #[test]
        fn windows_find_what_one_read_finds(
            keys in prop::collection::btree_set(key(), 0..300),
            reads in prop::collection::vec((key(), key(), any::<bool>(), 1usize..50), 1..20),
        ) {
            let widths = Widths::default();
            for (a, b, ascending, limit) in reads {
                let range = a.clone().min(b.clone())..a.max(b);
                let mut all: Vec<Vec<u8>> = keys.range(range.clone()).cloned().collect();
                let order = if ascending { Order::Ascending } else { all.reverse(); Order::Descending };
                all.truncate(limit);
                prop_assert_eq!(read(&keys, &widths, range, order, limit).0, all);
            }
        }
    }

    #[test]
    fn windows_learn_to_hold_little_more_than_what_is_wanted() {
        let mut keys: Keys = (0..100_000u64).map(|n| [&b"A"[..], &n.to_be_bytes()].concat()).collect();
        // One directory with many names, and many with few.
        let entry = |parent: u64, n: u64| {
            [&b"D"[..], &parent.to_be_bytes(), &fjordfs_proto::cluster::mix(n).to_be_bytes()].concat()
        };
        keys.extend((0..100_000).map(|n| entry(7, n)));
        keys.extend((0..20_000).map(|n| entry(100 + n / 4, n)));
        let end = vec![0xf0];
        for order in [Order::Ascending, Order::Descending] {
            let widths = Widths::default();
            for at in [[&b"A"[..], &50_000u64.to_be_bytes()].concat(), entry(7, 5), entry(3000, 0)] {
                let range = match order {
                    Order::Ascending => at..end.clone(),
                    Order::Descending => b"A".to_vec()..at,
                };
                // Some reads to learn by.
                for _ in 0..8 {
                    read(&keys, &widths, range.clone(), order, 128);
                }
                let (found, most) = read(&keys, &widths, range, order, 128);
                assert!(found.len() == 128 && most < 4000, "{most} keys were looked at for 128");
            }
        }
    }

    #[test]
    fn emptiness_is_crossed_in_a_few_windows() {
        let keys: Keys = [b"A".to_vec(), b"k".to_vec()].into();
        for (range, order) in [
            (b"A\0".to_vec()..vec![0xff], Order::Ascending),
            (b"l".to_vec()..vec![0xff], Order::Ascending),
            (vec![1]..b"k".to_vec(), Order::Descending),
        ] {
            let widths = Widths::default();
            let mut windows = widths.windows(range.clone(), order);
            let mut asked = 0;
            while let Some(window) = windows.next() {
                asked += 1;
                windows.held(keys.range(window).count() as u64, 128);
            }
            assert!(asked <= 8, "{asked} windows for {range:?}");
        }
    }

    #[test]
    fn what_is_not_answered_is_asked_in_smaller_windows() {
        let widths = Widths::default();
        let wide = |widths: &Widths| {
            let mut windows = widths.windows(b"A".to_vec()..b"B".to_vec(), Order::Ascending);
            let window = windows.next().unwrap();
            windows.failed();
            number(&window.end) - number(&window.start)
        };
        let first = wide(&widths);
        assert_eq!(wide(&widths), first >> SHRINK);
        assert_eq!(wide(&widths), first >> (2 * SHRINK));
    }
}
