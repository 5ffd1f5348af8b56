//! Inputs that the benchmarks share. Run them with `cargo bench -p fjordfs-benches`; the whole-system workload is
//! `benches/run-workload.sh`.

use fjordfs_proto::{BlockId, Extent, Layout, Policy, ids::BlockAddr};

/// An extent of `length` bytes in a block of its own: neighbours never join, as in a fragmented file.
///
/// # Panics
/// Never: `replica:1` is a policy.
pub fn lone_extent(i: u64, length: u64) -> Extent {
    let layout = Layout::of(Policy::replica(1).expect("replica:1 is a policy"), length as usize);
    Extent::blocks(BlockAddr { block: BlockId(2 * i + 1), offset: 0 }, length, layout)
}
