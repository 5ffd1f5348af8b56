//! Which files blocks belong to, by name.

use std::collections::BTreeSet;

use fjordfs_proto::{
    FsResult, InodeId, ROOT_INODE,
    error::Errno,
    pb::meta::{FileKind, UsesRequest},
};

use super::{BLOCKS, Tell, admin};
use crate::Client;

/// Entries of a directory read at a time.
const PAGE: u32 = 4096;

/// Names of the files that have bytes in these blocks, one each.
///
/// Only directories know where they are, so the tree is walked until all are found: for what is rare, and worth the time.
///
/// # Errors
/// When the metaserver does not answer.
pub async fn files_of(client: &Client, blocks: &[u64], tell: Tell<'_>) -> FsResult<Vec<String>> {
    let mut wanted = BTreeSet::new();
    for some in blocks.chunks(BLOCKS) {
        let asked = UsesRequest { blocks: some.to_vec(), ..UsesRequest::default() };
        wanted.extend(admin::uses(client, asked).await?.uses.into_iter().map(|found| found.ino));
    }
    let mut files = Vec::new();
    let mut directories = vec![(ROOT_INODE, String::new())];
    while let Some((directory, path)) = directories.pop().filter(|_| !wanted.is_empty()) {
        tell(format!("looking for the names of {} files: {path}/", wanted.len()));
        let mut cookie = 0;
        loop {
            let page = match client.readdir(directory, cookie, PAGE, false).await {
                Ok(page) => page,
                // Removed meanwhile.
                Err(e) if matches!(e.errno, Errno::ENOENT | Errno::ESTALE) => break,
                Err(e) => return Err(e),
            };
            cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
            let done = page.end || page.entries.is_empty();
            for entry in page.entries {
                let below = || format!("{path}/{}", String::from_utf8_lossy(&entry.name));
                if entry.kind() == FileKind::Directory {
                    directories.push((InodeId(entry.ino), below()));
                } else if wanted.remove(&entry.ino) {
                    files.push(below());
                }
            }
            if done {
                break;
            }
        }
    }
    files.sort_unstable();
    files.extend(wanted.into_iter().map(|ino| format!("{} (open, without a name)", InodeId(ino))));
    Ok(files)
}
