//! Reed-Solomon coding of shards: parity from data, and any lost shard from any K others.
//!
//! Used by clients, which encode what they write and decode what they cannot read, and by data servers, which restore
//! lost shards. The code is linear and works byte by byte, so a range of a lost shard needs that same range of K others.
//!
//! # The matrix
//! Arithmetic is in GF(2^8) modulo x^8+x^4+x^3+x^2+1 (0x11d). Parity shard j is the sum over the data shards i of
//! `c(j, i) * data(i)`, where c is the Cauchy matrix `1 / ((255 - j) ^ i)` with each column and then each row divided by
//! its first element. Every square part of a Cauchy matrix is regular, and scaling rows and columns leaves it so: any K
//! shards restore the rest. Its first row is all ones: the first parity shard is the XOR of the data shards, and a
//! single lost shard is restored with XORs alone. The matrix is a format: it never changes.
//!
//! Decoding applies one row of coefficients to K shards, as encoding does: it costs the same per byte restored.

use bytes::Bytes;
use fec_rs::galois;

use crate::{Layout, block::PageCrcs, layout::split};

/// Bytes of each shard that are worked on at a time: K + M of them and the tables stay in the caches.
const TILE: usize = 16 << 10;

/// A code of K data shards and M parity shards.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Code {
    k: u8,
    m: u8,
}

/// A shard that cannot be restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// Too few others.
    #[error("{have} shards are there, {need} are needed")]
    TooFew {
        /// Different shards given.
        have: usize,
        /// K.
        need: usize,
    },
    /// Not of this code, or not of one length.
    #[error("shards that do not fit together: {0}")]
    Mismatch(&'static str),
}

/// A block ready to be stored.
#[derive(Clone, Debug)]
pub struct Shards {
    /// Bytes of each shard, in parts; data shards first.
    pub parts: Vec<Vec<Bytes>>,
    /// Integrity entries of each shard.
    pub page_crcs: Vec<Bytes>,
}

/// Coefficient of data shard `i` in parity shard `j`.
fn coefficient(j: u8, i: u8) -> u8 {
    let cauchy = |j: u8, i: u8| galois::div(1, (255 - j) ^ i);
    let column_scaled = |j, i| galois::div(cauchy(j, i), cauchy(0, i));
    galois::div(column_scaled(j, i), column_scaled(j, 0))
}

impl Code {
    /// The code of a layout; `None` for copies.
    pub fn of(layout: Layout) -> Option<Code> {
        match layout {
            Layout::Copies(_) => None,
            Layout::Ec { k, m, .. } => Some(Code { k: k.get(), m: m.get() }),
        }
    }

    /// Row of the generator matrix: what of each data shard a shard is.
    fn row(self, shard: u8) -> Vec<u8> {
        (0..self.k)
            .map(|i| if shard < self.k { u8::from(shard == i) } else { coefficient(shard - self.k, i) })
            .collect()
    }

    /// Parity and integrity entries of data shards of one length, in one pass over their bytes.
    fn encode<B: AsMut<[u8]> + AsRef<[u8]> + Into<Bytes>>(
        self,
        mut parts: Vec<Vec<Bytes>>,
        mut parity: Vec<B>,
        size: usize,
    ) -> Shards {
        let rows: Vec<Vec<u8>> = (self.k..self.k + self.m).map(|shard| self.row(shard)).collect();
        let mut crcs = vec![PageCrcs::with_capacity(size); usize::from(self.k + self.m)];
        let mut cursors: Vec<Cursor<'_>> = parts.iter().map(|parts| Cursor::new(parts)).collect();
        for start in (0..size).step_by(TILE) {
            let end = size.min(start + TILE);
            for (i, cursor) in cursors.iter_mut().enumerate() {
                let mut at = start;
                while let Some(piece) = cursor.next(end - at) {
                    crcs[i].update(piece);
                    for (row, parity) in rows.iter().zip(&mut parity) {
                        add(row[i], piece, &mut parity.as_mut()[at..at + piece.len()], i == 0);
                    }
                    at += piece.len();
                }
            }
            for (crcs, parity) in crcs[usize::from(self.k)..].iter_mut().zip(&parity) {
                crcs.update(&parity.as_ref()[start..end]);
            }
        }
        parts.extend(parity.into_iter().map(|parity| vec![parity.into()]));
        Shards { parts, page_crcs: crcs.into_iter().map(|crcs| crcs.finish().into()).collect() }
    }

    /// Restores bytes of shard `lost` from the same range of `present`, the first K of which are used.
    ///
    /// # Errors
    /// When there are fewer than K, or they are not different shards of this code with equally many bytes.
    pub fn restore(self, present: &[(u8, &[u8])], lost: u8) -> Result<Vec<u8>, CodeError> {
        let k = usize::from(self.k);
        let present = present.get(..k).ok_or(CodeError::TooFew { have: present.len(), need: k })?;
        let length = present.first().map_or(0, |(_, bytes)| bytes.len());
        if present.iter().any(|(_, bytes)| bytes.len() != length) {
            return Err(CodeError::Mismatch("of different lengths"));
        }
        let shards: Vec<u8> = present.iter().map(|(shard, _)| *shard).collect();
        let weights = self.weights(&shards, lost)?;
        let mut out = vec![0; length];
        for start in (0..length).step_by(TILE) {
            let tile = start..length.min(start + TILE);
            let mut first = true;
            for ((_, bytes), weight) in present.iter().zip(&weights) {
                if *weight != 0 {
                    add(*weight, &bytes[tile.clone()], &mut out[tile.clone()], first);
                    first = false;
                }
            }
        }
        Ok(out)
    }

    /// What of each of the K shards `present` the shard `lost` is: x with x * A = row(lost), where the rows of A are
    /// those of the present shards.
    fn weights(self, present: &[u8], lost: u8) -> Result<Vec<u8>, CodeError> {
        let width = self.k + self.m;
        if lost >= width || present.iter().any(|shard| *shard >= width) {
            return Err(CodeError::Mismatch("a number that the code does not have"));
        }
        let k = present.len();
        // Equation i: the weights times column i of A, and on the right element i of the row wanted.
        let rows: Vec<Vec<u8>> = present.iter().map(|shard| self.row(*shard)).collect();
        let wanted = self.row(lost);
        let mut equations: Vec<Vec<u8>> =
            (0..k).map(|i| rows.iter().map(|row| row[i]).chain([wanted[i]]).collect()).collect();
        for at in 0..k {
            let pivot = (at..k).find(|i| equations[*i][at] != 0);
            // Any K different rows are independent.
            let pivot = pivot.ok_or(CodeError::Mismatch("the same shard twice"))?;
            equations.swap(at, pivot);
            let divisor = equations[at][at];
            equations[at].iter_mut().for_each(|value| *value = galois::div(*value, divisor));
            let pivot = equations[at].clone();
            for (i, equation) in equations.iter_mut().enumerate() {
                let factor = equation[at];
                if i != at && factor != 0 {
                    galois::mul_slice_xor(factor, &pivot, equation);
                }
            }
        }
        Ok(equations.iter().map(|equation| equation[k]).collect())
    }
}

/// Adds `weight * input` to `out`, or puts it there.
fn add(weight: u8, input: &[u8], out: &mut [u8], first: bool) {
    if first {
        galois::mul_slice(weight, input, out);
    } else {
        galois::mul_slice_xor(weight, input, out);
    }
}

/// The shards of a block that is given in parts, for `layout`. `buffer` gives memory of the size it is asked for, whatever
/// is in it, for one parity shard. CPU bound: about a millisecond a block.
pub fn encode<B: AsMut<[u8]> + AsRef<[u8]> + Into<Bytes>>(
    layout: Layout,
    parts: &[Bytes],
    mut buffer: impl FnMut(usize) -> B,
) -> Shards {
    let (Some(code), Some(size)) = (Code::of(layout), layout.shard_size()) else {
        let crcs: Bytes = crate::block::page_crcs_of(parts.iter().map(|p| &p[..])).into();
        return Shards { parts: vec![parts.to_vec(); layout.width()], page_crcs: vec![crcs; layout.width()] };
    };
    let size = size as usize;
    let parity = (0..code.m).map(|_| buffer(size)).collect();
    code.encode(split(parts, code.k.into(), size), parity, size)
}

/// Walks over bytes that lie in parts.
struct Cursor<'a> {
    parts: std::slice::Iter<'a, Bytes>,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn new(parts: &'a [Bytes]) -> Cursor<'a> {
        Cursor { parts: parts.iter(), rest: &[] }
    }

    /// The next bytes that lie together, at most `most`; `None` when that is 0, or at the end.
    fn next(&mut self, most: usize) -> Option<&'a [u8]> {
        while self.rest.is_empty() {
            self.rest = self.parts.next()?;
        }
        let (piece, rest) = self.rest.split_at(most.min(self.rest.len()));
        self.rest = rest;
        (!piece.is_empty()).then_some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAGE_SIZE, Policy, block::page_crcs};
    use proptest::prelude::*;

    /// Multiplication bit by bit, as the definition has it: the field is part of the format, whatever the crate does.
    fn slow_mul(a: u8, b: u8) -> u8 {
        let mut product = 0u16;
        for bit in 0..8 {
            if b >> bit & 1 == 1 {
                product ^= u16::from(a) << bit;
            }
        }
        for bit in (8..15).rev() {
            if product >> bit & 1 == 1 {
                product ^= 0x11d << (bit - 8);
            }
        }
        product as u8
    }

    #[test]
    fn the_field_is_the_one_of_the_format() {
        for (a, b) in (0..=255).flat_map(|a| (0..=255).map(move |b| (a, b))) {
            assert_eq!(galois::mul(a, b), slow_mul(a, b));
            if b != 0 {
                assert_eq!(slow_mul(galois::div(a, b), b), a);
            }
        }
        let input: Vec<u8> = (0..=255).cycle().take(1000).collect();
        for weight in 0..=255 {
            let mut out = vec![0x5a; input.len()];
            galois::mul_slice_xor(weight, &input, &mut out);
            assert!(out.iter().zip(&input).all(|(o, i)| *o == 0x5a ^ slow_mul(weight, *i)));
            galois::mul_slice(weight, &input, &mut out);
            assert!(out.iter().zip(&input).all(|(o, i)| *o == slow_mul(weight, *i)));
        }
    }

    #[test]
    fn the_matrix_is_the_one_of_the_format() {
        let row = |j| (0..6).map(|i| coefficient(j, i)).collect::<Vec<_>>();
        assert_eq!(row(0), [1; 6]);
        assert_eq!(row(1), [1, 231, 253, 2, 183, 171]);
        assert_eq!(row(2), [1, 253, 190, 44, 150, 39]);
    }

    fn block(seed: u64, length: usize) -> Vec<u8> {
        (0..length as u64).map(|i| ((i * 0x9e37_79b9 + seed * 77) >> 7) as u8).collect()
    }

    fn shards(policy: Policy, block: &[u8], cut: usize) -> (Code, Vec<Vec<u8>>) {
        let layout = Layout::of(policy, block.len());
        let parts: Vec<Bytes> = block.chunks(cut).map(Bytes::copy_from_slice).collect();
        let encoded = encode(layout, &parts, |size| vec![0x5a; size]);
        let shards: Vec<Vec<u8>> = encoded.parts.iter().map(|parts| parts.concat()).collect();
        for (shard, crcs) in shards.iter().zip(&encoded.page_crcs) {
            assert_eq!(&page_crcs(shard), crcs);
        }
        (Code::of(layout).unwrap(), shards)
    }

    /// Every shard, from every choice of K others.
    fn every_loss(k: u8, m: u8) {
        let width = usize::from(k + m);
        let (code, shards) =
            shards(Policy::ec(k, m).unwrap(), &block(1, usize::from(k) * (64 << 10) + 5), 10_000);
        assert_eq!(shards.len(), width);
        let range = 4096..4096 + 100;
        for chosen in (0u32..1 << width).filter(|mask| mask.count_ones() == u32::from(k)) {
            let present: Vec<(u8, &[u8])> = (0..k + m)
                .filter(|shard| chosen >> shard & 1 == 1)
                .map(|shard| (shard, &shards[usize::from(shard)][range.clone()]))
                .collect();
            for lost in 0..k + m {
                let restored = code.restore(&present, lost).unwrap();
                assert_eq!(
                    restored,
                    shards[usize::from(lost)][range.clone()],
                    "{lost} from {chosen:b} of {k}+{m}"
                );
            }
        }
    }

    #[test]
    fn any_k_shards_restore_every_other() {
        for (k, m) in [(2, 1), (2, 2), (3, 2), (4, 2), (5, 3), (8, 2), (10, 4), (2, 6)] {
            every_loss(k, m);
        }
    }

    #[test]
    fn what_cannot_be_restored_is_refused() {
        let code = Code { k: 2, m: 1 };
        let (a, b): (&[u8], &[u8]) = (&[1; 8], &[2; 9]);
        assert_eq!(code.restore(&[(0, a)], 1), Err(CodeError::TooFew { have: 1, need: 2 }));
        for present in [[(0, a), (0, a)], [(0, a), (2, b)], [(0, a), (3, a)]] {
            assert!(matches!(code.restore(&present, 1), Err(CodeError::Mismatch(_))), "{present:?}");
        }
        assert!(code.restore(&[(0, a), (2, a)], 3).is_err());
    }

    proptest! {
        /// The oracle adds up products byte by byte.
        #[test]
        fn parity_is_what_the_matrix_says(k in 2..32u8, m in 1..31u8, seed: u64, cut in 1..300_000usize, at in any::<prop::sample::Index>()) {
            let Some(policy) = Policy::ec(k, m) else { return Ok(()) };
            let length = usize::from(k) * crate::layout::SPLIT_MIN + PAGE_SIZE / 2;
            let (_, shards) = shards(policy, &block(seed % 1000, length), cut);
            let at = at.index(shards[0].len());
            for j in 0..m {
                let sum = (0..k).fold(0, |sum, i| sum ^ slow_mul(coefficient(j, i), shards[usize::from(i)][at]));
                prop_assert_eq!(sum, shards[usize::from(k + j)][at]);
            }
        }

        #[test]
        fn wide_codes_survive_any_loss(k in 2..32u8, m in 1..31u8, order in Just((0..32u8).collect::<Vec<_>>()).prop_shuffle()) {
            let Some(policy) = Policy::ec(k, m) else { return Ok(()) };
            let length = usize::from(k) * crate::layout::SPLIT_MIN;
            let (code, shards) = shards(policy, &block(3, length), 1 << 20);
            let order: Vec<u8> = order.into_iter().filter(|shard| *shard < k + m).collect();
            let (present, lost) = order.split_at(k.into());
            let present: Vec<(u8, &[u8])> = present.iter().map(|i| (*i, &shards[usize::from(*i)][..512])).collect();
            for lost in lost {
                prop_assert_eq!(&code.restore(&present, *lost).unwrap(), &shards[usize::from(*lost)][..512]);
            }
        }
    }
}
