//! `fjord import` and `fjord export`: many files at a time, straight through the client library.
//!
//! | file | what it holds |
//! |---|---|
//! | `import`, `export` | the two directions |
//! | `workers`, `ledger`, `progress` | parallel work, what it did, how that is shown |
//! | `local`, `listing` | the two ends |
//! | `attrs`, `xattrs`, `sums` | what must agree between them |
//!
//! There is no journal: what is there already is seen from size and modification time, and files appear under their
//! names only when complete. So a second run goes on where the first ended, even on another machine.

use std::{
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex},
};

use anyhow::{Context, bail, ensure};
use fjordfs_client::{Client, InodeId, Options};
use fjordfs_proto::{
    error::Errno,
    pb::meta::{Attr, FileKind},
};
use tokio::sync::Semaphore;

use crate::{
    daemon, data,
    locate::{self, Location, MetaArg},
    rpc,
};

mod attrs;
mod export;
mod import;
mod ledger;
mod listing;
mod local;
mod progress;
mod sums;
mod workers;
mod xattrs;

use ledger::Ledger;
use progress::Progress;

pub(crate) use attrs::kind_name;

/// Copy a local tree into FjordFS: parallel, resumable.
///
/// Keeps modes, owners, times, symbolic and hard links, holes, fifos, devices and extended attributes (those of users).
/// A directory's contents become those of DST, which is made when missing. A file becomes DST, or goes into DST
/// if that is a directory. Run it again after an interruption: files whose size and modification time agree are left
/// out. What cannot be copied is listed at the end.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord import ~/dataset /mnt/fjord/dataset
  fjord import --verify --jobs 64 /scratch/imagenet meta1:7440:/imagenet
  fjord import --meta meta1:7440 model.safetensors /models/")]
pub(crate) struct ImportArgs {
    /// Local file or directory
    src: PathBuf,
    /// Path in a mount, HOST:PORT:/path, or with --meta an absolute path
    dst: PathBuf,
    #[command(flatten)]
    how: How,
}

/// Copy a FjordFS tree to local files: parallel, resumable.
///
/// The reverse of `fjord import`, with the same rules.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord export /mnt/fjord/runs/7 ~/runs/7
  fjord export --verify meta1:7440:/models/a.safetensors /scratch/")]
pub(crate) struct ExportArgs {
    /// Path in a mount, HOST:PORT:/path, or with --meta an absolute path
    src: PathBuf,
    /// Local file or directory
    dst: PathBuf,
    #[command(flatten)]
    how: How,
}

#[derive(clap::Args)]
struct How {
    #[command(flatten)]
    meta: MetaArg,
    /// Files copied at a time
    #[arg(short, long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: u16,
    /// Read everything back and compare checksums, also of files that were there already
    #[arg(long)]
    verify: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

impl How {
    fn jobs(&self) -> usize {
        self.jobs.into()
    }

    /// Large files under way at a time: each holds a few chunks of memory.
    fn large(&self) -> Semaphore {
        Semaphore::new((self.jobs() / 4).max(1))
    }
}

pub(crate) fn run_import(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let local = std::fs::symlink_metadata(&args.src)
        .with_context(|| format!("cannot read {}", args.src.display()))?;
    let place = locate::locate(&args.how.meta, &args.dst)?;
    daemon::runtime()?.block_on(async {
        let client = connect(&place.meta, "import").await?;
        let verifier = match args.how.verify {
            true => Some(connect(&place.meta, "import --verify").await?),
            false => None,
        };
        let ledger = Arc::new(Ledger::new());
        let import = Arc::new(import::Import {
            client: client.clone(),
            verifier: verifier.clone(),
            ledger: ledger.clone(),
            jobs: args.how.jobs(),
            large: args.how.large(),
            links: Mutex::default(),
        });
        let progress = Progress::start(ledger.clone(), args.how.quiet);
        if local.is_dir() {
            let root = client.create_dir_all(text(&place.path)?).await?;
            import.tree(&args.src, InodeId(root.ino)).await;
        } else {
            let (parent, name, existing) =
                file_place(&client, &place, &args.src, ends_in_slash(&args.dst)).await?;
            import.single(&args.src, parent, &name, existing).await;
        }
        let ended = client.shutdown().await;
        if let Some(verifier) = verifier {
            verifier.shutdown().await?;
        }
        drop(progress);
        finish(
            "imported",
            &ledger,
            ended.context("the last data did not reach the servers: run the import again"),
        )
    })
}

pub(crate) fn run_export(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let place = locate::locate(&args.how.meta, &args.src)?;
    daemon::runtime()?.block_on(async {
        let client = connect(&place.meta, "export").await?;
        let root = resolve(&client, &place, false).await?;
        let ledger = Arc::new(Ledger::new());
        let export = Arc::new(export::Export {
            client: client.clone(),
            ledger: ledger.clone(),
            jobs: args.how.jobs(),
            verify: args.how.verify,
            large: args.how.large(),
            links: Mutex::default(),
        });
        let progress = Progress::start(ledger.clone(), args.how.quiet);
        let target = if root.kind() == FileKind::Directory {
            std::fs::create_dir_all(&args.dst)
                .with_context(|| format!("cannot make {}", args.dst.display()))?;
            export.tree(root, args.dst.clone()).await;
            args.dst
        } else {
            let target = match place.path.file_name() {
                Some(name) if args.dst.is_dir() => args.dst.join(name),
                _ => args.dst,
            };
            export.single(root, target.clone()).await;
            target
        };
        let ended = client.shutdown().await;
        // As for import: when this ends well, the copy survives a power failure.
        let synced = sync_filesystem(&target);
        drop(progress);
        finish("exported", &ledger, ended.map_err(Into::into).and(synced))
    })
}

/// A client for a verb.
pub(crate) async fn connect(meta: &str, verb: &str) -> anyhow::Result<Client> {
    rpc::check_address(meta)?;
    let description = format!("{} {} fjord {verb}", data::hostname(), std::process::id());
    Client::connect(meta, Options { description, ..Options::default() })
        .await
        .with_context(|| format!("cannot use the FjordFS at {meta}"))
}

/// What a location names.
pub(crate) async fn resolve(client: &Client, place: &Location, follow: bool) -> anyhow::Result<Attr> {
    Ok(client.resolve(text(&place.path)?, follow).await?)
}

/// Where a single file goes: into DST if that is a directory, else to DST itself.
async fn file_place(
    client: &Client,
    place: &Location,
    src: &Path,
    into: bool,
) -> anyhow::Result<(InodeId, Vec<u8>, Option<Attr>)> {
    let path = text(&place.path)?;
    let found = match client.resolve(path, true).await {
        Ok(attr) => Some(attr),
        Err(e) if e.errno == Errno::ENOENT => None,
        Err(e) => return Err(e.into()),
    };
    if into && found.is_none() {
        bail!("the directory {path} does not exist in the filesystem: make it, or leave out the final '/'");
    }
    if let Some(dir) = found.as_ref().filter(|attr| attr.kind() == FileKind::Directory) {
        let name = src.file_name().context("the source has no file name")?.as_bytes().to_vec();
        let existing = match client.lookup(InodeId(dir.ino), &name).await {
            Ok(attr) => Some(attr),
            Err(e) if e.errno == Errno::ENOENT => None,
            Err(e) => return Err(e.into()),
        };
        return Ok((InodeId(dir.ino), name, existing));
    }
    let name =
        place.path.file_name().with_context(|| format!("{path} has no file name"))?.as_bytes().to_vec();
    let parent = place.path.parent().unwrap_or(Path::new("/"));
    let parent = client.resolve(text(parent)?, true).await?;
    ensure!(parent.kind() == FileKind::Directory, "{path}: its parent is not a directory");
    Ok((InodeId(parent.ino), name, found))
}

fn ends_in_slash(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/")
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8: name a directory above it", path.display()))
}

fn sync_filesystem(path: &Path) -> anyhow::Result<()> {
    let at = if path.is_dir() {
        path
    } else {
        path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
    };
    let file = std::fs::File::open(at).with_context(|| format!("cannot open {}", at.display()))?;
    rustix::fs::syncfs(&file).with_context(|| format!("cannot sync the filesystem of {}", at.display()))
}

/// The summary, the list of errors and the exit status.
fn finish(verb: &str, ledger: &Ledger, ended: anyhow::Result<()>) -> anyhow::Result<ExitCode> {
    let errors = ledger.errors_text();
    if !errors.is_empty() {
        eprint!("{errors}");
    }
    eprintln!("{}", ledger.summary(verb, ledger.began.elapsed()));
    ended?;
    Ok(if ledger.errors_count() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
