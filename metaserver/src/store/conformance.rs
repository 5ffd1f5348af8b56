//! What every engine must do. Run by each engine's tests with a function that makes an empty one.

use super::{Batch, Fence, MetaStore, Order, StoreError};
use bytes::Bytes;

/// A batch of insertions.
pub(crate) fn put(pairs: &[(&str, &str)]) -> Batch {
    let writes =
        pairs.iter().map(|(k, v)| (k.as_bytes().to_vec(), Some(Bytes::copy_from_slice(v.as_bytes()))));
    Batch { writes: writes.collect() }
}

fn keys(store: &impl MetaStore, range: (&str, &str), order: Order, limit: usize) -> Vec<String> {
    let found = store.scan(range.0.as_bytes()..range.1.as_bytes(), order, limit).unwrap();
    found.into_iter().map(|(k, _)| String::from_utf8(k).unwrap()).collect()
}

/// Runs the suite.
pub(crate) fn check<S: MetaStore>(mut make: impl FnMut() -> S) {
    batches_apply_whole(&make());
    scans_are_ordered_and_bounded(&make());
    a_void_fence_changes_nothing(&make());
    tickets_follow_commits(&make());
    agrees_with_a_tree(&make());
}

fn batches_apply_whole(store: &impl MetaStore) {
    let fence = store.take_over().unwrap();
    store.commit(put(&[("a", "1"), ("b", "2")]), fence).unwrap();
    let batch = Batch { writes: vec![(b"a".to_vec(), None), (b"c".to_vec(), Some(Bytes::from_static(b"")))] };
    store.commit(batch, fence).unwrap();
    assert_eq!(store.get(b"a").unwrap(), None);
    assert_eq!(store.get(b"b").unwrap().unwrap(), "2");
    assert_eq!(store.get(b"c").unwrap().unwrap(), "", "an empty value is a value");
}

fn scans_are_ordered_and_bounded(store: &impl MetaStore) {
    let fence = store.take_over().unwrap();
    store.commit(put(&[("k1", ""), ("k3", ""), ("k2", ""), ("l", ""), ("k", "")]), fence).unwrap();
    use Order::*;
    assert_eq!(keys(store, ("k", "l"), Ascending, 9), ["k", "k1", "k2", "k3"]);
    assert_eq!(keys(store, ("k", "l"), Descending, 2), ["k3", "k2"]);
    assert_eq!(keys(store, ("k1", "k3"), Ascending, 9), ["k1", "k2"]);
    assert_eq!(keys(store, ("k1", "k1"), Ascending, 9), [""; 0]);
    assert_eq!(keys(store, ("l", "k"), Ascending, 9), [""; 0], "an inverted range is empty");
    assert_eq!(keys(store, ("k", "l"), Ascending, 0), [""; 0]);
}

fn a_void_fence_changes_nothing(store: &impl MetaStore) {
    let old = store.take_over().unwrap();
    store.commit(put(&[("a", "1")]), old).unwrap();
    let new = store.take_over().unwrap();
    assert!(new > old);
    let refused = store.commit(put(&[("a", "2")]), old).unwrap_err();
    assert!(matches!(refused, StoreError::Fenced { .. }));
    assert!(store.commit(put(&[("a", "2")]), Fence(new.0 + 1)).is_err(), "nor may a fence be invented");
    assert_eq!(store.get(b"a").unwrap().unwrap(), "1");
    store.commit(put(&[("a", "3")]), new).unwrap();
    assert_eq!(store.get(b"a").unwrap().unwrap(), "3");
}

fn tickets_follow_commits(store: &impl MetaStore) {
    let fence = store.take_over().unwrap();
    let first = store.commit(put(&[("a", "1")]), fence).unwrap();
    let second = store.commit(put(&[("a", "2")]), fence).unwrap();
    assert!(second > first);
    assert!(store.sync().unwrap() >= second);
}

/// Random batches against a tree, with a fixed seed.
fn agrees_with_a_tree(store: &impl MetaStore) {
    let fence = store.take_over().unwrap();
    let mut tree = std::collections::BTreeMap::new();
    let mut seed = 0x9e37_79b9u64;
    let mut random = |n: u64| {
        seed = fjordfs_proto::cluster::mix(seed);
        seed % n
    };
    for round in 0..200u64 {
        let mut writes = std::collections::BTreeMap::new();
        for _ in 0..random(20) {
            let key = format!("r{:03}", random(150)).into_bytes();
            let value = (random(3) > 0).then(|| Bytes::from(round.to_string()));
            writes.insert(key, value);
        }
        for (key, value) in &writes {
            match value {
                Some(value) => tree.insert(key.clone(), value.clone()),
                None => tree.remove(key),
            };
        }
        store.commit(Batch { writes: writes.into_iter().collect() }, fence).unwrap();
        let (a, b) = (random(150), random(150));
        let (from, to) = (format!("r{:03}", a.min(b)).into_bytes(), format!("r{:03}", a.max(b)).into_bytes());
        let expected: Vec<_> =
            tree.range(from.clone()..to.clone()).map(|(k, v)| (k.clone(), v.clone())).collect();
        assert_eq!(store.scan(&from..&to, Order::Ascending, usize::MAX).unwrap(), expected);
        let last: Vec<_> = expected.iter().rev().take(3).cloned().collect();
        assert_eq!(store.scan(&from..&to, Order::Descending, 3).unwrap(), last);
    }
}

#[test]
fn memory_meets_the_contract() {
    check(super::MemoryStore::default);
}
