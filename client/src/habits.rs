//! What the programs of this client have been doing lately, to guess what they do next.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// So many lookups are remembered, half of them for as long again, and so on.
const LATELY: u32 = 64;

/// Whether those who look files up open them, too. Counts may be lost when threads meet: it is a guess.
#[derive(Debug, Default)]
pub(crate) struct Habits {
    lookups: AtomicU32,
    opens: AtomicU32,
}

impl Habits {
    /// A name is being looked up; whether what is found will probably be opened.
    pub(crate) fn looks_up(&self) -> bool {
        let (lookups, opens) = (self.lookups.load(Relaxed) + 1, self.opens.load(Relaxed));
        let halve = u32::from(lookups >= LATELY);
        self.lookups.store(lookups >> halve, Relaxed);
        self.opens.store(opens >> halve, Relaxed);
        2 * opens >= lookups
    }

    /// A file is being opened.
    pub(crate) fn opens(&self) {
        self.opens.store((self.opens.load(Relaxed) + 1).min(LATELY), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_habit_is_noticed_and_forgotten() {
        let habits = Habits::default();
        assert!(!habits.looks_up());
        let mut guesses = Vec::new();
        for _ in 0..200 {
            guesses.push(habits.looks_up());
            habits.opens();
        }
        assert!(guesses[10..].iter().all(|guess| *guess), "who opens what it looks up goes on doing so");
        let still = (0..1000).take_while(|_| habits.looks_up()).count();
        assert!(still < 2 * LATELY as usize, "{still}");
    }
}
