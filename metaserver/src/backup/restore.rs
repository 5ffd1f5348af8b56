//! A store from a backup or a dump.

use std::{path::Path, sync::atomic::AtomicBool, time::SystemTime};

use bytes::Bytes;
use fjordfs_proto::pb;
use prost::Message;

use super::{About, BackupError, Form, goes_on, open, read};
use crate::{
    keys,
    label::{Folder, FolderError},
    records::{Counters, TargetRecord},
    store::{
        Batch, Fence, FjallOptions, FjallStore, Late, MetaStore, Place, RemoteStore, StoreError,
        bulk::{self, Bulk},
        is_empty,
    },
    store_label::{self, Closed},
};

/// More than could be given out between a backup and its restore.
pub(super) const IDS_SKIPPED: u64 = 1 << 40;
pub(super) const EPOCHS_SKIPPED: u64 = 1 << 32;
/// And for each second between them, so that a second restore of the same backup uses none that were given out since the first: more
/// than a cluster gives out in a second. A century of these is far below what a number holds.
pub(super) const IDS_PER_SECOND: u64 = 1 << 24;
pub(super) const EPOCHS_PER_SECOND: u64 = 1 << 16;
/// Servers and targets, whose numbers people read and type.
pub(super) const TARGETS_SKIPPED: u64 = 1000;
const TARGETS_PER_SECOND: u64 = 1;
/// Starts of a metaserver, of which there may be 2 to the power of 24.
const STARTS_SKIPPED: u64 = 1000;
const SECONDS_PER_START: u64 = 300;

/// Makes a store from a backup or a dump, in an empty folder or on an empty store; what it was of, and how many records it has. With `again` also
/// where a restore was interrupted.
///
/// # Errors
/// See [`BackupError`]. A file that is not whole is refused before anything is written. When a restore is interrupted, also by `stop`, no
/// metaserver opens what is there.
pub fn restore(
    form: Form,
    file: &Path,
    data: &Path,
    store: Option<&Place>,
    again: bool,
    stop: &AtomicBool,
) -> Result<(About, u64), BackupError> {
    let now = seconds_since_1970();
    // Whatever would be refused later is refused now.
    let mut onwards = Onwards::default();
    let (about, _) = read(form, file, open(form, file)?, |about, (key, value)| {
        goes_on(stop)?;
        onwards.moved_on(form, file, &key, value, now.saturating_sub(about.created)).map(drop)
    })?;
    match store {
        None => {
            let name = data.display().to_string();
            let mut folder = Folder::claim_unlabelled(data, &about.cluster_id).map_err(|e| match e {
                FolderError::Locked(_) => BackupError::NotEmpty(name.clone()),
                other => other.into(),
            })?;
            let store = FjallStore::open(&folder.store, FjallOptions::default()).map_err(|e| match e {
                // That it wants a backup is known, and there may still be something to be saved from it.
                StoreError::Damaged { .. } => BackupError::NotEmpty(name.clone()),
                other => other.into(),
            })?;
            let fence = close(&store, &name, again)?;
            folder.label()?;
            load(form, file, &store, fence, stop).map_err(|e| interrupted(e, name))
        }
        Some(place) => {
            let store = RemoteStore::open(place, FjallOptions::default().cache_bytes)?;
            if !store.is_free()? {
                return Err(BackupError::Owned(place.to_string()));
            }
            let name = place.to_string();
            let fence = close(&store, &name, again)?;
            let loaded = load(form, file, &store, fence, stop).map_err(|e| interrupted(e, name))?;
            store.release()?;
            Ok(loaded)
        }
    }
}

/// One that was stopped says what is to be done.
fn interrupted(e: BackupError, name: String) -> BackupError {
    if matches!(e, BackupError::Stopped) { BackupError::Interrupted(name) } else { e }
}

/// Takes a store that is empty, or that a restore has left, and sees to it that nobody opens it before everything is there.
pub(super) fn close(store: &dyn MetaStore, name: &str, again: bool) -> Result<Fence, BackupError> {
    let was_interrupted = matches!(store_label::closed(store)?, Some(Closed::Restoring(_)));
    match (was_interrupted, again) {
        (true, true) => {}
        (true, false) => return Err(BackupError::Interrupted(name.to_owned())),
        (false, _) if is_empty(store)? => {}
        (false, _) => return Err(BackupError::NotEmpty(name.to_owned())),
    }
    let fence = store.take_over()?;
    let marker = (keys::CLOSED.to_vec(), Some(Closed::restoring().encode()));
    store.commit(Batch { writes: vec![marker] }, fence)?;
    bulk::settle(store)?;
    bulk::clear(store, fence)?;
    Ok(fence)
}

/// Loads a file that has been verified into a store that has been closed, and opens that.
pub(super) fn load(
    form: Form,
    file: &Path,
    store: &dyn MetaStore,
    fence: Fence,
    stop: &AtomicBool,
) -> Result<(About, u64), BackupError> {
    let now = seconds_since_1970();
    let mut bulk = Bulk::new(store, fence);
    let mut onwards = Onwards::default();
    let loaded = read(form, file, open(form, file)?, |about, (key, value)| {
        goes_on(stop)?;
        let value = onwards.moved_on(form, file, &key, value, now.saturating_sub(about.created))?;
        Ok(bulk.write(key, Some(value))?)
    })?;
    bulk.finish()?;
    store.commit(Batch { writes: vec![(keys::CLOSED.to_vec(), None)] }, fence)?;
    bulk::settle(store)?;
    Ok(loaded)
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// What restored records say otherwise than those of the backup.
#[derive(Default)]
pub(super) struct Onwards {
    /// Of the map, which comes before the targets.
    epoch: u64,
}

impl Onwards {
    /// As [`Onwards::record`]; the reader of the file adds where it is damaged.
    fn moved_on(
        &mut self,
        form: Form,
        file: &Path,
        key: &[u8],
        value: Bytes,
        age: u64,
    ) -> Result<Bytes, BackupError> {
        let damaged = |what| BackupError::Damaged { form, file: file.to_owned(), what };
        self.record(key, value, age).map_err(damaged)
    }

    /// Numbers given out since the backup, which is so many seconds old, are not given out again; and any target may have, or lack, what
    /// has moved since.
    pub(super) fn record(&mut self, key: &[u8], value: Bytes, age: u64) -> Result<Bytes, String> {
        let behind = |next: u64, skipped: u64, per_second: u64| {
            next.saturating_add(skipped).saturating_add(age.saturating_mul(per_second))
        };
        match key {
            [keys::COUNTERS] => {
                let mut counters =
                    Counters::decode(value).map_err(|e| format!("its counters cannot be read: {e}"))?;
                for next in [&mut counters.next_block, &mut counters.next_inode, &mut counters.next_session] {
                    *next = behind(*next, IDS_SKIPPED, IDS_PER_SECOND);
                }
                // Versions of bytes grow with it.
                counters.fence =
                    counters.fence.saturating_add(STARTS_SKIPPED).saturating_add(age / SECONDS_PER_START);
                for next in [&mut counters.next_server, &mut counters.next_target] {
                    *next = behind(*next, TARGETS_SKIPPED, TARGETS_PER_SECOND);
                }
                Ok(counters.encode_to_vec().into())
            }
            [keys::MAP] => {
                let mut map = pb::common::ClusterMap::decode(value)
                    .map_err(|e| format!("its cluster map cannot be read: {e}"))?;
                map.epoch = behind(map.epoch, EPOCHS_SKIPPED, EPOCHS_PER_SECOND);
                self.epoch = map.epoch;
                Ok(map.encode_to_vec().into())
            }
            [keys::TARGET, ..] => {
                let mut target =
                    TargetRecord::decode(value).map_err(|e| format!("a target cannot be read: {e}"))?;
                (target.displaced, target.unasked) = (self.epoch, self.epoch);
                Ok(target.encode_to_vec().into())
            }
            _ => Ok(value),
        }
    }
}
