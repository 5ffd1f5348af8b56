//! A hash for numbers that are given out in turn, by us or by the kernel: they need no defence against an adversary.

use std::hash::Hasher;

/// One multiplication.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, value: u64) {
        // The golden ratio's bits; the map takes low bits and high bits, so both must depend on all of them.
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_of_neighbours_differ_at_both_ends() {
        let hash = |ino: u64| {
            let mut hasher = NumberHasher::default();
            hasher.write_u64(ino);
            hasher.finish()
        };
        for shift in [0, 57] {
            let ends: std::collections::HashSet<u64> =
                (0..128).map(|i| hash(i * 64) >> shift & 0x7f).collect();
            assert!(ends.len() > 64, "{}", ends.len());
        }
    }
}
