//! The extended attributes of an inode as records.
//!
//! Invariant: `Inode::xattr_list` is the sum of the names' lengths plus one each, so an inode that has none costs no
//! scan, and a list always fits into the buffer that programs may give.

use bytes::Bytes;
use fjordfs_proto::{FsError, FsResult, InodeId, XATTR_LIST_MAX, error::Errno};

use crate::{
    keys,
    records::{self, Inode},
    store::Order,
    txn::Txn,
};

/// What a name takes in a list.
fn list_bytes(name: &[u8]) -> u32 {
    name.len() as u32 + 1
}

/// The value, if the inode has this attribute.
pub(crate) fn find(txn: &mut Txn, ino: InodeId, inode: &Inode, name: &[u8]) -> FsResult<Option<Bytes>> {
    if inode.xattr_list == 0 { Ok(None) } else { txn.get(&keys::xattr(ino, name)) }
}

/// Sets the value; the caller stores the inode.
///
/// # Errors
/// `ENOSPC` when the list of names would be too long.
pub(crate) fn put(txn: &mut Txn, ino: InodeId, inode: &mut Inode, name: &[u8], value: Bytes) -> FsResult<()> {
    if find(txn, ino, inode, name)?.is_none() {
        let list = inode.xattr_list + list_bytes(name);
        if list as usize > XATTR_LIST_MAX {
            return Err(FsError::new(
                Errno::ENOSPC,
                format!(
                    "the names of inode {ino}'s extended attributes would take more than {XATTR_LIST_MAX} bytes"
                ),
            ));
        }
        inode.xattr_list = list;
    }
    txn.put(keys::xattr(ino, name), value);
    Ok(())
}

/// Removes an attribute; says whether it was there. The caller stores the inode.
pub(crate) fn take(txn: &mut Txn, ino: InodeId, inode: &mut Inode, name: &[u8]) -> FsResult<bool> {
    if find(txn, ino, inode, name)?.is_none() {
        return Ok(false);
    }
    inode.xattr_list = inode.xattr_list.checked_sub(list_bytes(name)).ok_or_else(|| {
        records::damaged(&format!("inode {ino} has more extended attributes than it counts"))
    })?;
    txn.remove(keys::xattr(ino, name));
    Ok(true)
}

/// All names, sorted.
pub(crate) fn names(txn: &mut Txn, ino: InodeId, inode: &Inode) -> FsResult<Vec<Bytes>> {
    if inode.xattr_list == 0 {
        return Ok(Vec::new());
    }
    let rows = txn.scan(&keys::xattrs(ino), Order::Ascending, usize::MAX)?;
    let short = || records::damaged(&format!("an extended attribute of {ino} with a short key"));
    let name = |key: &[u8]| keys::split_xattr(key).map(Bytes::copy_from_slice).ok_or_else(short);
    rows.iter().map(|(key, _)| name(key)).collect()
}

/// The inode goes, and its attributes with it.
pub(crate) fn destroy(txn: &mut Txn, ino: InodeId, inode: &Inode) -> FsResult<()> {
    if inode.xattr_list > 0 {
        for (key, _) in txn.scan(&keys::xattrs(ino), Order::Ascending, usize::MAX)? {
            txn.remove(key);
        }
    }
    Ok(())
}
