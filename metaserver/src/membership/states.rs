//! In what state a target is: every transition there is. Pure.
//!
//! | state | what it means | new blocks | reads | its groups |
//! |---|---|---|---|---|
//! | up | all is well | yes | yes | keep it |
//! | down | its server is silent | no | no | keep it: most outages end |
//! | failed | the device reports errors | no | no | keep it, like one that is down |
//! | out | down or failed for long | no | no | get another member each, rebuilt from the others |
//! | draining | an administrator wants it gone | no | yes | get another member each, copied from it and the others |
//!
//! A target that is out and comes back is up (or draining) again; groups that have not replaced it yet keep it. One that no
//! group names any more can be removed: then it is in no map, and what comes back with its label is turned away.

use fjordfs_proto::cluster::TargetState;

/// What happens to a target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// Its server reports it healthy.
    Healthy,
    /// Its server reports that the device fails.
    Faulty,
    /// Its server has missed its heartbeats.
    Silent,
    /// Nobody could use it for so long that it is not waited for.
    Overdue,
    /// An administrator wants it gone.
    Drain,
    /// An administrator wants it after all.
    Keep,
}

/// The state after an event. `leaving`: an administrator wants it gone, this event included.
pub(crate) fn next(state: TargetState, leaving: bool, event: Event) -> TargetState {
    use Event::*;
    use TargetState::*;
    match (state, event) {
        (_, Healthy) if leaving => Draining,
        (_, Healthy) => Up,
        (Out | Draining, Faulty) => Out,
        (_, Faulty) => Failed,
        (Draining, Silent) => Out,
        (Up, Silent) => Down,
        (Down | Failed, Overdue) => Out,
        (Up, Drain) => Draining,
        (Down | Failed, Drain) => Out,
        (Draining, Keep) => Up,
        (state, Silent | Overdue | Drain | Keep) => state,
    }
}

/// Whether placement groups keep a member in this state.
pub(crate) fn stays(state: TargetState) -> bool {
    matches!(state, TargetState::Up | TargetState::Down | TargetState::Failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [Event; 6] =
        [Event::Healthy, Event::Faulty, Event::Silent, Event::Overdue, Event::Drain, Event::Keep];

    proptest! {
        /// Whatever happens in whatever order: what is said last about the device and the wish is what counts.
        #[test]
        fn a_state_is_what_was_heard_and_wanted(events in proptest::collection::vec(0..EVENTS.len(), 0..40)) {
            let (mut state, mut leaving, mut usable) = (TargetState::Up, false, true);
            for event in events.into_iter().map(|i| EVENTS[i]) {
                match event {
                    Event::Drain => leaving = true,
                    Event::Keep => leaving = false,
                    Event::Healthy => usable = true,
                    Event::Faulty | Event::Silent => usable = false,
                    Event::Overdue => {}
                }
                let before = state;
                state = next(state, leaving, event);
                prop_assert!(state != TargetState::Unspecified);
                let readable = matches!(state, TargetState::Up | TargetState::Draining);
                prop_assert_eq!(readable, usable, "{:?} after {:?} in {:?}", state, event, before);
                if usable {
                    prop_assert_eq!(state == TargetState::Draining, leaving);
                }
                if leaving {
                    prop_assert!(!stays(state), "{:?} after {:?} in {:?}", state, event, before);
                }
                if state == TargetState::Out && before != TargetState::Out && !leaving {
                    prop_assert!(event == Event::Overdue, "{:?} in {:?} led to out", event, before);
                }
                prop_assert_eq!(next(state, leaving, event), state, "the same event twice");
            }
        }
    }
}
