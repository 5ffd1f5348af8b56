//! Histories of what several clients did at once, and whether the promise that applies to them was kept.
//!
//! | module | what was done | what must hold |
//! |---|---|---|
//! | [`register`] | several write one value, several read it | an order explains everything |
//! | [`steps`] | something is changed step by step, others look | everybody saw the steps, in their order |
//! | [`moves`] | such steps: files move among a few names | the same |
//! | [`exclusive`] | several make one name | exactly one did, and nobody saw the name gone |
//! | [`appends`] | several append records to one file | every record is there, whole, once, in its writer's order |
//! | [`turns`] | several take turns | one at a time, and each saw what the one before left |
//!
//! A client that is killed leaves operations of which nobody knows whether they took effect. What it was told was done can be
//! gone, too, unless it is [`Kept::Always`]: what nobody has looked at and was not fsynced is lost with it.

use std::time::Instant;

pub mod appends;
pub mod exclusive;
pub mod moves;
pub mod register;
pub mod steps;
pub mod turns;

pub use register::History;

/// Nanoseconds since a history began.
pub type Time = u128;

/// End of what nobody knows to have ended.
pub const NEVER: Time = Time::MAX;

/// Tells the time since it was made.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Clock {
        Clock(Instant::now())
    }
}

impl Clock {
    /// Now.
    pub fn now(&self) -> Time {
        self.0.elapsed().as_nanos()
    }
}

/// What holds of an operation that was reported as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It is done.
    Always,
    /// Its client was killed, and nobody may have looked: it may have been undone.
    Perhaps,
}
