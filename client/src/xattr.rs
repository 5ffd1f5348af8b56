//! Extended attributes.

use bytes::Bytes;
use fjordfs_proto::{
    FsError, FsResult, InodeId, XATTR_NAME_MAX,
    error::Errno,
    pb::meta::{Attr, GetXattr, ListXattrs, RemoveXattr, SetXattr, request::Op, response},
};

use crate::{Client, meta::unexpected};

const ACCESS_LIST: &[u8] = b"system.posix_acl_access";
const DEFAULT_LIST: &[u8] = b"system.posix_acl_default";

/// Whether a name is one that an inode can have; of others the server says what is wrong with them.
fn is_known(name: &[u8]) -> bool {
    let namespaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    name.len() <= XATTR_NAME_MAX
        && namespaces.iter().any(|space| name.starts_with(space) && name.len() > space.len())
        || name == ACCESS_LIST
        || name == DEFAULT_LIST
}

/// Whether an attribute may, or must, exist when it is set: the flags of `setxattr(2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetXattrMode {
    /// Either.
    #[default]
    Any,
    /// It must not exist: `XATTR_CREATE`.
    Create,
    /// It must exist: `XATTR_REPLACE`.
    Replace,
}

impl SetXattrMode {
    /// From the flags of `setxattr(2)`.
    ///
    /// # Errors
    /// `EINVAL` for others than `XATTR_CREATE` and `XATTR_REPLACE`.
    pub fn from_flags(flags: u32) -> FsResult<SetXattrMode> {
        match flags {
            0 => Ok(SetXattrMode::Any),
            1 => Ok(SetXattrMode::Create),
            2 => Ok(SetXattrMode::Replace),
            _ => Err(FsError::new(Errno::EINVAL, format!("setxattr with flags {flags:#x}"))),
        }
    }
}

impl Client {
    /// The value of an extended attribute; `name` with its namespace, as `user.comment`.
    ///
    /// # Errors
    /// `ENODATA` when the inode does not have it, `EOPNOTSUPP` for other namespaces than `user`, `trusted` and `security`,
    /// of which `system` has the access control lists.
    pub async fn get_xattr(&self, ino: InodeId, name: &[u8]) -> FsResult<Bytes> {
        if self.has_none(ino) && is_known(name) {
            let shown = String::from_utf8_lossy(name);
            return Err(FsError::new(Errno::ENODATA, format!("inode {ino} has no '{shown}'")));
        }
        let name = Bytes::copy_from_slice(name);
        match self.inner.meta.call(Op::GetXattr(GetXattr { ino: ino.0, name })).await? {
            response::Result::Xattr(reply) => Ok(reply.value),
            _ => Err(unexpected("a getxattr")),
        }
    }

    /// Sets an extended attribute.
    ///
    /// # Errors
    /// `EEXIST` and `ENODATA` as `mode` demands, `E2BIG` for a value over 64 KiB, `ENOSPC` when the inode has too many.
    pub async fn set_xattr(
        &self,
        ino: InodeId,
        name: &[u8],
        value: Bytes,
        mode: SetXattrMode,
    ) -> FsResult<Attr> {
        let flags = match mode {
            SetXattrMode::Any => 0,
            SetXattrMode::Create => 1,
            SetXattrMode::Replace => 2,
        };
        self.submit_set(SetXattr {
            ino: ino.0,
            name: Bytes::copy_from_slice(name),
            value,
            flags,
            clear_sgid: false,
        })
        .await
    }

    /// Sets the access control list (`system.posix_acl_access`), for somebody who may not give the group's rights away:
    /// sgid is dropped.
    ///
    /// # Errors
    /// `EINVAL` when the value is not a list.
    pub async fn set_access_list(&self, ino: InodeId, value: Bytes) -> FsResult<Attr> {
        let name = Bytes::from_static(ACCESS_LIST);
        self.submit_set(SetXattr { ino: ino.0, name, value, flags: 0, clear_sgid: true }).await
    }

    async fn submit_set(&self, op: SetXattr) -> FsResult<Attr> {
        let attr = self.inner.entry(Op::SetXattr(op)).await?;
        Ok(self.inner.with_local(attr))
    }

    /// Whether a lease says that an inode has no extended attributes. Spares the round trips of a kernel that asks for
    /// capabilities before it lets anybody write, and for access lists before it lets anybody pass.
    fn has_none(&self, ino: InodeId) -> bool {
        self.inner.meta.leases().attr(ino).is_some_and(|attr| !attr.xattrs)
    }

    /// Names of all extended attributes of an inode.
    pub async fn list_xattrs(&self, ino: InodeId) -> FsResult<Vec<Bytes>> {
        if self.has_none(ino) {
            return Ok(Vec::new());
        }
        match self.inner.meta.call(Op::ListXattrs(ListXattrs { ino: ino.0 })).await? {
            response::Result::XattrNames(reply) => Ok(reply.names),
            _ => Err(unexpected("a listxattr")),
        }
    }

    /// Removes an extended attribute.
    ///
    /// # Errors
    /// `ENODATA` when the inode does not have it.
    pub async fn remove_xattr(&self, ino: InodeId, name: &[u8]) -> FsResult<Attr> {
        let op = RemoveXattr { ino: ino.0, name: Bytes::copy_from_slice(name) };
        let attr = self.inner.entry(Op::RemoveXattr(op)).await?;
        Ok(self.inner.with_local(attr))
    }
}
