//! Differential testing: the same random operations on a mount and on a local directory must do the same.
//!
//! [`op`] says what can be done and makes random sequences, [`world`] does it to one directory and reports what a
//! program would see, [`shrink`] makes a failing sequence short. The local filesystem is the oracle: what is compared
//! is every result, every errno, attributes, listings and bytes.

pub mod op;
pub mod shrink;
pub mod space;
pub mod world;
pub mod xattr;

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::tree::{Compare, differences, scan};
pub use op::{Op, sequence};
use world::World;

/// Two directories that must stay the same.
#[derive(Debug)]
pub struct Pair {
    left: PathBuf,
    right: PathBuf,
    runs: usize,
}

impl Pair {
    /// Below these two; `left` is the oracle.
    pub fn new(left: &Path, right: &Path) -> Pair {
        Pair { left: left.into(), right: right.into(), runs: 0 }
    }

    /// Applies a sequence to two fresh directories. `Some`: where they first differed.
    pub fn run(&mut self, ops: &[Op]) -> Option<String> {
        self.runs += 1;
        let name = format!("run{}", self.runs);
        let (left, right) = (self.left.join(&name), self.right.join(&name));
        for dir in [&left, &right] {
            fs::create_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
        }
        let (mut oracle, mut subject) = (World::new(&left), World::new(&right));
        for (i, op) in ops.iter().enumerate() {
            let (expected, got) = (oracle.apply(op), subject.apply(op));
            if expected != got {
                return Some(format!("op {i} {op:?}\n  local: {expected:?}\n  fjord: {got:?}"));
            }
            if (i + 1) % 25 == 0
                && let Some(found) = compare(&left, &right)
            {
                return Some(format!("after op {i}:\n{found}"));
            }
        }
        drop((oracle, subject));
        compare(&left, &right).map(|found| format!("after the last close:\n{found}"))
    }

    /// Everything that all runs left behind, once more. `Some`: what differs.
    pub fn compare_all(&self) -> Option<String> {
        compare(&self.left, &self.right)
    }

    /// A shorter sequence that fails too, as text.
    pub fn explain(&mut self, ops: &[Op], failure: &str) -> String {
        let short = shrink::shrink(ops, 150, |candidate| self.run(candidate).is_some());
        let again = self.run(&short);
        let listing: Vec<String> = short.iter().map(|op| format!("  {op:?}")).collect();
        format!(
            "{failure}\n\nshortened to {} operations:\n{}\nwhich give: {}",
            short.len(),
            listing.join("\n"),
            again.as_deref().unwrap_or("(nothing this time: it depends on timing)")
        )
    }
}

fn compare(left: &Path, right: &Path) -> Option<String> {
    let (left, right) = match (scan(left), scan(right)) {
        (Ok(left), Ok(right)) => (left, right),
        (left, right) => return Some(format!("cannot be read: {:?} {:?}", left.err(), right.err())),
    };
    let found = differences(&left, &right, Compare { times: false, hard_links: true });
    let lines: Vec<String> = found.iter().take(8).map(ToString::to_string).collect();
    (!found.is_empty()).then(|| lines.join("\n"))
}
