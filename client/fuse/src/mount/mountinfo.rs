//! What is mounted where: /proc/self/mountinfo, which unlike `stat` sends no request to a filesystem that may hang.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Major and minor number of a mounted filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceNumber(u32, u32);

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0, self.1)
    }
}

/// One mounted filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountInfo {
    pub(super) device: DeviceNumber,
    pub(super) path: PathBuf,
    pub(super) kind: String,
    pub(super) source: String,
    /// Those of the mount and, behind a comma, of the filesystem.
    pub(super) options: String,
}

/// The filesystem that one sees at exactly this absolute path, if it is a mount point.
pub(super) fn top_at(path: &Path) -> Option<MountInfo> {
    read().into_iter().rfind(|mount| mount.path == path)
}

pub(super) fn is_mounted(device: DeviceNumber) -> bool {
    read().iter().any(|mount| mount.device == device)
}

fn read() -> Vec<MountInfo> {
    match std::fs::read("/proc/self/mountinfo") {
        Ok(table) => table.split(|&byte| byte == b'\n').filter_map(parse).collect(),
        Err(e) => {
            tracing::warn!("/proc/self/mountinfo: {e}");
            Vec::new()
        }
    }
}

/// `36 35 98:0 /root /mount/point options [optional fields] - type source superoptions`
fn parse(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|&byte| byte == b' ');
    let (major, minor) = std::str::from_utf8(fields.nth(2)?).ok()?.split_once(':')?;
    let device = DeviceNumber(major.parse().ok()?, minor.parse().ok()?);
    let path = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let of_mount = String::from_utf8_lossy(fields.next()?).into_owned();
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let mut text = || fields.next().map(|field| String::from_utf8_lossy(&unescape(field)).into_owned());
    let (kind, source) = (text()?, text()?);
    let options = format!("{of_mount},{}", text().unwrap_or_default());
    Some(MountInfo { device, path, kind, source, options })
}

/// Blanks, newlines and backslashes stand as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after
            .first_chunk::<3>()
            .filter(|digits| byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some([a, b, c]) => {
                out.push((a & 7) << 6 | (b & 7) << 3 | (c & 7));
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel() {
        let line =
            b"41 22 0:52 / /mnt/my\\040data rw,nosuid shared:5 master:1 - fuse.fjord host:7440 rw,user_id=0";
        let expected = MountInfo {
            device: DeviceNumber(0, 52),
            path: "/mnt/my data".into(),
            kind: "fuse.fjord".into(),
            source: "host:7440".into(),
            options: "rw,nosuid,rw,user_id=0".into(),
        };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse(b"41 22 0:52 / /mnt rw"), None);
        assert_eq!(parse(b""), None);
        assert_eq!(unescape(b"a\\134b\\"), b"a\\b\\");
    }

    #[test]
    fn the_root_is_a_mount() {
        assert!(top_at(Path::new("/proc")).is_some_and(|mount| mount.kind == "proc"));
        assert!(top_at(Path::new("/proc/self")).is_none());
    }
}
