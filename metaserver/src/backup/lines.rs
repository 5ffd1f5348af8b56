//! The form of a dump: JSON Lines, UTF-8, one record a line. The README describes it for those who read or write it.
//!
//! ```text
//! {"format":"fjord-meta-dump","version":1,"records":2,"cluster_id":"...","created":1764565200,"counters":{...},"crc32c":"..."}
//! {"table":"inode","key":{"ino":"1"},"record":{"kind":"FILE_KIND_DIRECTORY","mode":493,...},"crc32c":"..."}
//! ...
//! {"end":{"lines":812,"sha256":"..."},"crc32c":"..."}
//! ```
//!
//! Lines are in the order of their keys in the store. `crc32c` is of what stands before it in its line, so a damaged line is told by its
//! number; whoever writes a dump with other tools may leave it out. The end has the number of lines before it and SHA-256 of all their
//! bytes, which nobody may leave out: it shows that none is missing.

use std::{
    borrow::Cow,
    io::{BufRead, Read},
    path::Path,
    sync::atomic::AtomicBool,
};

use fjordfs_proto::crc32c::crc32c;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::{About, BackupError, Form, READ, at, frames, goes_on, read as read_form, tables};
use crate::{label::FORMAT_VERSION, store::Pair};

const NAME: &str = "fjord-meta-dump";
const VERSION: u32 = 1;
/// How what this release writes begins.
const BEGIN: &[u8] = br#"{"format":"fjord-meta-dump","#;

/// Longer lines are not written, and would be read into memory.
const LINE_MAX: u64 = 256 << 20;

/// What stands before a line's checksum, and behind it.
const CRC: &[u8] = br#","crc32c":""#;
const CRC_END: &[u8] = br#""}"#;
const CRC_DIGITS: usize = 8;

/// The first line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header<'a> {
    format: Cow<'a, str>,
    version: u32,
    /// Version of the records.
    records: u32,
    cluster_id: Cow<'a, str>,
    created: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    counters: Option<serde_json::Value>,
}

/// Any other line.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow)]
    table: Option<Cow<'a, str>>,
    #[serde(borrow)]
    key: Option<&'a RawValue>,
    #[serde(borrow)]
    record: Option<&'a RawValue>,
    #[serde(borrow)]
    end: Option<End<'a>>,
}

/// The last line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End<'a> {
    lines: u64,
    sha256: Cow<'a, str>,
}

// ---- making ----

/// Lines under way, with their sum.
struct Lines<'a> {
    pending: Vec<u8>,
    sum: Sha256,
    count: u64,
    out: &'a mut dyn FnMut(&[u8]) -> Result<(), BackupError>,
}

impl Lines<'_> {
    /// Ends a line that was begun at `start` of what is pending, without its closing brace.
    fn end(&mut self, start: usize) -> Result<(), BackupError> {
        let crc = crc32c(&self.pending[start..]);
        self.pending.extend(CRC);
        self.pending.extend(format!("{crc:08x}").into_bytes());
        self.pending.extend(CRC_END);
        self.pending.push(b'\n');
        self.sum.update(&self.pending[start..]);
        self.count += 1;
        if self.pending.len() >= READ { self.flush() } else { Ok(()) }
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), BackupError> {
        let start = self.pending.len();
        self.pending.push(b'{');
        tables::to_json(key, value, &mut self.pending).expect("a record is JSON, and memory takes it");
        self.end(start)
    }

    /// A line that is `value`.
    fn value(&mut self, value: &impl Serialize) -> Result<(), BackupError> {
        let start = self.pending.len();
        let text = serde_json::to_string(value).expect("it is JSON, and memory takes it");
        self.pending.extend(text.strip_suffix('}').unwrap_or(&text).as_bytes());
        self.end(start)
    }

    fn flush(&mut self) -> Result<(), BackupError> {
        let written = (self.out)(&self.pending);
        self.pending.clear();
        written
    }
}

/// Writes the records of a backup, which `source` has and errors call `name`, as a dump into `out`, piece by piece; what it is of, and how many
/// records it has.
///
/// # Errors
/// When the backup is damaged, torn, or of a newer release, what `out` says against a piece, or when `stop` is set: then what was written
/// is not whole.
pub fn dump(
    source: impl Read,
    name: &Path,
    stop: &AtomicBool,
    mut out: impl FnMut(&[u8]) -> Result<(), BackupError>,
) -> Result<(About, u64), BackupError> {
    let mut lines = Lines { pending: Vec::new(), sum: Sha256::new(), count: 0, out: &mut out };
    let done = read_form(Form::Backup, name, source, |about, (key, value)| {
        goes_on(stop)?;
        if lines.count == 0 {
            lines.value(&header(about))?;
        }
        lines.record(&key, &value)
    })?;
    if lines.count == 0 {
        lines.value(&header(&done.0))?;
    }
    let sha256 = hex(&lines.sum.clone().finalize());
    lines.value(&serde_json::json!({"end": End { lines: lines.count, sha256: sha256.into() }}))?;
    lines.flush()?;
    Ok(done)
}

fn header(about: &About) -> Header<'_> {
    Header {
        format: NAME.into(),
        version: VERSION,
        records: about.records,
        cluster_id: about.cluster_id.as_str().into(),
        created: about.created,
        counters: about.counters.clone(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// ---- reading ----

/// A record as it comes back from a dump; `None`: not at all.
#[cfg(any(test, fuzzing))]
pub(crate) fn through_a_line(key: &[u8], value: &[u8]) -> Option<Pair> {
    let mut line = b"{".to_vec();
    tables::to_json(key, value, &mut line).ok()?;
    line.push(b'}');
    let line: Line<'_> = serde_json::from_slice(&line).ok()?;
    tables::from_json(&line.table?, line.key?, line.record?).ok()
}

/// See [`super::read`].
pub(super) fn read(
    file: &Path,
    source: &mut impl BufRead,
    mut each: impl FnMut(&About, Pair) -> Result<(), BackupError>,
) -> Result<(About, u64), BackupError> {
    let form = Form::Dump;
    let io = |source| BackupError::Io { form, file: file.to_owned(), source };
    let (mut line, mut sum, mut last) = (Vec::new(), Sha256::new(), Vec::new());
    let mut about = None::<About>;
    for number in 1u64.. {
        let damaged = |what: String| BackupError::Damaged {
            form,
            file: file.to_owned(),
            what: format!("line {number} {what}"),
        };
        line.clear();
        source.by_ref().take(LINE_MAX).read_until(b'\n', &mut line).map_err(io)?;
        let Some((b'\n', text)) = line.split_last() else {
            return Err(match (&about, line.len()) {
                (None, 0) => damaged("is missing: it is empty".into()),
                (None, _) => BackupError::Other { form, file: file.to_owned() },
                (Some(_), 0) => damaged("is missing: it ends before, so it is not complete".into()),
                (Some(_), _) => damaged("has no end: it is not complete".into()),
            });
        };
        let text = checked(text);
        let Some(about) = &about else {
            about = Some(first(text).map_err(|wrong| match wrong {
                // Whatever else a damaged first line says, it is one.
                Wrong::NoDump(what) if line.starts_with(BEGIN) => damaged(what),
                Wrong::NoDump(_) => BackupError::Other { form, file: file.to_owned() },
                Wrong::Newer => BackupError::Newer { form, file: file.to_owned() },
                Wrong::Header(what) => damaged(what),
            })?);
            sum.update(&line);
            continue;
        };
        let text = text.map_err(damaged)?;
        let found: Line<'_> = serde_json::from_slice(&text)
            .map_err(|e| damaged(format!("cannot be read: {}", tables::saying(&e))))?;
        match found {
            Line { table: Some(table), key: Some(key), record: Some(record), end: None } => {
                let pair = tables::from_json(&table, key, record);
                let pair = pair.map_err(|what| damaged(format!("cannot be read: {what}")))?;
                if pair.0 <= last || pair.0.first() == Some(&0) {
                    return Err(damaged(
                        "is out of order: its key does not follow that of the line before".into(),
                    ));
                }
                last.clone_from(&pair.0);
                each(about, pair).map_err(|e| at(|| format!("line {number}"), e))?;
            }
            Line { table: None, key: None, record: None, end: Some(end) } => {
                let before = number - 1;
                if end.lines != before {
                    return Err(damaged(format!(
                        "says that there are {} lines before it, and there are {before}",
                        end.lines
                    )));
                }
                if end.sha256 != hex(&sum.finalize()) {
                    return Err(damaged(
                        "has another SHA-256 than the lines before it: one was changed".into(),
                    ));
                }
                if source.read(&mut [0]).map_err(io)? > 0 {
                    return Err(damaged("is the end, and there is something behind it".into()));
                }
                return Ok((about.clone(), before - 1));
            }
            _ => return Err(damaged("has neither `table`, `key` and `record` nor `end`".into())),
        }
        sum.update(&line);
    }
    Err(BackupError::Other { form, file: file.to_owned() })
}

/// A line without its checksum, which is right if it is there.
fn checked(line: &[u8]) -> Result<Cow<'_, [u8]>, String> {
    let crc = line.strip_suffix(CRC_END).and_then(|line| line.split_last_chunk::<CRC_DIGITS>());
    let Some((text, crc)) = crc.and_then(|(line, crc)| Some((line.strip_suffix(CRC)?, crc))) else {
        return Ok(line.into());
    };
    if crc[..] != *format!("{:08x}", crc32c(text)).as_bytes() {
        return Err("is damaged: its checksum is of something else".into());
    }
    Ok([text, b"}"].concat().into())
}

/// What is wrong with the first line.
enum Wrong {
    NoDump(String),
    Newer,
    Header(String),
}

fn first(text: Result<Cow<'_, [u8]>, String>) -> Result<About, Wrong> {
    let unreadable = |e: serde_json::Error| format!("cannot be read: {}", tables::saying(&e));
    let text = text.map_err(Wrong::NoDump)?;
    // The version first: a newer header may have what this release does not know.
    let header: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Wrong::NoDump(unreadable(e)))?;
    if header.get("format").and_then(serde_json::Value::as_str) != Some(NAME) {
        return Err(Wrong::NoDump("does not say that this is a dump".into()));
    }
    let version = |name| header.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
    if version("version") > VERSION.into() || version("records") > FORMAT_VERSION.into() {
        return Err(Wrong::Newer);
    }
    let header = Header::deserialize(header).map_err(|e| Wrong::Header(unreadable(e)))?;
    Ok(About {
        format: frames::FORMAT,
        records: header.records,
        cluster_id: header.cluster_id.into_owned(),
        created: header.created,
        counters: header.counters,
    })
}

#[cfg(test)]
mod tests;
