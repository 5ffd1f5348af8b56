//! Commits what was written to files that others are about to use.
//!
//! A close of a file that is delegated to this client commits nothing ([`crate::File::flush`]); that happens a second
//! later, or here, when the delegation is recalled. The recall is not acknowledged before.

use std::sync::{Arc, Weak};

use fjordfs_proto::InodeId;

use crate::{
    client::Inner,
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
            Keep::Refused(inodes, error) => {
                for file in inodes.iter().filter_map(|ino| client.known_file(*ino)) {
                    file.lock().failures.note(|| error.clone());
                }
            }
        }
    }
}

impl Inner {
    fn dirty_of(&self, inodes: &[InodeId]) -> Vec<Arc<crate::file::FileState>> {
        let dirty = self.dirty.lock();
        inodes.iter().filter_map(|ino| dirty.get(ino).cloned()).collect()
    }

    /// Of these, the ones that nothing is left to be written to.
    fn clean_of(&self, mut inodes: Vec<InodeId>) -> Vec<InodeId> {
        let dirty = self.dirty.lock();
        inodes.retain(|ino| !dirty.contains_key(ino));
        inodes
    }
}
