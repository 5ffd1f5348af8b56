//! Extended attributes against their inodes.

use std::collections::HashMap;

use super::{Fix, Report, Source, each, tree::Seen};
use crate::{keys, store::StoreError};

pub(super) fn check(
    store: &Source<'_>,
    inodes: &HashMap<u64, Seen>,
    report: &mut Report,
) -> Result<(), StoreError> {
    let mut lists: HashMap<u64, u64> = HashMap::new();
    each(store, keys::XATTR, |key, _| match (keys::first_id(key), keys::split_xattr(key)) {
        (Some(ino), Some(name)) => *lists.entry(ino).or_default() += name.len() as u64 + 1,
        _ => report.problem(format!("extended attribute {} has a short key", key.escape_ascii())),
    })?;
    for ino in lists.keys().filter(|ino| !inodes.contains_key(ino)) {
        report.problem(format!("i{ino} has extended attributes and does not exist"));
    }
    for (ino, seen) in inodes {
        let list = lists.get(ino).copied().unwrap_or(0);
        if u64::from(seen.inode.xattr_list) != list {
            let by = list.wrapping_sub(seen.inode.xattr_list.into()) as i64;
            let what = format!(
                "i{ino} counts {} bytes of names of extended attributes and has {list}",
                seen.inode.xattr_list
            );
            report.fixable(Fix::XattrList { ino: *ino, by }, what);
        }
    }
    Ok(())
}
