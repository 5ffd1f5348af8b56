//! Turns that several take at something: each reads a number and writes the next.

use std::sync::Mutex;

use super::{NEVER, Time};

#[derive(Clone, Copy, Debug)]
struct Turn {
    /// Number read.
    read: u64,
    began: Time,
    /// [`NEVER`] when nobody knows whether the next was written.
    ended: Time,
}

/// Who read what, and when.
#[derive(Debug, Default)]
pub struct Turns {
    turns: Mutex<Vec<Turn>>,
}

impl Turns {
    /// Notes a turn. `began` is a time after it had begun, `ended` one before it ended, or `None` when it is not known whether the
    /// next number was written.
    pub fn note(&self, read: u64, began: Time, ended: Option<Time>) {
        let turn = Turn { read, began, ended: ended.unwrap_or(NEVER) };
        self.turns.lock().expect("no thread panics with it").push(turn);
    }

    /// How many there were.
    pub fn len(&self) -> usize {
        self.turns.lock().expect("no thread panics with it").len()
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether one came after another, and each read what the one before wrote, from 0 to what is there at last.
    ///
    /// # Errors
    /// Two turns that contradict each other.
    pub fn check(&self, last: u64) -> Result<(), String> {
        let mut turns = self.turns.lock().expect("no thread panics with it").clone();
        turns.sort_by_key(|turn| turn.began);
        let mut next = vec![0];
        let mut before: Option<Turn> = None;
        for turn in turns {
            if !next.contains(&turn.read) {
                return Err(format!("{turn:?} after {before:?}"));
            }
            let known = turn.ended != NEVER;
            if let Some(before) = before.filter(|before| before.ended != NEVER && before.ended > turn.began) {
                return Err(format!("{turn:?} during {before:?}"));
            }
            next = if known { vec![turn.read + 1] } else { vec![turn.read, turn.read + 1] };
            before = Some(turn);
        }
        if next.contains(&last) { Ok(()) } else { Err(format!("{last} is there at last, after {before:?}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(turns: &[(u64, Time, Option<Time>)], last: u64) -> Result<(), String> {
        let history = Turns::default();
        turns.iter().for_each(|&(read, began, ended)| history.note(read, began, ended));
        history.check(last)
    }

    #[test]
    fn one_after_another_is_accepted() {
        history(&[], 0).unwrap();
        history(&[(1, 3, Some(4)), (0, 1, Some(2)), (2, 5, Some(6))], 3).unwrap();
        history(&[(0, 1, None), (0, 3, Some(4))], 1).unwrap();
        history(&[(0, 1, None), (1, 3, Some(4))], 2).unwrap();
    }

    #[test]
    fn two_at_a_time_and_lost_numbers_are_refused() {
        history(&[(0, 1, Some(9)), (1, 5, Some(12))], 2).unwrap_err();
        history(&[(0, 1, Some(2)), (0, 3, Some(4))], 1).unwrap_err();
        history(&[(0, 1, Some(2)), (1, 3, Some(4))], 1).unwrap_err();
        history(&[(0, 1, None), (2, 3, Some(4))], 3).unwrap_err();
    }
}
