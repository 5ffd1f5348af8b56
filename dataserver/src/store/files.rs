//! The real device: volume files in a folder of a Linux filesystem, O_DIRECT through io_uring.
//!
//! ```text
//!   TARGET/label.json         whose target this is (label.rs)
//!   TARGET/lock               flock of the running data server
//!   TARGET/index.checkpoint   (checkpoint.rs), replaced by rename
//!   TARGET/volumes/00000001.vol ...
//! ```

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    ops::{Deref, Range},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use fjordfs_proto::PAGE_SIZE;
use memmap2::Mmap;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek, statvfs};

use super::{
    Store,
    device::{CheckpointBytes, Device, DeviceSpace},
    error::StoreError,
    index::Entry,
    volume::VolumeId,
};
use crate::{buffer::PageBuf, uring};

const CHECKPOINT: &str = "index.checkpoint";
const CHECKPOINT_NEW: &str = "index.checkpoint.new";
const VOLUMES: &str = "volumes";
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// A target's folder.
pub(crate) struct Files {
    folder: PathBuf,
    volumes: PathBuf,
    holes_visible: bool,
    warned_buffered: AtomicBool,
}

impl Files {
    /// Opens a folder, made before, and finds out what its filesystem can do.
    ///
    /// # Errors
    /// When the filesystem cannot preallocate or punch holes: then deleting would never free space.
    pub(crate) fn new(folder: &Path) -> io::Result<Files> {
        let volumes = folder.join(VOLUMES);
        std::fs::create_dir_all(&volumes)?;
        let holes_visible = probe(folder).map_err(|e| match e.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => io::Error::new(
                io::ErrorKind::Unsupported,
                "the filesystem cannot preallocate files or punch holes into them; use ext4, XFS, btrfs or tmpfs",
            ),
            _ => e,
        })?;
        Ok(Files {
            folder: folder.to_owned(),
            volumes,
            holes_visible,
            warned_buffered: AtomicBool::new(false),
        })
    }

    fn volume_path(&self, id: VolumeId) -> PathBuf {
        self.volumes.join(format!("{:08}.vol", id.0))
    }

    /// Opens for direct I/O where the filesystem has it.
    fn open_file(&self, path: &Path, create: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(create);
        match options.clone().custom_flags(libc::O_DIRECT).open(path) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                if !self.warned_buffered.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "target {}: the filesystem has no direct I/O; using its page cache instead",
                        self.folder.display()
                    );
                }
                // open(2) may have created the file before it refused the flag.
                options.create_new(false).create(create).open(path)
            }
            result => result,
        }
    }
}

/// Tries preallocation and hole punching on a small file. True when holes can also be asked for.
fn probe(folder: &Path) -> io::Result<bool> {
    const PAGE: u64 = PAGE_SIZE as u64;
    let path = folder.join("probe.tmp");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
    let result = (|| {
        fallocate(&file, FallocateFlags::empty(), 0, 4 * PAGE)?;
        file.write_all_at(&[1; 3 * PAGE_SIZE], 0)?;
        fallocate(&file, PUNCH, PAGE, PAGE)?;
        file.sync_data()?;
        let mut middle = [1; PAGE_SIZE];
        file.read_exact_at(&mut middle, PAGE)?;
        if middle != [0; PAGE_SIZE] {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        Ok(data_ranges(&file).is_ok_and(|ranges| ranges == [0..PAGE, 2 * PAGE..3 * PAGE]))
    })();
    std::fs::remove_file(&path)?;
    result
}

fn data_ranges(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return Ok(ranges),
            Err(e) => return Err(e.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?;
        ranges.push(start..end);
        at = end;
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A mapped file as bytes.
struct Mapped(Mmap);

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A volume's file, as others can find it.
pub(crate) struct VolumeFile {
    pub(crate) path: PathBuf,
    /// `st_dev` and `st_ino`.
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl Store<Files> {
    /// The file that a shard is in.
    pub(crate) fn file_of(&self, entry: &Entry) -> Result<VolumeFile, StoreError> {
        let volume = self.volumes.read().get(&entry.volume).cloned();
        // Gone with its last shard.
        let volume = volume.ok_or_else(|| self.missing(entry.block, entry.shard))?;
        let path = self.device.volume_path(entry.volume);
        let found = std::path::absolute(&path).and_then(|path| Ok((path, rustix::fs::fstat(&volume.file)?)));
        let (path, stat) = found.map_err(|e| self.io(format!("looking at {}", path.display()), e))?;
        Ok(VolumeFile { path, device: stat.st_dev, inode: stat.st_ino })
    }
}

impl Device for Files {
    type File = File;

    fn path(&self) -> &Path {
        &self.folder
    }

    fn space(&self) -> io::Result<DeviceSpace> {
        let s = statvfs(&self.folder)?;
        Ok(DeviceSpace { total: s.f_blocks * s.f_frsize, free: s.f_bavail * s.f_frsize })
    }

    fn volumes(&self) -> io::Result<Vec<VolumeId>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.volumes)? {
            let name = entry?.file_name();
            match name.to_str().and_then(|n| n.strip_suffix(".vol")).and_then(|n| n.parse().ok()) {
                Some(id) => ids.push(VolumeId(id)),
                None => tracing::warn!("{} holds a stranger, left alone: {name:?}", self.volumes.display()),
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    fn create(&self, id: VolumeId, size: u64) -> io::Result<File> {
        let path = self.volume_path(id);
        let file = self.open_file(&path, true)?;
        if let Err(e) = fallocate(&file, FallocateFlags::empty(), 0, size) {
            // The reason to report is the first one.
            let _ = std::fs::remove_file(&path);
            return Err(e.into());
        }
        Ok(file)
    }

    fn open(&self, id: VolumeId) -> io::Result<(File, u64)> {
        let file = self.open_file(&self.volume_path(id), false)?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }

    fn remove(&self, id: VolumeId) -> io::Result<()> {
        std::fs::remove_file(self.volume_path(id))
    }

    fn sync_folder(&self) -> io::Result<()> {
        sync_folder(&self.volumes)?;
        sync_folder(&self.folder)
    }

    fn read_now(&self, file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                // A direct read that ends unaligned has met the end of the file.
                Ok(n) if n % PAGE_SIZE != 0 => return Ok(done + n),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }

    fn write_now(&self, file: &File, offset: u64, buf: &[u8]) -> io::Result<()> {
        file.write_all_at(buf, offset)
    }

    fn punch_now(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        Ok(fallocate(file, PUNCH, range.start, range.end - range.start)?)
    }

    fn allocate_now(&self, file: &File, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        Ok(fallocate(file, FallocateFlags::empty(), range.start, range.end - range.start)?)
    }

    fn sync_now(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn data_ranges(&self, file: &File) -> io::Result<Option<Vec<Range<u64>>>> {
        if self.holes_visible { data_ranges(file).map(Some) } else { Ok(None) }
    }

    fn write_checkpoint(&self, fill: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(self.folder.join(CHECKPOINT_NEW))?);
        fill(&mut out)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
    }

    fn publish_checkpoint(&self) -> io::Result<()> {
        std::fs::rename(self.folder.join(CHECKPOINT_NEW), self.folder.join(CHECKPOINT))?;
        sync_folder(&self.folder)
    }

    fn discard_checkpoint(&self) -> io::Result<()> {
        std::fs::remove_file(self.folder.join(CHECKPOINT))?;
        sync_folder(&self.folder)
    }

    fn load_checkpoint(&self) -> io::Result<Option<CheckpointBytes>> {
        let file = match File::open(self.folder.join(CHECKPOINT)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        // SAFETY: the folder is locked for this process, which replaces a checkpoint by renaming and never writes
        // into one. Someone else truncating it would kill the process, not make it believe wrong bytes.
        let map = unsafe { Mmap::map(&file)? };
        Ok(Some(Box::new(Mapped(map))))
    }

    async fn read(
        &self,
        file: &Arc<File>,
        offset: u64,
        buf: PageBuf,
        range: Range<usize>,
    ) -> (io::Result<()>, PageBuf) {
        uring::read(file, offset, buf, range).await
    }

    async fn write(
        &self,
        file: &Arc<File>,
        offset: u64,
        buf: PageBuf,
        range: Range<usize>,
    ) -> (io::Result<()>, PageBuf) {
        uring::write(file, offset, buf, range).await
    }

    async fn punch(&self, file: &Arc<File>, range: Range<u64>) -> io::Result<()> {
        uring::punch(file, range).await
    }

    async fn sync(&self, file: &Arc<File>) -> io::Result<()> {
        uring::datasync(file).await
    }
}
