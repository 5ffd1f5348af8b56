//! Something that is changed, one step after the other, while others look at parts of it.
//!
//! Every look must show what was there after some step, within the time of the look, and never less than what a look had shown that
//! ended before. Taking for each look, in order of their begin, the first step that fits is exact: a later step
//! for one only takes choices from others.

use std::sync::Mutex;

use super::{Clock, NEVER, Time};

#[derive(Clone, Copy, Debug)]
struct Step<S> {
    state: S,
    began: Time,
    /// [`NEVER`] when nobody knows whether it was taken.
    ended: Time,
}

#[derive(Clone, Copy, Debug)]
struct Look<O> {
    seen: O,
    began: Time,
    ended: Time,
    /// Several places one after another: means something only when no step was under way.
    gradual: bool,
}

/// States `S`, and what was seen of them.
#[derive(Debug)]
pub struct Steps<S, O> {
    clock: Clock,
    first: S,
    steps: Mutex<Vec<Step<S>>>,
    looks: Mutex<Vec<Look<O>>>,
}

impl<S: Clone + std::fmt::Debug, O: Clone + std::fmt::Debug> Steps<S, O> {
    /// Begins.
    pub fn new(first: S) -> Steps<S, O> {
        Steps { clock: Clock::default(), first, steps: Mutex::default(), looks: Mutex::default() }
    }

    /// Takes a step, which leads to `state`. An error leaves open whether it was taken: there must be no other after it.
    pub fn step<T, E>(&self, state: S, step: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        self.begin_step(state, self.clock.now());
        let result = step();
        if result.is_ok() {
            self.end_step(self.clock.now());
        }
        result
    }

    /// A step after all others, at a time by the clock of who tells. Until its end is told, it may not have been taken.
    pub fn begin_step(&self, state: S, began: Time) {
        self.steps.lock().expect("no thread panics with it").push(Step { state, began, ended: NEVER });
    }

    /// The last step was taken.
    pub fn end_step(&self, ended: Time) {
        if let Some(last) = self.steps.lock().expect("no thread panics with it").last_mut() {
            last.ended = ended;
        }
    }

    /// What a look at one moment showed.
    pub fn add_look(&self, seen: O, (began, ended): (Time, Time)) {
        let look = Look { seen, began, ended, gradual: false };
        self.looks.lock().expect("no thread panics with it").push(look);
    }

    /// Looks.
    pub fn look<E>(&self, look: impl FnOnce() -> Result<O, E>) -> Result<(), E> {
        self.note_look(false, look)
    }

    /// Looks at several places, one after another.
    pub fn look_around<E>(&self, look: impl FnOnce() -> Result<O, E>) -> Result<(), E> {
        self.note_look(true, look)
    }

    fn note_look<E>(&self, gradual: bool, look: impl FnOnce() -> Result<O, E>) -> Result<(), E> {
        let began = self.clock.now();
        let seen = look()?;
        let ended = self.clock.now();
        self.looks.lock().expect("no thread panics with it").push(Look { seen, began, ended, gradual });
        Ok(())
    }

    /// Whether the steps explain what was seen: all of them, or, when `may_lose`, as many as were taken before the one
    /// who took them died.
    ///
    /// # Errors
    /// What no step explains.
    pub fn check(&self, may_lose: bool, fits: impl Fn(&S, &O) -> bool) -> Result<(), String> {
        let steps = self.steps.lock().expect("no thread panics with it");
        let mut looks = self.looks.lock().expect("no thread panics with it").clone();
        looks.sort_by_key(|look| look.began);
        let all = explain(&self.first, &steps, &looks, &fits);
        if all.is_ok() || !may_lose {
            return all;
        }
        let some =
            (0..steps.len()).rev().any(|kept| explain(&self.first, &steps[..kept], &looks, &fits).is_ok());
        if some { Ok(()) } else { all }
    }
}

fn explain<S: Clone + std::fmt::Debug, O: Clone + std::fmt::Debug>(
    first: &S,
    steps: &[Step<S>],
    looks: &[Look<O>],
    fits: &impl Fn(&S, &O) -> bool,
) -> Result<(), String> {
    let state = |k: usize| k.checked_sub(1).map_or(first, |at| &steps[at].state);
    // When state `k` was there, at the earliest and at the latest.
    let from = |k: usize| k.checked_sub(1).map_or(0, |at| steps[at].began);
    let until = |k: usize| steps.get(k).map_or(NEVER, |next| next.ended);
    let mut explained: Vec<(Time, usize)> = Vec::with_capacity(looks.len());
    for look in looks {
        let under_way = |step: &Step<S>| step.began <= look.ended && look.began <= step.ended;
        if look.gradual && steps.iter().any(under_way) {
            continue;
        }
        let seen_before = explained.iter().filter(|(ended, _)| *ended < look.began).map(|(_, k)| *k);
        let least = seen_before.max().unwrap_or(0);
        let possible = |k: &usize| from(*k) <= look.ended && look.began <= until(*k);
        let found = (least..=steps.len()).filter(possible).find(|k| fits(state(*k), &look.seen));
        match found {
            Some(k) => explained.push((look.ended, k)),
            None => {
                let possible: Vec<_> = (0..=steps.len()).filter(possible).map(|k| (k, state(k))).collect();
                return Err(format!(
                    "{look:?}, while there could be {possible:?}, and state {least} had been seen"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps from 0 to 1, 2, …; looks at the number itself.
    fn history(steps: &[(Time, Time)], looks: &[(usize, Time, Time)], may_lose: bool) -> Result<(), String> {
        let history = Steps::new(0);
        for (k, &(began, ended)) in steps.iter().enumerate() {
            history.steps.lock().unwrap().push(Step { state: k + 1, began, ended });
        }
        for &(seen, began, ended) in looks {
            history.looks.lock().unwrap().push(Look { seen, began, ended, gradual: false });
        }
        history.check(may_lose, |state, seen| state == seen)
    }

    #[test]
    fn what_the_steps_explain_is_accepted() {
        let steps = [(10, 20), (30, 40)];
        history(&steps, &[(0, 1, 2), (0, 11, 12), (1, 13, 14), (1, 25, 26), (2, 50, 51)], false).unwrap();
        // Seen at the same time, in either order.
        history(&steps, &[(1, 12, 18), (0, 11, 19), (1, 13, 45)], false).unwrap();
        history(&[(10, NEVER)], &[(0, 50, 51)], false).unwrap();
        history(&[(10, NEVER)], &[(0, 50, 51), (1, 60, 61)], false).unwrap();
    }

    #[test]
    fn what_they_do_not_is_refused() {
        let steps = [(10, 20), (30, 40)];
        for looks in [
            &[(0, 21, 22)][..],
            &[(1, 1, 9)],
            &[(1, 11, 12), (0, 13, 14)],
            &[(2, 50, 51), (1, 60, 61)],
            &[(7, 1, 99)],
        ] {
            history(&steps, looks, false).unwrap_err();
        }
    }

    #[test]
    fn what_its_client_took_with_it_may_be_gone() {
        let steps = [(10, 20), (30, 40)];
        history(&steps, &[(0, 50, 51)], true).unwrap();
        history(&steps, &[(1, 35, 36), (1, 50, 51)], true).unwrap();
        // But not what somebody has seen.
        history(&steps, &[(1, 25, 26), (0, 50, 51)], true).unwrap_err();
        history(&steps, &[(2, 50, 51), (1, 60, 61)], true).unwrap_err();
    }

    #[test]
    fn a_look_around_means_something_when_nothing_happens() {
        let around = |seen: usize, began: Time, ended: Time| {
            let history = Steps::new(0);
            history.steps.lock().unwrap().push(Step { state: 1, began: 10, ended: 20 });
            history.looks.lock().unwrap().push(Look { seen, began, ended, gradual: true });
            history.check(false, |state, seen| state == seen)
        };
        around(7, 5, 12).unwrap();
        around(7, 1, 2).unwrap_err();
        around(1, 21, 30).unwrap();
    }
}
