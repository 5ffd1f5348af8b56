//! Listing a directory.
//!
//! The kernel's offset of an entry is the server's cookie, valid without any state here. A handle keeps the page it
//! fetched last, because a reply to the kernel holds fewer entries than a page, and because the kernel asks again for entries
//! that did not fit in its own caller's buffer. "." and ".." are made up, with cookies 1 and 2, which the server
//! does not use.

use std::time::Instant;

use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{DirEntry, FileKind};
use fjordfs_proto::{FsError, FsResult, InodeId};
use tokio::sync::Mutex;

use crate::abi;
use crate::filesystem::Filesystem;
use crate::reply::{DirentBuffer, Validity, entry_out};
use crate::request::is_entry_name;

/// Entries fetched at a time: about as many as fill the 32 KiB that glibc reads at once, twice.
const PAGE_ENTRIES: u32 = 2048;

const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// An open directory.
#[derive(Debug)]
pub(crate) struct OpenDirectory {
    ino: InodeId,
    page: Mutex<Option<Page>>,
}

/// Entries as the server sent them.
#[derive(Debug)]
struct Page {
    /// Cookie that the page follows.
    after: u64,
    entries: Vec<DirEntry>,
    /// No entries follow the page.
    end: bool,
    parent: InodeId,
    fetched: Instant,
    /// Index of the entry that the last reply ended before.
    next: usize,
}

impl Page {
    /// Index of the first entry after `cookie`, if the page reaches there. An index behind the last entry is one too.
    fn position(&self, cookie: u64) -> Option<usize> {
        let ends_before = |index: usize| match index.checked_sub(1) {
            None => self.after == cookie,
            Some(previous) => self.entries.get(previous).is_some_and(|entry| entry.cookie == cookie),
        };
        if ends_before(self.next) {
            return Some(self.next);
        }
        (0..=self.entries.len()).find(|&index| ends_before(index))
    }
}

impl OpenDirectory {
    pub(crate) fn new(ino: InodeId) -> OpenDirectory {
        OpenDirectory { ino, page: Mutex::new(None) }
    }

    /// Fills a reply with entries after `offset`. An empty reply is the end. With `plus`, entries come with attributes.
    pub(crate) async fn list<F: Filesystem>(
        &self,
        fs: &F,
        offset: u64,
        buffer: &mut DirentBuffer,
        plus: Option<Validity>,
    ) -> FsResult<()> {
        let mut kept = self.page.lock().await;
        if offset == 0 {
            // opendir or rewinddir: the caller expects the present state.
            *kept = None;
        }
        let mut cookie = if offset <= DOT_DOT { 0 } else { offset };
        let mut page = self.page_at(fs, kept.take(), cookie, plus.is_some()).await?;
        if !self.list_dots(offset, page.parent, buffer, plus) {
            *kept = Some(page);
            return Ok(());
        }
        loop {
            let start = page.position(cookie).unwrap_or_default();
            let attributes = plus.filter(|validity| page.fetched.elapsed() <= validity.attr);
            page.next = start + fill(&page.entries[start..], buffer, plus, attributes);
            let exhausted = page.next == page.entries.len();
            if !buffer.is_empty() || (exhausted && page.end) {
                *kept = Some(page);
                return Ok(());
            }
            if !exhausted {
                *kept = Some(page);
                return Err(FsError::new(
                    Errno::EINVAL,
                    "the buffer of a directory read is too small for one entry",
                ));
            }
            cookie = match page.entries.last() {
                Some(entry) if entry.cookie != cookie => entry.cookie,
                _ => return Err(self.stuck(cookie)),
            };
            page = self.page_at(fs, None, cookie, plus.is_some()).await?;
        }
    }

    /// "." and ".."; false when the buffer is full already.
    fn list_dots(
        &self,
        offset: u64,
        parent: InodeId,
        buffer: &mut DirentBuffer,
        plus: Option<Validity>,
    ) -> bool {
        // Without a node id the kernel takes the entry as a name only.
        let nothing = plus.map(|_| abi::EntryOut::default());
        let mut push = |cookie: u64, ino: InodeId, name: &[u8]| {
            offset >= cookie || buffer.push(ino, cookie, FileKind::Directory, name, nothing.as_ref())
        };
        push(DOT, self.ino, b".") && push(DOT_DOT, parent, b"..")
    }

    async fn page_at<F: Filesystem>(
        &self,
        fs: &F,
        kept: Option<Page>,
        cookie: u64,
        attributes: bool,
    ) -> FsResult<Page> {
        if let Some(page) = kept
            && let Some(position) = page.position(cookie)
            && (position < page.entries.len() || page.end)
        {
            return Ok(page);
        }
        let reply = fs.read_dir(self.ino, cookie, PAGE_ENTRIES, attributes).await?;
        if reply.entries.is_empty() && !reply.end {
            return Err(self.stuck(cookie));
        }
        let parent = if reply.parent == 0 { self.ino } else { InodeId(reply.parent) };
        Ok(Page {
            after: cookie,
            entries: reply.entries,
            end: reply.end,
            parent,
            fetched: Instant::now(),
            next: 0,
        })
    }

    fn stuck(&self, cookie: u64) -> FsError {
        FsError::new(
            Errno::EIO,
            format!(
                "directory {}: the metadata server's listing does not get past cookie {cookie}; this is a bug, report it",
                self.ino
            ),
        )
    }
}

/// Adds entries while they fit; answers with how many were dealt with.
fn fill(
    entries: &[DirEntry],
    buffer: &mut DirentBuffer,
    plus: Option<Validity>,
    attributes: Option<Validity>,
) -> usize {
    for (index, entry) in entries.iter().enumerate() {
        if !is_entry_name(&entry.name) || entry.cookie <= DOT_DOT {
            // The kernel would reject the whole listing.
            tracing::error!(name = %crate::request::display(&entry.name), cookie = entry.cookie,
                "left out a directory entry that cannot be");
            continue;
        }
        let with = plus.map(|_| match (&entry.attr, attributes) {
            (Some(attr), Some(validity)) => entry_out(attr, validity),
            _ => abi::EntryOut::default(),
        });
        if !buffer.push(InodeId(entry.ino), entry.cookie, entry.kind(), &entry.name, with.as_ref()) {
            return index;
        }
    }
    entries.len()
}
