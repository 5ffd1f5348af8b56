//! The filesystem of a [`super::FaultyDisk`]: every operation is done on a folder below, after a look at what is wrong.

use std::{
    collections::HashMap,
    ffi::{OsStr, c_int},
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, SystemTime},
};

use fuser::{
    FileAttr, FileType, Filesystem, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
};
use rand::Rng;

use super::{SECTOR, Shared, State, Trouble};

/// How long the kernel may trust names and attributes: nobody else changes them, but damage is done below.
const TTL: Duration = Duration::ZERO;

struct Open {
    file: Arc<File>,
    /// Inode number of the file below: its name may be gone.
    ino: u64,
    is_volume: bool,
}

pub(super) struct Passthrough {
    root: PathBuf,
    shared: Shared,
    /// By our number: where it is below, relative to `root`.
    names: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    next_number: u64,
    open: HashMap<u64, Open>,
    next_handle: u64,
}

fn code(e: &io::Error) -> c_int {
    e.raw_os_error().unwrap_or(libc::EIO)
}

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What is to be done after an operation has been looked at.
struct Verdict {
    fails: Option<c_int>,
    late: Duration,
}

impl Passthrough {
    pub(super) fn new(root: &Path, shared: Shared) -> Passthrough {
        Passthrough {
            root: root.to_owned(),
            shared,
            names: HashMap::from([(fuser::FUSE_ROOT_ID, PathBuf::new())]),
            numbers: HashMap::from([(PathBuf::new(), fuser::FUSE_ROOT_ID)]),
            next_number: fuser::FUSE_ROOT_ID + 1,
            open: HashMap::new(),
            next_handle: 1,
        }
    }

    fn below(&self, number: u64) -> io::Result<PathBuf> {
        let name = self.names.get(&number).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        Ok(self.root.join(name))
    }

    fn child(&self, parent: u64, name: &OsStr) -> io::Result<PathBuf> {
        let parent = self.names.get(&parent).ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))?;
        Ok(parent.join(name))
    }

    fn number_of(&mut self, name: &Path) -> u64 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.next_number;
        self.next_number += 1;
        self.numbers.insert(name.to_owned(), number);
        self.names.insert(number, name.to_owned());
        number
    }

    fn forget_name(&mut self, name: &Path) {
        if let Some(number) = self.numbers.remove(name) {
            self.names.remove(&number);
        }
    }

    fn attr_of(number: u64, meta: &fs::Metadata) -> FileAttr {
        let time = |secs: i64, nanos: i64| {
            SystemTime::UNIX_EPOCH + Duration::new(secs.max(0) as u64, nanos.max(0) as u32)
        };
        FileAttr {
            ino: number,
            size: meta.len(),
            blocks: meta.blocks(),
            atime: time(meta.atime(), meta.atime_nsec()),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
            crtime: SystemTime::UNIX_EPOCH,
            kind: if meta.is_dir() { FileType::Directory } else { FileType::RegularFile },
            perm: (meta.mode() & 0o7777) as u16,
            nlink: meta.nlink() as u32,
            uid: meta.uid(),
            gid: meta.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn entry(&mut self, name: &Path) -> io::Result<FileAttr> {
        let meta = fs::symlink_metadata(self.root.join(name))?;
        let number = self.number_of(name);
        Ok(Passthrough::attr_of(number, &meta))
    }

    fn attr(&self, number: u64, handle: Option<u64>) -> io::Result<FileAttr> {
        let meta = match handle.and_then(|handle| self.open.get(&handle)) {
            Some(open) => open.file.metadata()?,
            None => fs::symlink_metadata(self.below(number)?)?,
        };
        Ok(Passthrough::attr_of(number, &meta))
    }

    fn handle(&self, handle: u64) -> Result<&Open, c_int> {
        self.open.get(&handle).ok_or(libc::EBADF)
    }

    fn add_handle(&mut self, name: &Path, file: File) -> io::Result<u64> {
        let ino = file.metadata()?.ino();
        let is_volume = name.extension().is_some_and(|e| e == "vol");
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, Open { file: Arc::new(file), ino, is_volume });
        Ok(handle)
    }

    /// Whether an operation that changes or reads the medium fails, and how long it takes. `grows`: it needs room.
    fn judge(&self, grows: bool) -> Verdict {
        let mut state = self.shared.lock();
        let (fails, late) = match state.trouble {
            Trouble::Errors => (Some(libc::EIO), Duration::ZERO),
            Trouble::Full if grows => (Some(libc::ENOSPC), Duration::ZERO),
            Trouble::Slow(late) => (None, late),
            _ => (None, Duration::ZERO),
        };
        if fails.is_some() || !late.is_zero() {
            state.hits += 1;
        }
        Verdict { fails, late }
    }

    fn write_below(&self, open: &Open, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.shared.lock();
        let State { trouble, rng, unsynced, hits } = &mut *state;
        let data_kept = match trouble {
            Trouble::Loses if open.is_volume && rng.random_ratio(1, 4) => 0,
            Trouble::Tears if open.is_volume && data.len() > SECTOR && rng.random_ratio(1, 4) => {
                rng.random_range(1..data.len() / SECTOR) * SECTOR
            }
            _ => data.len(),
        };
        *hits += u64::from(data_kept < data.len());
        unsynced.note(open.ino, &open.file, offset, data_kept)?;
        open.file.write_all_at(&data[..data_kept], offset)
    }

    fn read_below(&self, open: &Open, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut data = vec![0; len];
        let mut have = 0;
        while have < len {
            match open.file.read_at(&mut data[have..], offset + have as u64)? {
                0 => break,
                n => have += n,
            }
        }
        data.truncate(have);
        let mut state = self.shared.lock();
        let State { trouble, rng, hits, .. } = &mut *state;
        if *trouble == Trouble::Flips && open.is_volume && have > 0 && rng.random_ratio(1, 4) {
            data[rng.random_range(0..have)] ^= 1 << rng.random_range(0..8);
            *hits += 1;
        }
        Ok(data)
    }
}

/// Answers now or later, without holding up others.
fn answer(late: Duration, reply: impl FnOnce() + Send + 'static) {
    if late.is_zero() {
        reply();
    } else {
        thread::spawn(move || {
            thread::sleep(late);
            reply();
        });
    }
}

fn empty(result: Result<(), c_int>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(code) => reply.error(code),
    }
}

impl Filesystem for Passthrough {
    fn lookup(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEntry) {
        match self.child(parent, name).and_then(|name| self.entry(&name)) {
            Ok(attr) => reply.entry(&TTL, &attr, 0),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn getattr(&mut self, _: &Request<'_>, number: u64, handle: Option<u64>, reply: ReplyAttr) {
        match self.attr(number, handle) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn setattr(
        &mut self,
        _: &Request<'_>,
        number: u64,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<u64>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<u32>,
        reply: ReplyAttr,
    ) {
        let change = || {
            let path = self.below(number)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            }
            if let Some(size) = size {
                match handle.and_then(|handle| self.open.get(&handle)) {
                    Some(open) => open.file.set_len(size)?,
                    None => File::options().write(true).open(&path)?.set_len(size)?,
                }
            }
            self.attr(number, handle)
        };
        match change() {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn mkdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        let made = self.child(parent, name).and_then(|name| {
            fs::create_dir(self.root.join(&name))?;
            self.entry(&name)
        });
        match made {
            Ok(attr) => reply.entry(&TTL, &attr, 0),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn unlink(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.child(parent, name).and_then(|name| {
            fs::remove_file(self.root.join(&name))?;
            self.forget_name(&name);
            Ok(())
        });
        empty(removed.map_err(|e| code(&e)), reply);
    }

    fn rmdir(&mut self, _: &Request<'_>, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let removed = self.child(parent, name).and_then(|name| {
            fs::remove_dir(self.root.join(&name))?;
            self.forget_name(&name);
            Ok(())
        });
        empty(removed.map_err(|e| code(&e)), reply);
    }

    fn rename(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        newparent: u64,
        newname: &OsStr,
        flags: u32,
        reply: ReplyEmpty,
    ) {
        if flags != 0 {
            return reply.error(libc::EINVAL);
        }
        let mut rename = || {
            let (from, to) = (self.child(parent, name)?, self.child(newparent, newname)?);
            fs::rename(self.root.join(&from), self.root.join(&to))?;
            self.forget_name(&to);
            // What was in a folder that moves has new names, too.
            let moved: Vec<PathBuf> =
                self.numbers.keys().filter(|name| name.starts_with(&from)).cloned().collect();
            for old in moved {
                let rest = old.strip_prefix(&from).map_err(io::Error::other)?.to_owned();
                let new = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
                if let Some(number) = self.numbers.remove(&old) {
                    self.names.insert(number, new.clone());
                    self.numbers.insert(new, number);
                }
            }
            Ok(())
        };
        empty(rename().map_err(|e: io::Error| code(&e)), reply);
    }

    fn open(&mut self, _: &Request<'_>, number: u64, flags: i32, reply: ReplyOpen) {
        let opened = self.below(number).and_then(|path| {
            let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
            // O_DIRECT is between the owner and us.
            let file = OpenOptions::new()
                .read(true)
                .write(writes)
                .custom_flags(flags & libc::O_TRUNC)
                .open(&path)?;
            self.add_handle(&path, file)
        });
        match opened {
            Ok(handle) => reply.opened(handle, 0),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn create(
        &mut self,
        _: &Request<'_>,
        parent: u64,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if let Some(code) = self.judge(true).fails {
            return reply.error(code);
        }
        let created = self.child(parent, name).and_then(|name| {
            let path = self.root.join(&name);
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(flags & libc::O_TRUNC != 0)
                .mode(mode)
                .open(&path)?;
            Ok((self.entry(&name)?, self.add_handle(&path, file)?))
        });
        match created {
            Ok((attr, handle)) => reply.created(&TTL, &attr, 0, handle, 0),
            Err(e) => reply.error(code(&e)),
        }
    }

    fn read(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        offset: i64,
        size: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyData,
    ) {
        let Verdict { fails, late } = self.judge(false);
        let done = match fails {
            Some(code) => Err(code),
            None => self.handle(handle).and_then(|open| {
                self.read_below(open, offset.unsigned_abs(), size as usize).map_err(|e| code(&e))
            }),
        };
        answer(late, move || match done {
            Ok(data) => reply.data(&data),
            Err(code) => reply.error(code),
        });
    }

    fn write(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        offset: i64,
        data: &[u8],
        _: u32,
        _: i32,
        _: Option<u64>,
        reply: ReplyWrite,
    ) {
        let Verdict { fails, late } = self.judge(true);
        let done = match fails {
            Some(code) => Err(code),
            None => self
                .handle(handle)
                .and_then(|open| self.write_below(open, offset.unsigned_abs(), data).map_err(|e| code(&e))),
        };
        let len = data.len() as u32;
        answer(late, move || match done {
            Ok(()) => reply.written(len),
            Err(code) => reply.error(code),
        });
    }

    fn flush(&mut self, _: &Request<'_>, _: u64, _: u64, _: u64, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        _: i32,
        _: Option<u64>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.open.remove(&handle);
        reply.ok();
    }

    fn fsync(&mut self, _: &Request<'_>, _: u64, handle: u64, _: bool, reply: ReplyEmpty) {
        let Verdict { fails, late } = self.judge(false);
        // What is below is only as power-safe as this test needs it: it survives everything but this machine.
        let done = match fails {
            Some(code) => Err(code),
            None => self.handle(handle).map(|open| self.shared.lock().unsynced.synced(open.ino)),
        };
        answer(late, move || empty(done, reply));
    }

    fn fsyncdir(&mut self, _: &Request<'_>, _: u64, _: u64, _: bool, reply: ReplyEmpty) {
        let Verdict { fails, late } = self.judge(false);
        answer(late, move || empty(fails.map_or(Ok(()), Err), reply));
    }

    fn readdir(&mut self, _: &Request<'_>, number: u64, _: u64, offset: i64, mut reply: ReplyDirectory) {
        let list = self.below(number).and_then(|path| {
            let mut list =
                vec![(number, FileType::Directory, ".".into()), (number, FileType::Directory, "..".into())];
            let mut entries: Vec<fs::DirEntry> = fs::read_dir(path)?.collect::<io::Result<_>>()?;
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                let kind =
                    if entry.file_type()?.is_dir() { FileType::Directory } else { FileType::RegularFile };
                let name = self.child(number, &entry.file_name())?;
                list.push((self.number_of(&name), kind, entry.file_name()));
            }
            Ok(list)
        });
        match list {
            Ok(list) => {
                for (i, (number, kind, name)) in
                    list.into_iter().enumerate().skip(offset.unsigned_abs() as usize)
                {
                    if reply.add(number, i as i64 + 1, kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
            Err(e) => reply.error(code(&e)),
        }
    }

    fn statfs(&mut self, _: &Request<'_>, _: u64, reply: ReplyStatfs) {
        match rustix::fs::statvfs(&self.root) {
            Ok(s) => {
                let full = self.shared.lock().trouble == Trouble::Full;
                let (free, available) = if full { (0, 0) } else { (s.f_bfree, s.f_bavail) };
                let (size, fragment) = (s.f_bsize as u32, s.f_frsize as u32);
                reply.statfs(s.f_blocks, free, available, s.f_files, s.f_ffree, size, 255, fragment);
            }
            Err(e) => reply.error(e.raw_os_error()),
        }
    }

    fn fallocate(
        &mut self,
        _: &Request<'_>,
        _: u64,
        handle: u64,
        offset: i64,
        length: i64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Verdict { fails, late } = self.judge(mode & libc::FALLOC_FL_PUNCH_HOLE == 0);
        let done = match fails {
            Some(code) => Err(code),
            None => self.handle(handle).and_then(|open| {
                // SAFETY: a system call on an open descriptor; no memory is involved.
                check(unsafe { libc::fallocate(open.file.as_raw_fd(), mode, offset, length) })
                    .map_err(|e| code(&e))
            }),
        };
        answer(late, move || empty(done, reply));
    }

    fn lseek(&mut self, _: &Request<'_>, _: u64, handle: u64, offset: i64, whence: i32, reply: ReplyLseek) {
        let Ok(open) = self.handle(handle) else { return reply.error(libc::EBADF) };
        // SAFETY: a system call on an open descriptor; no memory is involved.
        match unsafe { libc::lseek(open.file.as_raw_fd(), offset, whence) } {
            -1 => reply.error(code(&io::Error::last_os_error())),
            at => reply.offset(at),
        }
    }
}
