//! Writers and readers that know what they may see.
//!
//! Each writer has a folder with files that it replaces (new name, `fsync`, `rename`, `fsync` of the folder or the file) and
//! removes, one that it appends to and one whose pages it changes in place. Readers look at all of them from all clients.
//! Everything goes through a descriptor of the writer's folder, which exists only in the cluster: where a mount was lost,
//! nothing is taken for it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rand::Rng;
use rustix::{
    fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat},
    io::Errno,
};

use super::{
    content::{self, HEADER, Id, PAGE},
    ledger::{Item, Ledger, PAGES, Progress, WHOLE_FILES, WorkerNo},
};
use crate::rng::{self, TestRng};

/// An operation that takes longer has hung: several times the clients' `timeout`.
const HUNG_AFTER: Duration = Duration::from_secs(150);

/// Longest the file that is appended to may become.
const LOG_MAX: u64 = 6 << 20;

/// What was done.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Operations {
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    pub(super) reads_verified: u64,
    pub(super) longest: Duration,
}

pub(super) struct Workload {
    stop: Arc<AtomicBool>,
    done: Arc<Mutex<Operations>>,
    threads: Vec<JoinHandle<()>>,
}

fn folder_name(worker: WorkerNo) -> String {
    format!("writer{worker}")
}

fn file_name(item: Item) -> String {
    match item {
        Item::Whole(n) => format!("file{n}"),
        Item::Page(_) => "pages".into(),
        Item::Log => "log".into(),
    }
}

fn open_folder(mount: &Path, worker: WorkerNo) -> io::Result<File> {
    File::open(mount.join(folder_name(worker)))
}

fn open_in(folder: &File, name: &str, flags: OFlags) -> io::Result<File> {
    Ok(openat(folder, name, flags | OFlags::CLOEXEC, Mode::from(0o644))?.into())
}

impl Workload {
    /// Makes the folders and starts two writers and a reader on each client.
    ///
    /// # Panics
    /// When the folders cannot be made: nothing is wrong yet.
    pub(super) fn start(ledger: &Arc<Ledger>, mounts: &[PathBuf]) -> Workload {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::default());
        for worker in 0..ledger.workers() {
            prepare(&mounts[worker % mounts.len()], ledger, worker).expect("files to begin with");
        }
        let mut threads = Vec::new();
        let mut start = |mount: &Path, purpose: u64, worker: Option<WorkerNo>| {
            let actor = Actor {
                ledger: Arc::clone(ledger),
                mount: mount.to_owned(),
                rng: rng::stream(ledger.id(0, Item::Log).seed, purpose),
                done: Arc::clone(&done),
            };
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || actor.act(worker, &stop)));
        };
        for worker in 0..ledger.workers() {
            start(&mounts[worker % mounts.len()], 100 + worker as u64, Some(worker));
        }
        for (client, mount) in mounts.iter().enumerate() {
            start(mount, 200 + client as u64, None);
        }
        Workload { stop, done, threads }
    }

    /// Ends it, and waits until every operation under way has ended.
    ///
    /// # Panics
    /// When a thread has panicked.
    pub(super) fn stop(self) -> Operations {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a thread of the workload");
        }
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn prepare(mount: &Path, ledger: &Ledger, worker: WorkerNo) -> io::Result<()> {
    fs::create_dir(mount.join(folder_name(worker)))?;
    let folder = open_folder(mount, worker)?;
    let id = ledger.id(worker, Item::Page(0));
    let pages = open_in(&folder, &file_name(Item::Page(0)), OFlags::CREATE | OFlags::WRONLY)?;
    pages.write_all_at(&id.bytes(1, 0, PAGES * PAGE), 0)?;
    pages.sync_all()?;
    open_in(&folder, &file_name(Item::Log), OFlags::CREATE | OFlags::WRONLY)?.sync_all()?;
    folder.sync_all()?;
    File::open(mount)?.sync_all()?;
    for page in 0..PAGES {
        ledger.trying(worker, Item::Page(page), 1);
        ledger.acked(worker, Item::Page(page), 1);
    }
    Ok(())
}

/// A thread of the workload.
struct Actor {
    ledger: Arc<Ledger>,
    mount: PathBuf,
    rng: TestRng,
    done: Arc<Mutex<Operations>>,
}

impl Actor {
    /// Writes as `worker`, or reads.
    fn act(mut self, worker: Option<WorkerNo>, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            let (what, result) = match worker {
                Some(worker) => self.write(worker),
                None => self.read(),
            };
            let took = began.elapsed();
            if took > HUNG_AFTER {
                self.ledger.broke(format_args!("{what} hung for {took:?}, then: {result:?}"));
            }
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            done.longest = done.longest.max(took);
            match result {
                Ok(()) => {
                    done.succeeded += 1;
                    done.reads_verified += u64::from(worker.is_none());
                    drop(done);
                    thread::sleep(Duration::from_millis(self.rng.random_range(0..30)));
                }
                Err(_) => {
                    done.failed += 1;
                    drop(done);
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn write(&mut self, worker: WorkerNo) -> (String, io::Result<()>) {
        match self.rng.random_range(0..10) {
            0..5 => {
                let file = self.rng.random_range(0..WHOLE_FILES);
                (format!("replacing file {file} of writer {worker}"), self.replace(worker, file))
            }
            5..8 => (format!("changing pages of writer {worker}"), self.change_pages(worker)),
            _ => (format!("appending to the log of writer {worker}"), self.append(worker)),
        }
    }

    fn replace(&mut self, worker: WorkerNo, file: usize) -> io::Result<()> {
        let item = Item::Whole(file);
        let (id, name) = (self.ledger.id(worker, item), file_name(item));
        let folder = open_folder(&self.mount, worker)?;
        let version = self.ledger.progress(worker, item).tried + 1;
        if Id::absent(version) {
            self.ledger.trying(worker, item, version);
            match unlinkat(&folder, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
            folder.sync_all()?;
        } else {
            let temporary = format!("{name}.new");
            let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY;
            let new = open_in(&folder, &temporary, flags)?;
            new.write_all_at(&id.bytes(version, 0, id.len(version)), 0)?;
            new.sync_all()?;
            self.ledger.trying(worker, item, version);
            renameat(&folder, &temporary, &folder, &name)?;
            // Either is promised to make the new name safe.
            if self.rng.random() { folder.sync_all()? } else { new.sync_all()? }
        }
        self.ledger.acked(worker, item, version);
        Ok(())
    }

    fn change_pages(&mut self, worker: WorkerNo) -> io::Result<()> {
        let folder = open_folder(&self.mount, worker)?;
        let file = open_in(&folder, &file_name(Item::Page(0)), OFlags::WRONLY)?;
        let (first, count) = (self.rng.random_range(0..PAGES), self.rng.random_range(1..24));
        let pages = first..PAGES.min(first + count);
        let mut versions = Vec::new();
        for page in pages.clone() {
            let item = Item::Page(page);
            let version = self.ledger.progress(worker, item).tried + 1;
            self.ledger.trying(worker, item, version);
            let offset = (page * PAGE) as u64;
            file.write_all_at(&self.ledger.id(worker, item).page(version, offset), offset)?;
            versions.push((item, version));
        }
        file.sync_all()?;
        for (item, version) in versions {
            self.ledger.acked(worker, item, version);
        }
        Ok(())
    }

    fn append(&mut self, worker: WorkerNo) -> io::Result<()> {
        let folder = open_folder(&self.mount, worker)?;
        let file = open_in(&folder, &file_name(Item::Log), OFlags::WRONLY | OFlags::APPEND)?;
        let before = self.ledger.progress(worker, Item::Log);
        let len = file.metadata()?.len();
        // Only this writer changes it, and nothing of it is under way.
        if !(before.acked..=before.tried).contains(&len) {
            self.ledger.broke(format_args!("log of writer {worker} has {len} bytes, not {before:?}"));
        }
        if len >= LOG_MAX {
            return Ok(());
        }
        let count = self.rng.random_range(1..20_000);
        self.ledger.trying(worker, Item::Log, len + count);
        let data = self.ledger.id(worker, Item::Log).bytes(0, len, count as usize);
        let mut rest = &data[..];
        while !rest.is_empty() {
            rest = &rest[rustix::io::write(&file, rest)?..];
        }
        file.sync_all()?;
        self.ledger.acked(worker, Item::Log, len + count);
        Ok(())
    }

    fn read(&mut self) -> (String, io::Result<()>) {
        let worker = self.rng.random_range(0..self.ledger.workers());
        let item = match self.rng.random_range(0..10) {
            0..6 => Item::Whole(self.rng.random_range(0..WHOLE_FILES)),
            6..9 => Item::Page(self.rng.random_range(0..PAGES)),
            _ => Item::Log,
        };
        let looked = look(&self.mount, &self.ledger, worker, item, "meanwhile");
        (format!("reading {} of writer {worker}", file_name(item)), looked)
    }
}

/// Reads one thing and says what is wrong with it. An error is what the filesystem answered.
fn look(mount: &Path, ledger: &Ledger, worker: WorkerNo, item: Item, when: &str) -> io::Result<()> {
    let folder = open_folder(mount, worker)?;
    let before = ledger.progress(worker, item);
    let opened = open_in(&folder, &file_name(item), OFlags::RDONLY);
    match (item, opened) {
        (Item::Whole(_), Err(e)) if e.kind() == io::ErrorKind::NotFound => {
            // Nobody answers so for what is not reachable: the folder must still be there.
            rustix::fs::statat(&folder, "..", AtFlags::empty())?;
            if !ledger.allowed(worker, item, before).any(Id::absent) {
                ledger.broke(format_args!(
                    "{when}: {} of writer {worker} is not there, expected version {before:?}",
                    file_name(item)
                ));
            }
            Ok(())
        }
        (_, Err(e)) => Err(e),
        (Item::Whole(_), Ok(file)) => look_at_whole(&file, ledger, worker, item, before, when),
        (Item::Page(page), Ok(file)) => look_at_page(&file, ledger, worker, page, before, when, mount),
        (Item::Log, Ok(file)) => {
            look_at_log(&file, ledger, worker, before, &format!("{when} on {}", mount.display()))
        }
    }
}

fn read_to_end(file: &File) -> io::Result<Vec<u8>> {
    let mut data = vec![0; file.metadata()?.len() as usize + PAGE];
    let mut have = 0;
    loop {
        match file.read_at(&mut data[have..], have as u64)? {
            0 => break,
            n => have += n,
        }
        if have == data.len() {
            data.resize(have + (1 << 16), 0);
        }
    }
    data.truncate(have);
    Ok(data)
}

fn look_at_whole(
    file: &File,
    ledger: &Ledger,
    worker: WorkerNo,
    item: Item,
    before: Progress,
    when: &str,
) -> io::Result<()> {
    let data = read_to_end(file)?;
    let id = ledger.id(worker, item);
    let version = id.version_of(&data[..data.len().min(PAGE)], 0).filter(|_| data.len() >= HEADER);
    let allowed = ledger.allowed(worker, item, before);
    match version {
        Some(version) if data != id.bytes(version, 0, id.len(version)) => {
            let right = id.bytes(version, 0, id.len(version));
            let wrong = data.chunks(PAGE).zip(right.chunks(PAGE)).position(|(a, b)| a != b);
            let seen =
                wrong.map(|page| content::describe(&data[page * PAGE..data.len().min((page + 1) * PAGE)]));
            ledger.broke(format_args!(
                "{when}: {} of writer {worker}, version {version}: {} bytes of {}, page {wrong:?} is {seen:?}",
                file_name(item),
                data.len(),
                right.len()
            ));
        }
        Some(version) if allowed.contains(&version) && !Id::absent(version) => {}
        Some(version) => ledger.broke(format_args!(
            "{when}: {} of writer {worker} is version {version}, allowed are {allowed:?}",
            file_name(item)
        )),
        None => ledger.broke(format_args!(
            "{when}: {} of writer {worker} is none of its versions ({allowed:?}): {}",
            file_name(item),
            content::describe(&data[..data.len().min(PAGE)])
        )),
    }
    Ok(())
}

fn look_at_page(
    file: &File,
    ledger: &Ledger,
    worker: WorkerNo,
    page: usize,
    before: Progress,
    when: &str,
    mount: &Path,
) -> io::Result<()> {
    let offset = (page * PAGE) as u64;
    let mut data = vec![0; PAGE];
    file.read_exact_at(&mut data, offset)?;
    let item = Item::Page(page);
    let allowed = ledger.allowed(worker, item, before);
    // While it is being written, half of it may be seen, as in any filesystem.
    let quiet = before.acked == *allowed.end() || before.tried == *allowed.end() && when != "meanwhile";
    match ledger.id(worker, item).version_of(&data, offset) {
        Some(version) if allowed.contains(&version) => {}
        Some(version) => {
            file.read_exact_at(&mut data, offset)?;
            let again = ledger.id(worker, item).version_of(&data, offset);
            ledger.broke(format_args!(
                "{when} on {}: page {page} of writer {worker} is version {version}, allowed are {allowed:?}; looked at again it is {again:?}",
                mount.display()
            ));
        }
        None if quiet => ledger.broke(format_args!(
            "{when}: page {page} of writer {worker} is none of {allowed:?}: {}",
            content::describe(&data)
        )),
        None => {}
    }
    Ok(())
}

fn look_at_log(
    file: &File,
    ledger: &Ledger,
    worker: WorkerNo,
    before: Progress,
    when: &str,
) -> io::Result<()> {
    let data = read_to_end(file)?;
    let allowed = ledger.allowed(worker, Item::Log, before);
    let right = ledger.id(worker, Item::Log).bytes(0, 0, data.len());
    if !allowed.contains(&(data.len() as u64)) {
        ledger.broke(format_args!(
            "{when}: log of writer {worker} has {} bytes, allowed are {allowed:?}",
            data.len()
        ));
    }
    if let Some(wrong) = data.iter().zip(&right).position(|(a, b)| a != b) {
        let zeros = data[wrong..].iter().take_while(|b| **b == 0).count();
        let size = file.metadata()?.len();
        let again = read_to_end(file)?;
        let right = ledger.id(worker, Item::Log).bytes(0, 0, again.len());
        ledger.broke(format_args!(
            "{when}: log of writer {worker} of {} bytes ({allowed:?}) is wrong from byte {wrong} on, {zeros} of them zeros; looked at again \
             it has {size} bytes and is {} from {:?} on",
            data.len(),
            if again == right { "right" } else { "wrong" },
            again.iter().zip(&right).position(|(a, b)| a != b)
        ));
    }
    Ok(())
}

/// Looks at everything of a writer when all is well, so nothing may fail. `forgets`: except what was written over and not synced
/// before a power cut of more than the redundancy covers.
pub(super) fn verify(mount: &Path, ledger: &Ledger, worker: WorkerNo, when: &str, forgets: bool) {
    let items = (0..WHOLE_FILES).map(Item::Whole).chain((0..PAGES).map(Item::Page)).chain([Item::Log]);
    for item in items {
        if let Err(e) = look(mount, ledger, worker, item, when) {
            let progress = ledger.progress(worker, item);
            // The log may have been synced further on since.
            let excused = match item {
                Item::Whole(_) => false,
                Item::Page(_) => progress.tried > progress.acked,
                Item::Log => true,
            };
            if !(forgets && excused) {
                ledger.broke(format_args!("{when}: {item:?} of writer {worker}, {progress:?}: {e}"));
            }
        }
    }
}
