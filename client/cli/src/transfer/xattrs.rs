//! Extended attributes on both ends, those of the namespace `user`: the others belong to the system that they are on.

use std::{collections::BTreeMap, ffi::OsStr, os::unix::ffi::OsStrExt, path::Path};

use anyhow::Context;
use bytes::Bytes;
use fjordfs_client::{Client, InodeId, SetXattrMode};
use fjordfs_proto::{FsResult, XATTR_LIST_MAX, XATTR_VALUE_MAX, pb::meta::Attr};
use rustix::{
    fs::{XattrFlags, lgetxattr, llistxattr, lremovexattr, lsetxattr},
    io::Errno,
};

const NAMESPACE: &[u8] = b"user.";

/// Values by name.
pub(crate) type Xattrs = BTreeMap<Vec<u8>, Bytes>;

/// Those of a local file or folder; none where the filesystem has none. Blocks.
pub(crate) fn read(path: &Path) -> anyhow::Result<Xattrs> {
    let mut found = Xattrs::new();
    let mut value = Vec::new();
    for name in local_names(path)? {
        value.resize(XATTR_VALUE_MAX, 0);
        let length = match lgetxattr(path, OsStr::from_bytes(&name), &mut value[..]) {
            Ok(length) => length,
            // Removed meanwhile.
            Err(Errno::NODATA) => continue,
            Err(e) => return Err(e).with_context(|| format!("cannot read its attribute {}", shown(&name))),
        };
        found.insert(name, Bytes::copy_from_slice(&value[..length]));
    }
    Ok(found)
}

/// Makes these the attributes of a local file or folder. Blocks.
pub(crate) fn write(path: &Path, wanted: &Xattrs) -> anyhow::Result<()> {
    for (name, value) in wanted {
        lsetxattr(path, OsStr::from_bytes(name), value, XattrFlags::empty())
            .with_context(|| format!("cannot set its attribute {}", shown(name)))?;
    }
    for name in local_names(path)?.into_iter().filter(|name| !wanted.contains_key(name)) {
        lremovexattr(path, OsStr::from_bytes(&name))
            .with_context(|| format!("cannot remove its attribute {}", shown(&name)))?;
    }
    Ok(())
}

fn local_names(path: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let mut list = vec![0; XATTR_LIST_MAX];
    let length = match llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => 0,
        Err(e) => return Err(e).context("cannot list its attributes"),
    };
    let names = list[..length].split(|byte| *byte == 0).filter(|name| name.starts_with(NAMESPACE));
    Ok(names.map(<[u8]>::to_vec).collect())
}

/// Those of an inode.
pub(crate) async fn fetch(client: &Client, attr: &Attr) -> FsResult<Xattrs> {
    let ino = InodeId(attr.ino);
    let mut found = Xattrs::new();
    for name in names(client, attr).await? {
        found.insert(name.to_vec(), client.get_xattr(ino, &name).await?);
    }
    Ok(found)
}

/// Makes these the attributes of an inode.
pub(crate) async fn store(client: &Client, attr: &Attr, wanted: Xattrs) -> FsResult<()> {
    let ino = InodeId(attr.ino);
    for name in names(client, attr).await?.into_iter().filter(|name| !wanted.contains_key(&name[..])) {
        client.remove_xattr(ino, &name).await?;
    }
    for (name, value) in wanted {
        client.set_xattr(ino, &name, value, SetXattrMode::Any).await?;
    }
    Ok(())
}

/// Costs nothing where there are none.
async fn names(client: &Client, attr: &Attr) -> FsResult<Vec<Bytes>> {
    if !attr.xattrs {
        return Ok(Vec::new());
    }
    let mut names = client.list_xattrs(InodeId(attr.ino)).await?;
    names.retain(|name| name.starts_with(NAMESPACE));
    Ok(names)
}

fn shown(name: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        // Not below /tmp, which may be of a kind without user attributes.
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let of = |pairs: &[(&str, &str)]| -> Xattrs {
            pairs.iter().map(|(k, v)| (k.as_bytes().to_vec(), Bytes::copy_from_slice(v.as_bytes()))).collect()
        };
        let first = of(&[("user.a", "1"), ("user.b", "")]);
        write(folder.path(), &first).unwrap();
        assert_eq!(read(folder.path()).unwrap(), first);
        let second = of(&[("user.b", "2")]);
        write(folder.path(), &second).unwrap();
        assert_eq!(read(folder.path()).unwrap(), second);
        assert!(read(Path::new("/proc/self/status")).unwrap().is_empty());
    }
}
