//! Extended attributes. A caller that offers no buffer asks how large one must be.

use bytes::Bytes;
use fjordfs_proto::error::Errno;
use fjordfs_proto::{FsError, FsResult, InodeId};

use super::Dispatcher;
use crate::abi::{GetxattrOut, SETXATTR_ACL_KILL_SGID};
use crate::filesystem::Filesystem;
use crate::reply::Reply;
use crate::request::Caller;

/// Only the superuser sees these in a list; reading and writing them is checked by the kernel.
const TRUSTED: &[u8] = b"trusted.";
const ACCESS_LIST: &[u8] = b"system.posix_acl_access";
/// Where SELinux is on, the kernel answers for labels itself. Where it is off, `ls -l` asks for the label of every file, until it is told
/// once that there is no such thing here.
const LABEL: &[u8] = b"security.selinux";

impl<F: Filesystem> Dispatcher<F> {
    pub(super) async fn getxattr(&self, ino: InodeId, name: &[u8], size: u32) -> FsResult<Reply> {
        match self.fs.get_xattr(ino, name).await {
            Ok(value) => sized(value, size),
            Err(e) if e.errno == Errno::ENODATA && name == LABEL => {
                Err(FsError::new(Errno::EOPNOTSUPP, "files have no labels here"))
            }
            Err(e) => Err(e),
        }
    }

    pub(super) async fn setxattr(
        &self,
        ino: InodeId,
        name: &[u8],
        value: Bytes,
        flags: u32,
        setxattr_flags: u32,
    ) -> FsResult<Reply> {
        if setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 && name == ACCESS_LIST {
            self.fs.set_access_list(ino, value).await?;
        } else {
            self.fs.set_xattr(ino, name, value, flags).await?;
        }
        Ok(Reply::Empty)
    }

    pub(super) async fn listxattr(&self, caller: Caller, ino: InodeId, size: u32) -> FsResult<Reply> {
        let names = self.fs.list_xattrs(ino).await?;
        let mut list = Vec::new();
        for name in names.iter().filter(|name| caller.uid == 0 || !name.starts_with(TRUSTED)) {
            list.extend_from_slice(name);
            list.push(0);
        }
        sized(list.into(), size)
    }
}

/// The bytes if they fit the caller's buffer, or their length for a caller without one.
fn sized(value: Bytes, size: u32) -> FsResult<Reply> {
    if size == 0 {
        return Ok(Reply::of(&GetxattrOut { size: value.len() as u32, padding: 0 }));
    }
    if value.len() > size as usize {
        return Err(FsError::new(
            Errno::ERANGE,
            format!("{} bytes do not fit a buffer of {size}", value.len()),
        ));
    }
    Ok(Reply::Bytes(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_filled_measured_or_too_small() {
        let value = Bytes::from_static(b"value");
        assert!(matches!(sized(value.clone(), 5), Ok(Reply::Bytes(bytes)) if bytes == value));
        match sized(value.clone(), 0) {
            Ok(Reply::Fixed(body)) => assert_eq!(body.as_slice(), [5, 0, 0, 0, 0, 0, 0, 0]),
            other => panic!("{other:?}"),
        }
        assert_eq!(sized(value, 4).unwrap_err().errno, Errno::ERANGE);
    }
}
