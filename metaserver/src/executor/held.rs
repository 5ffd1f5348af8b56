//! What waits for recalls: answers, and requests that are not executed before.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::leases::RecallId;

/// In the order in which it came.
pub(super) struct Held<T> {
    items: BTreeMap<u64, (T, HashSet<RecallId>)>,
    waiting: HashMap<RecallId, Vec<u64>>,
    next: u64,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Held { items: BTreeMap::new(), waiting: HashMap::new(), next: 0 }
    }
}

impl<T> Held<T> {
    /// Keeps something until all of `recalls` have ended; its number.
    pub(super) fn hold(&mut self, item: T, recalls: Vec<RecallId>) -> u64 {
        let at = self.next;
        for recall in &recalls {
            self.waiting.entry(*recall).or_default().push(at);
        }
        self.items.insert(at, (item, recalls.into_iter().collect()));
        self.next += 1;
        at
    }

    /// What is kept under a number, and the recalls that it still waits for.
    pub(super) fn get(&self, at: u64) -> Option<&(T, HashSet<RecallId>)> {
        self.items.get(&at)
    }

    /// Recalls have ended: what waited for nothing else, with its number.
    pub(super) fn release(&mut self, ended: &[RecallId]) -> Vec<(u64, T)> {
        let mut free = Vec::new();
        for recall in ended {
            for at in self.waiting.remove(recall).unwrap_or_default() {
                let Some((_, recalls)) = self.items.get_mut(&at) else { continue };
                recalls.remove(recall);
                if recalls.is_empty() {
                    free.push(at);
                }
            }
        }
        free.sort_unstable();
        free.into_iter().filter_map(|at| self.items.remove(&at).map(|(item, _)| (at, item))).collect()
    }
}
