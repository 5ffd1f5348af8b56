//! All records of a store in one file, and a store from such a file: online backup, restore, and the way from one engine to another.
//!
//! There are two forms of that file. Nothing in them depends on an engine; the records are described in `keys.rs` and
//! `schema/records.proto`.
//!
//! - A **backup** (`frames.rs`) is small, and quickly made and restored.
//! - A **dump** (`lines.rs`) is text, one record a line, for programs that are not FjordFS. It is made from a backup, which may be
//!   under way, so it is as consistent as that.
//!
//! Of both, whatever is damaged, missing or twice there is noticed, and a restore reads the whole file before it writes anything.
//!
//! # What a restored store is
//! The metadata as it was at the backup, while the data servers have gone on since. So no id of before is used again: block, inode,
//! session, server, target and map numbers go on far behind those of the backup, and of an earlier restore of it. Blocks written since are
//! garbage (`fjord gc`), and files whose blocks have been deleted since cannot be read any more (`fjord fsck` names the blocks).
//!
//! Targets that were added since come with the numbers that they have, and are taken in (`membership/register.rs`). Shards may have moved
//! since from any target to any other: so each counts as one that has lost a place, until it says what it has (`healing.rs`, "Strays").

mod frames;
mod lines;
mod new_file;
mod restore;
mod tables;

use std::{
    fmt,
    fs::File,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use serde::{Deserialize, Serialize};

pub(crate) use self::frames::write;
#[cfg(any(test, fuzzing))]
pub(crate) use self::lines::through_a_line;
pub use self::{lines::dump, new_file::Writer, restore::restore};
use crate::{
    label::FolderError,
    store::{Pair, StoreError},
};

/// Bytes read at a time.
const READ: usize = 1 << 20;

/// How the records are written in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Of `fjord meta backup`.
    Backup,
    /// Of `fjord meta dump`.
    Dump,
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::Backup => "backup",
            Form::Dump => "dump",
        })
    }
}

/// What a backup or a dump is of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct About {
    /// Version of a backup's format; a dump has its own.
    pub format: u32,
    /// Version of the records.
    pub records: u32,
    /// UUID of the cluster.
    pub cluster_id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The record of counters, as a dump shows it. Older releases did not say it here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counters: Option<serde_json::Value>,
}

/// Why a backup or a dump cannot be made, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file is not what was written.
    #[error("{form} {}: {what}. Make it anew, or use another one", file.display())]
    Damaged {
        /// What it should be.
        form: Form,
        /// The file.
        file: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// The file is something else.
    #[error("{} is not a {form} of metadata{}", file.display(), match form {
        Form::Backup => "; `fjord meta load` takes what `fjord meta dump` has written",
        Form::Dump => "; `fjord meta restore` takes what `fjord meta backup` has written",
    })]
    Other {
        /// What it should be.
        form: Form,
        /// The file.
        file: PathBuf,
    },
    /// It is a pipe, a device, a folder.
    #[error("{} is not a regular file: {needed}", file.display())]
    NotAFile {
        /// The file.
        file: PathBuf,
        /// Why it should be one.
        needed: &'static str,
    },
    /// The operating system said no.
    #[error("{form} {}: {source}", file.display())]
    Io {
        /// What it is to be.
        form: Form,
        /// The file.
        file: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// A newer release wrote it.
    #[error("{form} {} is of a newer release: restore it with that one", file.display())]
    Newer {
        /// What it is.
        form: Form,
        /// The file.
        file: PathBuf,
    },
    /// There is metadata where it should go.
    #[error("{0} holds metadata already: give an empty place")]
    NotEmpty(String),
    /// There is what a restore has left where it should go.
    #[error(
        "a restore into {0} was interrupted, and what it has left there is of no use: give --force to begin it again"
    )]
    Interrupted(String),
    /// A metaserver runs.
    #[error("a metaserver runs on {0}: stop all of them first, and name an empty place")]
    Owned(String),
    /// It was told to stop.
    #[error("stopped before the end: nothing has been made")]
    Stopped,
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The engine failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads a whole backup or dump, checks it, and hands its records out in the order of their keys; what it is of, and how many records there
/// were. `file` is what errors call it. Of what `each` calls damaged, the place in the file is told as well.
fn read(
    form: Form,
    file: &Path,
    source: impl Read,
    each: impl FnMut(&About, Pair) -> Result<(), BackupError>,
) -> Result<(About, u64), BackupError> {
    let mut source = BufReader::with_capacity(READ, source);
    match form {
        Form::Backup => frames::read(file, &mut source, each),
        Form::Dump => lines::read(file, &mut source, each),
    }
}

/// Reads a backup or a dump to its end and checks it; what it is of, and how many records it has.
///
/// # Errors
/// When it is damaged, torn, of a newer release, or something else; when `stop` is set meanwhile.
pub fn verify(form: Form, file: &Path, stop: &AtomicBool) -> Result<(About, u64), BackupError> {
    read(form, file, open(form, file)?, |_, _| goes_on(stop))
}

/// Opens a file that is read more than once.
fn open(form: Form, file: &Path) -> Result<File, BackupError> {
    let io = |source| BackupError::Io { form, file: file.to_owned(), source };
    if !std::fs::metadata(file).map_err(io)?.is_file() {
        return Err(BackupError::NotAFile {
            file: file.to_owned(),
            needed: "it is read twice, so write it into one first",
        });
    }
    File::open(file).map_err(io)
}

fn goes_on(stop: &AtomicBool) -> Result<(), BackupError> {
    if stop.load(Ordering::Relaxed) { Err(BackupError::Stopped) } else { Ok(()) }
}

/// What is wrong with a record that was read at `place`.
fn at(place: impl FnOnce() -> String, e: BackupError) -> BackupError {
    match e {
        BackupError::Damaged { form, file, what } => {
            BackupError::Damaged { form, file, what: format!("{}: {what}", place()) }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests;
