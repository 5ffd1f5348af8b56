//! What the engine's journals hold, seen without it: before it is opened, since it keeps silent where it should not, and gives up where
//! it need not.
//!
//! ```text
//! folder:   0.jnl, 1.jnl, ...     the oldest are removed when their batches are in tables; batches go to the newest
//! journal:  | batch | batch | ... | zeros to the end of the file |
//! batch:    | 1 | items u32 | sequence u64 | item | ... | 3 | XXH3-64 of all items u64 | "FJL\3" |      little-endian
//! item:     | 2 | kind u8 | compression u8 | keyspace u64 | key length u16 | value length u32 | stored length u32 | key | value |
//!           | 4 | keyspace u64 |
//! ```
//!
//! | what is there | what the engine does | what is done here |
//! |---|---|---|
//! | an older journal that is damaged, or missing between others | goes on without the rest of it; the newest record is there, so nothing is noticed | refused |
//! | the newest ends in half a batch, and what follows are zeros | cuts it | cuts it |
//! | the same, with pages of it that reached the disk behind others that did not | refuses to open, though nothing of it was promised | cuts it |
//! | the newest holds fewer batches than were safe | cuts what it cannot read | refused, and left as it is |
//!
//! What is cut off is kept beside it (`N.torn`), for people.
//!
//! # Syncs that failed
//! When a sync fails, the kernel may keep pages that are not on the disk and take them for clean: they can be read, also by the next process,
//! and no later sync writes them. So what the newest journal holds is written once more, as it is, before anything is built on it.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{SeekFrom, seek},
    io::Errno,
};
use xxhash_rust::xxh3::xxh3_64;

use crate::{
    keys,
    store::{StoreError, StoreResult, synced::Synced},
};

const EXTENSION: &str = "jnl";
const START: u8 = 1;
const ITEM: u8 = 2;
const END: u8 = 3;
const CLEAR: u8 = 4;
const TRAILER: &[u8] = b"FJL\x03";
/// Written again at a time.
const PIECE: usize = 1 << 20;

/// What a journal holds.
#[derive(Default, PartialEq, Eq, Debug)]
struct Content {
    /// Where its last whole batch ends.
    whole: usize,
    /// There is something behind that.
    torn: bool,
    /// What the first and the last batch that count have counted.
    first: Option<u64>,
    count: Option<u64>,
}

/// The journals of a folder by number, ascending.
pub(super) fn list(folder: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let number = (path.extension().is_some_and(|e| e == EXTENSION))
            .then(|| path.file_stem()?.to_str()?.parse::<u64>().ok())
            .flatten();
        found.extend(number.map(|number| (number, path)));
    }
    found.sort_unstable();
    Ok(found)
}

/// Makes the journals of a folder fit to be opened.
///
/// # Errors
/// When they lack something that was safe, and it is not so that nobody knows what was; then nothing has been changed. When they cannot be
/// read or written.
pub(super) fn prepare(folder: &Path, synced: &Synced) -> StoreResult<()> {
    let io = |source| StoreError::Io { folder: folder.to_owned(), source };
    let safe = synced.count()?;
    let lacks = |what: String| match safe {
        Some(_) => Err(synced.lacks(&what)),
        None => {
            tracing::error!("{what}; it goes on with what is left");
            Ok(())
        }
    };
    let journals = list(folder).map_err(io)?;
    if let Some(pair) = journals.windows(2).find(|pair| pair[0].0 + 1 != pair[1].0) {
        lacks(format!("journal {} is missing", pair[0].0 + 1))?;
    }
    // The last with anything in it, and what that is.
    let mut last: Option<(&Path, Vec<u8>, Content)> = None;
    let mut empty: Option<&Path> = None;
    for (_, path) in &journals {
        let bytes = load(path).map_err(io)?;
        let content = read(&bytes);
        if content == Content::default() {
            empty = Some(path);
            continue;
        }
        // Only what was written last may be in halves: before it begins the next one, the engine syncs a journal, which is never empty.
        if let Some(path) = empty.take() {
            lacks(format!("{} is empty", path.display()))?;
        }
        let first = content.first;
        if let Some((path, _, content)) = last.replace((path, bytes, content)) {
            let goes_on = content.count.zip(first).is_none_or(|(count, first)| first == count + 1);
            if content.torn || !goes_on {
                lacks(format!("{} is damaged at byte {}", path.display(), content.whole))?;
            }
        }
    }
    let Some((path, bytes, content)) = last else { return Ok(()) };
    if let (Some(count), Some(safe)) = (content.count, safe)
        && count < safe
    {
        let (path, at) = (path.display(), content.whole);
        lacks(format!("{path} ends at byte {at} with {count} batches, and {safe} were safe"))?;
    }
    if content.torn {
        tracing::warn!("{} ends in half a batch, which nobody was promised: it is cut off", path.display());
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        fs::write(path.with_extension("torn"), &bytes[content.whole..end]).map_err(io)?;
    }
    renew(path, &bytes[..content.whole], content.torn).map_err(io)
}

/// The bytes of a journal up to its last hole: it is made longer than what it holds.
fn load(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len() as u64;
        let (start, end) = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => (start, seek(&file, SeekFrom::Hole(start))?),
            Err(Errno::NXIO) => return Ok(bytes),
            Err(e) => return Err(e.into()),
        };
        bytes.resize(end as usize, 0);
        file.read_exact_at(&mut bytes[start as usize..], start)?;
    }
}

/// Writes what a journal holds once more; with `cut` it ends there.
fn renew(path: &Path, content: &[u8], cut: bool) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    for (n, piece) in content.chunks(PIECE).enumerate() {
        file.write_all_at(piece, (n * PIECE) as u64)?;
    }
    if cut {
        file.set_len(content.len() as u64)?;
    }
    file.sync_all()
}

fn read(bytes: &[u8]) -> Content {
    let mut content = Content::default();
    while let Some((length, count)) = batch(&bytes[content.whole..]) {
        content.whole += length;
        content.first = content.first.or(count);
        content.count = count.or(content.count);
    }
    content.torn = bytes[content.whole..].iter().any(|byte| *byte != 0);
    content
}

/// Length of the batch that the bytes begin with, if it is whole, and what it has counted.
fn batch(bytes: &[u8]) -> Option<(usize, Option<u64>)> {
    let mut rest = Rest { bytes, at: 0 };
    if rest.u8()? != START {
        return None;
    }
    let (items, _sequence) = (rest.u32()?, rest.take(8)?);
    let (first, mut count) = (rest.at, None);
    for _ in 0..items {
        match rest.u8()? {
            ITEM => {
                let (_kind, compression, _keyspace) = (rest.u8()?, rest.u8()?, rest.take(8)?);
                let (key, _length, stored) = (rest.u16()?, rest.u32()?, rest.u32()?);
                let (key, value) = (rest.take(usize::from(key))?, rest.take(stored as usize)?);
                if key == keys::COMMITS && compression == 0 {
                    count = Some(u64::from_be_bytes(value.try_into().ok()?));
                }
            }
            CLEAR => drop(rest.take(8)?),
            _ => return None,
        }
    }
    let sum = xxh3_64(&bytes[first..rest.at]);
    let whole =
        rest.u8()? == END && rest.take(8)? == sum.to_le_bytes() && rest.take(TRAILER.len())? == TRAILER;
    whole.then_some((rest.at, count))
}

struct Rest<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        Some(self.take(1)?[0])
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
}

/// The journal that batches go to, held open.
///
/// A descriptor that was there before something was written tells of its failure once, whoever else has asked before: the engine syncs
/// its journals now and then as well, and keeps to itself what comes of it.
#[derive(Default)]
pub(super) struct Newest(Option<(PathBuf, File)>);

impl Newest {
    /// Syncs what was written last; false when there is no journal.
    pub(super) fn sync(&mut self, folder: &Path) -> io::Result<bool> {
        let newest = list(folder)?.pop().map(|(_, path)| path);
        if let Some((_, file)) = &self.0 {
            file.sync_data()?;
        }
        let Some(path) = newest else { return Ok(false) };
        if self.0.as_ref().is_none_or(|(held, _)| *held != path) {
            match File::open(&path) {
                Ok(file) => {
                    file.sync_data()?;
                    self.0 = Some((path, file));
                }
                // Its batches are in tables.
                Err(e) if e.kind() == io::ErrorKind::NotFound => self.0 = None,
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }
}
