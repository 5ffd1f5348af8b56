//! Operations done to one directory, and what a program sees of them.

use std::{
    fmt,
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{self, AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid},
    io::{self, Errno},
};

use super::{
    op::{Name, Op, SLOTS},
    space,
};

/// What an operation answered.
#[derive(PartialEq, Eq, Debug)]
pub enum Outcome {
    /// An errno.
    Failed(Errno),
    /// Nothing to tell.
    Done,
    /// The operation does not apply here (an empty slot, a map beyond the end).
    Skipped,
    /// Bytes written.
    Count(usize),
    /// Bytes read.
    Bytes(Bytes),
    /// Attributes.
    Attr(Attr),
    /// Names in a directory, sorted.
    Names(Vec<(Vec<u8>, FileType)>),
    /// Names of extended attributes, sorted.
    Attributes(Vec<String>),
    /// Target of a symbolic link.
    Target(Vec<u8>),
}

/// Bytes that print short.
#[derive(PartialEq, Eq)]
pub struct Bytes(pub(super) Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Runs, as written bytes come in runs of one value that grows per position.
        write!(f, "{} bytes: ", self.0.len())?;
        for (i, byte) in
            self.0.iter().enumerate().filter(|(i, b)| *i == 0 || self.0[i - 1].abs_diff(**b) > 1).take(12)
        {
            write!(f, "@{i}={byte} ")?;
        }
        Ok(())
    }
}

/// What is compared of a file's attributes. Sizes of directories are a matter of taste, and clocks differ: a time counts
/// only where a test has set it.
#[derive(PartialEq, Eq, Debug)]
pub struct Attr {
    kind: FileType,
    mode: u32,
    nlink: u64,
    owner: (u32, u32),
    size: Option<i64>,
    mtime_set: Option<(i64, i64)>,
}

/// Times that tests set lie before this one (2001), times of clocks after it.
const SET_TIMES_END: i64 = 1_000_000_000;

/// One directory and the descriptors open in it.
#[derive(Debug)]
pub struct World {
    root: PathBuf,
    slots: [Option<OwnedFd>; SLOTS],
}

impl World {
    /// An existing, empty directory.
    pub fn new(root: &Path) -> World {
        World { root: root.into(), slots: Default::default() }
    }

    /// Does it.
    pub fn apply(&mut self, op: &Op) -> Outcome {
        self.attempt(op).unwrap_or_else(Outcome::Failed)
    }

    fn at(&self, name: Name) -> PathBuf {
        self.root.join(name.path())
    }

    fn attempt(&mut self, op: &Op) -> io::Result<Outcome> {
        match *op {
            Op::Open { slot, path, flags, mode } => {
                let fd = fs::open(self.at(path), flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode))?;
                self.slots[slot] = Some(fd);
                return Ok(Outcome::Done);
            }
            Op::Tmpfile { slot, path, mode, flags } => {
                let flags = flags | OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
                self.slots[slot] = Some(fs::open(self.at(path), flags, Mode::from_raw_mode(mode))?);
                return Ok(Outcome::Done);
            }
            Op::LinkDescriptor { slot, to } => {
                let Some(fd) = &self.slots[slot] else { return Ok(Outcome::Skipped) };
                let from = format!("/proc/self/fd/{}", fd.as_raw_fd());
                fs::linkat(CWD, from, CWD, self.at(to), AtFlags::SYMLINK_FOLLOW)?;
            }
            Op::Close { slot } => {
                self.slots[slot] = None;
                return Ok(Outcome::Done);
            }
            Op::Truncate { path, size } => {
                // truncate(2) itself: open + ftruncate would not meet the same checks.
                let path = std::ffi::CString::new(self.at(path).into_os_string().into_encoded_bytes())
                    .map_err(|_| Errno::INVAL)?;
                // SAFETY: `path` is a C string that lives across the call.
                if unsafe { libc::truncate(path.as_ptr(), size as i64) } != 0 {
                    return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
                }
                return Ok(Outcome::Done);
            }
            Op::Unlink { path } => fs::unlink(self.at(path))?,
            Op::Rmdir { path } => fs::rmdir(self.at(path))?,
            Op::Mkdir { path, mode } => fs::mkdir(self.at(path), Mode::from_raw_mode(mode))?,
            Op::Rename { from, to, flags } => {
                fs::renameat_with(CWD, self.at(from), CWD, self.at(to), flags)?;
            }
            Op::Link { from, to } => fs::link(self.at(from), self.at(to))?,
            Op::Symlink { target, path } => fs::symlink(target.path(), self.at(path))?,
            Op::Readlink { path } => {
                return Ok(Outcome::Target(fs::readlink(self.at(path), Vec::new())?.into_bytes()));
            }
            Op::Lstat { path } => return Ok(Outcome::Attr(attr(&fs::lstat(self.at(path))?))),
            Op::Stat { path } => return Ok(Outcome::Attr(attr(&fs::stat(self.at(path))?))),
            Op::List { path } => return list(&self.at(path)),
            Op::Chmod { path, mode } => fs::chmod(self.at(path), Mode::from_raw_mode(mode))?,
            Op::Chown { path, uid, gid } => {
                fs::chown(self.at(path), Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
            }
            Op::Utimens { path, sec, nsec } => {
                return self.utimens(path, Timespec { tv_sec: sec, tv_nsec: nsec });
            }
            Op::CopyRange { from, to, at, len } => {
                let (Some(from), Some(to)) = (&self.slots[from], &self.slots[to]) else {
                    return Ok(Outcome::Skipped);
                };
                return space::copy(from, to, at, len);
            }
            Op::Space { slot, ref op } => {
                let Some(fd) = &self.slots[slot] else { return Ok(Outcome::Skipped) };
                return op.apply(fd);
            }
            Op::Xattr(ref op) => return op.apply(&self.root),
            ref op => return self.with_descriptor(op),
        }
        Ok(Outcome::Done)
    }

    fn utimens(&self, path: Name, time: Timespec) -> io::Result<Outcome> {
        let path = self.at(path);
        let times = Timestamps { last_access: time, last_modification: time };
        fs::utimensat(CWD, &path, &times, AtFlags::empty())?;
        let now = fs::stat(&path)?;
        if (now.st_atime, now.st_atime_nsec as i64) != (time.tv_sec, time.tv_nsec) {
            return Err(Errno::RANGE);
        }
        Ok(Outcome::Attr(attr(&now)))
    }

    fn with_descriptor(&self, op: &Op) -> io::Result<Outcome> {
        let slot = match *op {
            Op::Write { slot, .. }
            | Op::Pwrite { slot, .. }
            | Op::Read { slot, .. }
            | Op::Pread { slot, .. }
            | Op::MmapWrite { slot, .. }
            | Op::Fsync { slot }
            | Op::Ftruncate { slot, .. }
            | Op::Fchmod { slot, .. }
            | Op::Fstat { slot } => slot,
            _ => return Ok(Outcome::Skipped),
        };
        let Some(fd) = self.slots[slot].as_ref() else { return Ok(Outcome::Skipped) };
        Ok(match *op {
            Op::Write { len, fill, .. } => {
                Outcome::Count(all(&pattern(len, fill), |_, rest| io::write(fd, rest))?)
            }
            Op::Pwrite { at, len, fill, .. } => {
                Outcome::Count(all(&pattern(len, fill), |done, rest| io::pwrite(fd, rest, at + done as u64))?)
            }
            Op::Read { len, .. } => {
                let mut data = vec![0; len];
                // A local read is whole up to the end of file, so ours must be, too.
                let got = io::read(fd, &mut data[..])?;
                data.truncate(got);
                Outcome::Bytes(Bytes(data))
            }
            Op::Pread { at, len, .. } => {
                let mut data = vec![0; len];
                let got = io::pread(fd, &mut data[..], at)?;
                data.truncate(got);
                Outcome::Bytes(Bytes(data))
            }
            Op::MmapWrite { at, len, fill, .. } => mmap_write(fd, at, len, fill)?,
            Op::Fsync { .. } => {
                fs::fsync(fd)?;
                Outcome::Done
            }
            Op::Ftruncate { size, .. } => {
                fs::ftruncate(fd, size)?;
                Outcome::Done
            }
            Op::Fchmod { mode, .. } => {
                fs::fchmod(fd, Mode::from_raw_mode(mode))?;
                Outcome::Done
            }
            _ => Outcome::Attr(attr(&fs::fstat(fd)?)),
        })
    }
}

/// Bytes of which each position can be told from its neighbours.
fn pattern(len: usize, fill: u8) -> Vec<u8> {
    (0..len).map(|i| fill.wrapping_add((i / 512) as u8).max(1)).collect()
}

fn all(data: &[u8], mut write: impl FnMut(usize, &[u8]) -> io::Result<usize>) -> io::Result<usize> {
    let mut done = write(0, data)?;
    while done < data.len() {
        match write(done, &data[done..])? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

fn mmap_write(fd: &OwnedFd, at: u64, len: usize, fill: u8) -> io::Result<Outcome> {
    let stat = fs::fstat(fd)?;
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !regular || len == 0 || at + len as u64 > stat.st_size as u64 {
        return Ok(Outcome::Skipped);
    }
    let to_errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
    let file = File::from(fd.as_fd().try_clone_to_owned().map_err(to_errno)?);
    // SAFETY: nothing else truncates or maps this file while the map lives; it is the test's own.
    let mut map =
        unsafe { memmap2::MmapOptions::new().offset(at).len(len).map_mut(&file) }.map_err(to_errno)?;
    map.copy_from_slice(&pattern(len, fill));
    map.flush().map_err(to_errno)?;
    Ok(Outcome::Done)
}

fn attr(stat: &fs::Stat) -> Attr {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let set = stat.st_mtime < SET_TIMES_END;
    Attr {
        kind,
        mode: stat.st_mode & 0o7777,
        nlink: stat.st_nlink,
        owner: (stat.st_uid, stat.st_gid),
        size: (kind != FileType::Directory).then_some(stat.st_size),
        mtime_set: set.then_some((stat.st_mtime, stat.st_mtime_nsec as i64)),
    }
}

fn list(path: &Path) -> io::Result<Outcome> {
    let fd = fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::read_from(fd)? {
        let entry = entry?;
        names.push((entry.file_name().to_bytes().to_vec(), entry.file_type()));
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(Outcome::Names(names))
}
