//! Commits what nobody flushes: old dirty data every so often, all of it when writers wait for room; and makes what
//! was committed power-safe in the background, so that little is at stake even for who never calls fsync.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior};
use tracing::warn;

use crate::{client::Inner, file::FileState};

/// How often dirty files are looked at.
const TICK: Duration = Duration::from_millis(250);

/// How often everything stored since is synced.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);

/// Files flushed at a time.
const FLUSHES_MAX: usize = 512;

/// Starts the flusher on the client's engine.
pub(crate) fn spawn(client: &Arc<Inner>) {
    client.engine.spawn(flush_old(Arc::downgrade(client)));
    client.engine.spawn(relieve_pressure(Arc::downgrade(client)));
    client.engine.spawn(sync_stored(Arc::downgrade(client)));
}

async fn flush_old(client: Weak<Inner>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let Some(client) = client.upgrade() else { return };
        let age_max = client.options.dirty_age_max;
        let old = |f: &Arc<FileState>| f.lock().dirty_since.is_some_and(|since| since.elapsed() >= age_max);
        let files: Vec<_> = dirty_files(&client).into_iter().filter(old).collect();
        flush_files(&client, files).await;
    }
}

async fn relieve_pressure(client: Weak<Inner>) {
    loop {
        let Some(strong) = client.upgrade() else { return };
        let budget = strong.budget.clone();
        drop(strong);
        // Looks up now and then, so that a dropped client ends the task.
        let waited = tokio::time::timeout(Duration::from_secs(1), budget.pressure.notified()).await;
        let Some(client) = client.upgrade() else { return };
        if waited.is_ok() {
            let mut files = dirty_files(&client);
            files.sort_by_key(|f| std::cmp::Reverse(f.lock().view.dirty_bytes()));
            flush_files(&client, files).await;
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
        let started = Instant::now();
        // Tiny files first, many in a commit; flushing them then only waits for that.
        client.start_inline_units(group);
        futures_util::future::join_all(group.iter().map(|file| client.flush(file))).await;
        if started.elapsed() > Duration::from_secs(10) {
            warn!(files = group.len(), "writing back took {:?}", started.elapsed());
        }
    }
}
