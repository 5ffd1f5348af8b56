//! Group sync: one fdatasync per changed volume serves everyone who waits.
//!
//! A waiter is served by the first sync that *began* after its writes had completed. Waiters queue at a mutex: the first
//! one syncs; by the time the next one enters, everything it waited for has usually been covered, together with all
//! behind it, and it leaves at once. A waiter that is dropped in the middle leaves nothing half done: what is known to be
//! synced is only noted after success.
//!
//! **A failed fdatasync is final.** The kernel reports a lost write once and then forgets about it, so a retry would
//! succeed without the data being there. The target is marked failed and says so to everyone from then on.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Store, device::Device, error::StoreError};

/// What has been written and what of it is power-safe, over all volumes of a store.
pub(super) struct SyncState {
    /// Completed writes and punches. Counted after the volume's own count.
    writes: AtomicU64,
    /// How many of them are on stable storage; the lock is what waiters queue at.
    covered: tokio::sync::Mutex<u64>,
}

impl SyncState {
    pub(super) fn new() -> SyncState {
        SyncState { writes: AtomicU64::new(0), covered: tokio::sync::Mutex::new(0) }
    }

    pub(super) fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }
}

impl<D: Device> Store<D> {
    /// Returns when every put and deletion that completed before the call is power-safe.
    ///
    /// # Errors
    /// [`StoreError::Failed`] when the target has failed, now or earlier: what was written since the last successful
    /// sync may be lost.
    pub(crate) async fn sync(&self) -> Result<(), StoreError> {
        let wanted = self.sync_state.writes();
        let mut covered = self.sync_state.covered.lock().await;
        self.check_alive()?;
        if *covered >= wanted {
            return Ok(());
        }
        let covering = self.sync_state.writes();
        let dirty: Vec<_> =
            (self.volumes.read().values()).filter_map(|v| Some((v.clone(), v.unsynced()?))).collect();
        let syncs = dirty.iter().map(|(volume, _)| self.device.sync(&volume.file));
        for (result, (volume, up_to)) in futures_util::future::join_all(syncs).await.into_iter().zip(&dirty) {
            if let Err(e) = result {
                return Err(self.fail(format!("fdatasync of {}: {e}", volume.id)));
            }
            volume.synced(*up_to);
        }
        *covered = covering;
        Ok(())
    }

    /// Whether a power failure would lose nothing.
    #[cfg(test)]
    pub(crate) fn is_power_safe(&self) -> bool {
        self.volumes.read().values().all(|volume| volume.unsynced().is_none())
    }
}
