//! The data folder of `fjord up`: where it is by default, whose it is, how much fits.

use std::{
    fs::{self, File, TryLockError},
    io::{Read, Seek, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use crate::holders;

/// Left free for the namespace and for other files on the same disk.
const RESERVE_PERCENT: u64 = 5;

/// Children of an `up` that was killed need this long at most.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(30);

/// A data folder that no other `fjord up` uses.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    /// Inherited by the children, so that it is held until the last of them has ended.
    _lock: File,
}

/// `/var/lib/fjord` for root, else below the user's data folder.
pub(crate) fn default_path() -> anyhow::Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/fjord".into());
    }
    let data = std::env::var_os("XDG_DATA_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
    let data = data
        .or_else(home)
        .context("where is the data to be kept? Neither XDG_DATA_HOME nor HOME is set: give --data")?;
    Ok(data.join("fjord"))
}

impl Folder {
    /// Makes the folder when it is missing, and claims it.
    ///
    /// # Errors
    /// When another `fjord up` runs on it.
    pub(crate) fn claim(path: &Path) -> anyhow::Result<Folder> {
        fs::create_dir_all(path)
            .with_context(|| format!("cannot make the data folder {}", path.display()))?;
        let path =
            path.canonicalize().with_context(|| format!("cannot use the data folder {}", path.display()))?;
        let file = path.join("up.lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .with_context(|| format!("cannot open {}", file.display()))?;
        let deadline = Instant::now() + LEFTOVER_PATIENCE;
        let mut told = false;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::Error(e)) => {
                    return Err(e).with_context(|| format!("cannot lock {}", file.display()));
                }
                Err(TryLockError::WouldBlock) => {}
            }
            let owner = read_pid(&mut lock);
            if let Some(pid) = owner.filter(|pid| holders::alive(*pid)) {
                bail!(
                    "the data folder {} is in use by another `fjord up` (process {pid}): stop that, or give another --data",
                    path.display()
                );
            }
            if Instant::now() >= deadline {
                bail!("processes of an earlier `fjord up` still use {}: see its *.log files", path.display());
            }
            if !std::mem::replace(&mut told, true) {
                tracing::info!(
                    "waiting for the processes of an earlier `fjord up` on {} to end",
                    path.display()
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        write_pid(&mut lock).with_context(|| format!("cannot write {}", file.display()))?;
        rustix::io::fcntl_setfd(&lock, rustix::io::FdFlags::empty())
            .context("cannot share the lock with children")?;
        Ok(Folder { path, _lock: lock })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Folder of the metaserver.
    pub(crate) fn meta(&self) -> PathBuf {
        self.path.join("meta")
    }

    /// Folder of a data server; they are counted from 1.
    pub(crate) fn data(&self, server: usize) -> PathBuf {
        self.path.join(format!("data-{server}"))
    }

    /// Log of a child.
    pub(crate) fn log(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.log"))
    }

    /// Bytes that the data servers together may use: what they have, and what the disk has left.
    ///
    /// They share one disk; without a bound each would report all of it as its own.
    pub(crate) fn room(&self) -> anyhow::Result<u64> {
        let disk = rustix::fs::statvfs(&self.path)
            .with_context(|| format!("cannot ask for the free space of {}", self.path.display()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let mut used = 0;
        let entries =
            fs::read_dir(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        for entry in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("data-")) {
            used += walkdir::WalkDir::new(entry.path())
                .into_iter()
                .filter_map(|e| e.ok()?.metadata().ok())
                .filter(|m| m.is_file())
                .map(|m| m.blocks() * 512)
                .sum::<u64>();
        }
        Ok((free.saturating_add(used) / 100).saturating_mul(100 - RESERVE_PERCENT))
    }
}

fn read_pid(lock: &mut File) -> Option<u32> {
    let mut text = String::new();
    lock.rewind().ok()?;
    lock.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn write_pid(lock: &mut File) -> std::io::Result<()> {
    lock.set_len(0)?;
    lock.rewind()?;
    writeln!(lock, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder");
        let first = Folder::claim(&path).unwrap();
        let error = Folder::claim(&path).unwrap_err().to_string();
        assert!(error.contains("in use") && error.contains(&std::process::id().to_string()), "{error}");
        drop(first);
        let again = Folder::claim(&path).unwrap();
        assert!(again.room().unwrap() > 0);
        assert_eq!(again.data(2), path.canonicalize().unwrap().join("data-2"));
    }
}
