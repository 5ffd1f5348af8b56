//! Damage done on purpose.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpStream,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rustix::fs::{SeekFrom, seek};

use crate::{Scratch, mountpoint::detach, process::run};

/// A place in a file.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// Byte in it.
    pub offset: u64,
}

/// Every place below `folder` where a 4 KiB aligned page begins with `needle`. Preallocated, never written parts of
/// volumes are skipped.
///
/// # Panics
/// When a file cannot be read.
pub fn find_pages(folder: &Path, needle: &[u8]) -> Vec<Place> {
    const PAGE: usize = 4096;
    let mut found = Vec::new();
    for file in files(folder) {
        let open = File::open(&file).expect("volume");
        for (start, end) in written_parts(&open) {
            let mut data = vec![0; (end - start) as usize];
            open.read_exact_at(&mut data, start).expect("volume data");
            let hits = data.chunks(PAGE).enumerate().filter(|(_, page)| page.starts_with(needle));
            found.extend(hits.map(|(i, _)| Place { file: file.clone(), offset: start + (i * PAGE) as u64 }));
        }
    }
    found.sort();
    found
}

/// Offsets of all 4 KiB pages of a volume that are not empty.
///
/// # Panics
/// When the file cannot be read.
pub fn find_written(volume: &Path) -> Vec<u64> {
    const PAGE: usize = 4096;
    let open = File::open(volume).expect("volume");
    let mut found = Vec::new();
    for (start, end) in written_parts(&open) {
        let mut data = vec![0; (end - start) as usize];
        open.read_exact_at(&mut data, start).expect("volume data");
        let written = data.chunks(PAGE).enumerate().filter(|(_, page)| page.iter().any(|b| *b != 0));
        found.extend(written.map(|(i, _)| start + (i * PAGE) as u64));
    }
    found
}

/// All regular files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut todo = vec![folder.to_owned()];
    let mut found = Vec::new();
    while let Some(dir) = todo.pop() {
        for item in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match item.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(item.path()),
                Ok(kind) if kind.is_file() => found.push(item.path()),
                _ => {}
            }
        }
    }
    found.sort();
    found
}

/// The volume files of a target: its largest kind of file.
pub fn volumes(target: &Path) -> Vec<PathBuf> {
    let is_volume = |path: &PathBuf| fs::metadata(path).is_ok_and(|m| m.len() >= 16 << 20);
    files(target).into_iter().filter(is_volume).collect()
}

fn written_parts(file: &File) -> Vec<(u64, u64)> {
    // Written bytes may still be in the page cache only, where the extents say "unwritten".
    file.sync_all().expect("sync");
    let mut parts = Vec::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(start)).expect("end of data");
        parts.push((start & !4095, end));
        at = end;
    }
    parts
}

/// Inverts some bytes of a file and makes that durable.
///
/// # Panics
/// When it cannot.
pub fn flip(place: &Place, bytes: usize) {
    let file = File::options().read(true).write(true).open(&place.file).expect("volume");
    let mut data = vec![0; bytes];
    file.read_exact_at(&mut data, place.offset).expect("bytes to flip");
    data.iter_mut().for_each(|b| *b = !*b);
    file.write_all_at(&data, place.offset).expect("flipped bytes");
    file.sync_all().expect("sync");
    // Data servers read with O_DIRECT, so no stale page may stay behind in the cache for later buffered looks.
    // SAFETY: the descriptor is open; the call has no effect on memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Cuts a file.
///
/// # Panics
/// When it cannot.
pub fn truncate(path: &Path, len: u64) {
    let file = File::options().write(true).open(path).expect("file to truncate");
    file.set_len(len).expect("truncate");
    file.sync_all().expect("sync");
}

/// Bytes of disk that a folder's files occupy.
pub fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    files(folder).iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.blocks() * 512).sum()
}

/// A small ext4 filesystem in a file. Unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Makes and mounts one of `mib` MiB.
    ///
    /// # Panics
    /// When that fails.
    pub fn new(scratch: &Scratch, name: &str, mib: u64) -> SmallDisk {
        let image = scratch.path().join(format!("{name}.img"));
        let dir = scratch.dir(name);
        File::create(&image).and_then(|f| f.set_len(mib << 20)).expect("image");
        let mut make = Command::new("mkfs.ext4");
        run({
            make.args(["-q", "-m", "0"]).arg(&image);
            make
        })
        .ok();
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(&image).arg(&dir);
        run(mount).ok();
        SmallDisk { dir }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.dir
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        detach(&self.dir);
    }
}

/// Sends bytes to a server and returns what it answers until it closes the connection or is silent for two seconds.
///
/// # Panics
/// When nobody listens there.
pub fn send_noise(address: &str, bytes: &[u8]) -> Vec<u8> {
    exchange(address, bytes, Duration::from_secs(2))
}

/// [`send_noise`] for when the answer does not matter.
pub fn send_noise_quick(address: &str, bytes: &[u8]) {
    exchange(address, bytes, Duration::from_millis(100));
}

fn exchange(address: &str, bytes: &[u8], patience: Duration) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap_or_else(|e| panic!("connect {address}: {e}"));
    socket.set_read_timeout(Some(patience)).expect("timeout");
    socket.set_write_timeout(Some(Duration::from_secs(5))).expect("timeout");
    // The server may hang up in the middle: that is a fine answer to noise.
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    answer
}

/// Sets `format_version` in the label of a data folder to that of a far future.
///
/// # Panics
/// When the folder has no label.
pub fn make_newer(folder: &Path) {
    let mut found = false;
    for file in files(folder) {
        let small = fs::metadata(&file).is_ok_and(|m| m.len() < 64 << 10);
        let label = small.then(|| fs::read(&file).ok()).flatten();
        let Some(mut label) = label.and_then(|raw| serde_json::from_slice::<serde_json::Value>(&raw).ok())
        else {
            continue;
        };
        if label.get("format_version").is_some() {
            label["format_version"] = 999.into();
            fs::write(&file, label.to_string()).expect("label");
            found = true;
        }
    }
    assert!(found, "no label with a format_version in {}", folder.display());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_pages_are_found_and_flipped() {
        let scratch = Scratch::new("fault");
        let path = scratch.path().join("volume");
        let file = File::create(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        file.write_all_at(b"marker here", 5 * 4096).unwrap();
        file.write_all_at(b"marker here", 600 << 20).unwrap();
        file.write_all_at(b"marker unaligned", 100_001).unwrap();
        let found = find_pages(scratch.path(), b"marker");
        assert_eq!(found.iter().map(|p| p.offset).collect::<Vec<_>>(), [5 * 4096, 600 << 20]);
        flip(&found[0], 2);
        assert_eq!(find_pages(scratch.path(), b"marker").len(), 1);
        flip(&found[0], 2);
        assert_eq!(find_pages(scratch.path(), b"marker").len(), 2);
        assert_eq!(volumes(scratch.path()), [path]);
    }

    #[test]
    fn a_small_disk_is_small_and_goes_away() {
        let scratch = Scratch::new("disk");
        let disk = SmallDisk::new(&scratch, "disk", 32);
        assert!(fs::write(disk.path().join("f"), vec![1; 64 << 20]).is_err());
        let dir = disk.path().to_owned();
        drop(disk);
        assert!(!crate::mountpoint::is_mounted(&dir));
    }
}
