//! A device for tests that forgets: at a crash every page written or punched since the last sync of its file is, each
//! on its own, new or old. Files that were made or removed without a sync of the folder may be there or not.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use fjordfs_proto::PAGE_SIZE;
use parking_lot::Mutex;

use super::{
    device::{CheckpointBytes, Device, DeviceSpace},
    volume::VolumeId,
};
use crate::buffer::PageBuf;

type Page = Option<Arc<[u8]>>;

/// A page's contents since the last sync, oldest (synced) first; `None` is a hole.
#[derive(Clone, Default)]
struct History(Vec<Page>);

#[derive(Clone)]
pub(super) struct SimFile {
    size: u64,
    pages: Arc<Mutex<BTreeMap<u64, History>>>,
    linked: bool,
    /// What a crash may undo: the file was made (true) or removed (false).
    unsynced_name: bool,
}

#[derive(Default)]
struct State {
    files: BTreeMap<VolumeId, SimFile>,
    checkpoint: Option<Vec<u8>>,
    checkpoint_new: Option<Vec<u8>>,
}

pub(super) struct SimDevice {
    state: Mutex<State>,
    total: u64,
    holes_visible: bool,
    /// Writes begun while this is set reach the device's cache but never complete.
    pub(super) stall: AtomicBool,
    pub(super) stalled: AtomicUsize,
    /// Holes begun while this is set are never made.
    pub(super) stall_punch: AtomicBool,
    pub(super) fail_sync: AtomicBool,
    pub(super) fail_write: AtomicBool,
    pub(super) fail_punch: AtomicBool,
    pub(super) syncs: AtomicUsize,
    /// Offset, in any file, of a record that cannot become a hole.
    pub(super) bad_hole: Mutex<Option<u64>>,
    /// Offset of a page, in any file, that cannot be read.
    pub(super) bad_sector: Mutex<Option<u64>>,
}

/// splitmix64: enough randomness for a crash, reproducible from its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(1);
        (fjordfs_proto::cluster::mix(self.0) % sides as u64) as usize
    }
}

impl SimDevice {
    pub(super) fn new(total: u64, holes_visible: bool) -> SimDevice {
        SimDevice {
            state: Mutex::default(),
            total,
            holes_visible,
            stall: AtomicBool::new(false),
            stalled: AtomicUsize::new(0),
            stall_punch: AtomicBool::new(false),
            fail_sync: AtomicBool::new(false),
            fail_write: AtomicBool::new(false),
            fail_punch: AtomicBool::new(false),
            syncs: AtomicUsize::new(0),
            bad_hole: Mutex::default(),
            bad_sector: Mutex::new(None),
        }
    }

    /// What is left after a power failure.
    pub(super) fn crash(&self, seed: u64) -> SimDevice {
        let (mut dice, after) = (Dice(seed), SimDevice::new(self.total, self.holes_visible));
        let before = self.state.lock();
        let mut state = State { checkpoint: before.checkpoint.clone(), ..State::default() };
        for (id, file) in &before.files {
            let linked = if file.unsynced_name { dice.roll(2) == 0 } else { file.linked };
            if !linked {
                continue;
            }
            let mut pages = BTreeMap::new();
            for (n, history) in &*file.pages.lock() {
                if let Some(page) = history.0.get(dice.roll(history.0.len().max(1))).cloned().flatten() {
                    pages.insert(*n, History(vec![Some(page)]));
                }
            }
            let kept = SimFile {
                size: file.size,
                pages: Arc::new(Mutex::new(pages)),
                linked: true,
                unsynced_name: false,
            };
            state.files.insert(*id, kept);
        }
        drop(before);
        *after.state.lock() = state;
        after
    }

    /// Pages that are not holes, over all files.
    pub(super) fn data_pages(&self) -> usize {
        let state = self.state.lock();
        let live = state.files.values().filter(|f| f.linked);
        live.map(|f| f.pages.lock().values().filter(|h| h.0.last().is_some_and(Option::is_some)).count())
            .sum()
    }

    /// Flips a bit of a stored byte.
    pub(super) fn rot(&self, id: VolumeId, offset: u64) {
        let state = self.state.lock();
        let mut pages = state.files[&id].pages.lock();
        let history = pages.get_mut(&(offset / PAGE_SIZE as u64)).unwrap();
        let mut page = history.0.last().unwrap().clone().unwrap().to_vec();
        page[offset as usize % PAGE_SIZE] ^= 1;
        history.0 = vec![Some(page.into())];
    }

    pub(super) fn truncate(&self, id: VolumeId, size: u64) {
        let mut state = self.state.lock();
        let file = state.files.get_mut(&id).unwrap();
        file.size = size;
        file.pages.lock().retain(|n, _| n * (PAGE_SIZE as u64) < size);
    }

    pub(super) fn damage_checkpoint(&self) {
        if let Some(byte) = self.state.lock().checkpoint.as_mut().and_then(|c| c.last_mut()) {
            *byte ^= 1;
        }
    }

    fn allocated(&self) -> u64 {
        self.state.lock().files.values().filter(|f| f.linked).map(|f| f.size).sum()
    }
}

impl SimFile {
    fn put(&self, offset: u64, bytes: Option<&[u8]>, len: u64) {
        let mut pages = self.pages.lock();
        let first = offset / PAGE_SIZE as u64;
        for i in 0..len / PAGE_SIZE as u64 {
            let history = pages.entry(first + i).or_default();
            if history.0.is_empty() {
                history.0.push(None);
            }
            let at = i as usize * PAGE_SIZE;
            history.0.push(bytes.map(|b| b[at..at + PAGE_SIZE].into()));
        }
    }

    fn sync(&self) {
        let mut pages = self.pages.lock();
        pages.retain(|_, history| {
            let last = history.0.pop().flatten();
            history.0 = vec![last];
            history.0[0].is_some()
        });
    }
}

impl Device for SimDevice {
    type File = SimFile;

    fn path(&self) -> &Path {
        Path::new("/sim")
    }

    fn space(&self) -> io::Result<DeviceSpace> {
        Ok(DeviceSpace { total: self.total, free: self.total.saturating_sub(self.allocated()) })
    }

    fn volumes(&self) -> io::Result<Vec<VolumeId>> {
        Ok(self.state.lock().files.iter().filter(|(_, f)| f.linked).map(|(id, _)| *id).collect())
    }

    fn create(&self, id: VolumeId, size: u64) -> io::Result<SimFile> {
        if self.space()?.free < size {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let file = SimFile { size, pages: Arc::default(), linked: true, unsynced_name: true };
        self.state.lock().files.insert(id, file.clone());
        Ok(file)
    }

    fn open(&self, id: VolumeId) -> io::Result<(SimFile, u64)> {
        let file = self.state.lock().files[&id].clone();
        let size = file.size;
        Ok((file, size))
    }

    fn remove(&self, id: VolumeId) -> io::Result<()> {
        let mut state = self.state.lock();
        let file = state.files.get_mut(&id).unwrap();
        (file.linked, file.unsynced_name) = (false, true);
        Ok(())
    }

    fn sync_folder(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.files.retain(|_, f| f.linked);
        state.files.values_mut().for_each(|f| f.unsynced_name = false);
        Ok(())
    }

    fn read_now(&self, file: &SimFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let len = (buf.len() as u64).min(file.size.saturating_sub(offset)) as usize;
        if self.bad_sector.lock().is_some_and(|bad| (offset..offset + len as u64).contains(&bad)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        buf[..len].fill(0);
        let pages = file.pages.lock();
        let (first, last) = (offset / PAGE_SIZE as u64, (offset + len as u64).div_ceil(PAGE_SIZE as u64));
        for (n, history) in pages.range(first..last) {
            let at = (n - first) as usize * PAGE_SIZE;
            if let Some(Some(page)) = history.0.last() {
                let n = PAGE_SIZE.min(len - at);
                buf[at..at + n].copy_from_slice(&page[..n]);
            }
        }
        Ok(len)
    }

    fn write_now(&self, file: &SimFile, offset: u64, buf: &[u8]) -> io::Result<()> {
        file.put(offset, Some(buf), buf.len() as u64);
        Ok(())
    }

    fn punch_now(&self, file: &SimFile, range: Range<u64>) -> io::Result<()> {
        file.put(range.start, None, range.end - range.start);
        Ok(())
    }

    fn allocate_now(&self, _: &SimFile, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn sync_now(&self, file: &SimFile) -> io::Result<()> {
        file.sync();
        Ok(())
    }

    fn data_ranges(&self, file: &SimFile) -> io::Result<Option<Vec<Range<u64>>>> {
        if !self.holes_visible {
            return Ok(None);
        }
        let pages = file.pages.lock();
        let data: BTreeSet<u64> =
            pages.iter().filter(|(_, h)| h.0.last().is_some_and(Option::is_some)).map(|(n, _)| *n).collect();
        let page = PAGE_SIZE as u64;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for n in data {
            match ranges.last_mut() {
                Some(last) if last.end == n * page => last.end += page,
                _ => ranges.push(n * page..(n + 1) * page),
            }
        }
        Ok(Some(ranges))
    }

    fn write_checkpoint(&self, fill: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
        let mut raw = Vec::new();
        fill(&mut raw)?;
        self.state.lock().checkpoint_new = Some(raw);
        Ok(())
    }

    fn publish_checkpoint(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.checkpoint = state.checkpoint_new.take();
        Ok(())
    }

    fn discard_checkpoint(&self) -> io::Result<()> {
        self.state.lock().checkpoint = None;
        Ok(())
    }

    fn load_checkpoint(&self) -> io::Result<Option<CheckpointBytes>> {
        Ok(self.state.lock().checkpoint.clone().map(|raw| Box::new(raw) as CheckpointBytes))
    }

    async fn read(
        &self,
        file: &Arc<SimFile>,
        offset: u64,
        mut buf: PageBuf,
        range: Range<usize>,
    ) -> (io::Result<()>, PageBuf) {
        let wanted = range.len();
        let result = match self.read_now(file, offset, &mut buf[range]) {
            Ok(n) if n < wanted => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            other => other.map(drop),
        };
        (result, buf)
    }

    async fn write(
        &self,
        file: &Arc<SimFile>,
        offset: u64,
        buf: PageBuf,
        range: Range<usize>,
    ) -> (io::Result<()>, PageBuf) {
        if self.fail_write.load(Ordering::SeqCst) {
            return (Err(io::Error::from_raw_os_error(libc::EIO)), buf);
        }
        file.put(offset, Some(&buf[range.clone()]), range.len() as u64);
        if self.stall.load(Ordering::SeqCst) {
            self.stalled.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        (Ok(()), buf)
    }

    async fn punch(&self, file: &Arc<SimFile>, range: Range<u64>) -> io::Result<()> {
        if self.fail_punch.load(Ordering::SeqCst) || *self.bad_hole.lock() == Some(range.start) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if self.stall_punch.load(Ordering::SeqCst) {
            self.stalled.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }
        self.punch_now(file, range)
    }

    async fn sync(&self, file: &Arc<SimFile>) -> io::Result<()> {
        if self.fail_sync.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        tokio::task::yield_now().await;
        self.syncs.fetch_add(1, Ordering::SeqCst);
        self.sync_now(file)
    }
}
