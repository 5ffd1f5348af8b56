//! Records that several append to one file.
//!
//! A record names its writer, its number among that writer's, and its length, and its bytes depend on these: one that was torn,
//! overwritten or mixed with another shows.

use std::collections::{BTreeMap, BTreeSet};

use crate::rng;

const MAGIC: u32 = 0x464a_5244;
const HEADER: usize = 16;

/// Writer and number of a record.
pub type Record = (u32, u32);

/// The bytes of a record; `length` is that of its body.
pub fn record((writer, number): Record, length: usize) -> Vec<u8> {
    let words = [MAGIC, writer, number, u32::try_from(length).expect("records are short")];
    let mut bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    bytes.extend(rng::bytes(u64::from(writer) << 32 | u64::from(number), length));
    bytes
}

/// The records of a file.
///
/// # Errors
/// Where it is not a whole one.
pub fn records(content: &[u8]) -> Result<Vec<Record>, String> {
    let mut found = Vec::new();
    let mut rest = content;
    while !rest.is_empty() {
        let at = content.len() - rest.len();
        let wrong = |what: &str| format!("at {at} of {}: {what} after {:?}", content.len(), found.last());
        let header = rest.get(..HEADER).ok_or_else(|| wrong("half a header"))?;
        let word = |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]);
        if word(0) != MAGIC {
            return Err(wrong(&format!("no record but {:?}", &header[..8])));
        }
        let (name, length) = ((word(4), word(8)), word(12) as usize);
        let bytes = rest.get(..HEADER + length).ok_or_else(|| wrong(&format!("half of {name:?}")))?;
        let right = record(name, length);
        if let Some(first) = bytes.iter().zip(&right).position(|(found, right)| found != right) {
            let last = bytes.iter().zip(&right).rposition(|(found, right)| found != right).unwrap_or(first);
            let what =
                if bytes[first..=last].iter().all(|byte| *byte == 0) { "zeros" } else { "other bytes" };
            return Err(wrong(&format!(
                "{name:?} of {length} bytes has {what} in {:?}",
                at + first..=at + last
            )));
        }
        found.push(name);
        rest = &rest[bytes.len()..];
    }
    Ok(found)
}

/// How far a writer came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Records that must be there.
    pub sure: u32,
    /// Records that may be there: those that were begun.
    pub begun: u32,
}

/// Whether a file holds every writer's records, in their order, and nothing else.
///
/// # Errors
/// What is missing, twice there, or out of order.
pub fn check(found: &[Record], writers: &BTreeMap<u32, Progress>) -> Result<(), String> {
    check_but(found, writers, &BTreeSet::new())
}

/// As [`check`], but each of `lost` may be missing, whatever comes after it.
///
/// # Errors
/// What is missing, twice there, or out of order.
pub fn check_but(
    found: &[Record],
    writers: &BTreeMap<u32, Progress>,
    lost: &BTreeSet<Record>,
) -> Result<(), String> {
    let mut next: BTreeMap<u32, u32> = BTreeMap::new();
    let are_lost = |writer, mut numbers: std::ops::Range<u32>| numbers.all(|n| lost.contains(&(writer, n)));
    for &(writer, number) in found {
        let expected = next.entry(writer).or_default();
        if number < *expected || !are_lost(writer, *expected..number) {
            return Err(format!("writer {writer}: record {number} where {expected} belongs, in {found:?}"));
        }
        *expected = number + 1;
        if writers.get(&writer).is_none_or(|progress| number >= progress.begun) {
            return Err(format!("record {number} of writer {writer} was not written yet"));
        }
    }
    for (writer, progress) in writers {
        let there = next.get(writer).copied().unwrap_or(0);
        if !are_lost(*writer, there..progress.sure) {
            return Err(format!("of writer {writer} only {there} records are there, not {}", progress.sure));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_records_are_found_and_others_are_not() {
        let file = [record((1, 0), 5), record((2, 0), 0), record((1, 1), 300)].concat();
        assert_eq!(records(&file), Ok(vec![(1, 0), (2, 0), (1, 1)]));
        for end in [1, 20, 40, file.len() - 1] {
            records(&file[..end]).unwrap_err();
        }
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            assert_ne!(records(&damaged), Ok(vec![(1, 0), (2, 0), (1, 1)]), "{at}");
        }
    }

    #[test]
    fn all_of_a_writers_records_are_there_in_order() {
        let writers =
            BTreeMap::from([(1, Progress { sure: 2, begun: 3 }), (2, Progress { sure: 0, begun: 1 })]);
        check(&[(1, 0), (1, 1)], &writers).unwrap();
        check(&[(1, 0), (2, 0), (1, 1), (1, 2)], &writers).unwrap();
        for wrong in [
            &[(1, 0)][..],
            &[(1, 1), (1, 0)],
            &[(1, 0), (1, 0), (1, 1)],
            &[(1, 0), (1, 1), (2, 0), (2, 1)],
            &[(3, 0)],
        ] {
            check(wrong, &writers).unwrap_err();
        }
    }

    #[test]
    fn only_what_may_be_lost_is_missing() {
        let writers = BTreeMap::from([(1, Progress { sure: 3, begun: 4 })]);
        let lost = BTreeSet::from([(1, 1), (1, 3)]);
        for right in [&[(1, 0), (1, 2)][..], &[(1, 0), (1, 1), (1, 2)], &[(1, 0), (1, 2), (1, 3)]] {
            check_but(right, &writers, &lost).unwrap();
        }
        for wrong in [&[(1, 0), (1, 1)][..], &[(1, 2)], &[(1, 0), (1, 2), (1, 1)], &[(1, 0), (1, 0), (1, 2)]]
        {
            check_but(wrong, &writers, &lost).unwrap_err();
        }
    }
}
