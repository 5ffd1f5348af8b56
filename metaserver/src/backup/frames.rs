//! The form of a backup.
//!
//! Little-endian throughout.
//!
//! ```text
//! file:    | "fjordbak" | frame | frame | ... |
//! frame:   | kind u8 | number u32 | length u32 | CRC-32C u32 | `length` bytes |
//!
//! kind 1   JSON {"format": 1, "records": <version of the records>, "cluster_id": "...", "created": seconds since 1970,
//!                "counters": {...}}                                first
//! kind 2   | key length u32 | key | value length u32 | value | ...   ascending keys, over all frames
//! kind 3   | records u64 |                                          last, and nothing behind it
//! ```
//!
//! Frames are numbered from 0, and the checksum is of kind, number, length and bytes: a frame that is damaged, lost, twice there or
//! in the wrong place is noticed, and so is an end that is missing.

use std::{
    io::{self, Read},
    path::Path,
};

use bytes::Bytes;
use fjordfs_proto::crc32c::{crc32c, crc32c_append};

use super::{About, BackupError, Form, at, tables};
use crate::{
    keys,
    label::FORMAT_VERSION,
    store::{Pair, Reading, StoreError},
};

const MAGIC: &[u8; 8] = b"fjordbak";
pub(super) const FORMAT: u32 = 1;
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
    let counters = snapshot.get(&[keys::COUNTERS])?.and_then(|counters| tables::counters(&counters));
    let cluster_id = cluster_id.to_owned();
    let about = About { format: FORMAT, records: FORMAT_VERSION, cluster_id, created, counters };
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

/// Reads a whole backup, checks it, and hands its records out in order; what it is of, and how many records there were.
///
/// # Errors
/// When it is damaged, torn, or of a newer release; the file is named. What `each` says against a record.
pub(super) fn read(
    file: &Path,
    source: &mut impl Read,
    mut each: impl FnMut(&About, Pair) -> Result<(), BackupError>,
) -> Result<(About, u64), BackupError> {
    let damaged = |what: String| BackupError::Damaged { form: Form::Backup, file: file.to_owned(), what };
    let mut magic = [0; MAGIC.len()];
    fill(file, source, &mut magic, "it is too short to be one")?;
    if &magic != MAGIC {
        return Err(BackupError::Other { form: Form::Backup, file: file.to_owned() });
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
                    return Err(BackupError::Newer { form: Form::Backup, file: file.to_owned() });
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
                    each(about, (key.to_vec(), Bytes::copy_from_slice(value)))
                        .map_err(|e| at(|| format!("frame {number}"), e))?;
                }
            }
            (END, Some(about)) => {
                if bytes != records.to_le_bytes() {
                    return Err(damaged(format!(
                        "it holds {records} records, which is not what was written"
                    )));
                }
                if source.read(&mut [0]).map_err(|source| BackupError::Io {
                    form: Form::Backup,
                    file: file.to_owned(),
                    source,
                })? > 0
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
        io::ErrorKind::UnexpectedEof => {
            BackupError::Damaged { form: Form::Backup, file: file.to_owned(), what: torn.to_owned() }
        }
        _ => BackupError::Io { form: Form::Backup, file: file.to_owned(), source },
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
