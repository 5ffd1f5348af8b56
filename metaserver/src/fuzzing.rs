//! What the fuzzer of `tests/fuzz` reaches.

use std::hint::black_box;

use bytes::Bytes;
use fjordfs_proto::InodeId;
use prost::Message;

use crate::{
    backup, keys,
    records::{self, ExtentRecord},
};

/// Decodes a value as `M`, and requires that it means the same after it was written again.
fn value<M: Message + Default + PartialEq + std::fmt::Debug>(raw: &[u8]) -> Option<M> {
    let value: M = records::decode(Bytes::copy_from_slice(raw), || "a value".to_owned()).ok()?;
    let again = records::decode(value.encode_to_vec().into(), || "its copy".to_owned());
    assert!(again.is_ok_and(|again: M| again == value), "{value:?} does not come back");
    Some(value)
}

/// A dump brings back what is stored, whatever it is.
fn dumped(key: &[u8], value: &[u8]) {
    let back = backup::through_a_line(key, value);
    assert!(
        back.is_some_and(|pair| pair.0 == key && pair.1 == value),
        "{key:?} {value:?} does not come back"
    );
}

/// The tables of the kinds below, and how long their keys are behind the first byte.
const TABLES: [(u8, usize); 11] = [
    (keys::INODE, 8),
    (keys::DIRENT, 16),
    (keys::EXTENT, 16),
    (keys::LIVE, 8),
    (keys::RANGE, 16),
    (keys::DEAD, 8),
    (keys::SESSION, 8),
    (keys::MAP, 0),
    (keys::SLOT, 12),
    (keys::COUNTERS, 0),
    (keys::TARGET, 8),
];

/// Reads bytes as a key, and as a value of the kind that the first byte says. Whatever they are, nothing panics, and a dump has them.
pub fn record(bytes: &[u8]) {
    let Some((kind, raw)) = bytes.split_first() else { return };
    _ = black_box((keys::first_id(raw), keys::second_id(raw), keys::leased_inode(raw)));
    _ = black_box((keys::split_dirent(raw), keys::split_xattr(raw), keys::split_width(raw)));
    let (table, length) = TABLES[usize::from(kind % 11)];
    dumped(&[&[table][..], &[7; 16][..length]].concat(), raw);
    dumped(&[&[table], raw].concat(), raw);
    match kind % 11 {
        0 => _ = black_box(value::<records::Inode>(raw).map(|inode| inode.attr(InodeId(7)))),
        1 => _ = black_box(value::<records::Dirent>(raw)),
        2 => {
            let offset = raw.first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
            let extent = value::<ExtentRecord>(raw).and_then(|r| r.extent(InodeId(7), offset).ok());
            // One that is believed is one that can be stored.
            if let Some(extent) = extent {
                let again = ExtentRecord::new(&extent).extent(InodeId(7), offset);
                assert_eq!(again.ok(), Some(extent));
            }
        }
        3 => _ = black_box(value::<records::LiveBlock>(raw)),
        4 => _ = black_box(value::<records::LeasedRange>(raw)),
        5 => _ = black_box(value::<records::DeadRun>(raw)),
        6 => _ = black_box(value::<records::SessionRecord>(raw).map(|session| session.ranges())),
        7 => _ = black_box(value::<records::InodeRange>(raw)),
        8 => _ = black_box(value::<records::SlotRecord>(raw)),
        9 => _ = black_box(value::<records::Counters>(raw)),
        _ => _ = black_box(value::<records::TargetRecord>(raw)),
    }
}

#[cfg(test)]
#[path = "../../tests/fuzz/inputs.rs"]
mod inputs;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::inputs::{corpus, like};

    #[test]
    fn the_corpus_comes_back() {
        corpus("records").iter().for_each(|input| super::record(input));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20000))]
        #[test]
        fn what_is_like_it_comes_back_or_is_refused(input in like(corpus("records"))) {
            super::record(&input);
        }
    }
}
