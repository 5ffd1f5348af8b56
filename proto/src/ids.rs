//! One newtype per id, so that no bare integer crosses a crate.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id!(
    /// An inode number, never reused.
    InodeId(u64), "i"
);
id!(
    /// An immutable block; ids come from ranges leased to sessions and are never reused.
    BlockId(u64), "b"
);
id!(
    /// A data server.
    ServerId(u64), "s"
);
id!(
    /// One device (a directory or partition) of a data server.
    TargetId(u64), "t"
);
id!(
    /// A placement group within the tables of its era.
    PgId(u32), "pg"
);
id!(
    /// A mounted client.
    SessionId(u64), "session "
);
id!(
    /// An open file of a session; chosen by the client.
    HandleId(u64), "h"
);
id!(
    /// Version of the cluster map.
    Epoch(u64), "e"
);
id!(
    /// Position of a shard in its block's placement group.
    ShardNo(u8), "#"
);

/// Address of a byte in the linear space of all blocks: block id × 16 MiB + offset in the block.
///
/// Consecutive full blocks are consecutive addresses, so a run of them is one extent.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockAddr {
    /// The block.
    pub block: BlockId,
    /// Offset in the block, bytes, below [`crate::BLOCK_SIZE_MAX`].
    pub offset: u32,
}

impl BlockAddr {
    /// The address `bytes` further on.
    pub fn advance(self, bytes: u64) -> BlockAddr {
        let max = crate::BLOCK_SIZE_MAX as u64;
        let linear = u64::from(self.offset) + bytes;
        BlockAddr { block: BlockId(self.block.0.wrapping_add(linear / max)), offset: (linear % max) as u32 }
    }
}

impl fmt::Debug for BlockAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.block, self.offset)
    }
}
