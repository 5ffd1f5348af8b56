//! What a store needs of its device, as a trait: the real one is `files.rs`, a faulty and crashing one `sim.rs`.
//!
//! Functions ending in `_now` and those about whole files block: they are for start-up and helper threads. The async
//! ones are for the data path and never block the core.

use std::{
    io::{self, Write},
    ops::{Deref, Range},
    path::Path,
    sync::Arc,
};

use super::volume::VolumeId;
use crate::buffer::PageBuf;

/// Room on the filesystem, bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceSpace {
    pub(crate) total: u64,
    /// For us: without what is kept for the superuser.
    pub(crate) free: u64,
}

/// A loaded checkpoint.
pub(crate) type CheckpointBytes = Box<dyn Deref<Target = [u8]>>;

/// A folder of volume files, and one checkpoint.
///
/// Offsets and lengths of volume I/O are multiples of 4 KiB. A hole reads as zeros.
pub(crate) trait Device: Send + Sync + 'static {
    /// An open volume file, usable from any thread.
    type File: Send + Sync + 'static;

    /// For messages.
    fn path(&self) -> &Path;
    fn space(&self) -> io::Result<DeviceSpace>;

    /// All volume files, ascending.
    fn volumes(&self) -> io::Result<Vec<VolumeId>>;
    /// A new file of `size` bytes, all zero, with its space reserved. Leaves nothing behind when it fails.
    fn create(&self, id: VolumeId, size: u64) -> io::Result<Self::File>;
    /// An existing file and its size.
    fn open(&self, id: VolumeId) -> io::Result<(Self::File, u64)>;
    /// Removes a file.
    fn remove(&self, id: VolumeId) -> io::Result<()>;
    /// Makes created and removed files power-safe.
    fn sync_folder(&self) -> io::Result<()>;

    /// Fills `buf`; less at the end of the file.
    fn read_now(&self, file: &Self::File, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
    fn write_now(&self, file: &Self::File, offset: u64, buf: &[u8]) -> io::Result<()>;
    fn punch_now(&self, file: &Self::File, range: Range<u64>) -> io::Result<()>;
    fn allocate_now(&self, file: &Self::File, range: Range<u64>) -> io::Result<()>;
    fn sync_now(&self, file: &Self::File) -> io::Result<()>;
    /// Where the file is no hole, ascending; `None` when the filesystem does not tell reliably.
    fn data_ranges(&self, file: &Self::File) -> io::Result<Option<Vec<Range<u64>>>>;

    /// Writes the next checkpoint, power-safe, without making it the current one.
    fn write_checkpoint(&self, fill: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> io::Result<()>;
    /// Makes the last written checkpoint the current one, atomically and power-safe.
    fn publish_checkpoint(&self) -> io::Result<()>;
    /// Removes the current checkpoint, power-safe.
    fn discard_checkpoint(&self) -> io::Result<()>;
    /// The current checkpoint.
    fn load_checkpoint(&self) -> io::Result<Option<CheckpointBytes>>;

    /// Fills `range` of the buffer from `offset` on.
    fn read(
        &self,
        file: &Arc<Self::File>,
        offset: u64,
        buf: PageBuf,
        range: Range<usize>,
    ) -> impl Future<Output = (io::Result<()>, PageBuf)>;
    /// Writes `range` of the buffer at `offset`. Complete when the device has it; power-safe after a sync.
    fn write(
        &self,
        file: &Arc<Self::File>,
        offset: u64,
        buf: PageBuf,
        range: Range<usize>,
    ) -> impl Future<Output = (io::Result<()>, PageBuf)>;
    /// Makes `range` a hole. Power-safe after a sync.
    fn punch(&self, file: &Arc<Self::File>, range: Range<u64>) -> impl Future<Output = io::Result<()>>;
    /// Makes completed writes and punches of this file power-safe.
    fn sync(&self, file: &Arc<Self::File>) -> impl Future<Output = io::Result<()>>;
}
