//! Listing a directory.
//!
//! The kernel's offset of an entry is the server's cookie, valid without any state here. A handle keeps the page it
//! fetched last, because a reply to the kernel holds fewer entries than a page, and because the kernel asks again for entries
//! that did not fit in its own caller's buffer. "." and ".." are made up, with cookies 1 and 2, which the server
//! does not use.

use std::sync::atomic::{AtomicUsize, Ordering};

use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{DirEntry, FileKind};
use fjordfs_proto::{FsError, FsResult, InodeId};
use tokio::sync::Mutex;

use crate::abi;
use crate::ends::Told;
use crate::filesystem::{Filesystem, KnownEntry};
use crate::held::Held;
use crate::reply::{DirentBuffer, Reply, Validity, entry_out};
use crate::request::is_entry_name;

/// Entries fetched at a time: about as many as fill the 32 KiB that glibc reads at once, twice.
const PAGE_ENTRIES: u32 = 2048;

/// Entries of an open directory that bring the kernel an inode each: who looks at a listing's files asks for no more then. For what
/// is beyond, the kernel's memory, of a kilobyte each, is better spent on files that somebody looks at.
const BROUGHT_MAX: usize = 1 << 16;

const DOT: u64 = 1;
const DOT_DOT: u64 = 2;

/// An open directory.
#[derive(Debug)]
pub(crate) struct OpenDirectory {
    ino: InodeId,
    page: Mutex<Option<Page>>,
    brought: AtomicUsize,
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
        OpenDirectory { ino, page: Mutex::new(None), brought: AtomicUsize::new(0) }
    }

    pub(crate) fn ino(&self) -> InodeId {
        self.ino
    }

    /// Fills a reply with entries after `offset`. An empty reply is the end.
    pub(crate) async fn list<F: Filesystem>(
        &self,
        fs: &F,
        offset: u64,
        listing: &mut Listing<'_>,
    ) -> FsResult<()> {
        let mut kept = self.page.lock().await;
        if offset == 0 {
            // opendir or rewinddir: the caller expects the present state.
            *kept = None;
        }
        let mut cookie = if offset <= DOT_DOT { 0 } else { offset };
        let mut page = self.page_at(fs, kept.take(), cookie, listing.is_plus()).await?;
        if !self.list_dots(offset, page.parent, listing) {
            *kept = Some(page);
            return Ok(());
        }
        loop {
            let start = page.position(cookie).unwrap_or_default();
            page.next = start + listing.add(fs, self, &page.entries[start..]);
            let exhausted = page.next == page.entries.len();
            if !listing.is_empty() || (exhausted && page.end) {
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
            page = self.page_at(fs, None, cookie, listing.is_plus()).await?;
        }
    }

    /// "." and ".."; false when the buffer is full already.
    fn list_dots(&self, offset: u64, parent: InodeId, listing: &mut Listing<'_>) -> bool {
        let mut push = |cookie: u64, ino: InodeId, name: &[u8]| {
            offset >= cookie || listing.push(ino, cookie, FileKind::Directory, name, None)
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
        Ok(Page { after: cookie, entries: reply.entries, end: reply.end, parent, next: 0 })
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

/// What an answer to READDIRPLUS needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plus<'a> {
    pub(crate) held: &'a Held,
    pub(crate) handle: u64,
    /// What the user wants, at least.
    pub(crate) least: Validity,
}

/// An answer to READDIR, or to READDIRPLUS: then each entry is preceded by what a LOOKUP would bring, or by nothing.
pub(crate) struct Listing<'a> {
    buffer: DirentBuffer,
    plus: Option<Plus<'a>>,
    brings: Vec<Told>,
}

impl<'a> Listing<'a> {
    pub(crate) fn new(size_max: usize, plus: Option<Plus<'a>>) -> Listing<'a> {
        Listing { buffer: DirentBuffer::new(size_max), plus, brings: Vec::new() }
    }

    fn is_plus(&self) -> bool {
        self.plus.is_some()
    }

    fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// The answer, and the inodes that it brings, which are counted.
    pub(crate) fn into_reply(self) -> (Reply, Vec<Told>) {
        (self.buffer.into_reply(), self.brings)
    }

    /// Adds entries while they fit; answers with how many were dealt with.
    fn add<F: Filesystem>(&mut self, fs: &F, directory: &OpenDirectory, entries: &[DirEntry]) -> usize {
        let entries = &entries[..self.fitting(entries)];
        let brought = match self.plus {
            // What others change right now would have to be asked for again anyway, and listings with more than names are what recalls
            // can be held up by.
            Some(plus)
                if directory.brought.load(Ordering::Relaxed) < BROUGHT_MAX
                    && !plus.held.unsettled.is_contended(directory.ino) =>
            {
                directory.brought.fetch_add(entries.len(), Ordering::Relaxed);
                self.bring(fs, plus, directory.ino, entries)
            }
            _ => Vec::new(),
        };
        for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| is_possible(entry)) {
            let with = brought.get(index).and_then(Option::as_ref);
            let fits = self.push(InodeId(entry.ino), entry.cookie, entry.kind(), &entry.name, with);
            debug_assert!(fits, "it was measured");
        }
        entries.len()
    }

    /// How many of these entries there is room for.
    fn fitting(&self, entries: &[DirEntry]) -> usize {
        let mut room = self.buffer.room();
        let fits = |entry: &&DirEntry| {
            if !is_possible(entry) {
                // The kernel would reject the whole listing.
                tracing::error!(name = %crate::request::display(&entry.name), cookie = entry.cookie,
                    "left out a directory entry that cannot be");
                return true;
            }
            let size = DirentBuffer::size_of(&entry.name, self.is_plus());
            let fits = size <= room;
            room -= size.min(room);
            fits
        };
        entries.iter().take_while(fits).count()
    }

    /// What to say of entries beside their names. Everything is counted before the filesystem is asked, so that a recall that
    /// comes after its answer has to wait for ours.
    fn bring<F: Filesystem>(
        &mut self,
        fs: &F,
        plus: Plus<'_>,
        directory: InodeId,
        entries: &[DirEntry],
    ) -> Vec<Option<abi::EntryOut>> {
        plus.held.unsettled.list(directory, plus.handle);
        for entry in entries {
            plus.held.lookups.add(InodeId(entry.ino));
        }
        let mut known = fs.known_entries(directory, entries);
        known.resize(entries.len(), None);
        for name in plus.held.asked.names(directory) {
            // Linking it would wait for the answer to the LOOKUP.
            if let Some(index) = entries.iter().position(|entry| entry.name == name) {
                known[index] = None;
            }
        }
        if known.iter().all(Option::is_none) {
            plus.held.unsettled.settle_listing(directory, plus.handle);
        }
        let with = |(entry, known): (&DirEntry, Option<KnownEntry>)| match known {
            Some(KnownEntry { attr, name_left, attr_left })
                if attr.ino == entry.ino && is_possible(entry) =>
            {
                self.brings.push(Told { ino: InodeId(entry.ino), size: attr.size });
                let validity =
                    Validity { entry: name_left.max(plus.least.entry), attr: attr_left.max(plus.least.attr) };
                Some(entry_out(&attr, validity))
            }
            _ => {
                plus.held.lookups.subtract(InodeId(entry.ino), 1);
                None
            }
        };
        entries.iter().zip(known).map(with).collect()
    }

    fn push(
        &mut self,
        ino: InodeId,
        cookie: u64,
        kind: FileKind,
        name: &[u8],
        with: Option<&abi::EntryOut>,
    ) -> bool {
        // Without a node id the kernel takes the entry as a name only.
        let nothing = self.plus.map(|_| abi::EntryOut::default());
        self.buffer.push(ino, cookie, kind, name, with.or(nothing.as_ref()))
    }
}

/// What the kernel does not reject.
fn is_possible(entry: &DirEntry) -> bool {
    is_entry_name(&entry.name) && entry.cookie > DOT_DOT
}
