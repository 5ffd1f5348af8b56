//! A directory, used as programs use it: one system call after the other in each thread.

use std::{
    fs::{self, File},
    io::{Read, Write},
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Instant,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use rustix::fs::{Advice, OFlags};

use super::{
    plan::scratch_name,
    target::{Dice, FileOp, PIECE, RANDOM_READ, Reads, Target},
    watch::Watch,
};

pub(super) struct Directory {
    parent: PathBuf,
    dir: PathBuf,
    /// Cleared when the filesystem refuses O_DIRECT.
    direct: AtomicBool,
}

impl Directory {
    /// Makes a directory of its own below `parent`.
    pub(super) fn new(parent: &Path) -> anyhow::Result<Directory> {
        let found = fs::metadata(parent).with_context(|| format!("cannot use {}", parent.display()))?;
        ensure!(found.is_dir(), "{} is not a directory", parent.display());
        let dir = parent.join(scratch_name());
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Directory { parent: parent.to_owned(), dir, direct: AtomicBool::new(true) })
    }

    fn open_direct(&self, path: &Path) -> anyhow::Result<File> {
        if self.direct() {
            match File::options().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path) {
                Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => self.direct.store(false, Relaxed),
                opened => return opened.with_context(|| path.display().to_string()),
            }
        }
        File::open(path).with_context(|| path.display().to_string())
    }
}

impl Target for Directory {
    fn name(&self) -> String {
        self.parent.display().to_string()
    }

    fn free(&self) -> anyhow::Result<u64> {
        let found = rustix::fs::statvfs(&self.parent)
            .with_context(|| format!("statvfs of {}", self.parent.display()))?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    fn direct(&self) -> bool {
        self.direct.load(Relaxed)
    }

    fn make_dir(&self, name: &str) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))
    }

    fn write(&self, name: &str, len: u64, piece: &Bytes, watch: &Watch) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            let mut left = len;
            while left > 0 && !watch.stopped() {
                let n = left.min(piece.len() as u64);
                file.write_all(&piece[..n as usize])?;
                left -= n;
                watch.did(n);
            }
            // Who is interrupted need not wait for the disk.
            if watch.stopped() { Ok(()) } else { file.sync_all() }
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        watch.check()
    }

    fn read(&self, name: &str, len: u64, watch: &Watch) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        let read = || -> std::io::Result<u64> {
            let (mut file, mut buffer) = (File::open(&path)?, vec![0; PIECE]);
            let mut total = 0;
            while !watch.stopped() {
                match file.read(&mut buffer)? {
                    0 => break,
                    n => {
                        total += n as u64;
                        watch.did(n as u64);
                    }
                }
            }
            Ok(total)
        };
        let total = read().with_context(|| format!("cannot read {}", path.display()))?;
        watch.check()?;
        ensure!(total == len, "{} has {total} bytes, {len} were written", path.display());
        Ok(())
    }

    fn random(&self, name: &str, dice: &mut Dice, until: Instant, watch: &Watch) -> anyhow::Result<Reads> {
        let path = self.dir.join(name);
        let file = self.open_direct(&path)?;
        // Direct reads want memory aligned to pages.
        let mut memory = vec![0; 2 * RANDOM_READ];
        let start = memory.as_ptr().align_offset(RANDOM_READ).min(RANDOM_READ);
        let buffer = &mut memory[start..start + RANDOM_READ];
        let mut reads = Reads::default();
        let mut began = Instant::now();
        while began < until {
            watch.check()?;
            let at = dice.offset();
            file.read_exact_at(buffer, at).with_context(|| format!("{}, byte {at}", path.display()))?;
            let now = Instant::now();
            reads.latencies_us.push(now.duration_since(began).as_micros().try_into().unwrap_or(u32::MAX));
            reads.count += 1;
            began = now;
        }
        Ok(reads)
    }

    fn files(&self, op: &FileOp, dir: &str, files: Range<u64>, watch: &Watch) -> anyhow::Result<()> {
        let dir = self.dir.join(dir);
        let mut buffer = Vec::new();
        for i in files {
            watch.check()?;
            let path = dir.join(format!("f{i}"));
            let result = match op {
                FileOp::Create(data) => File::create_new(&path).and_then(|mut file| file.write_all(data)),
                FileOp::Read(len) => {
                    buffer.clear();
                    File::open(&path).and_then(|mut file| file.read_to_end(&mut buffer)).and_then(|n| {
                        let cut = std::io::Error::other(format!("{n} bytes, {len} were written"));
                        if n == *len { Ok(()) } else { Err(cut) }
                    })
                }
                FileOp::Stat => fs::symlink_metadata(&path).map(drop),
                FileOp::Delete => fs::remove_file(&path),
            };
            result.with_context(|| path.display().to_string())?;
            watch.did(1);
        }
        Ok(())
    }

    fn forget(&self) -> anyhow::Result<()> {
        for entry in walkdir::WalkDir::new(&self.dir) {
            let entry = entry.context("cannot list what the benchmark has written")?;
            if entry.file_type().is_file() {
                let file = File::open(entry.path()).with_context(|| entry.path().display().to_string())?;
                // Dirty pages stay in memory: they are written first.
                file.sync_data()
                    .and_then(|()| rustix::fs::fadvise(&file, 0, None, Advice::DontNeed).map_err(Into::into))
                    .with_context(|| entry.path().display().to_string())?;
            }
        }
        Ok(())
    }

    fn remove(&self) -> anyhow::Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}: remove it by hand", self.dir.display()))
            }
            _ => Ok(()),
        }
    }
}
