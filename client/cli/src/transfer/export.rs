//! FjordFS → a local tree. The mirror image of [`super::import`]: the same order, the same rules for what is there
//! already, the same partial names.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs,
    ops::Range,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
};

use anyhow::{Context, ensure};
use fjordfs_client::{Client, File, InodeId};
use fjordfs_proto::pb::meta::{Attr, DirEntry, FileKind};
use futures_util::{StreamExt, stream};
use tokio::{sync::Semaphore, task::spawn_blocking};

use super::{
    attrs,
    ledger::Ledger,
    listing::Pages,
    local,
    sums::{self, Sum},
    workers::Workers,
    xattrs::{self, Xattrs},
};

/// Files up to this size are read in one piece, without asking for their extents.
const SMALL_MAX: u64 = 1 << 20;

/// Chunks of one file that are on their way at a time.
const CHUNKS_IN_FLIGHT: usize = 4;

/// What all parts of an export share.
pub(crate) struct Export {
    pub(crate) client: Client,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) jobs: usize,
    pub(crate) verify: bool,
    /// Bounds the memory of large files under way.
    pub(crate) large: Semaphore,
    /// First copies of files with several names.
    pub(crate) links: Mutex<HashMap<u64, PathBuf>>,
}

/// Something of the source and where it belongs.
struct Item {
    path: PathBuf,
    attr: Attr,
}

impl Export {
    /// Copies the contents of the directory `root` into the local folder `target`, which is there.
    pub(crate) async fn tree(self: &Arc<Self>, root: Attr, target: PathBuf) {
        let this = self.clone();
        let workers = Workers::start(self.jobs, move |item: Item| {
            let this = this.clone();
            async move { this.leaf(item).await }
        });
        let mut todo = vec![(InodeId(root.ino), target.clone())];
        let mut dirs = vec![(target, root)];
        let mut later: Vec<Item> = Vec::new();
        let mut seen = HashSet::new();
        while let Some((dir, folder)) = todo.pop() {
            let mut pages = Pages::new(self.client.clone(), dir);
            loop {
                let page = match pages.next().await {
                    Ok(Some(page)) => page,
                    Ok(None) => break,
                    Err(e) => {
                        self.ledger.fail(&folder, &e.into());
                        break;
                    }
                };
                for entry in page.into_iter().filter(|e| !local::is_partial(&e.name)) {
                    let Some(item) = self.noted(&folder, item_of(&folder, entry)) else { continue };
                    if item.attr.kind() == FileKind::Directory {
                        self.ledger.other();
                        let path = item.path.clone();
                        let made = spawn_blocking(move || local::make_dir(&path)).await;
                        if self.noted(&item.path, made.map_err(Into::into).and_then(|m| m)).is_some() {
                            todo.push((InodeId(item.attr.ino), item.path.clone()));
                            dirs.push((item.path, item.attr));
                        }
                        continue;
                    }
                    if item.attr.nlink > 1 && !seen.insert(item.attr.ino) {
                        later.push(item);
                        continue;
                    }
                    if item.attr.kind() == FileKind::Regular {
                        self.ledger.found.file();
                        self.ledger.found.bytes(item.attr.size);
                    }
                    workers.give(item).await;
                }
            }
        }
        self.ledger.walked.store(true, Relaxed);
        workers.finish().await;
        stream::iter(later).for_each_concurrent(self.jobs, |item| self.other_name(item)).await;
        // Children before their parents: setting the mode of a parent may lock its owner out.
        for (path, attr) in dirs.into_iter().rev() {
            let at = path.clone();
            let set = async {
                let wanted = xattrs::fetch(&self.client, &attr).await?;
                spawn_blocking(move || set_all(&at, &attr, &wanted)).await?
            };
            self.noted(&path, set.await);
        }
    }

    /// Copies one file (or link, or special file).
    pub(crate) async fn single(&self, attr: Attr, target: PathBuf) {
        if attr.kind() == FileKind::Regular {
            self.ledger.found.file();
            self.ledger.found.bytes(attr.size);
        }
        self.ledger.walked.store(true, Relaxed);
        self.leaf(Item { path: target, attr }).await;
    }

    fn noted<T>(&self, path: &Path, result: anyhow::Result<T>) -> Option<T> {
        result.map_err(|e| self.ledger.fail(path, &e)).ok()
    }

    /// Everything but directories and second names.
    async fn leaf(&self, item: Item) {
        let done = match item.attr.kind() {
            FileKind::Regular => self.file(&item).await,
            _ => self.special(&item).await,
        };
        if self.noted(&item.path, done).is_some() && item.attr.nlink > 1 {
            self.links.lock().unwrap_or_else(PoisonError::into_inner).insert(item.attr.ino, item.path);
        }
    }

    async fn file(&self, item: &Item) -> anyhow::Result<()> {
        let path = item.path.clone();
        let there = spawn_blocking(move || fs::symlink_metadata(&path).ok()).await?;
        if let Some(there) = there.filter(|there| attrs::same_content(there, &item.attr)) {
            let wanted = xattrs::fetch(&self.client, &item.attr).await?;
            let (path, attr) = (item.path.clone(), item.attr);
            spawn_blocking(move || match attrs::same_rights(&there, &attr) {
                true => xattrs::write(&path, &wanted),
                false => set_all(&path, &attr, &wanted),
            })
            .await??;
            if self.verify {
                let (attr, file) = self.client.open(InodeId(item.attr.ino)).await?;
                let sums = self.copy(&file, &attr, None).await?;
                self.check(item, sums).await?;
            }
            self.ledger.skipped.file();
            self.ledger.skipped.bytes(item.attr.size);
            return Ok(());
        }
        let (attr, file) = self.client.open(InodeId(item.attr.ino)).await?;
        let path = item.path.clone();
        let (target, partial) = spawn_blocking(move || local::create_partial(&path)).await??;
        let target = Arc::new(target);
        let finished = async {
            let sums = self.copy(&file, &attr, Some(target.clone())).await?;
            let now = self.client.getattr(InodeId(attr.ino)).await?;
            ensure!(
                now.data_version == attr.data_version,
                "it was written to while it was copied: run the export again"
            );
            let wanted = xattrs::fetch(&self.client, &now).await?;
            let (from, to) = (partial.clone(), item.path.clone());
            spawn_blocking(move || -> anyhow::Result<()> {
                target.set_len(now.size)?;
                set_all(&from, &now, &wanted)?;
                fs::rename(&from, &to)?;
                Ok(())
            })
            .await??;
            anyhow::Ok(sums)
        };
        match finished.await {
            Ok(sums) => {
                self.ledger.copied.file();
                if self.verify {
                    self.check(item, sums).await?;
                }
                Ok(())
            }
            Err(e) => {
                if let Err(left) = fs::remove_file(&partial) {
                    tracing::debug!("{} remains: {left}", partial.display());
                }
                Err(e)
            }
        }
    }

    /// Reads a file chunk by chunk, holes left out, writes it when there is a target; its sums when verifying.
    async fn copy(
        &self,
        file: &File,
        attr: &Attr,
        target: Option<Arc<fs::File>>,
    ) -> anyhow::Result<Vec<Sum>> {
        let _permit = if attr.size > SMALL_MAX { Some(self.large.acquire().await?) } else { None };
        let ranges = match attr.size {
            0 => Vec::new(),
            size if size <= SMALL_MAX => std::iter::once(0..size).collect(),
            size => data_ranges(self.client.extents(InodeId(attr.ino)).await?, size),
        };
        let mut chunks = stream::iter(sums::chunks(&ranges).collect::<Vec<_>>())
            .map(|range| async move {
                let length = (range.end - range.start) as usize;
                let parts = file.read_at(range.start, length).await?;
                let got: usize = parts.iter().map(bytes::Bytes::len).sum();
                ensure!(got == length, "it became shorter while it was copied: run the export again");
                anyhow::Ok((range, parts))
            })
            .buffered(CHUNKS_IN_FLIGHT);
        let mut sums = Vec::new();
        while let Some(chunk) = chunks.next().await {
            let (range, parts) = chunk?;
            if self.verify {
                sums.push(Sum::of(range.start, &parts));
            }
            if let Some(target) = target.clone() {
                let length = range.end - range.start;
                spawn_blocking(move || -> std::io::Result<()> {
                    let mut at = range.start;
                    for part in parts {
                        target.write_all_at(&part, at)?;
                        at += part.len() as u64;
                    }
                    Ok(())
                })
                .await??;
                self.ledger.copied.bytes(length);
            }
        }
        Ok(sums)
    }

    async fn check(&self, item: &Item, sums: Vec<Sum>) -> anyhow::Result<()> {
        let path = item.path.clone();
        let bytes = spawn_blocking(move || -> anyhow::Result<u64> {
            let file = local::open(&path).context("cannot read it back")?;
            let mut bytes = 0;
            for sum in sums {
                sum.check(&[local::read_range(&file, sum.range.clone()).context("cannot read it back")?])?;
                bytes += sum.range.end - sum.range.start;
            }
            Ok(bytes)
        })
        .await??;
        self.ledger.verified.file();
        self.ledger.verified.bytes(bytes);
        Ok(())
    }

    async fn special(&self, item: &Item) -> anyhow::Result<()> {
        self.ledger.other();
        let target = match item.attr.kind() {
            FileKind::Symlink => self.client.readlink(InodeId(item.attr.ino)).await?,
            _ => Vec::new(),
        };
        let (path, attr) = (item.path.clone(), item.attr);
        spawn_blocking(move || {
            let there = fs::symlink_metadata(&path).ok().filter(|m| {
                attrs::kind_of(m.file_type()) == attr.kind()
                    && attr.mtime.as_ref() == Some(&attrs::mtime_of(m))
            });
            let same = there.is_some_and(|there| match attr.kind() {
                FileKind::Symlink => fs::read_link(&path).is_ok_and(|t| t.as_os_str().as_bytes() == target),
                _ => {
                    attrs::encode_device(std::os::unix::fs::MetadataExt::rdev(&there)) == attr.rdev
                        && attrs::same_rights(&there, &attr)
                }
            });
            if same { Ok(()) } else { local::make_special(&path, &attr, &target) }
        })
        .await?
    }

    /// A further name of a file that was copied under its first.
    async fn other_name(&self, item: Item) {
        let first = self.links.lock().unwrap_or_else(PoisonError::into_inner).get(&item.attr.ino).cloned();
        let path = item.path.clone();
        let linked = async {
            let first = first.context("its first name could not be copied")?;
            spawn_blocking(move || local::link(&first, &path)).await?
        };
        let result = linked.await;
        self.noted(&item.path, result);
        self.ledger.other();
    }
}

/// Extended attributes first: a mode may forbid to set them.
fn set_all(path: &Path, attr: &Attr, wanted: &Xattrs) -> anyhow::Result<()> {
    xattrs::write(path, wanted)?;
    local::set_attributes(path, attr)
}

/// The item of an entry. A name that would lead out of the folder does not come from a sound filesystem.
fn item_of(folder: &Path, entry: DirEntry) -> anyhow::Result<Item> {
    let name = &entry.name[..];
    let sound =
        !name.is_empty() && name != b"." && name != b".." && !name.iter().any(|b| matches!(b, b'/' | 0));
    ensure!(sound, "its listing has the impossible name '{}'", String::from_utf8_lossy(name));
    let path = folder.join(OsStr::from_bytes(name));
    let attr = entry.attr.with_context(|| format!("no attributes of {}", path.display()))?;
    Ok(Item { path, attr })
}

/// The ranges of a file that have extents, neighbours joined, cut at its size.
fn data_ranges(extents: Vec<(u64, fjordfs_proto::Extent)>, size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (offset, extent) in extents {
        let (start, end) = (offset.min(size), offset.saturating_add(extent.length).min(size));
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ if start < end => ranges.push(start..end),
            _ => {}
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use fjordfs_proto::Extent;

    #[test]
    fn neighbouring_extents_are_one_range() {
        let extent = |offset, length: usize| (offset, Extent::inline(Bytes::from(vec![0; length])));
        let ranges = data_ranges(vec![extent(0, 10), extent(10, 10), extent(30, 10), extent(50, 10)], 35);
        assert_eq!(ranges, [0..20, 30..35]);
    }

    #[test]
    fn impossible_names_do_not_leave_the_folder() {
        let entry = |name: &'static [u8]| DirEntry {
            name: Bytes::from_static(name),
            attr: Some(Attr::default()),
            ..DirEntry::default()
        };
        for bad in [&b".."[..], b".", b"", b"a/b", b"/etc/passwd", b"a\0b"] {
            assert!(item_of(Path::new("/t"), entry(bad)).is_err());
        }
        assert_eq!(item_of(Path::new("/t"), entry(b"ok")).unwrap().path, Path::new("/t/ok"));
    }
}
