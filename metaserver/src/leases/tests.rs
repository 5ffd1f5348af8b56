//! Who waits for whom: changes, delegations, silence, and what is true after a start.

use super::*;

const A: SessionId = SessionId(1);
const B: SessionId = SessionId(2);
const I: InodeId = InodeId(7);
const MOMENT: Duration = Duration::from_millis(1);

#[test]
fn who_changes_what_nobody_else_caches_waits_for_nobody() {
    let mut leases = Leases::default();
    leases.grant(A, I, 1);
    leases.changed(Some(A), &[I], Instant::now());
    assert_eq!((leases.pending(None, &[I]), leases.take_orders()), (vec![], vec![]));
}

#[test]
fn a_change_waits_for_every_holder_and_recalls_the_actor_too() {
    let mut leases = Leases::default();
    let now = Instant::now();
    leases.grant(A, I, 1);
    leases.grant(B, I, 1);
    leases.changed(Some(A), &[I], now);
    let orders = leases.take_orders();
    assert_eq!(orders.iter().map(|o| o.session).collect::<Vec<_>>(), [A, B]);
    leases.changed(Some(A), &[I], now);
    assert!(leases.take_orders().is_empty(), "recalled already");
    assert_eq!(leases.pending(None, &[I, I, InodeId(8)]).len(), 2);
    leases.obeyed(A, orders[1].id);
    assert_eq!(leases.pending(None, &[I]).len(), 2, "B's recall is not A's to obey");
    leases.obeyed(A, orders[0].id);
    leases.obeyed(B, orders[1].id);
    assert_eq!(leases.take_ended(), [orders[0].id, orders[1].id]);
    assert!(leases.pending(None, &[I]).is_empty() && leases.held(A) + leases.held(B) == 0);
}

#[test]
fn what_was_changed_together_is_shown_together() {
    let (from, to, other) = (InodeId(8), InodeId(9), InodeId(10));
    let mut leases = Leases::default();
    let now = Instant::now();
    leases.grant(A, from, 1);
    leases.grant(B, to, 2);
    // Somebody moves a name.
    leases.changed(None, &[from, to], now);
    leases.changed_together(&[from, to], &[from, to]);
    // And then another from there to where nobody has looked.
    leases.changed_together(&[to, other], &[to, other]);
    let orders = leases.take_orders();
    leases.obeyed(A, orders[0].id);
    for ino in [from, to, other] {
        assert_eq!(leases.pending(None, &[ino]), [orders[1].id], "B may still show the old names in {ino}");
    }
    leases.obeyed(B, orders[1].id);
    assert!(leases.pending(None, &[from, to, other]).is_empty());
    assert_eq!(leases.take_vacated().len(), 3);
}

#[test]
fn a_lease_granted_after_it_was_given_back_stays() {
    let mut leases = Leases::default();
    leases.grant(A, I, 5);
    leases.given_back(A, &[I.0], 4);
    assert_eq!(leases.held(A), 1);
    leases.given_back(A, &[I.0], 5);
    assert_eq!(leases.held(A), 0);
}

#[test]
fn silence_and_ends_end_recalls() {
    let mut leases = Leases::default();
    let now = Instant::now();
    leases.grant(B, I, 1);
    leases.changed(None, &[I], now);
    assert!(leases.disobedient(Duration::from_secs(1), now).is_empty());
    assert_eq!(leases.disobedient(Duration::from_secs(1), now + Duration::from_secs(2)), [B]);
    leases.end_all(B);
    assert_eq!(leases.take_ended().len(), 1);
    assert!(leases.take_orders().is_empty(), "nobody is left to send it to");
}

#[test]
fn after_a_start_everybody_of_before_may_hold_anything() {
    let mut leases = Leases::default();
    leases.add_unknown(B);
    leases.changed(Some(A), &[I], Instant::now());
    assert_eq!(leases.pending(None, &[I]).len(), 1);
    leases.end_all(B);
    leases.changed(Some(A), &[I], Instant::now());
    assert!(leases.pending(None, &[I]).is_empty());
}

#[test]
fn a_delegation_needs_to_be_alone_and_unrecalled() {
    let mut leases = Leases::default();
    let now = Instant::now();
    assert!(!leases.delegate(A, I, now), "no lease");
    leases.grant(A, I, 1);
    leases.grant(B, I, 1);
    assert!(!leases.delegate(A, I, now), "two holders");
    leases.changed(Some(A), &[I], now);
    for order in leases.take_orders() {
        leases.obeyed(order.session, order.id);
    }
    leases.grant(A, I, 2);
    assert!(!leases.delegate(A, I, now), "contended");
    assert!(leases.delegate(A, I, now + CONTENDED));
    assert!(leases.delegate(A, I, now) && !leases.delegate(B, I, now));
}

#[test]
fn others_wait_for_a_delegation_and_its_holder_does_not() {
    let mut leases = Leases::default();
    let now = Instant::now();
    leases.delegate_new(A, I);
    assert!(!leases.may_conflict(A) && leases.may_conflict(B));
    assert_eq!((leases.conflicts(A, &[I]), leases.conflicts(B, &[InodeId(1), I])), (vec![], vec![I]));
    let recalls = leases.take_back(&[I], now);
    assert_eq!((recalls.len(), leases.take_orders().len()), (1, 1));
    // What A has decided arrives.
    leases.changed(Some(A), &[I], now);
    assert!(leases.pending(Some(A), &[I]).is_empty() && leases.take_orders().is_empty());
    assert_eq!(leases.pending(Some(B), &[I]), recalls);
    leases.obeyed(A, recalls[0]);
    assert_eq!((leases.take_ended(), leases.may_conflict(B)), (recalls, false));
}

#[test]
fn a_demoted_delegation_is_still_a_lease() {
    let mut leases = Leases::default();
    leases.delegate_new(A, I);
    leases.grant(A, I, 3);
    leases.demoted(A, &[I.0], 2);
    assert!(leases.may_conflict(B), "delegated later than that");
    leases.demoted(A, &[I.0], 3);
    assert!(!leases.may_conflict(B));
    leases.changed(Some(B), &[I], Instant::now());
    assert_eq!(leases.take_orders().len(), 1);
}

#[test]
fn a_session_that_comes_back_is_recalled_again() {
    let mut leases = Leases::default();
    leases.delegate_new(A, I);
    let (now, second) = (Instant::now(), Duration::from_secs(1));
    let recalls = leases.take_back(&[I], now);
    let orders = leases.take_orders();
    leases.attached(A, now + second);
    assert_eq!(leases.take_orders(), orders);
    assert!(leases.disobedient(second, now + 2 * second).is_empty(), "it was told a second ago");
    leases.attached(A, now + 2 * second);
    assert_eq!(leases.disobedient(second, now + 2 * second + MOMENT), [A], "but not for ever");
    leases.end_all(A);
    assert_eq!(leases.take_ended(), recalls);
}

#[test]
fn the_grace_ends_with_the_last_session_of_before() {
    let mut leases = Leases::default();
    leases.add_unknown(A);
    leases.add_unknown(B);
    leases.attached(A, Instant::now());
    // What A commits before it settles waits for B alone, who may cache anything.
    leases.changed(Some(A), &[I], Instant::now());
    assert_eq!(leases.take_orders().iter().map(|o| o.session).collect::<Vec<_>>(), [B]);
    leases.settled(A);
    assert!(leases.in_grace() && leases.take_ended().is_empty());
    leases.end_all(B);
    assert!(!leases.in_grace());
    assert!(leases.take_ended().contains(&RecallId::GRACE));
}
