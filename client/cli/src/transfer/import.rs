//! A local tree → FjordFS.
//!
//! One thread walks the source. The planner takes what it finds in that order, makes directories, decides what is
//! there already, and hands the rest to workers. When they are done come hard links, then the attributes of
//! directories, deepest first, since every entry made in one changes its times.
//!
//! # Crash consistency
//! A file appears under its name when it is complete: a larger one, and one that replaces another, is written under
//! a partial name and renamed; a small new one becomes visible in one commit. Its times are set last, so that a later
//! run takes whatever an interrupted one left half done for a different file, and copies it again.

use std::{
    collections::HashMap,
    fs::Metadata,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
};

use anyhow::{Context, bail, ensure};
use fjordfs_client::{AttrChange, Client, InodeId, NewFile, NewNode, ROOT_INODE};
use fjordfs_proto::pb::meta::{Attr, FileKind};
use futures_util::{StreamExt, stream};
use tokio::sync::{Semaphore, mpsc};

use super::{
    attrs,
    ledger::Ledger,
    listing::Listing,
    local,
    sums::{self, Sum},
    workers::Workers,
    xattrs,
};

/// Files up to this size are read whole and written in one commit.
const SMALL_MAX: u64 = 1 << 20;

/// Chunks read ahead of the writer.
const READ_AHEAD: usize = 2;

/// What all parts of an import share.
pub(crate) struct Import {
    pub(crate) client: Client,
    /// A second client, which has nothing cached, reads back.
    pub(crate) verifier: Option<Client>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) jobs: usize,
    /// Bounds the memory of large files under way.
    pub(crate) large: Semaphore,
    /// First copies of files with several names.
    pub(crate) links: Mutex<HashMap<(u64, u64), InodeId>>,
}

/// Where something of the source belongs.
struct Item {
    path: PathBuf,
    local: Metadata,
    parent: InodeId,
    name: Vec<u8>,
    existing: Option<Attr>,
}

impl Item {
    fn link_key(&self) -> Option<(u64, u64)> {
        (self.local.nlink() > 1 && !self.local.is_dir()).then(|| (self.local.dev(), self.local.ino()))
    }
}

/// A directory of the walk that is open. `None` inside when it could not be made: what is below is left out.
type Level = Option<(InodeId, Listing)>;

impl Import {
    /// Copies the contents of `source` into the directory `root`.
    pub(crate) async fn tree(self: &Arc<Self>, source: &Path, root: InodeId) {
        let mut found = walk(source.to_owned());
        let this = self.clone();
        let workers = Workers::start(self.jobs, move |item: Item| {
            let this = this.clone();
            async move { this.leaf(item).await }
        });
        let mut levels: Vec<Level> = Vec::new();
        let mut dirs: Vec<(InodeId, PathBuf, Metadata)> = Vec::new();
        let mut later: Vec<Item> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(entry) = found.recv().await {
            let Found { depth, path, local } = match entry {
                Ok(found) => found,
                Err((path, e)) => {
                    self.ledger.fail(&path, &e);
                    continue;
                }
            };
            levels.truncate(depth);
            if depth == 0 {
                let level = Listing::read(&self.client, root).await;
                levels.push(self.noted(&path, level.map(|l| (root, l)).map_err(Into::into)));
                // The root of the filesystem belongs to all: its owner and mode are not a source's to set.
                if root != ROOT_INODE {
                    dirs.push((root, path, local));
                }
                continue;
            }
            let Some(Some((parent, listing))) = levels.last_mut() else {
                if local.is_dir() {
                    levels.push(None);
                }
                continue;
            };
            let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
            if local::is_partial(&name) {
                continue;
            }
            let existing = listing.take(&self.client, *parent, &name).await;
            let Some(existing) = self.noted(&path, existing.map_err(Into::into)) else { continue };
            let item = Item { path, local, parent: *parent, name, existing };
            if item.local.is_dir() {
                let made = self.directory(&item).await;
                let level = self.noted(&item.path, made);
                if let Some((ino, _)) = &level {
                    dirs.push((*ino, item.path, item.local));
                }
                levels.push(level);
                continue;
            }
            if item.link_key().is_some_and(|key| !seen.insert(key)) {
                later.push(item);
                continue;
            }
            if item.local.is_file() {
                self.ledger.found.file();
                self.ledger.found.bytes(item.local.len());
            }
            workers.give(item).await;
        }
        self.ledger.walked.store(true, Relaxed);
        workers.finish().await;
        stream::iter(later).for_each_concurrent(self.jobs, |item| self.other_name(item)).await;
        // Deepest first: but a directory's times depend only on its own entries, which are all there by now.
        stream::iter(dirs.into_iter().rev())
            .for_each_concurrent(self.jobs, |(ino, path, local)| async move {
                let set = async {
                    let attr = self.client.setattr(ino, attrs::change_to(&local)).await?;
                    self.xattrs(&path, &attr).await
                };
                self.noted(&path, set.await);
            })
            .await;
    }

    /// Copies one file (or link, or special file) to `name` in `parent`.
    pub(crate) async fn single(&self, source: &Path, parent: InodeId, name: &[u8], existing: Option<Attr>) {
        let local = match std::fs::symlink_metadata(source) {
            Ok(local) => local,
            Err(e) => return self.ledger.fail(source, &e.into()),
        };
        if local.is_file() {
            self.ledger.found.file();
            self.ledger.found.bytes(local.len());
        }
        self.ledger.walked.store(true, Relaxed);
        self.leaf(Item { path: source.to_owned(), local, parent, name: name.to_vec(), existing }).await;
    }

    /// The value, or `None` with the error noted.
    fn noted<T>(&self, path: &Path, result: anyhow::Result<T>) -> Option<T> {
        result.map_err(|e| self.ledger.fail(path, &e)).ok()
    }

    async fn directory(&self, item: &Item) -> anyhow::Result<(InodeId, Listing)> {
        self.ledger.other();
        if let Some(existing) = &item.existing {
            ensure!(
                existing.kind() == FileKind::Directory,
                "a {} is in the way: remove it, or import to another place",
                attrs::kind_name(existing.kind())
            );
            let ino = InodeId(existing.ino);
            return Ok((ino, Listing::read(&self.client, ino).await?));
        }
        let made = self.client.make(item.parent, &item.name, self.node(item, Vec::new())).await?;
        Ok((InodeId(made.ino), Listing::empty()))
    }

    fn node(&self, item: &Item, target: Vec<u8>) -> NewNode {
        NewNode {
            kind: attrs::kind_of(item.local.file_type()),
            mode: attrs::mode_of(&item.local),
            umask: 0,
            uid: item.local.uid(),
            gid: item.local.gid(),
            rdev: attrs::encode_device(item.local.rdev()),
            target,
        }
    }

    /// Everything but directories and second names.
    async fn leaf(&self, item: Item) {
        let key = item.link_key();
        let done = if item.local.is_file() { self.file(&item).await } else { self.special(&item).await };
        if let Some(ino) = self.noted(&item.path, done)
            && let Some(key) = key
        {
            self.links.lock().unwrap_or_else(PoisonError::into_inner).insert(key, ino);
        }
    }

    async fn file(&self, item: &Item) -> anyhow::Result<InodeId> {
        if let Some(existing) = item.existing.as_ref().filter(|e| attrs::same_content(&item.local, e)) {
            return self.keep(item, existing).await;
        }
        refuse_directory(item)?;
        let small = item.local.len() <= SMALL_MAX;
        let partial = !small || item.existing.is_some();
        let name = if partial { local::partial_name(&item.name) } else { item.name.clone() };
        let new = NewFile {
            mode: attrs::mode_of(&item.local),
            umask: 0,
            uid: item.local.uid(),
            gid: item.local.gid(),
            exclusive: false,
        };
        let (attr, file) = self.client.create(item.parent, &name, new).await?;
        let ino = InodeId(attr.ino);
        if attr.size > 0 {
            // Left by an interrupted run.
            self.client.setattr(ino, AttrChange { size: Some(0), ..AttrChange::default() }).await?;
        }
        let copied =
            if small { self.copy_small(item, &file).await } else { self.copy_large(item, &file).await };
        let finished = async {
            let sums = copied?;
            file.close().await?;
            let end = sums.last().map_or(0, |sum| sum.range.end);
            // A hole at the end holds no bytes that would make the file this long.
            let size = (end < item.local.len()).then_some(item.local.len());
            let change = AttrChange { size, ..attrs::change_to(&item.local) };
            let attr = self.client.setattr(ino, change).await?;
            self.xattrs(&item.path, &attr).await?;
            if partial {
                self.client.rename(item.parent, &name, item.parent, &item.name, 0).await?;
            }
            anyhow::Ok(sums)
        };
        let sums = match finished.await {
            Ok(sums) => sums,
            Err(e) => {
                // A half-copied file is of no use. If the servers are out of reach, a later run clears it away.
                if let Err(left) = self.client.unlink(item.parent, &name).await {
                    tracing::debug!("the partial copy of {} remains: {left}", item.path.display());
                }
                return Err(e);
            }
        };
        self.ledger.copied.file();
        if let Some(verifier) = &self.verifier {
            self.verify(verifier, ino, item.local.len(), sums).await?;
        }
        Ok(ino)
    }

    /// What an earlier run has copied already.
    async fn keep(&self, item: &Item, existing: &Attr) -> anyhow::Result<InodeId> {
        let ino = InodeId(existing.ino);
        if !attrs::same_rights(&item.local, existing) {
            self.client.setattr(ino, attrs::change_to(&item.local)).await?;
        }
        self.xattrs(&item.path, existing).await?;
        if let Some(verifier) = &self.verifier {
            let path = item.path.clone();
            let size = item.local.len();
            let sums = tokio::task::spawn_blocking(move || -> anyhow::Result<Vec<Sum>> {
                let file = local::open(&path)?;
                let ranges = local::data_ranges(&file, size)?;
                sums::chunks(&ranges).map(|r| Ok(Sum::of(r.start, &[local::read_range(&file, r)?]))).collect()
            });
            self.verify(verifier, ino, size, sums.await??).await?;
        }
        self.ledger.skipped.file();
        self.ledger.skipped.bytes(item.local.len());
        Ok(ino)
    }

    async fn xattrs(&self, path: &Path, attr: &Attr) -> anyhow::Result<()> {
        let path = path.to_owned();
        let wanted = tokio::task::spawn_blocking(move || xattrs::read(&path)).await??;
        Ok(xattrs::store(&self.client, attr, wanted).await?)
    }

    /// Reads the file whole; its sums.
    async fn copy_small(&self, item: &Item, file: &fjordfs_client::File) -> anyhow::Result<Vec<Sum>> {
        let (path, before) = (item.path.clone(), item.local.clone());
        let verify = self.verifier.is_some();
        let (data, sum) = tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let file = local::open(&path)?;
            let data = local::read_range(&file, 0..before.len())?;
            unchanged(&before, &file)?;
            let sum = if verify { Sum::of(0, &[&data]) } else { Sum { range: 0..before.len(), hash: 0 } };
            Ok((data, sum))
        })
        .await??;
        if data.is_empty() {
            return Ok(Vec::new());
        }
        let length = data.len() as u64;
        file.write_at(0, data).await?;
        self.ledger.copied.bytes(length);
        Ok(vec![sum])
    }

    /// Streams the file chunk by chunk, holes left out; its sums.
    async fn copy_large(&self, item: &Item, file: &fjordfs_client::File) -> anyhow::Result<Vec<Sum>> {
        let _permit = self.large.acquire().await?;
        let (chunks, mut inbox) = mpsc::channel(READ_AHEAD);
        let (path, before) = (item.path.clone(), item.local.clone());
        let verify = self.verifier.is_some();
        let reader = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            let file = local::open(&path)?;
            let ranges = local::data_ranges(&file, before.len())?;
            for range in sums::chunks(&ranges) {
                let data = local::read_range(&file, range.clone())?;
                let sum = if verify { Sum::of(range.start, &[&data]) } else { Sum { range, hash: 0 } };
                if chunks.blocking_send((data, sum)).is_err() {
                    // The writer has failed and tells why.
                    return Ok(());
                }
            }
            unchanged(&before, &file)
        });
        let mut sums = Vec::new();
        while let Some((data, sum)) = inbox.recv().await {
            let length = data.len() as u64;
            file.write_at(sum.range.start, data).await?;
            self.ledger.copied.bytes(length);
            sums.push(sum);
        }
        reader.await??;
        Ok(sums)
    }

    async fn verify(&self, verifier: &Client, ino: InodeId, size: u64, sums: Vec<Sum>) -> anyhow::Result<()> {
        // By its number, the other client could not ask for what is known only here.
        self.client.publish().await?;
        let (attr, file) = verifier.open(ino).await.context("cannot read it back")?;
        ensure!(attr.size == size, "it has {} bytes instead of {size}", attr.size);
        for sum in sums {
            let length = (sum.range.end - sum.range.start) as usize;
            let back = file.read_at(sum.range.start, length).await.context("cannot read it back")?;
            sum.check(&back)?;
            self.ledger.verified.bytes(length as u64);
        }
        self.ledger.verified.file();
        Ok(())
    }

    /// Symbolic links, fifos, sockets, devices.
    async fn special(&self, item: &Item) -> anyhow::Result<InodeId> {
        let kind = attrs::kind_of(item.local.file_type());
        ensure!(kind != FileKind::Unspecified, "it is of a kind that cannot be copied");
        refuse_directory(item)?;
        let target = match kind {
            FileKind::Symlink => std::fs::read_link(&item.path)?.as_os_str().as_bytes().to_vec(),
            _ => Vec::new(),
        };
        self.ledger.other();
        if let Some(existing) = &item.existing
            && self.same_special(existing, kind, &target, item).await?
        {
            return Ok(InodeId(existing.ino));
        }
        let partial = local::partial_name(&item.name);
        let name = if item.existing.is_some() { &partial } else { &item.name };
        let made = match self.client.make(item.parent, name, self.node(item, target.clone())).await {
            // Left by an interrupted run.
            Err(e) if e.errno == fjordfs_client::Errno::EEXIST && item.existing.is_some() => {
                self.client.unlink(item.parent, name).await?;
                self.client.make(item.parent, name, self.node(item, target)).await?
            }
            made => made?,
        };
        let ino = InodeId(made.ino);
        self.client.setattr(ino, attrs::change_to(&item.local)).await?;
        if item.existing.is_some() {
            self.client.rename(item.parent, name, item.parent, &item.name, 0).await?;
        }
        Ok(ino)
    }

    async fn same_special(
        &self,
        existing: &Attr,
        kind: FileKind,
        target: &[u8],
        item: &Item,
    ) -> anyhow::Result<bool> {
        if existing.kind() != kind || existing.mtime.as_ref() != Some(&attrs::mtime_of(&item.local)) {
            return Ok(false);
        }
        Ok(match kind {
            FileKind::Symlink => self.client.readlink(InodeId(existing.ino)).await? == target,
            _ => {
                existing.rdev == attrs::encode_device(item.local.rdev())
                    && attrs::same_rights(&item.local, existing)
            }
        })
    }

    /// A further name of a file that was copied under its first.
    async fn other_name(&self, item: Item) {
        let first = item
            .link_key()
            .and_then(|key| self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied());
        let linked = async {
            let first = first.context("its first name could not be copied")?;
            match &item.existing {
                Some(existing) if existing.ino == first.0 => {}
                None => drop(self.client.link(first, item.parent, &item.name).await?),
                Some(_) => {
                    refuse_directory(&item)?;
                    let partial = local::partial_name(&item.name);
                    if let Err(e) = self.client.link(first, item.parent, &partial).await
                        && e.errno != fjordfs_client::Errno::EEXIST
                    {
                        return Err(e.into());
                    }
                    self.client.rename(item.parent, &partial, item.parent, &item.name, 0).await?;
                }
            }
            anyhow::Ok(())
        };
        let result = linked.await;
        self.noted(&item.path, result);
        self.ledger.other();
    }
}

fn refuse_directory(item: &Item) -> anyhow::Result<()> {
    if item.existing.as_ref().is_some_and(|e| e.kind() == FileKind::Directory) {
        bail!("a directory is in the way: remove it, or import to another place");
    }
    Ok(())
}

fn unchanged(before: &Metadata, file: &std::fs::File) -> anyhow::Result<()> {
    ensure!(
        !local::changed(before, &file.metadata()?),
        "it was written to while it was copied: run the import again"
    );
    Ok(())
}

/// Something the walk found.
struct Found {
    depth: usize,
    path: PathBuf,
    local: Metadata,
}

type Walked = Result<Found, (PathBuf, anyhow::Error)>;

/// Walks a tree on a thread of its own, directories before what is in them.
fn walk(source: PathBuf) -> mpsc::Receiver<Walked> {
    let (sender, receiver) = mpsc::channel(4096);
    tokio::task::spawn_blocking(move || {
        for entry in walkdir::WalkDir::new(&source).follow_links(false) {
            let found = entry.and_then(|entry| {
                let local = entry.metadata()?;
                Ok(Found { depth: entry.depth(), path: entry.into_path(), local })
            });
            let found = found.map_err(|e| {
                let path = e.path().unwrap_or(&source).to_owned();
                let error = e.into_io_error().map_or_else(|| anyhow::anyhow!("cannot be read"), Into::into);
                (path, error)
            });
            if sender.blocking_send(found).is_err() {
                return;
            }
        }
    });
    receiver
}
