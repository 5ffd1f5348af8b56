//! Blocks shared by copy_file_range.

use fjordfs_proto::{BLOCK_SIZE_MAX, ROOT_INODE, error::Errno::*, pb::meta::*};
use proptest::prelude::*;

use crate::testing::{World, errno, inline, run};

const BLOCK: u64 = BLOCK_SIZE_MAX as u64;

#[test]
fn a_copy_shares_the_blocks_and_outlives_its_source() {
    let mut w = World::new();
    let (f, g, b) = (w.file("f"), w.file("g"), w.lease(4));
    w.write(f, vec![run(0, 3 * BLOCK, b, 0)]).unwrap();
    w.write(g, vec![run(0, BLOCK, b + 3, 0)]).unwrap();
    w.pass(std::time::Duration::from_secs(5));
    let (copied, attr) = w.copy((f, 100), (g, 200), 2 * BLOCK).unwrap();
    assert_eq!((copied, attr.size, attr.allocated), (2 * BLOCK, 2 * BLOCK + 200, 2 * BLOCK + 200));
    assert_eq!((attr.data_version, attr.mtime.unwrap().sec), (2, 1005));
    w.check();
    w.remove(ROOT_INODE, "f", false).unwrap();
    assert_eq!(w.deleted_blocks(), [0u64; 0], "the copy reaches a part of each");
    w.check();
    w.truncate(g, 200 + BLOCK - 100).unwrap();
    assert_eq!(w.deleted_blocks(), [b + 1, b + 2]);
    w.remove(ROOT_INODE, "g", false).unwrap();
    assert_eq!(w.deleted_blocks(), [b, b + 3]);
    assert_eq!(w.check().blocks_live, 0);
}

#[test]
fn holes_and_the_end_of_the_source_are_copied_too() {
    let mut w = World::new();
    let (f, g, b) = (w.file("f"), w.file("g"), w.lease(4));
    w.write(f, vec![run(1000, 1000, b, 0)]).unwrap();
    w.truncate(f, 5000).unwrap();
    w.write(g, vec![run(0, 10_000, b + 1, 0)]).unwrap();
    let (copied, attr) = w.copy((f, 0), (g, 0), 1 << 40).unwrap();
    assert_eq!((copied, attr.size), (5000, 10_000));
    assert_eq!(w.extents(g), [(1000, 1000), (5000, 5000)]);
    assert_eq!(w.copy((f, 5000), (g, 0), 10).unwrap().0, 0);
    let (copied, attr) = w.copy((f, 3000), (g, 20_000), 2000).unwrap();
    assert_eq!((copied, attr.size), (2000, 22_000), "a hole makes the target longer");
    w.check();
}

#[test]
fn what_cannot_be_shared_is_left_to_the_caller() {
    let mut w = World::new();
    let (f, g, d) = (w.file("f"), w.file("g"), w.dir(ROOT_INODE, "d"));
    w.write(f, vec![inline(0, b"hello")]).unwrap();
    assert_eq!(w.copy((f, 1), (g, 3), 3).unwrap().0, 3);
    assert_eq!(errno(w.copy((f, 0), (g, 9000), 5)), EOPNOTSUPP, "inline bytes belong to the start of a file");
    let b = w.lease(1);
    w.write(f, vec![run(5, 1000, b, 0)]).unwrap();
    assert_eq!(errno(w.copy((f, 0), (f, 500), 600)), EINVAL);
    assert_eq!(errno(w.copy((d, 0), (f, 0), 1)), EISDIR);
    assert_eq!(errno(w.copy((f, 0), (g, u64::MAX >> 1), 5)), EFBIG);
    w.setattr(SetAttr { ino: d.0, policy: Some(1), ..SetAttr::default() }).unwrap();
    let single = w.make(d, "single", FileKind::Regular).unwrap();
    assert_eq!(w.copy((f, 0), (single, 0), 1000).unwrap().0, 5, "the blocks have another policy");
    assert_eq!(errno(w.copy((f, 5), (single, 5), 1000)), EOPNOTSUPP);
    w.check();
}

#[test]
fn what_is_moved_is_the_same_file_and_whoever_changes_it_wins() {
    let mut w = World::new();
    let (f, anew, b) = (w.file("f"), w.file("anew"), w.lease(4));
    let before = w.write(f, vec![run(0, 3000, b, 0), run(3000, 5000, b, 9000)]).unwrap();
    w.write(anew, vec![run(0, 20_000, b + 1, 0)]).unwrap();
    w.pass(std::time::Duration::from_secs(5));
    let version = Some(before.data_version);
    let (copied, attr) = w.take_copy((anew, 6000), (f, 0), 3000, version).unwrap();
    assert_eq!(copied, 3000);
    assert_eq!(
        (attr.data_version, attr.mtime, attr.ctime),
        (before.data_version, before.mtime, before.ctime)
    );
    assert_eq!(w.deleted_blocks(), [0u64; 0], "the file still uses a part of it");
    w.take_copy((anew, 9000), (f, 3000), 5000, version).unwrap();
    assert_eq!(w.deleted_blocks(), [b]);
    w.remove(ROOT_INODE, "anew", false).unwrap();
    w.check();
    let other = w.file("other");
    w.write(other, vec![run(0, 20_000, b + 2, 0)]).unwrap();
    w.write(f, vec![run(100, 10, b + 3, 0)]).unwrap();
    assert_eq!(errno(w.take_copy((other, 0), (f, 0), 3000, version)), EAGAIN);
    assert_eq!(w.deleted_blocks(), [0u64; 0]);
    w.remove(ROOT_INODE, "f", false).unwrap();
    assert_eq!(w.deleted_blocks(), [b + 1, b + 3]);
    w.check();
}

proptest! {
    /// The oracle is an array with the block and the offset of every byte's unit; the checker counts live bytes.
    #[test]
    fn copies_read_as_their_source_did(
        ops in proptest::collection::vec((0..4u8, 0..3usize, 0..3usize, 0..20u64, 0..20u64, 1..12u64), 1..40)
    ) {
        const UNIT: u64 = 10_000;
        let mut w = World::new();
        let files: Vec<_> = (0..3).map(|i| w.file(&format!("f{i}"))).collect();
        let mut model: Vec<Vec<Option<(u64, u64)>>> = vec![Vec::new(); 3];
        for (kind, a, b, from, to, length) in ops {
            match kind {
                0 | 1 => {
                    let block = w.lease(1);
                    w.write(files[a], vec![run(from * UNIT, length * UNIT, block, 0)]).unwrap();
                    let end = (from + length) as usize;
                    let grown = model[a].len().max(end);
                    model[a].resize(grown, None);
                    (0..length).for_each(|i| model[a][(from + i) as usize] = Some((block, i * UNIT)));
                }
                2 => {
                    w.truncate(files[a], from * UNIT).unwrap();
                    model[a].resize(from as usize, None);
                }
                _ => {
                    let copied = w.copy((files[a], from * UNIT), (files[b], to * UNIT), length * UNIT);
                    let available = (model[a].len() as u64).saturating_sub(from).min(length);
                    if a == b && available > 0 && from.abs_diff(to) < available {
                        prop_assert_eq!(errno(copied), EINVAL);
                        continue;
                    }
                    prop_assert_eq!(copied.unwrap().0, available * UNIT);
                    let taken: Vec<_> = (from..from + available).map(|i| model[a][i as usize]).collect();
                    if available > 0 {
                        let grown = model[b].len().max((to + available) as usize);
                        model[b].resize(grown, None);
                        model[b][to as usize..(to + available) as usize].copy_from_slice(&taken);
                    }
                }
            }
        }
        for (file, units) in files.iter().zip(&model) {
            let mut found = vec![None; units.len()];
            for e in w.whole_extents(*file) {
                for i in 0..e.length / UNIT {
                    let at = u64::from(e.block_offset) + i * UNIT;
                    found[(e.offset / UNIT + i) as usize] = Some((e.block, at));
                }
            }
            prop_assert_eq!(&found, units);
        }
        w.check();
        for i in 0..3 {
            w.remove(ROOT_INODE, &format!("f{i}"), false).unwrap();
        }
        w.tick();
        prop_assert_eq!(w.check().blocks_live, 0);
    }
}
