//! Writing a checkpoint, and removing empty volumes. The order of the steps is explained in `checkpoint.rs`.

use std::sync::Arc;

use fjordfs_proto::PAGE_SIZE;

use super::{
    Store,
    checkpoint::{CheckpointHead, CheckpointVolume, CheckpointWriter},
    device::Device,
    error::StoreError,
    volume::{Volume, VolumeId},
};
use crate::blocking;

impl<D: Device> Store<D> {
    /// Makes the index power-safe, together with all it refers to. Does nothing when nothing has changed.
    ///
    /// # Errors
    /// When the device fails; the checkpoint before stays current.
    pub(crate) async fn checkpoint(self: &Arc<Self>) -> Result<(), StoreError> {
        let mut last = self.checkpointing.lock().await;
        self.check_alive()?;
        let writes = self.sync_state.writes();
        if *last == Some(writes) {
            return Ok(());
        }
        let next_volume = *self.growing.lock().await;
        let (empty, kept): (Vec<Arc<Volume<D::File>>>, Vec<_>) =
            self.volumes.read().values().cloned().partition(|v| v.removable());
        let volumes = kept
            .iter()
            .map(|v| CheckpointVolume { id: v.id, salt: v.salt, size: v.size, position: v.position() })
            .collect();
        let head = CheckpointHead { uuid: self.uuid, next_volume, volumes };

        let store = self.clone();
        self.on_helper("writing the index checkpoint", move || store.write_entries(&head)).await?;
        drop(self.deleting.write().await);
        self.sync().await?;
        let device = self.device.clone();
        self.on_helper("replacing the index checkpoint", move || device.publish_checkpoint()).await?;
        *last = Some(writes);
        self.remove_volumes(empty).await
    }

    fn write_entries(&self, head: &CheckpointHead) -> std::io::Result<()> {
        let position = |id: VolumeId| {
            let found = head.volumes.binary_search_by_key(&id, |v| v.id);
            found.map_or(0, |i| head.volumes[i].position)
        };
        self.device.write_checkpoint(&mut |out| {
            let mut writer = CheckpointWriter::begin(out, head)?;
            self.index.visit_parts(|entries| {
                for entry in entries {
                    // What lies behind the position is found by the scan.
                    if u64::from(entry.page) * (PAGE_SIZE as u64) < position(entry.volume) {
                        writer.add(&entry)?;
                    }
                }
                Ok::<(), std::io::Error>(())
            })?;
            writer.end()
        })
    }

    async fn remove_volumes(&self, empty: Vec<Arc<Volume<D::File>>>) -> Result<(), StoreError> {
        for volume in empty {
            self.volumes.write().remove(&volume.id);
            let (device, id) = (self.device.clone(), volume.id);
            self.on_helper("removing an empty volume", move || {
                device.remove(id)?;
                device.sync_folder()
            })
            .await?;
            tracing::debug!("target {}: removed empty {id}", self.path().display());
        }
        Ok(())
    }

    /// Runs what blocks on a helper thread.
    async fn on_helper<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        blocking::run(work).await.and_then(|done| done).map_err(|e| self.io(what, e))
    }
}
