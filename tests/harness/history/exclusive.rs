//! One name that several try to make, and that nobody removes.

use std::sync::Mutex;

use super::{Clock, Kept, NEVER, Time};

/// Whether a name was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It was.
    There,
    /// It was not.
    Absent,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// Made by this worker.
    Made(usize, Kept),
    /// Nobody knows whether it was made by this one.
    PerhapsMade,
    Found(Found),
}

#[derive(Clone, Copy, Debug)]
struct Operation {
    what: What,
    began: Time,
    ended: Time,
}

/// What happened to the name.
#[derive(Debug, Default)]
pub struct Exclusive {
    clock: Clock,
    operations: Mutex<Vec<Operation>>,
}

impl Exclusive {
    fn note(&self, what: What, began: Time, ended: Time) {
        self.operations.lock().expect("no thread panics with it").push(Operation { what, began, ended });
    }

    /// Tries to make the name: `Ok(false)` when it exists. An error leaves open whether it was made.
    pub fn make<E>(&self, worker: usize, make: impl FnOnce() -> Result<bool, E>) -> Result<bool, E> {
        let began = self.clock.now();
        let result = make();
        let (what, ended) = match result {
            Ok(true) => (What::Made(worker, Kept::Always), self.clock.now()),
            Ok(false) => (What::Found(Found::There), self.clock.now()),
            Err(_) => (What::PerhapsMade, NEVER),
        };
        self.note(what, began, ended);
        result
    }

    /// Looks for the name.
    pub fn look<E>(&self, look: impl FnOnce() -> Result<Found, E>) -> Result<Found, E> {
        let began = self.clock.now();
        let found = look()?;
        self.note(What::Found(found), began, self.clock.now());
        Ok(found)
    }

    /// What this worker was told was done may be undone.
    pub fn may_be_lost(&self, lost: usize) {
        for operation in self.operations.lock().expect("no thread panics with it").iter_mut() {
            if let What::Made(worker, kept) = &mut operation.what
                && *worker == lost
            {
                *kept = Kept::Perhaps;
            }
        }
    }

    /// Who made the name, if that is known.
    ///
    /// # Errors
    /// What contradicts each other.
    pub fn check(&self) -> Result<Option<usize>, String> {
        let operations = self.operations.lock().expect("no thread panics with it");
        let contradiction =
            |what: &str, one: &Operation, other: &Operation| Err(format!("{what}: {one:?}, {other:?}"));
        let made = |o: &&Operation| matches!(o.what, What::Made(_, Kept::Always));
        let mut makers = operations.iter().filter(made);
        let maker = makers.next();
        if let (Some(one), Some(other)) = (maker, makers.next()) {
            return contradiction("made twice", one, other);
        }
        let there: Vec<_> =
            operations.iter().filter(|o| matches!(o.what, What::Found(Found::There))).collect();
        for seen in &there {
            let can_have_made = |o: &&Operation| !matches!(o.what, What::Found(_)) && o.began <= seen.ended;
            if !operations.iter().any(|o| can_have_made(&o)) {
                return Err(format!("there before anybody made it: {seen:?}"));
            }
        }
        let late =
            |o: &&Operation| matches!(o.what, What::Found(Found::Absent) | What::Made(_, Kept::Always));
        for absent in operations.iter().filter(late) {
            if let Some(seen) = there.iter().copied().chain(maker).find(|seen| seen.ended < absent.began) {
                return contradiction("there, and then not", seen, absent);
            }
        }
        Ok(maker.and_then(|o| if let What::Made(worker, _) = o.what { Some(worker) } else { None }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: What = What::Made(1, Kept::Always);
    const B: What = What::Made(2, Kept::Always);
    const LOST: What = What::Made(3, Kept::Perhaps);
    const THERE: What = What::Found(Found::There);
    const ABSENT: What = What::Found(Found::Absent);

    fn history(operations: &[(What, Time, Time)]) -> Result<Option<usize>, String> {
        let history = Exclusive::default();
        operations.iter().for_each(|&(what, began, ended)| history.note(what, began, ended));
        history.check()
    }

    #[test]
    fn one_maker_is_accepted() {
        assert_eq!(
            history(&[(ABSENT, 1, 2), (A, 3, 9), (THERE, 4, 5), (ABSENT, 3, 6), (THERE, 20, 21)]),
            Ok(Some(1))
        );
        assert_eq!(history(&[(What::PerhapsMade, 3, NEVER), (THERE, 4, 5)]), Ok(None));
        assert_eq!(history(&[(LOST, 1, 2), (ABSENT, 3, 4), (A, 5, 6)]), Ok(Some(1)));
    }

    #[test]
    fn everything_else_is_refused() {
        for operations in [
            &[(A, 1, 2), (B, 1, 2)][..],
            &[(A, 1, 2), (ABSENT, 3, 4)],
            &[(A, 1, 9), (THERE, 2, 3), (ABSENT, 4, 5)],
            &[(THERE, 1, 2), (A, 3, 4)],
            &[(LOST, 1, 2), (THERE, 3, 4), (A, 5, 6)],
        ] {
            history(operations).unwrap_err();
        }
    }
}
