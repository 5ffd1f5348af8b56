//! `fjord layout`: the redundancy of new files.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, bail, ensure};
use fjordfs_client::{AttrChange, Client, InodeId};
use fjordfs_proto::{
    Policy,
    pb::meta::{Attr, FileKind},
};
use serde::Serialize;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report,
    transfer::{connect, kind_name, resolve},
};

/// Show or set the redundancy of what is newly written.
#[derive(clap::Subcommand)]
#[command(after_help = "\
Examples:
  fjord layout get /mnt/fjord/checkpoints
  fjord layout set /mnt/fjord/checkpoints replica:3
  fjord layout set /mnt/fjord/scratch replica:1")]
pub(crate) enum Verb {
    /// Show the policy of a file or directory
    Get(GetArgs),
    /// Set the policy of a directory: files and directories made in it from now on have it
    Set(SetArgs),
}

#[derive(clap::Args)]
pub(crate) struct GetArgs {
    #[command(flatten)]
    meta: MetaArg,
    /// Path in a mount, HOST:PORT:/path, or with --meta an absolute path
    path: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
pub(crate) struct SetArgs {
    #[command(flatten)]
    meta: MetaArg,
    /// Path in a mount, HOST:PORT:/path, or with --meta an absolute path
    path: PathBuf,
    /// replica:N or ec:K+M
    policy: Policy,
}

#[derive(Serialize)]
struct Layout {
    path: String,
    kind: &'static str,
    policy: String,
}

pub(crate) fn run(verb: &Verb) -> anyhow::Result<ExitCode> {
    daemon::runtime()?.block_on(async {
        match verb {
            Verb::Get(args) => get(args).await,
            Verb::Set(args) => set(args).await,
        }
    })
}

async fn get(args: &GetArgs) -> anyhow::Result<ExitCode> {
    let place = locate::locate(&args.meta, &args.path)?;
    let client = connect(&place.meta, "layout").await?;
    let attr = resolve(&client, &place, true).await?;
    client.shutdown().await?;
    let layout = Layout {
        path: place.path.to_string_lossy().into_owned(),
        kind: kind_name(attr.kind()),
        policy: policy_of(&attr)?.to_string(),
    };
    if args.json {
        report::print_json(&layout)?;
    } else {
        report::print(&format!("{}\n", layout.policy))?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn set(args: &SetArgs) -> anyhow::Result<ExitCode> {
    let place = locate::locate(&args.meta, &args.path)?;
    let client = connect(&place.meta, "layout").await?;
    let changed = change(&client, &resolve(&client, &place, true).await?, args).await;
    client.shutdown().await?;
    changed.map(|()| ExitCode::SUCCESS)
}

async fn change(client: &Client, attr: &Attr, args: &SetArgs) -> anyhow::Result<()> {
    ensure!(
        attr.kind() == FileKind::Directory,
        "{} is a {}: a policy is set on a directory, and holds for what is made in it from then on",
        args.path.display(),
        kind_name(attr.kind())
    );
    let targets = client.map().targets.len();
    if args.policy.width() > targets {
        bail!(
            "{} needs {} targets, and the cluster has {targets}: add data servers first",
            args.policy,
            args.policy.width()
        );
    }
    let change = AttrChange { policy: Some(args.policy), ..AttrChange::default() };
    client.setattr(InodeId(attr.ino), change).await?;
    Ok(())
}

/// # Errors
/// When a newer version wrote a policy that this one does not know.
pub(crate) fn policy_of(attr: &Attr) -> anyhow::Result<Policy> {
    Policy::from_code(attr.policy)
        .with_context(|| format!("unknown policy code {}: use a newer fjord", attr.policy))
}
