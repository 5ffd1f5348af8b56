//! All records of a store in one file, and a store from such a file: online backup, restore, and the way from one engine to another.
//!
//! # Format
//! Little-endian throughout. Nothing in it depends on an engine; the records are described in `keys.rs` and `records.rs`.
//!
//! ```text
//! file:    | "fjordbak" | frame | frame | ... |
//! frame:   | kind u8 | number u32 | length u32 | CRC-32C u32 | `length` bytes |
//!
//! kind 1   JSON {"format": 1, "records": <version of the records>, "cluster_id": "...", "created": seconds since 1970}   first
//! kind 2   | key length u32 | key | value length u32 | value | ...   ascending keys, over all frames
//! kind 3   | records u64 |                                          last, and nothing behind it
//! ```
//!
//! Frames are numbered from 0, and the checksum is of kind, number, length and bytes: a frame that is damaged, lost, twice there or
//! in the wrong place is noticed, and so is an end that is missing. A restore reads the whole file before it writes anything.
//!
//! # What a restored store is
//! The metadata as it was at the backup, while the data servers have gone on since. So no id of before is used again: block, inode,
//! session, server, target and map numbers go on far behind those of the backup, and of an earlier restore of it. Blocks written since are
//! garbage (`fjord gc`), and files whose blocks have been deleted since cannot be read any more (`fjord fsck` names the blocks).
//!
//! Targets that were added since come with the numbers that they have, and are taken in (`membership/register.rs`). Shards may have moved
//! since from any target to any other: so each counts as one that has lost a place, until it says what it has (`healing.rs`, "Strays").

use std::{
    io::{self, BufReader, Read, Write},
    path::{Path, PathBuf},
    time::SystemTime,
};

use bytes::Bytes;
use fjordfs_proto::{
    crc32c::{crc32c, crc32c_append},
    pb,
};
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::{
    keys,
    label::{FORMAT_VERSION, Folder, FolderError},
    records::{Counters, TargetRecord},
    store::{
        Batch, Fence, FjallOptions, FjallStore, Late, MetaStore, Pair, Place, Reading, RemoteStore,
        StoreError,
        bulk::{self, Bulk},
        is_empty,
    },
    store_label::{self, Closed},
};

const MAGIC: &[u8; 8] = b"fjordbak";
const FORMAT: u32 = 1;
const HEAD: usize = 13;

const ABOUT: u8 = 1;
const RECORDS: u8 = 2;
const END: u8 = 3;

/// A frame is begun anew behind this many bytes.
const FRAME: usize = 1 << 20;
/// Larger ones are not written, and would be read into memory.
const FRAME_MAX: usize = 64 << 20;
/// Records read at a time.
const PAGE: usize = 4096;

/// More than could be given out between a backup and its restore.
const IDS_SKIPPED: u64 = 1 << 40;
const EPOCHS_SKIPPED: u64 = 1 << 32;
/// And for each second between them, so that a second restore of the same backup uses none that were given out since the first: more
/// than a cluster gives out in a second. A century of these is far below what a number holds.
const IDS_PER_SECOND: u64 = 1 << 24;
const EPOCHS_PER_SECOND: u64 = 1 << 16;
/// Servers and targets, whose numbers people read and type.
const TARGETS_SKIPPED: u64 = 1000;
const TARGETS_PER_SECOND: u64 = 1;
/// Starts of a metaserver, of which there may be 2 to the power of 24.
const STARTS_SKIPPED: u64 = 1000;
const SECONDS_PER_START: u64 = 300;

/// What a backup is of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct About {
    /// Version of this format.
    pub format: u32,
    /// Version of the records.
    pub records: u32,
    /// UUID of the cluster.
    pub cluster_id: String,
    /// Seconds since 1970.
    pub created: u64,
}

/// Why a backup cannot be made, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file is not what a backup wrote.
    #[error("backup {}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// The operating system said no.
    #[error("backup {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A newer release wrote it.
    #[error("backup {} is of a newer release: restore it with that one", .0.display())]
    Newer(PathBuf),
    /// There is metadata where it should go.
    #[error("{0} holds metadata already: a backup is restored into an empty place")]
    NotEmpty(String),
    /// There is what a restore has left where it should go.
    #[error(
        "a restore into {0} was interrupted, and what it has left there is of no use: give --force to begin it again"
    )]
    Interrupted(String),
    /// A metaserver runs.
    #[error("a metaserver runs on {0}: stop all of them first, and name an empty place")]
    Owned(String),
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The engine failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

// ---- making ----

/// Writes a backup of a snapshot, piece by piece, into `out`. Returns how many records it has.
///
/// # Errors
/// When the snapshot cannot be read, or `out` refuses a piece.
pub(crate) fn write<E: From<StoreError>>(
    snapshot: &dyn Reading,
    cluster_id: &str,
    created: u64,
    mut out: impl FnMut(Vec<u8>) -> Result<(), E>,
) -> Result<u64, E> {
    let about = About { format: FORMAT, records: FORMAT_VERSION, cluster_id: cluster_id.to_owned(), created };
    let mut number = 0;
    let mut frame = |kind: u8, bytes: &[u8]| {
        let framed = frame(kind, number, bytes);
        number += 1;
        framed
    };
    let mut first = MAGIC.to_vec();
    first.extend(frame(ABOUT, serde_json::json!(about).to_string().as_bytes()));
    out(first)?;
    let (mut start, mut pending, mut records) = (vec![1], Vec::new(), 0);
    loop {
        // Keys that begin with a zero byte are the engine's own.
        let page = snapshot.scan(&start..&[0xff; 1], PAGE)?;
        let full = page.len() == PAGE;
        for (key, value) in page {
            for part in [&key[..], &value[..]] {
                pending.extend((part.len() as u32).to_le_bytes());
                pending.extend(part);
            }
            records += 1u64;
            if pending.len() >= FRAME {
                out(frame(RECORDS, &pending))?;
                pending.clear();
            }
            start = key;
        }
        if !full {
            break;
        }
        start.push(0);
    }
    if !pending.is_empty() {
        out(frame(RECORDS, &pending))?;
    }
    out(frame(END, &records.to_le_bytes()))?;
    Ok(records)
}

fn frame(kind: u8, number: u32, bytes: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEAD + bytes.len());
    frame.push(kind);
    frame.extend(number.to_le_bytes());
    frame.extend((bytes.len() as u32).to_le_bytes());
    let crc = crc32c_append(crc32c(&frame), bytes);
    frame.extend(crc.to_le_bytes());
    frame.extend(bytes);
    frame
}

// ---- reading ----

/// Reads a whole backup, checks it, and hands its records out in order; what it is of, and how many records there were.
///
/// # Errors
/// When it is damaged, torn, or of a newer release; the file is named. What `each` says against a record.
fn read(
    file: &Path,
    source: &mut impl Read,
    mut each: impl FnMut(&About, Pair) -> Result<(), BackupError>,
) -> Result<(About, u64), BackupError> {
    let damaged = |what: String| BackupError::Damaged { file: file.to_owned(), what };
    let mut magic = [0; MAGIC.len()];
    fill(file, source, &mut magic, "it is too short to be one")?;
    if &magic != MAGIC {
        return Err(damaged("it is not a backup of metadata".into()));
    }
    let (mut about, mut last, mut records) = (None::<About>, Vec::new(), 0u64);
    for number in 0u32.. {
        let torn = format!("it ends in frame {number}, so it is not complete");
        let mut head = [0; HEAD];
        fill(file, source, &mut head, &torn)?;
        let length = u32_at(&head, 5).unwrap_or(u32::MAX) as usize;
        let bad = || damaged(format!("frame {number} is damaged"));
        if length > FRAME_MAX {
            return Err(bad());
        }
        let mut bytes = vec![0; length];
        fill(file, source, &mut bytes, &torn)?;
        let crc = crc32c_append(crc32c(&head[..9]), &bytes);
        if u32_at(&head, 9) != Some(crc) || u32_at(&head, 1) != Some(number) {
            return Err(bad());
        }
        match (head[0], &about) {
            (ABOUT, None) => {
                let found: About = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
                if found.format > FORMAT || found.records > FORMAT_VERSION {
                    return Err(BackupError::Newer(file.to_owned()));
                }
                about = Some(found);
            }
            (RECORDS, Some(about)) => {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (Some(key), Some(value)) = (part(&mut rest), part(&mut rest)) else {
                        return Err(bad());
                    };
                    if key <= last.as_slice() || key.first() == Some(&0) {
                        return Err(damaged(format!("the keys of frame {number} are out of order")));
                    }
                    last = key.to_vec();
                    records += 1;
                    each(about, (key.to_vec(), Bytes::copy_from_slice(value)))?;
                }
            }
            (END, Some(about)) => {
                if bytes != records.to_le_bytes() {
                    return Err(damaged(format!(
                        "it holds {records} records, which is not what was written"
                    )));
                }
                if source
                    .read(&mut [0])
                    .map_err(|source| BackupError::Io { file: file.to_owned(), source })?
                    > 0
                {
                    return Err(damaged("there is something behind its end".into()));
                }
                return Ok((about.clone(), records));
            }
            _ => return Err(bad()),
        }
    }
    Err(damaged("it has no end".into()))
}

fn fill(file: &Path, source: &mut impl Read, into: &mut [u8], torn: &str) -> Result<(), BackupError> {
    source.read_exact(into).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => BackupError::Damaged { file: file.to_owned(), what: torn.to_owned() },
        _ => BackupError::Io { file: file.to_owned(), source },
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32_at(rest, 0)? as usize;
    let part = rest.get(4..4usize.checked_add(length)?)?;
    *rest = rest.get(4 + length..)?;
    Some(part)
}

/// Reads a backup to its end and checks it; what it is of, and how many records it has.
///
/// # Errors
/// When it is damaged, torn, or of a newer release.
pub fn verify(file: &Path) -> Result<(About, u64), BackupError> {
    read(file, &mut open(file)?, |_, _| Ok(()))
}

fn open(file: &Path) -> Result<BufReader<std::fs::File>, BackupError> {
    let opened = std::fs::File::open(file);
    let opened = opened.map_err(|source| BackupError::Io { file: file.to_owned(), source })?;
    Ok(BufReader::with_capacity(1 << 20, opened))
}

// ---- restoring ----

/// Makes a store from a backup, in an empty folder or on an empty store; what it was of, and how many records it has. With `again` also
/// where a restore was interrupted.
///
/// # Errors
/// See [`BackupError`]. A backup that is not whole is refused before anything is written. When a restore is interrupted, no metaserver
/// opens what is there.
pub fn restore(
    file: &Path,
    data: &Path,
    store: Option<&Place>,
    again: bool,
) -> Result<(About, u64), BackupError> {
    let (about, _) = verify(file)?;
    match store {
        None => {
            let name = data.display().to_string();
            let mut folder = Folder::claim_unlabelled(data, &about.cluster_id).map_err(|e| match e {
                FolderError::Locked(_) => BackupError::NotEmpty(name.clone()),
                other => other.into(),
            })?;
            let store = FjallStore::open(&folder.store, FjallOptions::default()).map_err(|e| match e {
                // That it wants a backup is known, and there may still be something to be saved from it.
                StoreError::Damaged { .. } => BackupError::NotEmpty(name.clone()),
                other => other.into(),
            })?;
            let fence = close(&store, &name, again)?;
            folder.label()?;
            load(file, &store, fence)
        }
        Some(place) => {
            let store = RemoteStore::open(place, FjallOptions::default().cache_bytes)?;
            if !store.is_free()? {
                return Err(BackupError::Owned(place.to_string()));
            }
            let fence = close(&store, &place.to_string(), again)?;
            let loaded = load(file, &store, fence)?;
            store.release()?;
            Ok(loaded)
        }
    }
}

/// Takes a store that is empty, or that a restore has left, and sees to it that nobody opens it before everything is there.
fn close(store: &dyn MetaStore, name: &str, again: bool) -> Result<Fence, BackupError> {
    let was_interrupted = matches!(store_label::closed(store)?, Some(Closed::Restoring(_)));
    match (was_interrupted, again) {
        (true, true) => {}
        (true, false) => return Err(BackupError::Interrupted(name.to_owned())),
        (false, _) if is_empty(store)? => {}
        (false, _) => return Err(BackupError::NotEmpty(name.to_owned())),
    }
    let fence = store.take_over()?;
    let marker = (keys::CLOSED.to_vec(), Some(Closed::restoring().encode()));
    store.commit(Batch { writes: vec![marker] }, fence)?;
    bulk::settle(store)?;
    bulk::clear(store, fence)?;
    Ok(fence)
}

/// Loads a backup that has been verified into a store that has been closed, and opens that.
fn load(file: &Path, store: &dyn MetaStore, fence: Fence) -> Result<(About, u64), BackupError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut bulk = Bulk::new(store, fence);
    let mut source = open(file)?;
    let mut onwards = Onwards::default();
    let loaded = read(file, &mut source, |about, (key, value)| {
        let value = onwards.record(&key, value, now.saturating_sub(about.created));
        let value = value.map_err(|what| BackupError::Damaged { file: file.to_owned(), what })?;
        Ok(bulk.write(key, Some(value))?)
    })?;
    bulk.finish()?;
    store.commit(Batch { writes: vec![(keys::CLOSED.to_vec(), None)] }, fence)?;
    bulk::settle(store)?;
    Ok(loaded)
}

/// What restored records say otherwise than those of the backup.
#[derive(Default)]
struct Onwards {
    /// Of the map, which comes before the targets.
    epoch: u64,
}

impl Onwards {
    /// Numbers given out since the backup, which is so many seconds old, are not given out again; and any target may have, or lack, what
    /// has moved since.
    fn record(&mut self, key: &[u8], value: Bytes, age: u64) -> Result<Bytes, String> {
        let behind = |next: u64, skipped: u64, per_second: u64| {
            next.saturating_add(skipped).saturating_add(age.saturating_mul(per_second))
        };
        match key {
            [keys::COUNTERS] => {
                let mut counters = Counters::decode(value).map_err(|e| format!("its counters: {e}"))?;
                for next in [&mut counters.next_block, &mut counters.next_inode, &mut counters.next_session] {
                    *next = behind(*next, IDS_SKIPPED, IDS_PER_SECOND);
                }
                // Versions of bytes grow with it.
                counters.fence =
                    counters.fence.saturating_add(STARTS_SKIPPED).saturating_add(age / SECONDS_PER_START);
                for next in [&mut counters.next_server, &mut counters.next_target] {
                    *next = behind(*next, TARGETS_SKIPPED, TARGETS_PER_SECOND);
                }
                Ok(counters.encode_to_vec().into())
            }
            [keys::MAP] => {
                let mut map =
                    pb::common::ClusterMap::decode(value).map_err(|e| format!("its cluster map: {e}"))?;
                map.epoch = behind(map.epoch, EPOCHS_SKIPPED, EPOCHS_PER_SECOND);
                self.epoch = map.epoch;
                Ok(map.encode_to_vec().into())
            }
            [keys::TARGET, ..] => {
                let mut target = TargetRecord::decode(value).map_err(|e| format!("a target: {e}"))?;
                target.displaced = self.epoch;
                Ok(target.encode_to_vec().into())
            }
            _ => Ok(value),
        }
    }
}

/// Writes pieces of a backup into a file that appears under its name when it is whole and safe. One that is dropped before leaves nothing.
pub struct Writer {
    path: PathBuf,
    new: PathBuf,
    file: std::fs::File,
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After the end it has another name.
        match std::fs::remove_file(&self.new) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {}: {e}", self.new.display());
            }
            _ => {}
        }
    }
}

impl Writer {
    /// Begins beside `path`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn create(path: &Path) -> Result<Writer, BackupError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let new = path.with_file_name(name);
        let file = std::fs::File::create(&new);
        let file = file.map_err(|source| BackupError::Io { file: new.clone(), source })?;
        Ok(Writer { path: path.to_owned(), new, file })
    }

    /// The next piece.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), BackupError> {
        self.file.write_all(piece).map_err(|source| BackupError::Io { file: self.new.clone(), source })
    }

    /// Reads it back, and gives it its name.
    ///
    /// # Errors
    /// When it is not whole, or cannot be synced.
    pub fn finish(self) -> Result<(About, u64), BackupError> {
        let io = |source| BackupError::Io { file: self.path.clone(), source };
        self.file.sync_all().map_err(io)?;
        let about = verify(&self.new)?;
        std::fs::rename(&self.new, &self.path).map_err(io)?;
        let folder = self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        Ok(about)
    }
}

#[cfg(test)]
mod tests;
