//! The local side of a transfer: reading, writing and making files. All of this blocks.

use std::{
    fs::{self, File, Metadata},
    io, iter,
    ops::Range,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use anyhow::Context;
use bytes::Bytes;
use fjordfs_proto::pb::meta::{Attr, FileKind, Time};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

use super::attrs;

/// Beginning of the names of files that are not complete yet.
const PARTIAL: &str = ".fjord-partial-";

/// Name under which a file is written until it is complete. The same for every run, so that a later run takes over
/// what an interrupted one left.
pub(crate) fn partial_name(name: &[u8]) -> Vec<u8> {
    format!("{PARTIAL}{:016x}", xxhash_rust::xxh3::xxh3_64(name)).into_bytes()
}

/// Whether a name is one of [`partial_name`]: leftovers are not copied.
pub(crate) fn is_partial(name: &[u8]) -> bool {
    name.strip_prefix(PARTIAL.as_bytes())
        .is_some_and(|hash| hash.len() == 16 && hash.iter().all(u8::is_ascii_hexdigit))
}

/// The ranges of a file that are not holes, in order. All of it where the filesystem does not know.
pub(crate) fn data_ranges(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    use rustix::{fs::SeekFrom, io::Errno};
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(size),
            // Nothing but a hole up to the end.
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(iter::once(0..size).collect()),
            Err(e) => return Err(e.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(size);
        if end <= start {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// The bytes of a range.
///
/// # Errors
/// `UnexpectedEof` when the file has become shorter.
pub(crate) fn read_range(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let mut buffer = vec![0; (range.end - range.start) as usize];
    file.read_exact_at(&mut buffer, range.start)?;
    Ok(buffer.into())
}

/// Opens a file to be copied. A fifo or device put in its place meanwhile does not block us.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    File::options().read(true).custom_flags(flags.bits() as i32).open(path)
}

/// A new file under the partial name of `path`, and that name.
pub(crate) fn create_partial(path: &Path) -> anyhow::Result<(File, PathBuf)> {
    let name = path.file_name().context("a file needs a name")?;
    let partial = path.with_file_name(std::ffi::OsStr::from_bytes(&partial_name(name.as_bytes())));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
        .open(&partial)
        .with_context(|| format!("cannot create {}", partial.display()))?;
    Ok((file, partial))
}

/// Makes a directory, or takes the one that is there. True when it is new.
pub(crate) fn make_dir(path: &Path) -> anyhow::Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && fs::symlink_metadata(path)?.is_dir() => {
            Ok(false)
        }
        Err(e) => Err(e.into()),
    }
}

/// Makes a symbolic link, fifo, socket or device under the partial name and renames it into place.
pub(crate) fn make_special(path: &Path, attr: &Attr, target: &[u8]) -> anyhow::Result<()> {
    use rustix::fs::{FileType, Mode};
    let name = path.file_name().context("a file needs a name")?;
    let partial = path.with_file_name(std::ffi::OsStr::from_bytes(&partial_name(name.as_bytes())));
    match fs::remove_file(&partial) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let file_type = match attr.kind() {
        FileKind::Symlink => None,
        FileKind::Fifo => Some(FileType::Fifo),
        FileKind::Socket => Some(FileType::Socket),
        FileKind::CharDevice => Some(FileType::CharacterDevice),
        FileKind::BlockDevice => Some(FileType::BlockDevice),
        other => anyhow::bail!("a {} is not a special file", attrs::kind_name(other)),
    };
    match file_type {
        None => std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &partial)?,
        Some(kind) => {
            let device = attrs::decode_device(attr.rdev);
            rustix::fs::mknodat(CWD, &partial, kind, Mode::from_raw_mode(attr.mode), device)
                .with_context(|| format!("cannot make a {}", attrs::kind_name(attr.kind())))?;
        }
    }
    set_attributes(&partial, attr)?;
    fs::rename(&partial, path)?;
    Ok(())
}

/// Makes `path` another name of `first`.
pub(crate) fn link(first: &Path, path: &Path) -> anyhow::Result<()> {
    let name = path.file_name().context("a file needs a name")?;
    let partial = path.with_file_name(std::ffi::OsStr::from_bytes(&partial_name(name.as_bytes())));
    match fs::remove_file(&partial) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    fs::hard_link(first, &partial)?;
    fs::rename(&partial, path)?;
    // rename(2) does nothing when both names are one file already, and leaves the partial name.
    match fs::remove_file(&partial) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e.into()),
        _ => Ok(()),
    }
}

/// Gives a file owner, mode and times. Only root can give files away; for others the owner stays theirs.
pub(crate) fn set_attributes(path: &Path, attr: &Attr) -> anyhow::Result<()> {
    let owned = std::os::unix::fs::lchown(path, Some(attr.uid), Some(attr.gid));
    if rustix::process::geteuid().is_root() {
        owned.with_context(|| format!("cannot give it to user {} and group {}", attr.uid, attr.gid))?;
    }
    // After the owner: a change of owner drops suid and sgid.
    if attr.kind() != FileKind::Symlink {
        fs::set_permissions(path, fs::Permissions::from_mode(attr.mode)).context("cannot set its mode")?;
    }
    let times = Timestamps { last_access: timespec(attr.atime), last_modification: timespec(attr.mtime) };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).context("cannot set its times")?;
    Ok(())
}

fn timespec(time: Option<Time>) -> Timespec {
    let time = time.unwrap_or_default();
    Timespec { tv_sec: time.sec, tv_nsec: time.nsec.into() }
}

/// Whether a file was written to between two looks at it.
pub(crate) fn changed(before: &Metadata, after: &Metadata) -> bool {
    before.len() != after.len() || attrs::mtime_of(before) != attrs::mtime_of(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn partial_names_are_recognised() {
        assert!(is_partial(&partial_name(b"model.bin")));
        assert!(!is_partial(b".fjord-partial-notes"));
        assert_ne!(partial_name(b"a"), partial_name(b"b"));
    }

    #[test]
    fn holes_are_found_where_the_filesystem_knows_them() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 20).unwrap();
        file.write_all_at(&[1; 4096], 4 << 20).unwrap();
        let ranges = data_ranges(&file, 8 << 20).unwrap();
        // Whatever the filesystem knows: the data is covered and no range leaves the file.
        assert!(ranges.iter().any(|r| r.start <= 4 << 20 && r.end >= (4 << 20) + 4096), "{ranges:?}");
        assert!(ranges.iter().all(|r| r.start < r.end && r.end <= 8 << 20));
        assert_eq!(data_ranges(&file, 0).unwrap(), []);
        assert!(read_range(&file, (8 << 20) - 1..(8 << 20) + 1).is_err());
    }

    #[test]
    fn special_files_and_links_replace_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("x"), dir.path().join("y"));
        let time = Some(Time { sec: 1_000_000_000, nsec: 123_456_789 });
        let own = fs::metadata(dir.path()).unwrap();
        let mut attr =
            Attr { mode: 0o640, uid: own.uid(), gid: own.gid(), atime: time, mtime: time, ..Attr::default() };
        fs::write(&path, b"old").unwrap();
        attr.set_kind(FileKind::Fifo);
        make_special(&path, &attr, b"").unwrap();
        let made = fs::symlink_metadata(&path).unwrap();
        assert_eq!(attrs::kind_of(made.file_type()), FileKind::Fifo);
        assert_eq!(
            (made.mtime(), made.mtime_nsec(), attrs::mode_of(&made)),
            (1_000_000_000, 123_456_789, 0o640)
        );
        attr.set_kind(FileKind::Symlink);
        make_special(&path, &attr, b"some/target").unwrap();
        assert_eq!(fs::read_link(&path).unwrap(), Path::new("some/target"));
        assert_eq!(fs::symlink_metadata(&path).unwrap().mtime(), 1_000_000_000);

        fs::write(&other, b"data").unwrap();
        link(&other, &path).unwrap();
        link(&other, &path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), fs::metadata(&other).unwrap().ino());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
