//! Histories of one register that several clients read and write, and whether an order of the operations explains them.
//!
//! Every write has a value of its own. Then a history is linearisable exactly if the *zones* of its values fit (Gibbons
//! and Korach, Testing Shared Memories, 1997, section 4): the operations of one value lie between the earliest end `f` and the latest begin `s`
//! among them; with `f < s` the value must be the register's during all of `f..s`, which no two values can be at
//! once, and a value that could have come and gone within such a time cannot have.

use std::{collections::BTreeMap, sync::Mutex};

use super::{Clock, NEVER, Time};

/// Value of a register; 0 is there from the beginning.
pub type Value = u64;

#[derive(Clone, Copy, Debug)]
struct Operation {
    value: Value,
    is_write: bool,
    began: Time,
    /// [`NEVER`] when nobody knows whether it took effect.
    ended: Time,
}

/// What happened, as seen by those who did it.
#[derive(Debug, Default)]
pub struct History {
    clock: Clock,
    operations: Mutex<Vec<Operation>>,
}

impl History {
    fn note(&self, operation: Operation) {
        self.operations.lock().expect("no thread panics with it").push(operation);
    }

    /// Writes a value that was never written before. An error leaves open whether it was.
    pub fn write<E>(&self, value: Value, write: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let began = self.clock.now();
        let result = write();
        let ended = if result.is_ok() { self.clock.now() } else { NEVER };
        self.note(Operation { value, is_write: true, began, ended });
        result
    }

    /// Reads the value.
    pub fn read<E>(&self, read: impl FnOnce() -> Result<Value, E>) -> Result<Value, E> {
        let began = self.clock.now();
        let value = read()?;
        self.note(Operation { value, is_write: false, began, ended: self.clock.now() });
        Ok(value)
    }

    /// A write of a value that was never written before, by this clock; [`NEVER`] ends one that may not have taken effect.
    pub fn add_write(&self, value: Value, (began, ended): (Time, Time)) {
        self.note(Operation { value, is_write: true, began, ended });
    }

    /// What a read saw.
    pub fn add_read(&self, value: Value, (began, ended): (Time, Time)) {
        self.note(Operation { value, is_write: false, began, ended });
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.operations.lock().expect("no thread panics with it").len()
    }

    /// Whether nothing has happened.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Why no order explains the history.
    ///
    /// # Errors
    /// The operations that contradict each other.
    pub fn check(&self) -> Result<(), String> {
        let mut values: BTreeMap<Value, Vec<Operation>> = BTreeMap::new();
        let first = Operation { value: 0, is_write: true, began: 0, ended: 0 };
        for operation in self.operations.lock().expect("no thread panics with it").iter().chain([&first]) {
            values.entry(operation.value).or_default().push(*operation);
        }
        let mut zones = Vec::new();
        for (value, operations) in &values {
            let write = operations.iter().find(|o| o.is_write);
            let write = write.ok_or_else(|| format!("{value} was read and never written"))?;
            if let Some(read) = operations.iter().find(|o| o.ended < write.began) {
                return Err(format!("{value} was read before it was written: {read:?}, {write:?}"));
            }
            if write.ended == NEVER && operations.len() == 1 {
                continue;
            }
            let first_end = operations.iter().map(|o| o.ended).min().unwrap_or(NEVER);
            let last_begin = operations.iter().map(|o| o.began).max().unwrap_or(0);
            zones.push((first_end, last_begin, *value));
        }
        // Zones in which the value was the register's all the time, by their begin.
        let mut forward: Vec<_> = zones.iter().filter(|(f, s, _)| f < s).copied().collect();
        forward.sort_unstable();
        for pair in forward.windows(2) {
            let ((_, until, older), (from, _, newer)) = (pair[0], pair[1]);
            if from < until {
                return Err(self.contradiction(&values, older, newer));
            }
        }
        for (f, s, value) in zones.iter().filter(|(f, s, _)| f >= s) {
            let before = forward.partition_point(|(from, _, _)| from < s);
            if let Some((_, until, around)) = before.checked_sub(1).and_then(|at| forward.get(at))
                && f < until
            {
                return Err(self.contradiction(&values, *around, *value));
            }
        }
        Ok(())
    }

    fn contradiction(&self, values: &BTreeMap<Value, Vec<Operation>>, one: Value, other: Value) -> String {
        let show = |value: Value| {
            let mut operations = values.get(&value).cloned().unwrap_or_default();
            operations.sort_by_key(|o| o.began);
            let lines = operations.iter().map(|o| {
                let what = if o.is_write { "write" } else { "read " };
                let ended = if o.ended == NEVER { "?".into() } else { (o.ended / 1000).to_string() };
                format!("  {what} {value} from {} to {ended} µs\n", o.began / 1000)
            });
            lines.collect::<String>()
        };
        format!("no order explains both\n{}and\n{}", show(one), show(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(operations: &[(bool, Value, Time, Time)]) -> Result<(), String> {
        let history = History::default();
        for &(is_write, value, began, ended) in operations {
            history.note(Operation { value, is_write, began, ended });
        }
        history.check()
    }

    const W: bool = true;
    const R: bool = false;

    #[test]
    fn what_has_an_order_is_accepted() {
        history(&[(R, 0, 1, 2), (W, 1, 3, 6), (R, 0, 4, 5), (R, 1, 5, 7), (R, 1, 8, 9)]).unwrap();
        // Two writes at once, seen in either order, but by everybody in the same.
        history(&[(W, 1, 1, 9), (W, 2, 2, 8), (R, 2, 3, 4), (R, 1, 5, 6), (R, 1, 10, 11)]).unwrap();
        // Nobody knows of this write, until it is seen; one that is not seen never was.
        history(&[(W, 1, 1, NEVER), (W, 2, 1, NEVER), (R, 0, 5, 6), (R, 1, 8, 9)]).unwrap();
    }

    #[test]
    fn what_has_none_is_refused() {
        // Stale after the write has ended.
        history(&[(W, 1, 1, 2), (R, 0, 3, 4)]).unwrap_err();
        // New, and old again.
        history(&[(W, 1, 1, 9), (R, 1, 2, 3), (R, 0, 4, 5)]).unwrap_err();
        history(&[(W, 1, 1, 20), (W, 2, 1, 20), (R, 1, 2, 3), (R, 2, 4, 5), (R, 1, 6, 7)]).unwrap_err();
        // A write within the time of another value.
        history(&[(W, 1, 1, 2), (W, 2, 3, 4), (R, 1, 5, 6)]).unwrap_err();
        history(&[(R, 7, 1, 2)]).unwrap_err();
        history(&[(R, 7, 1, 2), (W, 7, 3, 4)]).unwrap_err();
    }
}
