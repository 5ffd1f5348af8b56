//! What is mounted on this machine, from `/proc/self/mountinfo`.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
};

/// Filesystem type of our mounts.
pub(crate) const FSTYPE: &str = "fuse.fjord";

/// One line of mountinfo.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MountEntry {
    /// `major:minor` of the filesystem: the same for all its bind mounts.
    pub(crate) device: String,
    /// Folder of the filesystem that is mounted: `/` unless it is a bind mount.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) mountpoint: PathBuf,
    /// `fuse.fjord` for ours.
    pub(crate) fstype: String,
    /// For ours the metaserver's address.
    pub(crate) source: String,
}

impl MountEntry {
    pub(crate) fn is_ours(&self) -> bool {
        self.fstype == FSTYPE
    }
}

/// Every mount of this mount namespace, in the order they were made.
pub(crate) fn read() -> io::Result<Vec<MountEntry>> {
    read_of("self")
}

/// Every mount of the mount namespace of a process.
pub(crate) fn read_of(process: &str) -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read(format!("/proc/{process}/mountinfo"))?))
}

/// The mount that `path` (absolute, without symbolic links) lies in, and the path below its mount point.
pub(crate) fn covering<'a, 'p>(
    mounts: &'a [MountEntry],
    path: &'p Path,
) -> Option<(&'a MountEntry, &'p Path)> {
    // The deepest mount point wins, and of two on one folder the later, which hides the earlier.
    mounts
        .iter()
        .filter_map(|m| Some((m, path.strip_prefix(&m.mountpoint).ok()?)))
        .max_by_key(|(m, _)| m.mountpoint.components().count())
}

/// The mount on exactly this folder that is seen there.
pub(crate) fn at<'a>(mounts: &'a [MountEntry], mountpoint: &Path) -> Option<&'a MountEntry> {
    mounts.iter().rfind(|m| m.mountpoint == mountpoint)
}

/// Absolute path of a mount point, without looking into it: a dead mount does not answer.
pub(crate) fn absolute(path: &Path) -> io::Result<PathBuf> {
    let path = std::path::absolute(path)?;
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if path.components().next_back() != Some(Component::ParentDir) => {
            Ok(parent.canonicalize()?.join(name))
        }
        _ => path.canonicalize(),
    }
}

fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mountpoint options [tags…] - fstype source superoptions`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|b| *b == b' ').skip(2);
    let (device, root, mountpoint) = (fields.next()?, fields.next()?, fields.next()?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    let (fstype, source) = (rest.next()?, rest.next()?);
    Some(MountEntry {
        device: String::from_utf8_lossy(device).into_owned(),
        root: PathBuf::from(OsString::from_vec(unescape(root))),
        mountpoint: PathBuf::from(OsString::from_vec(unescape(mountpoint))),
        fstype: String::from_utf8_lossy(&unescape(fstype)).into_owned(),
        source: String::from_utf8_lossy(&unescape(source)).into_owned(),
    })
}

/// The kernel writes blanks, line ends and backslashes as `\ooo`.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:45 / /mnt/fjord rw,nosuid,nodev shared:7 master:2 - fuse.fjord 10.0.0.1:7440 rw,user_id=0
41 22 0:46 / /mnt/with\\040blank rw - fuse.fjord 10.0.0.2:7440 rw
42 40 0:47 / /mnt/fjord/inner rw - tmpfs tmpfs rw
43 22 0:45 /datasets /srv/data rw - fuse.fjord 10.0.0.1:7440 rw
garbage
44 22 0:46 / /mnt/fjord rw - fuse.fjord 10.0.0.3:7440 rw
";

    #[test]
    fn fields_and_escapes_are_read() {
        let mounts = parse(SAMPLE);
        assert_eq!(mounts.len(), 6);
        assert_eq!(mounts[2].mountpoint, Path::new("/mnt/with blank"));
        assert_eq!((mounts[1].device.as_str(), mounts[1].source.as_str()), ("0:45", "10.0.0.1:7440"));
        assert!(mounts[1].is_ours() && !mounts[3].is_ours());
        assert_eq!(mounts[4].root, Path::new("/datasets"));
    }

    #[test]
    fn the_deepest_and_latest_mount_covers() {
        let mounts = parse(SAMPLE);
        let of = |path: &str| {
            let (m, rest) = covering(&mounts, Path::new(path)).unwrap();
            (m.source.clone(), rest.to_str().unwrap().to_owned())
        };
        assert_eq!(of("/mnt/fjord/a/b"), ("10.0.0.3:7440".into(), "a/b".into()));
        assert_eq!(of("/mnt/fjord/inner/x"), ("tmpfs".into(), "x".into()));
        assert_eq!(of("/mnt/fjordling"), ("/dev/vda".into(), "mnt/fjordling".into()));
        assert_eq!(of("/mnt/with blank"), ("10.0.0.2:7440".into(), String::new()));
        assert_eq!(at(&mounts, Path::new("/mnt/fjord")).unwrap().source, "10.0.0.3:7440");
        assert!(at(&mounts, Path::new("/mnt")).is_none());
    }

    #[test]
    fn octal_escapes() {
        assert_eq!(unescape(b"a\\040b\\134c\\01"), b"a b\\c\\01");
        assert_eq!(unescape(b"\\777"), b"\\777");
    }

    #[test]
    fn the_real_table_has_a_root() {
        assert!(at(&read().unwrap(), Path::new("/")).is_some());
    }
}
