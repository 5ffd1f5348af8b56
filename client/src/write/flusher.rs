//! Commits what nobody flushes: old dirty data every so often, all of it when writers wait for room; and makes what
//! was committed power-safe in the background, so that little is at stake even for who never calls fsync.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Weak},
    time::Duration,
};

use fjordfs_proto::InodeId;
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior};
use tracing::warn;

use crate::{client::Inner, file::FileState};

/// Dirty files are looked at so many times in [`crate::Options::dirty_age_max`], if that is no more often than every 10 ms.
const LOOKS: u32 = 10;
/// And every so often at least.
const LOOK_MAX: Duration = Duration::from_millis(100);

/// How often everything stored since is synced.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// Files flushed at a time.
const FLUSHES_MAX: usize = 512;

/// So long some files hold up the flush of others: what servers do not take shall not keep what they would take from being committed.
const PATIENCE: Duration = Duration::from_millis(250);

/// Starts the flusher on the client's engine.
pub(crate) fn spawn(client: &Arc<Inner>) {
    let flusher = Flusher { client: Arc::downgrade(client), running: Arc::default() };
    client.engine.spawn(flusher.clone().flush_old());
    client.engine.spawn(flusher.relieve_pressure());
    client.engine.spawn(sync_stored(Arc::downgrade(client)));
}

#[derive(Clone)]
struct Flusher {
    client: Weak<Inner>,
    /// Files that are being flushed from here, and whether writers have come to wait for room meanwhile.
    running: Arc<Mutex<HashMap<InodeId, bool>>>,
}

impl Flusher {
    async fn flush_old(self) {
        let Some(age_max) = self.client.upgrade().map(|client| client.options.dirty_age_max) else { return };
        let mut tick = tokio::time::interval((age_max / LOOKS).clamp(Duration::from_millis(10), LOOK_MAX));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The commit is to be there by then, so it is begun before.
        let begun = age_max * 3 / 4;
        loop {
            tick.tick().await;
            let Some(client) = self.client.upgrade() else { return };
            let old = |f: &Arc<FileState>| f.lock().dirty_since.is_some_and(|since| since.elapsed() >= begun);
            let files = dirty_files(&client).into_iter().filter(old).collect();
            self.flush(&client, files, false).await;
        }
    }

    async fn relieve_pressure(self) {
        loop {
            let Some(strong) = self.client.upgrade() else { return };
            let budget = strong.budget.clone();
            drop(strong);
            // Looks up now and then, so that a dropped client ends the task.
            let waited = tokio::time::timeout(Duration::from_secs(1), budget.pressure.notified()).await;
            let Some(client) = self.client.upgrade() else { return };
            if waited.is_ok() {
                let mut files = dirty_files(&client);
                files.sort_by_key(|f| std::cmp::Reverse(f.lock().view.dirty_bytes()));
                self.flush(&client, files, true).await;
            }
        }
    }

    /// Flushes files a group at a time, but for those that it is at already: under `pressure` those are looked at again when they are done,
    /// since more may have been written to them.
    async fn flush(&self, client: &Arc<Inner>, mut files: Vec<Arc<FileState>>, pressure: bool) {
        {
            let mut running = self.running.lock();
            files.retain(|file| match running.entry(file.ino) {
                Entry::Vacant(entry) => {
                    entry.insert(false);
                    true
                }
                Entry::Occupied(mut entry) => {
                    *entry.get_mut() |= pressure;
                    false
                }
            });
        }
        for group in files.chunks(FLUSHES_MAX) {
            let (group, client, running) = (group.to_vec(), client.clone(), self.running.clone());
            let task = client.engine.clone().spawn(async move {
                flush_group(&client, &group, |ino| {
                    if running.lock().remove(&ino) == Some(true) {
                        client.budget.pressure.notify_one();
                    }
                })
                .await;
            });
            let _ = tokio::time::timeout(PATIENCE, task).await;
        }
    }
}

async fn sync_stored(client: Weak<Inner>) {
    loop {
        tokio::time::sleep(SYNC_INTERVAL).await;
        let Some(client) = client.upgrade() else { return };
        if let Err(e) = client.sync_stored().await {
            warn!("stored data could not be synced, fsync will try again: {e}");
        }
    }
}

fn dirty_files(client: &Inner) -> Vec<Arc<FileState>> {
    client.dirty.lock().values().cloned().collect()
}

/// Flushes files a group at a time; their errors wait for their users.
pub(crate) async fn flush_files(client: &Arc<Inner>, files: Vec<Arc<FileState>>) {
    for group in files.chunks(FLUSHES_MAX) {
        flush_group(client, group, |_| ()).await;
    }
}

/// Flushes files side by side, and tells of each when it is done.
async fn flush_group(client: &Arc<Inner>, group: &[Arc<FileState>], done: impl Fn(InodeId)) {
    let started = Instant::now();
    // Tiny files first, many in a commit; flushing them then only waits for that.
    client.start_inline_units(group);
    let flush = async |file: &Arc<FileState>| {
        // The error waits for the file's user.
        let _ = client.flush(file).await;
        done(file.ino);
    };
    futures_util::future::join_all(group.iter().map(flush)).await;
    if started.elapsed() > Duration::from_secs(10) {
        warn!(files = group.len(), "writing back took {:?}", started.elapsed());
    }
}
