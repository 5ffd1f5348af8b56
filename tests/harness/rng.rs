//! Randomness that can be had again.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// The generator of all randomised tests. Its sequence is fixed by the pinned version of `rand`.
pub type TestRng = StdRng;

/// The seed that was asked for.
///
/// # Panics
/// When `FJORD_SEED` is no number.
pub fn given() -> Option<u64> {
    let text = std::env::var("FJORD_SEED").ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("FJORD_SEED must be a number, not '{text}'")))
}

/// The seed of this run: `FJORD_SEED` if set, else a fresh one. Printed, so that a failure can be repeated.
///
/// # Panics
/// When `FJORD_SEED` is not a number.
pub fn seed(test: &str) -> u64 {
    let seed = given().unwrap_or_else(|| rand::rng().random_range(0..u64::from(u32::MAX)));
    eprintln!("{test}: repeat with FJORD_SEED={seed}");
    seed
}

/// A generator for one purpose within a test: other streams do not disturb it.
pub fn stream(seed: u64, purpose: u64) -> TestRng {
    StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(purpose))
}

/// `len` bytes that depend on `seed` only. Never compressible, never sparse.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    stream(seed, 0xB17E5).fill(&mut out[..]);
    out
}
