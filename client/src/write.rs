//! From dirty bytes to committed blocks.
//!
//! # How it works
//! Dirty bytes leave a file in **units**. A unit is one block of at most 16 MiB: a full run of one large file, or the
//! scattered and small runs of many files packed together; or it is one tiny file whose bytes travel inside the
//! commit. A unit is stored ([`unit`]), then committed in one transaction that names all its files.
//!
//! # Order
//! A file's units are committed in the order in which they were taken, so that what others see of a file is a prefix
//! of what was written, never its end with a hole before it; and what was appended first is not put over what was appended
//! then. Storing goes on in parallel.
//!
//! # Consistency
//! The commit is built and submitted while all of its files are locked. A truncate does the same, so the two reach
//! the server in the order in which they took effect here.
//!
//! # Failures
//! A unit that cannot be stored or committed is given up after the operation timeout. Its files remember the error
//! and report it at their next write, flush, fsync or close; what was committed before stays.

mod flusher;
pub(crate) mod packer;
mod stored;
mod unit;

use std::sync::Arc;

use fjordfs_proto::INLINE_MAX;
use tokio::sync::watch;

pub(crate) use flusher::{flush_files, spawn as spawn_flusher};
use unit::Unit;

use crate::{client::Inner, file::FileState};

/// Becomes true when a unit is committed or has failed.
pub(crate) type UnitDone = watch::Receiver<bool>;

/// Files up to this size travel inside the commit: a block of their own would cost a round trip and a device write.
const INLINE_FILE_MAX: u64 = 4096;

const _: () = assert!(INLINE_FILE_MAX <= INLINE_MAX);

impl Inner {
    /// Starts a unit for every full block's worth of contiguous dirty bytes.
    pub(crate) fn start_full_units(self: &Arc<Self>, state: &Arc<FileState>) {
        loop {
            let mut inner = state.lock();
            let Ok(policy) = inner.view.policy() else { return };
            let mut unit = Unit::new(policy);
            let full = unit.take_run(state, &mut inner);
            drop(inner);
            if !full {
                return;
            }
            unit.start(self);
        }
    }

    /// Starts a unit with as many scattered dirty bytes of one file as a block holds.
    pub(crate) fn start_scattered_unit(self: &Arc<Self>, state: &Arc<FileState>) {
        let mut inner = state.lock();
        let Ok(policy) = inner.view.policy() else { return };
        let mut unit = Unit::new(policy);
        let taken = unit.take(state, &mut inner);
        drop(inner);
        if taken > 0 {
            unit.start(self);
        }
    }

    /// Starts a unit whose bytes travel inside the commit, if the file is small enough for that; whether it is.
    pub(crate) fn start_inline_unit(self: &Arc<Self>, state: &Arc<FileState>) -> bool {
        let mut units = Vec::new();
        let fits = add_inline(&mut units, state);
        self.start_units(units);
        fits
    }

    /// Starts units for those files whose bytes travel inside the commit: one for all of a policy, where that is possible.
    pub(crate) fn start_inline_units(self: &Arc<Self>, files: &[Arc<FileState>]) {
        let mut units = Vec::new();
        for file in files {
            add_inline(&mut units, file);
        }
        self.start_units(units);
    }

    fn start_units(self: &Arc<Self>, units: Vec<Unit>) {
        units.into_iter().filter(|unit| !unit.is_empty()).for_each(|unit| unit.start(self));
    }
}

/// Adds a file's dirty bytes to a unit if they are few enough to travel inside the commit; whether they are.
fn add_inline(units: &mut Vec<Unit>, state: &Arc<FileState>) -> bool {
    let mut inner = state.lock();
    if inner.view.size() > INLINE_FILE_MAX {
        return false;
    }
    let Ok(policy) = inner.view.policy() else { return false };
    let fits = |unit: &Unit| unit.policy() == policy && unit.may_take(&inner);
    let at = units.iter().position(fits).unwrap_or_else(|| {
        units.push(Unit::inline(policy));
        units.len() - 1
    });
    units[at].take(state, &mut inner);
    true
}
