//! Answers that wait for recalls.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Pending;
use crate::{leases::RecallId, store::Ticket};

/// In the order in which their operations were executed.
#[derive(Default)]
pub(super) struct Held {
    answers: BTreeMap<u64, (Pending, Ticket, HashSet<RecallId>)>,
    waiting: HashMap<RecallId, Vec<u64>>,
    next: u64,
}

impl Held {
    /// Keeps an answer until all of `recalls` have ended. Its share of memory is given back at once: the message with which its
    /// client obeys a recall must not wait for the room that its own answers take.
    pub(super) fn hold(&mut self, mut pending: Pending, committed: Ticket, recalls: Vec<RecallId>) {
        pending.permit = None;
        for recall in &recalls {
            self.waiting.entry(*recall).or_default().push(self.next);
        }
        self.answers.insert(self.next, (pending, committed, recalls.into_iter().collect()));
        self.next += 1;
    }

    /// Recalls have ended: the answers that waited for nothing else.
    pub(super) fn release(&mut self, ended: Vec<RecallId>) -> Vec<(Pending, Ticket)> {
        let mut free = Vec::new();
        for recall in ended {
            for at in self.waiting.remove(&recall).unwrap_or_default() {
                let Some((_, _, recalls)) = self.answers.get_mut(&at) else { continue };
                recalls.remove(&recall);
                if recalls.is_empty() {
                    free.push(at);
                }
            }
        }
        free.sort_unstable();
        free.into_iter()
            .filter_map(|at| self.answers.remove(&at).map(|(pending, committed, _)| (pending, committed)))
            .collect()
    }
}
