//! Redundancy of newly written blocks. What became of one block says its [`crate::Layout`].

use std::{fmt, num::NonZeroU8, str::FromStr};

/// How blocks are spread over the targets of their placement groups.
///
/// The 16-bit code is what inodes and shard headers store: `replica:N` is `N`, `ec:K+M` is `K << 8 | M`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Policy {
    /// N whole copies.
    Replica(NonZeroU8),
    /// K data shards and M parity shards: any K of them restore the block.
    Ec {
        /// Data shards.
        k: NonZeroU8,
        /// Parity shards.
        m: NonZeroU8,
    },
}

/// A policy that was misspelt or that this version does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a policy: write replica:N with N from 1 to {WIDTH_MAX}, or ec:K+M with K and M from 1 and at most {WIDTH_MAX} together"
)]
pub struct PolicyError(pub String);

/// Most targets a block may be spread over.
pub const WIDTH_MAX: u8 = 32;

impl Policy {
    /// `replica:n`; `None` when n is 0 or above [`WIDTH_MAX`].
    pub fn replica(n: u8) -> Option<Policy> {
        NonZeroU8::new(n).filter(|n| n.get() <= WIDTH_MAX).map(Policy::Replica)
    }

    /// `ec:k+m`; `None` when one of them is 0 or they are more than [`WIDTH_MAX`] together.
    pub fn ec(k: u8, m: u8) -> Option<Policy> {
        let (k, m) = (NonZeroU8::new(k)?, NonZeroU8::new(m)?);
        k.get().checked_add(m.get()).filter(|width| *width <= WIDTH_MAX).map(|_| Policy::Ec { k, m })
    }

    /// Number of targets a block needs, at most.
    pub fn width(self) -> usize {
        match self {
            Policy::Replica(n) => n.get().into(),
            Policy::Ec { k, m } => usize::from(k.get()) + usize::from(m.get()),
        }
    }

    /// Number of targets that each kind of block of this policy is spread over: whole copies of small ones too, under
    /// `ec:K+M`.
    pub fn widths(self) -> impl Iterator<Item = usize> {
        let copies = match self {
            Policy::Replica(_) => None,
            Policy::Ec { m, .. } => Some(usize::from(m.get()) + 1),
        };
        std::iter::once(self.width()).chain(copies)
    }

    /// What fits into `raw` bytes of targets, as large blocks.
    pub fn usable(self, raw: u64) -> u64 {
        (u128::from(raw) * u128::from(self.data_shards()) / self.width() as u128) as u64
    }

    /// Shards that a large block's own bytes are spread over.
    pub fn data_shards(self) -> u8 {
        match self {
            Policy::Replica(_) => 1,
            Policy::Ec { k, .. } => k.get(),
        }
    }

    /// Targets that may be lost without losing the block.
    pub fn losses_survived(self) -> usize {
        match self {
            Policy::Replica(n) => usize::from(n.get()) - 1,
            Policy::Ec { m, .. } => m.get().into(),
        }
    }

    /// The stored form.
    pub fn code(self) -> u16 {
        match self {
            Policy::Replica(n) => n.get().into(),
            Policy::Ec { k, m } => u16::from(k.get()) << 8 | u16::from(m.get()),
        }
    }

    /// From the stored form; `None` for a code no version has written.
    pub fn from_code(code: u32) -> Option<Policy> {
        let [_, _, k, m] = code.to_be_bytes();
        if code > u32::from(u16::MAX) {
            return None;
        }
        match NonZeroU8::new(k) {
            None => Policy::replica(m),
            Some(k) => Policy::ec(k.get(), m),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Policy::Replica(n) => write!(f, "replica:{n}"),
            Policy::Ec { k, m } => write!(f, "ec:{k}+{m}"),
        }
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        let policy = match text.split_once(':') {
            Some(("replica", n)) => number(n).and_then(Policy::replica),
            Some(("ec", shards)) => {
                shards.split_once('+').and_then(|(k, m)| Policy::ec(number(k)?, number(m)?))
            }
            _ => None,
        };
        policy.ok_or_else(|| PolicyError(text.to_owned()))
    }
}

/// Digits only: `parse` alone would take a sign.
fn number(text: &str) -> Option<u8> {
    text.parse().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_code_round_trip() {
        for n in 1..=WIDTH_MAX {
            let p: Policy = format!("replica:{n}").parse().unwrap();
            assert_eq!((p.width(), p.to_string()), (usize::from(n), format!("replica:{n}")));
            assert_eq!(Policy::from_code(p.code().into()), Some(p));
        }
        for (k, m) in (1..WIDTH_MAX).flat_map(|k| (1..=WIDTH_MAX - k).map(move |m| (k, m))) {
            let p: Policy = format!("ec:{k}+{m}").parse().unwrap();
            assert_eq!((p.width(), p.losses_survived()), (usize::from(k + m), usize::from(m)));
            assert_eq!(p.to_string(), format!("ec:{k}+{m}"));
            assert_eq!(Policy::from_code(p.code().into()), Some(p));
        }
    }

    #[test]
    fn capacity_is_counted_without_redundancy() {
        let usable = |text: &str| text.parse::<Policy>().unwrap().usable(1000);
        assert_eq!(usable("replica:2"), 500);
        assert_eq!(usable("ec:2+2"), 500);
        assert_eq!(usable("ec:8+2"), 800);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "replica",
            "replica:0",
            "replica:33",
            "replica:-1",
            "replica:+1",
            "mirror:2",
            "replica:256",
            "ec:0+1",
            "ec:1+0",
            "ec:30+3",
            "ec:2",
            "ec:2+1+1",
            "ec:+2+1",
            "ec:255+1",
        ] {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
        for code in [0, 33, 256, 30 << 8 | 3, 255 << 8 | 255, 1 << 16, u32::MAX] {
            assert_eq!(Policy::from_code(code), None, "{code}");
        }
    }
}
