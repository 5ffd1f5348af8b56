//! Commits what was written to files that others are about to use.
//!
//! A close of a file that is delegated to this client commits nothing ([`crate::File::flush`]); that happens a second
//! later, or here, when the delegation is recalled. The recall is not acknowledged before. What may not be committed any more is dropped here, too.

use std::sync::{Arc, Weak};

use fjordfs_proto::{FsError, InodeId};

use crate::{
    client::Inner,
    file::FileState,
    leases::{Keep, Keeper},
    write::flush_files,
};

/// Does as it is told until the client is gone.
pub(crate) async fn run(client: Weak<Inner>, mut orders: Keeper) {
    while let Some(order) = orders.recv().await {
        let Some(client) = client.upgrade() else { return };
        match order {
            Keep::Flush { recalled, below, done } => {
                let files = client.dirty_of(&recalled);
                if files.is_empty() {
                    // Nobody is there to hear it when the stream has broken.
                    let _ = done.send(client.clean_of(below));
                    continue;
                }
                // One that takes long does not hold up the next.
                let engine = client.engine.clone();
                engine.spawn(async move {
                    flush_files(&client, files).await;
                    let _ = done.send(client.clean_of(below));
                });
            }
            Keep::FlushAll(done) => {
                let files = client.dirty.lock().values().cloned().collect();
                let engine = client.engine.clone();
                engine.spawn(async move {
                    flush_files(&client, files).await;
                    let _ = done.send(Vec::new());
                });
            }
            Keep::Lost(error) => {
                let files: Vec<_> = client.files.lock().values().filter_map(Weak::upgrade).collect();
                for file in files {
                    file.lock().failures.note(|| error.clone());
                }
            }
            Keep::LocksLost { inodes, error, done } => {
                for file in inodes.iter().filter_map(|ino| client.known_file(*ino)) {
                    client.forget_written_under_lock(&file, &error);
                }
                // The driver of the stream is gone when the client is.
                let _ = done.send(Vec::new());
            }
            Keep::Refused(inodes, error) => {
                for file in inodes.iter().filter_map(|ino| client.known_file(*ino)) {
                    file.lock().failures.note(|| error.clone());
                }
            }
        }
    }
}

impl Inner {
    fn dirty_of(&self, inodes: &[InodeId]) -> Vec<Arc<FileState>> {
        let dirty = self.dirty.lock();
        inodes.iter().filter_map(|ino| dirty.get(ino).cloned()).collect()
    }

    /// Whoever has the lock now may have written meanwhile. That the lock is lost is told in any case, as NFS does (RFC 8881, 8.4.2.1).
    fn forget_written_under_lock(&self, file: &FileState, error: &FsError) {
        let mut inner = file.lock();
        self.budget.release(inner.forget_written());
        self.lost(file.ino, &mut inner, error);
        self.is_clean(file.ino);
    }

    /// Of these, the ones that nothing is left to be written to.
    fn clean_of(&self, mut inodes: Vec<InodeId>) -> Vec<InodeId> {
        let dirty = self.dirty.lock();
        inodes.retain(|ino| !dirty.contains_key(ino));
        inodes
    }
}
