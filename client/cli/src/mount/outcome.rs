//! How a mount has ended, for whoever unmounts it: the process that knows is not its child, and has its log who knows where.
//!
//! The process that serves a mount holds a file that lies in no folder, and writes there at its end whether everything written has
//! reached the servers, or why not. `fjord umount` opens it through /proc before it unmounts, and reads it when the process is
//! gone. A process that died has left it empty.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
};

use rustix::fs::{MemfdFlags, memfd_create};

use crate::report;

const NAME: &str = "fjord-outcome";

/// What is written of a clean end; anything else is what went wrong.
const CLEAN: &str = "clean";

/// What the process of a mount has left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Everything is with the servers.
    Clean,
    /// Why it is not.
    Failed(String),
    /// Nothing: it died.
    Died,
}

/// Where it is written and read.
#[derive(Debug)]
pub(crate) struct Note(File);

impl Note {
    /// In the process that serves a mount, for as long as it lives.
    pub(crate) fn new() -> io::Result<Note> {
        Ok(Note(memfd_create(NAME, MemfdFlags::CLOEXEC)?.into()))
    }

    /// Says how the mount has ended.
    pub(crate) fn write(&mut self, outcome: &anyhow::Result<()>) {
        let text = match outcome {
            Ok(()) => CLEAN.to_owned(),
            Err(e) => report::causes(e),
        };
        if let Err(e) = self.0.write_all(text.as_bytes()) {
            tracing::warn!("`fjord umount` will not hear how the mount has ended: {e}");
        }
    }

    /// That of one of these processes, from outside. `None` when they have none, as those of an older release, or it is not for this user.
    pub(crate) fn of(servers: &[u32]) -> Option<Note> {
        let folders = servers.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).ok());
        let mut files = folders.flatten().flatten().map(|entry| entry.path());
        let file = files.find(|file| {
            let target = fs::read_link(file).unwrap_or_default();
            target.to_string_lossy().starts_with(&format!("/memfd:{NAME} "))
        })?;
        File::open(file).ok().map(Note)
    }

    /// To be asked when the process is gone.
    pub(crate) fn read(mut self) -> Outcome {
        let mut text = String::new();
        match self.0.read_to_string(&mut text) {
            Ok(_) if text == CLEAN => Outcome::Clean,
            Ok(_) if !text.is_empty() => Outcome::Failed(text),
            _ => Outcome::Died,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_from_outside() {
        for (outcome, read) in [
            (Some(Ok(())), Outcome::Clean),
            (Some(Err(anyhow::anyhow!("full").context("lost"))), Outcome::Failed("lost: full".into())),
            (None, Outcome::Died),
        ] {
            let mut note = Note::new().unwrap();
            let outside = Note::of(&[std::process::id()]).unwrap();
            if let Some(outcome) = outcome {
                note.write(&outcome);
            }
            drop(note);
            assert_eq!(outside.read(), read);
        }
        assert!(Note::of(&[std::process::id()]).is_none());
    }
}
