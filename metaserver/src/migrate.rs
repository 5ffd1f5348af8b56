//! Moving the metadata from one engine to another, while no metaserver runs.
//!
//! # Crash consistency
//! The new store is closed before the first record is in it and opened by the last write, after everything was read back and
//! compared. The old one is closed then, too. A migration that was interrupted is run again: it begins with an empty
//! store. At no moment can both be served, but for a kill between those two last writes: then both are the same, and
//! whoever starts a metaserver decides by naming one.
//!
//! Both stores are owned meanwhile, so a metaserver that still runs on either is fenced and ends.

use bytes::Bytes;
use fjordfs_proto::FsError;

use crate::{
    core::cluster_of,
    keys,
    label::{Folder, FolderError},
    store::{
        Batch, Fence, FjallOptions, FjallStore, Late, MetaStore, Order, Pair, Place, RemoteStore, StoreError,
        bulk::{self, Bulk},
        each_page, is_empty,
    },
    store_label::{self, Closed},
};

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Progress {
    /// Records in the new store.
    pub copied: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Records that were read back and are the same.
    pub verified: u64,
}

/// Why nothing was moved.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// An engine failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The records make no sense.
    #[error("{place}: {source}")]
    Metadata {
        /// The store.
        place: String,
        /// What is wrong.
        source: FsError,
    },
    /// There is nothing to be moved.
    #[error("{0} holds no metadata")]
    Empty(String),
    /// The new store is in use.
    #[error("{0} is not empty: name another folder, prefix or database")]
    NotEmpty(String),
    /// A metaserver runs.
    #[error("a metaserver runs on {0}: stop all of them first")]
    Owned(String),
    /// What was moved before is not moved again.
    #[error("{place} is closed: {why}")]
    Closed {
        /// The store.
        place: String,
        /// What it says.
        why: String,
    },
    /// What was read back is not what was written.
    #[error("{place} does not hold what was written to it (record {key}): it stays closed")]
    Differs {
        /// The new store.
        place: String,
        /// The first key that differs.
        key: String,
    },
}

/// A store that is owned for as long as this lives.
struct Open {
    store: Box<dyn MetaStore>,
    fence: Fence,
    place: String,
    _folder: Option<Folder>,
}

impl Open {
    /// `cluster`: the folder or store is new, and for this cluster.
    fn new(place: &Place, cluster: Option<&str>) -> Result<Open, MigrateError> {
        let options = FjallOptions::default();
        let (store, folder): (Box<dyn MetaStore>, _) = match place {
            Place::Fjall(path) => {
                let mut folder = match cluster {
                    None => Folder::claim_existing(path)?,
                    Some(id) => Folder::claim_for(path, id)?,
                };
                let store = FjallStore::open(&folder.store, options)?;
                folder.label()?;
                (Box::new(store), Some(folder))
            }
            _ => {
                let store = RemoteStore::open(place, options.cache_bytes)?;
                if !store.is_free()? {
                    return Err(MigrateError::Owned(place.to_string()));
                }
                (Box::new(store), None)
            }
        };
        let fence = store.take_over()?;
        Ok(Open { store, fence, place: place.to_string(), _folder: folder })
    }

    fn commit(&self, writes: Vec<(Vec<u8>, Option<Bytes>)>) -> Result<(), MigrateError> {
        self.store.commit(Batch { writes }, self.fence)?;
        Ok(())
    }

    fn settle(&self) -> Result<(), MigrateError> {
        Ok(bulk::settle(&*self.store)?)
    }

    fn release(&self) -> Result<(), MigrateError> {
        self.store.late().map_or(Ok(()), Late::release).map_err(Into::into)
    }

    fn pages(&self, f: impl FnMut(Vec<Pair>) -> Result<(), MigrateError>) -> Result<(), MigrateError> {
        each_page(&*self.store, keys::everything(), f)
    }
}

/// Copies everything, reads it back, opens the new store and closes the old one. `tell` is called now and then.
///
/// # Errors
/// See [`MigrateError`]; the old store is as it was.
pub fn migrate(from: &Place, to: &Place, mut tell: impl FnMut(Progress)) -> Result<Progress, MigrateError> {
    let metadata = |place: &Place| {
        let place = place.to_string();
        move |source| MigrateError::Metadata { place, source }
    };
    let old = Open::new(from, None)?;
    if let Some(closed) = store_label::closed(&*old.store)? {
        return Err(MigrateError::Closed { place: old.place, why: closed.text().to_owned() });
    }
    store_label::check(&*old.store).map_err(metadata(from))?;
    let cluster = cluster_of(&*old.store).map_err(metadata(from))?;
    let cluster = cluster.ok_or_else(|| MigrateError::Empty(old.place.clone()))?;
    let new = Open::new(to, Some(&cluster))?;
    clear(&new)?;
    let why = format!(
        "a migration from {} into it was not finished: run `fjord meta migrate` again, or name another store",
        old.place
    );
    new.commit(vec![(keys::CLOSED.to_vec(), Some(Closed::Unfinished(why).encode()))])?;
    let mut progress = Progress::default();
    copy(&old, &new, &mut progress, &mut tell)?;
    // Nothing of what is compared shall come from memory.
    drop(new);
    let new = Open::new(to, Some(&cluster))?;
    compare(&old, &new, &mut progress, &mut tell)?;
    new.commit(vec![(keys::CLOSED.to_vec(), None)])?;
    new.settle()?;
    let moved = format!("its metadata was moved to {}: start the metaservers with that --store", new.place);
    old.commit(vec![(keys::CLOSED.to_vec(), Some(Closed::Moved(moved).encode()))])?;
    old.settle()?;
    new.release()?;
    old.release()?;
    Ok(progress)
}

/// Removes what a migration has left; anything else is somebody's.
fn clear(new: &Open) -> Result<(), MigrateError> {
    if store_label::closed(&*new.store)?.is_some_and(|closed| closed.is_unfinished()) {
        return Ok(bulk::clear(&*new.store, new.fence)?);
    }
    match is_empty(&*new.store)? {
        true => Ok(()),
        false => Err(MigrateError::NotEmpty(new.place.clone())),
    }
}

fn copy(
    old: &Open,
    new: &Open,
    progress: &mut Progress,
    tell: &mut impl FnMut(Progress),
) -> Result<(), MigrateError> {
    let mut bulk = Bulk::new(&*new.store, new.fence);
    old.pages(|page| {
        for (key, value) in page {
            progress.copied += 1;
            progress.bytes += (key.len() + value.len()) as u64;
            bulk.write(key, Some(value))?;
        }
        tell(*progress);
        Ok(())
    })?;
    bulk.finish()?;
    new.release()
}

fn compare(
    old: &Open,
    new: &Open,
    progress: &mut Progress,
    tell: &mut impl FnMut(Progress),
) -> Result<(), MigrateError> {
    let differs =
        |key: &[u8]| MigrateError::Differs { place: new.place.clone(), key: key.escape_ascii().to_string() };
    let mut from = keys::everything().start;
    let end = keys::everything().end;
    old.pages(|page| {
        let upto = page.last().map_or(end.clone(), |(key, _)| crate::store::successor(key));
        let mut there = new.store.scan(&from..&upto, Order::Ascending, page.len() + 2)?;
        there.retain(|(key, _)| key != keys::CLOSED);
        if let Some(at) = (0..page.len().max(there.len())).find(|n| page.get(*n) != there.get(*n)) {
            return Err(differs(page.get(at).or(there.get(at)).map_or(&[], |(key, _)| key)));
        }
        progress.verified += page.len() as u64;
        from.clone_from(&upto);
        tell(*progress);
        Ok(())
    })?;
    let beyond = new.store.scan(&from..&end, Order::Ascending, 2)?;
    match beyond.iter().find(|(key, _)| key != keys::CLOSED) {
        Some((key, _)) => Err(differs(key)),
        None => Ok(()),
    }
}
