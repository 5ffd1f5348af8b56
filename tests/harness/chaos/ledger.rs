//! What was tried, and what was acknowledged.

use std::{
    fmt::Display,
    ops::RangeInclusive,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::content::Id;

/// Writers: two to a client.
const WORKERS: usize = 4;
/// Files of a writer that are replaced as a whole.
pub(super) const WHOLE_FILES: usize = 10;
/// Pages of a writer's file that is changed in place.
pub(super) const PAGES: usize = 192;

/// Number of a writer.
pub(super) type WorkerNo = usize;

/// A value that only grows: the last one acknowledged, the last one tried. The truth is one of these or between.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Progress {
    pub(super) acked: u64,
    pub(super) tried: u64,
}

/// What one writer did. Nobody else writes to its files.
#[derive(Debug)]
struct Worker {
    whole: Vec<Progress>,
    pages: Vec<Progress>,
    /// Length of the file that is appended to.
    log: Progress,
}

#[derive(Debug)]
pub(super) struct Ledger {
    seed: u64,
    workers: Vec<Mutex<Worker>>,
    acknowledged: AtomicU64,
    broken: Mutex<Vec<String>>,
}

/// One of a writer's values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Item {
    /// Version of a file replaced as a whole.
    Whole(usize),
    /// Version of a page of the file changed in place.
    Page(usize),
    /// Length of the file appended to.
    Log,
}

impl Worker {
    fn get(&mut self, item: Item) -> &mut Progress {
        match item {
            Item::Whole(n) => &mut self.whole[n],
            Item::Page(n) => &mut self.pages[n],
            Item::Log => &mut self.log,
        }
    }
}

impl Ledger {
    pub(super) fn new(seed: u64) -> Ledger {
        let worker = || {
            Mutex::new(Worker {
                whole: vec![Progress::default(); WHOLE_FILES],
                pages: vec![Progress::default(); PAGES],
                log: Progress::default(),
            })
        };
        Ledger {
            seed,
            workers: (0..WORKERS).map(|_| worker()).collect(),
            acknowledged: AtomicU64::new(0),
            broken: Mutex::default(),
        }
    }

    pub(super) fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Files that there are to verify.
    pub(super) fn files(&self) -> usize {
        self.workers.len() * (WHOLE_FILES + 2)
    }

    /// What the content of a file follows from.
    pub(super) fn id(&self, worker: WorkerNo, item: Item) -> Id {
        let file = match item {
            Item::Whole(n) => n,
            Item::Page(_) => WHOLE_FILES,
            Item::Log => WHOLE_FILES + 1,
        };
        Id { seed: self.seed, file: (worker * 100 + file) as u64 }
    }

    fn worker(&self, worker: WorkerNo) -> MutexGuard<'_, Worker> {
        self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn progress(&self, worker: WorkerNo, item: Item) -> Progress {
        *self.worker(worker).get(item)
    }

    /// The value is going to be `value`, or stay below.
    pub(super) fn trying(&self, worker: WorkerNo, item: Item, value: u64) {
        let mut worker = self.worker(worker);
        let progress = worker.get(item);
        progress.tried = progress.tried.max(value);
    }

    /// The value is promised.
    pub(super) fn acked(&self, worker: WorkerNo, item: Item, value: u64) {
        self.worker(worker).get(item).acked = value;
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// What may be seen by a look that began when `before` was noted and ends now.
    pub(super) fn allowed(&self, worker: WorkerNo, item: Item, before: Progress) -> RangeInclusive<u64> {
        before.acked..=self.progress(worker, item).tried
    }

    /// A promise was broken.
    pub(super) fn broke(&self, what: impl Display) {
        let what = what.to_string();
        eprintln!("BROKEN: {what}");
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }

    /// # Panics
    /// When a promise was broken.
    pub(super) fn assert_kept(&self, context: &str) {
        let broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(broken.is_empty(), "{} promises broken under {context}\n{}", broken.len(), broken.join("\n"));
    }
}
