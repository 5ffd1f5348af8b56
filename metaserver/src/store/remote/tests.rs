//! The contract on real servers, and what is peculiar to engines across a network.

mod access;
#[allow(unreachable_pub, dead_code, reason = "shared with the tests of the whole system")]
#[path = "../../../../tests/harness/engines.rs"]
mod engines;
mod faulty;

use std::sync::{Arc, atomic::AtomicBool};

use bytes::Bytes;

use super::RemoteStore;
use crate::store::{
    Batch, Late, MetaStore, Order, Place, StoreError,
    conformance::{self, put},
};
use engines::{Etcd, Postgres};

const CACHE_BYTES: u64 = 8 << 20;

fn open(url: &str) -> RemoteStore {
    let place: Place = url.parse().unwrap();
    RemoteStore::open(&place, CACHE_BYTES).unwrap()
}

fn all(store: &RemoteStore) -> Vec<(Vec<u8>, Bytes)> {
    store.scan(&[1]..&[0xf0], Order::Ascending, usize::MAX).unwrap()
}

/// What every engine across a network must do; `url` makes the address of an empty store.
fn check(mut url: impl FnMut() -> String) {
    conformance::check(|| open(&url()));
    a_new_owner_finds_what_was_acknowledged_and_voids_the_old(&url());
    batches_above_the_limits_are_whole(&url());
    pages_are_read_both_ways(&url());
    a_standby_waits_for_silence_or_release(&url());
}

fn a_new_owner_finds_what_was_acknowledged_and_voids_the_old(url: &str) {
    let (old, new) = (open(url), open(url));
    let fence = old.take_over().unwrap();
    assert!(old.is_owner() && !new.is_owner());
    for n in 0..300 {
        old.commit(put(&[("count", &n.to_string()), (&format!("k{n:03}"), "v")]), fence).unwrap();
    }
    let upto = old.sync().unwrap();
    assert_eq!(old.acknowledged().unwrap(), upto);
    let newer = new.take_over().unwrap();
    assert!(newer > fence);
    assert_eq!(new.get(b"count").unwrap().unwrap(), "299");
    assert_eq!(all(&new).len(), 301);
    // The old one may not know yet; what it is told to do must not happen, and it must find out.
    let _ = old.commit(put(&[("count", "stale")]), fence);
    let refused = old.sync().unwrap_err();
    assert!(matches!(refused, StoreError::Fenced { current, .. } if current == newer), "{refused}");
    assert!(!old.is_owner());
    assert!(old.acknowledged().is_err() && old.commit(put(&[("count", "stale")]), fence).is_err());
    new.commit(put(&[("after", "")]), newer).unwrap();
    new.sync().unwrap();
    let third = open(url);
    third.take_over().unwrap();
    assert_eq!(third.get(b"count").unwrap().unwrap(), "299");
    assert_eq!(all(&third).len(), 302);
}

fn batches_above_the_limits_are_whole(url: &str) {
    let store = open(url);
    let fence = store.take_over().unwrap();
    store.commit(put(&[("gone", "1")]), fence).unwrap();
    let value = Bytes::from(vec![7; 3000]);
    let mut writes: Vec<_> =
        (0..2000u32).map(|n| (format!("k{n:05}").into_bytes(), Some(value.clone()))).collect();
    writes.push((b"gone".to_vec(), None));
    store.commit(Batch { writes }, fence).unwrap();
    store.commit(put(&[("last", "")]), fence).unwrap();
    store.sync().unwrap();
    let other = open(url);
    other.take_over().unwrap();
    let found = all(&other);
    assert_eq!(found.len(), 2001);
    assert!(found[..2000].iter().all(|(_, v)| *v == value));
    let left = other.fetch(b"\0i".to_vec()..b"\0j".to_vec(), Order::Ascending, 10).unwrap();
    assert_eq!(left, [], "no intents are left");
}

fn pages_are_read_both_ways(url: &str) {
    let store = open(url);
    let fence = store.take_over().unwrap();
    let names: Vec<String> = (0..1000).map(|n| format!("k{n:04}")).collect();
    let pairs: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), n.as_str())).collect();
    store.commit(put(&pairs), fence).unwrap();
    store.sync().unwrap();
    for (order, first) in [(Order::Ascending, "k0100"), (Order::Descending, "k0899")] {
        let reader = open(url);
        reader.take_over().unwrap();
        let found = reader.scan(b"k0100".as_slice()..b"k0900", order, usize::MAX).unwrap();
        assert_eq!((found.len(), found[0].0.as_slice()), (800, first.as_bytes()));
        assert_eq!(reader.get(b"k0099").unwrap().unwrap(), "k0099");
        assert_eq!(reader.get(b"k00991").unwrap(), None);
    }
}

fn a_standby_waits_for_silence_or_release(url: &str) {
    let go_on = || Arc::new(AtomicBool::new(false));
    let (owner, standby) = (open(url), open(url));
    assert!(standby.await_silence(go_on(), None).unwrap(), "nobody owns it");
    owner.take_over().unwrap();
    assert!(!standby.await_silence(Arc::new(AtomicBool::new(true)), None).unwrap(), "it was told to stop");
    owner.release().unwrap();
    assert!(standby.await_silence(go_on(), None).unwrap(), "released");
    let fence = owner.take_over().unwrap();
    // Without a release, as in a crash.
    drop(owner);
    assert!(standby.await_silence(go_on(), None).unwrap());
    let second = open(url);
    assert!(second.await_silence(go_on(), None).unwrap());
    let before = fence;
    let fence = standby.take_over().unwrap();
    assert!(fence > before);
    let late = second.take_over().unwrap_err();
    assert!(
        matches!(late, StoreError::Fenced { current, .. } if current == fence),
        "one of two standbys: {late}"
    );
    // Whoever opens the store asks here whether to stand by again.
    let why = second.acknowledged().unwrap_err();
    assert!(matches!(why, StoreError::Fenced { current, .. } if current == fence), "{why}");
    standby.commit(put(&[("k", "v")]), fence).unwrap();
    standby.sync().unwrap();
}

#[test]
fn etcd_meets_the_contract() {
    let etcd = Etcd::start();
    let mut n = 0;
    check(|| {
        n += 1;
        etcd.url(&format!("test/{n}"))
    });
}

#[test]
fn postgres_meets_the_contract() {
    let mut postgres = Postgres::start();
    check(|| postgres.url());
}

#[test]
fn etcd_loses_a_member_and_then_its_quorum() {
    let mut etcd = Etcd::start();
    let url = etcd.url("test");
    let store = open(&url);
    let fence = store.take_over().unwrap();
    etcd.kill_member(0);
    for n in 0..100 {
        store.commit(put(&[("count", &n.to_string())]), fence).unwrap();
        store.sync().unwrap();
    }
    etcd.kill_member(1);
    let ticket = store.commit(put(&[("count", "100")]), fence).unwrap();
    std::thread::sleep(super::OWNERSHIP);
    assert!(!store.is_owner() && store.acknowledged().unwrap() < ticket, "one of three decides nothing");
    etcd.start_member(1);
    assert_eq!(store.sync().unwrap(), ticket, "it waited, and went on");
    let other = open(&url);
    other.take_over().unwrap();
    assert_eq!(other.get(b"count").unwrap().unwrap(), "100");
}

#[test]
fn postgres_fails_over_to_its_standby() {
    let mut postgres = Postgres::start();
    let url = postgres.url();
    let store = open(&url);
    let fence = store.take_over().unwrap();
    for n in 0..100 {
        store.commit(put(&[("count", &n.to_string()), (&format!("k{n}"), "")]), fence).unwrap();
    }
    store.sync().unwrap();
    postgres.kill_server(0);
    let ticket = store.commit(put(&[("count", "100")]), fence).unwrap();
    postgres.promote();
    assert_eq!(store.sync().unwrap(), ticket);
    let other = open(&url);
    other.take_over().unwrap();
    assert_eq!(other.get(b"count").unwrap().unwrap(), "100");
    assert_eq!(all(&other).len(), 101);
}
