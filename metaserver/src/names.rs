//! Names of directory entries: which are allowed, and how errors show them.

use fjordfs_proto::{FsError, FsResult, InodeId, NAME_MAX, error::Errno};

/// Refuses what no directory may hold.
pub(crate) fn check(name: &[u8]) -> FsResult<()> {
    match name {
        b"" => Err(FsError::new(Errno::ENOENT, "the name is empty")),
        b"." | b".." => {
            Err(FsError::new(Errno::EINVAL, format!("'{}' is not a name of its own", show(name))))
        }
        _ if name.len() > NAME_MAX => Err(FsError::new(
            Errno::ENAMETOOLONG,
            format!("the name has {} bytes, {NAME_MAX} are allowed", name.len()),
        )),
        _ if name.contains(&b'/') || name.contains(&0) => {
            Err(FsError::new(Errno::EINVAL, format!("'{}' contains a slash or a zero byte", show(name))))
        }
        _ => Ok(()),
    }
}

/// A name for people.
pub(crate) fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).escape_debug().collect()
}

/// "'name' in directory i7 ...".
pub(crate) fn error(errno: Errno, parent: InodeId, name: &[u8], what: &str) -> FsError {
    FsError::new(errno, format!("'{}' in directory {parent} {what}", show(name)))
}
