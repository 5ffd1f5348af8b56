//! A directory of FjordFS as it was when a transfer came to it.

use std::collections::HashMap;

use fjordfs_client::{Client, InodeId};
use fjordfs_proto::{
    FsResult,
    error::Errno,
    pb::meta::{Attr, DirEntry},
};

/// Entries asked for at a time.
const PAGE: u32 = 1024;

/// A listing with more entries than this is not kept; names are looked up one by one.
const ENTRIES_MAX: usize = 1 << 20;

/// What exists in the directory.
#[derive(Debug)]
pub(crate) enum Listing {
    /// All of it. Empty for a directory just made, which is what saves a lookup per file.
    Known(HashMap<Vec<u8>, Attr>),
    /// Too much to keep.
    Ask,
}

impl Listing {
    pub(crate) fn empty() -> Listing {
        Listing::Known(HashMap::new())
    }

    pub(crate) async fn read(client: &Client, dir: InodeId) -> FsResult<Listing> {
        let mut known = HashMap::new();
        let mut pages = Pages::new(client.clone(), dir);
        while let Some(page) = pages.next().await? {
            if known.len() + page.len() > ENTRIES_MAX {
                return Ok(Listing::Ask);
            }
            known.extend(page.into_iter().filter_map(|e| Some((e.name.to_vec(), e.attr?))));
        }
        Ok(Listing::Known(known))
    }

    /// What has this name; taken out, since a tree has each name once.
    pub(crate) async fn take(
        &mut self,
        client: &Client,
        dir: InodeId,
        name: &[u8],
    ) -> FsResult<Option<Attr>> {
        match self {
            Listing::Known(known) => Ok(known.remove(name)),
            Listing::Ask => match client.lookup(dir, name).await {
                Ok(attr) => Ok(Some(attr)),
                Err(e) if e.errno == Errno::ENOENT => Ok(None),
                Err(e) => Err(e),
            },
        }
    }
}

/// The entries of a directory, page by page, with attributes.
pub(crate) struct Pages {
    client: Client,
    dir: InodeId,
    cookie: u64,
    end: bool,
}

impl Pages {
    pub(crate) fn new(client: Client, dir: InodeId) -> Pages {
        Pages { client, dir, cookie: 0, end: false }
    }

    /// The next entries, or `None` after the last.
    pub(crate) async fn next(&mut self) -> FsResult<Option<Vec<DirEntry>>> {
        if self.end {
            return Ok(None);
        }
        let page = self.client.readdir(self.dir, self.cookie, PAGE, true).await?;
        self.cookie = page.entries.last().map_or(self.cookie, |e| e.cookie);
        // A page without entries that claims not to be the last would be asked for for ever.
        self.end = page.end || page.entries.is_empty();
        Ok(Some(page.entries))
    }
}
