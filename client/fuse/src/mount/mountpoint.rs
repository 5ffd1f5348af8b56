//! Whether a directory can be mounted on.

use std::io;
use std::path::{Path, PathBuf};

use super::{MountError, TYPE, mountinfo};

/// Checks a mount point and answers with its absolute path without symbolic links, which is how the kernel names it.
pub(super) fn check(path: &Path, nonempty: bool) -> Result<PathBuf, MountError> {
    let inaccessible = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOTCONN | libc::ECONNABORTED) => MountError::Dead(path.to_owned()),
        Some(libc::ENOENT) => MountError::NotFound(path.to_owned()),
        Some(libc::ENOTDIR) => MountError::NotADirectory(path.to_owned()),
        _ => MountError::Inaccessible { path: path.to_owned(), source },
    };
    let metadata = std::fs::metadata(path).map_err(inaccessible)?;
    if !metadata.is_dir() {
        return Err(MountError::NotADirectory(path.to_owned()));
    }
    let absolute = std::fs::canonicalize(path).map_err(inaccessible)?;
    if let Some(mount) = mountinfo::top_at(&absolute)
        && mount.kind == TYPE
    {
        return Err(MountError::AlreadyMounted { path: absolute, source_name: mount.source });
    }
    if !nonempty && std::fs::read_dir(&absolute).map_err(inaccessible)?.next().is_some() {
        return Err(MountError::NotEmpty(absolute));
    }
    Ok(absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_mounted_on_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let message = |path: &Path, nonempty| check(path, nonempty).unwrap_err().to_string();
        assert!(message(&dir.path().join("missing"), false).contains("mkdir -p"));
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(message(&file, false).contains("not a directory"));
        assert!(message(&file.join("below"), false).contains("not a directory"));
        assert!(message(dir.path(), false).contains("not empty"));
        assert!(check(dir.path(), true).is_ok());
        std::fs::remove_file(&file).unwrap();
        let link = dir.path().with_extension("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert_eq!(check(&link, false).unwrap(), dir.path().canonicalize().unwrap());
        std::fs::remove_file(&link).unwrap();
    }
}
