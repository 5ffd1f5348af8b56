//! Redundancy of a block.

use std::{fmt, num::NonZeroU8, str::FromStr};

/// How a block is spread over the targets of its placement group.
///
/// The 16-bit code is what extents and shard headers store: `replica:N` is `N`, `ec:K+M` is `K << 8 | M`.
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
#[error("'{0}' is not a policy: write replica:N with N from 1 to 16")]
pub struct PolicyError(pub String);

/// Most copies a block may have.
pub const REPLICAS_MAX: u8 = 16;

impl Policy {
    /// `replica:n`; `None` when n is 0 or above [`REPLICAS_MAX`].
    pub fn replica(n: u8) -> Option<Policy> {
        NonZeroU8::new(n).filter(|n| n.get() <= REPLICAS_MAX).map(Policy::Replica)
    }

    /// Number of targets a block needs.
    pub fn width(self) -> usize {
        match self {
            Policy::Replica(n) => n.get().into(),
            Policy::Ec { k, m } => usize::from(k.get()) + usize::from(m.get()),
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
            Some(k) => Some(Policy::Ec { k, m: NonZeroU8::new(m)? }),
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

    /// Accepts `replica:N`. `ec:K+M` is a known code but cannot be chosen before erasure coding exists.
    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        text.strip_prefix("replica:")
            .and_then(|n| n.parse().ok())
            .and_then(Policy::replica)
            .ok_or_else(|| PolicyError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_code_round_trip() {
        for n in 1..=REPLICAS_MAX {
            let p: Policy = format!("replica:{n}").parse().unwrap();
            assert_eq!((p.width(), p.to_string()), (usize::from(n), format!("replica:{n}")));
            assert_eq!(Policy::from_code(p.code().into()), Some(p));
        }
        let ec = Policy::from_code(8 << 8 | 2).unwrap();
        assert_eq!((ec.to_string().as_str(), ec.width(), ec.losses_survived()), ("ec:8+2", 10, 2));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in
            ["", "replica", "replica:0", "replica:17", "replica:-1", "ec:8+2", "mirror:2", "replica:256"]
        {
            assert!(text.parse::<Policy>().is_err(), "{text}");
        }
        for code in [0, 17, 256, 1 << 16, u32::MAX] {
            assert_eq!(Policy::from_code(code), None, "{code}");
        }
    }
}
