//! `fjord meta dump` and `load`.

use std::{
    fs::{self, File},
    future::pending,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::AtomicBool,
};

use anyhow::Context;
use bytes::{Buf, Bytes};
use fjordfs_metaserver::backup::{self, About, BackupError, Form};
use tokio::sync::mpsc;

use super::backup::{Into, make, say, until_stopped};
use crate::{
    daemon::{self, Signals},
    locate::{self, MetaArg},
    rpc,
};

/// Messages of the metaserver that may wait to be written.
const AHEAD: usize = 4;

/// Write all metadata as JSON Lines: an open format, which the README describes
///
/// It is as of one moment, while clients go on, or what a backup has. `fjord meta load` makes metadata from it again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord meta dump /backup/meta.jsonl
  fjord meta dump /backup/meta.jsonl --from /backup/meta-monday
  fjord meta dump - | zstd > /backup/meta.jsonl.zst
  fjord meta dump - | jq -r 'select(.table == \"dirent\") | .key.name | @base64d'")]
pub(super) struct DumpArgs {
    /// The file, which appears when it is whole; - is standard output
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// What `fjord meta backup` wrote; no metaserver is asked then
    #[arg(long, value_name = "BACKUP")]
    from: Option<PathBuf>,
    #[command(flatten)]
    meta: MetaArg,
}

/// Make metadata from a dump, in an empty folder or on an empty store; no metaserver runs on it meanwhile
///
/// The whole file is read and checked before anything is written.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord meta load /backup/meta.jsonl --data /var/lib/fjord/meta
  fjord meta load /backup/meta.jsonl --store etcd://a:2379,b:2379,c:2379/fjord")]
pub(super) struct LoadArgs {
    /// What `fjord meta dump` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    into: Into,
}

pub(super) fn load(args: &LoadArgs) -> anyhow::Result<ExitCode> {
    make(Form::Dump, &args.file, &args.into)
}

pub(super) fn run(args: &DumpArgs) -> anyhow::Result<ExitCode> {
    let file = args.file.clone();
    let made = daemon::control_runtime()?.block_on(async {
        let mut signals = Signals::listen()?;
        match &args.from {
            Some(from) => {
                let source = File::open(from).with_context(|| format!("backup {}", from.display()))?;
                anyhow::ensure!(
                    !is_same(from, &file),
                    "{} is the backup: name another file for the dump",
                    file.display()
                );
                let name = from.clone();
                until_stopped(&mut signals, pending(), move |stop| write(source, &name, &file, stop)).await
            }
            None => {
                let address = locate::cluster(&args.meta, None)?;
                let name = PathBuf::from(format!("of {address}"));
                let (sender, arriving) = mpsc::channel(AHEAD);
                let source = Pieces { arriving, piece: Bytes::new() };
                let feed = async move {
                    rpc::backup(&address, async |piece| {
                        if sender.send(piece).await.is_err() {
                            // Whoever does not want more says why.
                            pending::<()>().await;
                        }
                        Ok(())
                    })
                    .await
                };
                until_stopped(&mut signals, feed, move |stop| write(source, &name, &file, stop)).await
            }
        }
    })?;
    if !is_standard_output(&args.file) {
        say(Form::Dump, &made, &args.file)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn is_standard_output(file: &Path) -> bool {
    file == Path::new("-")
}

fn is_same(a: &Path, b: &Path) -> bool {
    fs::canonicalize(a).is_ok_and(|a| fs::canonicalize(b).is_ok_and(|b| a == b))
}

/// Writes the backup that `source` has as a dump.
fn write(
    source: impl Read,
    name: &Path,
    file: &Path,
    stop: &AtomicBool,
) -> Result<(About, u64), BackupError> {
    if !is_standard_output(file) {
        let mut writer = backup::Writer::create(Form::Dump, file)?;
        backup::dump(source, name, stop, |piece| writer.write(piece))?;
        return writer.finish(stop);
    }
    let mut out = io::stdout().lock();
    let to = |source| BackupError::Io { form: Form::Dump, file: "to standard output".into(), source };
    let done = backup::dump(source, name, stop, |piece| out.write_all(piece).map_err(to))?;
    out.flush().map_err(to)?;
    Ok(done)
}

/// What arrives from the metaserver, as one file.
struct Pieces {
    arriving: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.arriving.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let length = into.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut into[..length]);
        Ok(length)
    }
}
