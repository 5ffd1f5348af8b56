//! `fjord stat`: what a file is, and where its bytes are.

use std::{fmt::Write, path::PathBuf, process::ExitCode, time::SystemTime};

use fjordfs_client::InodeId;
use fjordfs_proto::{
    ClusterMap, Extent, Source,
    extent::BlockPiece,
    pb::meta::{Attr, FileKind, Time},
};
use serde::Serialize;

use crate::{
    daemon,
    layout::policy_of,
    locate::{self, MetaArg},
    report,
    status::target_state,
    transfer::{connect, kind_name, resolve},
    units::{self, ByteSize},
};

/// Show attributes of a file, its extents and blocks, and the servers they are on.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord stat /mnt/fjord/model.safetensors
  fjord stat --json meta1:7440:/runs/7/ckpt | jq '.blocks[].targets[].server'")]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// Path in a mount, HOST:PORT:/path, or with --meta an absolute path; a symbolic link is shown itself
    path: PathBuf,
    /// Blocks shown at most; JSON has all of them
    #[arg(long, value_name = "N", default_value_t = 32)]
    blocks: usize,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let place = locate::locate(&args.meta, &args.path)?;
    let stat = daemon::runtime()?.block_on(async {
        let client = connect(&place.meta, "stat").await?;
        let attr = resolve(&client, &place, false).await?;
        let ino = InodeId(attr.ino);
        let extents = if attr.kind() == FileKind::Regular { client.extents(ino).await? } else { Vec::new() };
        let target = if attr.kind() == FileKind::Symlink { Some(client.readlink(ino).await?) } else { None };
        let stat =
            Stat::new(place.path.to_string_lossy().into_owned(), &attr, target, &extents, &client.map())?;
        client.shutdown().await?;
        anyhow::Ok(stat)
    })?;
    if args.json {
        report::print_json(&stat)?;
    } else {
        report::print(&stat.text(args.blocks))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Everything that is shown; serialised, it is the output of `--json`.
#[derive(Serialize, Debug)]
struct Stat {
    path: String,
    inode: u64,
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    links: u32,
    size: u64,
    allocated: u64,
    policy: String,
    data_version: u64,
    accessed: String,
    modified: String,
    changed: String,
    born: String,
    symlink_target: Option<String>,
    extents: Vec<ExtentRow>,
    blocks: Vec<BlockRow>,
}

#[derive(Serialize, Debug)]
struct ExtentRow {
    offset: u64,
    length: u64,
    /// Bytes kept in the metadata.
    inline: bool,
    block: Option<u64>,
    block_offset: Option<u32>,
}

/// A piece of the file in one block.
#[derive(Serialize, Debug)]
struct BlockRow {
    offset: u64,
    length: u32,
    block: u64,
    block_offset: u32,
    policy: String,
    placement_group: Option<u32>,
    targets: Vec<TargetRow>,
}

#[derive(Serialize, Debug)]
struct TargetRow {
    target: u64,
    state: &'static str,
    server: String,
    address: String,
}

impl Stat {
    fn new(
        path: String,
        attr: &Attr,
        symlink_target: Option<Vec<u8>>,
        extents: &[(u64, Extent)],
        map: &ClusterMap,
    ) -> anyhow::Result<Stat> {
        let blocks = extents.iter().flat_map(|(at, e)| e.pieces().map(|p| block_row(*at, &p, map))).collect();
        Ok(Stat {
            path,
            inode: attr.ino,
            kind: kind_name(attr.kind()),
            mode: format!("{:04o}", attr.mode),
            uid: attr.uid,
            gid: attr.gid,
            links: attr.nlink,
            size: attr.size,
            allocated: attr.allocated,
            policy: policy_of(attr)?.to_string(),
            data_version: attr.data_version,
            accessed: time(attr.atime),
            modified: time(attr.mtime),
            changed: time(attr.ctime),
            born: time(attr.btime),
            symlink_target: symlink_target.map(|t| String::from_utf8_lossy(&t).into_owned()),
            extents: extents.iter().map(|(at, e)| extent_row(*at, e)).collect(),
            blocks,
        })
    }

    fn text(&self, blocks_max: usize) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "{}: {}, inode {}, {} (mode {})",
            self.path, self.kind, self.inode, self.policy, self.mode
        );
        if let Some(target) = &self.symlink_target {
            let _ = writeln!(out, "  points to  {target}");
        }
        let _ = writeln!(
            out,
            "  size       {} bytes ({}), {} allocated",
            units::grouped(self.size),
            ByteSize(self.size),
            ByteSize(self.allocated)
        );
        let _ = writeln!(
            out,
            "  owner      {}:{}, {}",
            self.uid,
            self.gid,
            units::count(self.links.into(), "link")
        );
        for (name, time) in [
            ("modified", &self.modified),
            ("changed", &self.changed),
            ("accessed", &self.accessed),
            ("born", &self.born),
        ] {
            let _ = writeln!(out, "  {name:<10} {time}");
        }
        if self.kind != kind_name(FileKind::Regular) {
            return out;
        }
        let inline: u64 = self.extents.iter().filter(|e| e.inline).map(|e| e.length).sum();
        let _ = write!(
            out,
            "  extents    {} in {}",
            self.extents.len(),
            units::count(self.blocks.len() as u64, "block piece")
        );
        let _ = if inline > 0 {
            writeln!(out, ", {} inside the metadata", ByteSize(inline))
        } else {
            writeln!(out)
        };
        if self.blocks.is_empty() {
            return out;
        }
        let mut table = report::table(&[">OFFSET", ">LENGTH", "BLOCK", ">AT", ">PG", "TARGETS"]);
        for b in self.blocks.iter().take(blocks_max) {
            table.add_row([
                b.offset.to_string(),
                b.length.to_string(),
                fjordfs_proto::BlockId(b.block).to_string(),
                b.block_offset.to_string(),
                b.placement_group.map_or("none".into(), |pg| pg.to_string()),
                b.targets.iter().map(TargetRow::text).collect::<Vec<_>>().join(", "),
            ]);
        }
        let _ = write!(out, "\n{}", report::lines(&table));
        if self.blocks.len() > blocks_max {
            let _ =
                writeln!(out, "and {} more: --blocks N or --json shows them", self.blocks.len() - blocks_max);
        }
        out
    }
}

impl TargetRow {
    fn text(&self) -> String {
        let id = fjordfs_proto::TargetId(self.target);
        match self.state {
            "up" => format!("{id} {} ({})", self.server, self.address),
            state => format!("{id} {} ({}) {}", self.server, self.address, state.to_uppercase()),
        }
    }
}

fn extent_row(offset: u64, extent: &Extent) -> ExtentRow {
    let addr = match &extent.source {
        Source::Blocks { addr, .. } => Some(*addr),
        Source::Inline(_) => None,
    };
    ExtentRow {
        offset,
        length: extent.length,
        inline: addr.is_none(),
        block: addr.map(|a| a.block.0),
        block_offset: addr.map(|a| a.offset),
    }
}

fn block_row(extent_offset: u64, piece: &BlockPiece, map: &ClusterMap) -> BlockRow {
    let group = map.placement(piece.block, piece.layout);
    let era = map.eras.iter().rev().find(|era| era.first_block <= piece.block);
    let targets = group.unwrap_or_default().iter().map(|id| {
        let server = map.server_of(*id).map(|(_, server)| server);
        TargetRow {
            target: id.0,
            state: map.targets.get(id).map_or("unknown", |t| target_state(t.state)),
            server: server.map(|s| s.name.clone()).unwrap_or_default(),
            address: server.map(|s| s.address.clone()).unwrap_or_default(),
        }
    });
    BlockRow {
        offset: extent_offset + piece.from,
        length: piece.length,
        block: piece.block.0,
        block_offset: piece.offset,
        policy: piece.layout.policy().to_string(),
        placement_group: era
            .and_then(|era| era.tables.get(&piece.layout.width()))
            .map(|t| t.pg_of(piece.block).0),
        targets: targets.collect(),
    }
}

/// UTC, with nanoseconds.
fn time(time: Option<Time>) -> String {
    let time = time.unwrap_or_default();
    let since = std::time::Duration::new(time.sec.unsigned_abs(), time.nsec.min(999_999_999));
    let at = if time.sec >= 0 {
        SystemTime::UNIX_EPOCH.checked_add(since)
    } else {
        SystemTime::UNIX_EPOCH.checked_sub(since)
    };
    // Years that RFC 3339 has no digits for are shown as the seconds they are.
    let formatted = at
        .filter(|_| (0..253_402_300_800).contains(&time.sec))
        .map(|at| humantime::format_rfc3339_nanos(at).to_string());
    formatted.unwrap_or_else(|| format!("{} s after 1970", time.sec))
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::{BLOCK_SIZE_MAX, BlockAddr, BlockId, Layout, Policy, cluster::TargetState};

    fn sample() -> Stat {
        let map = ClusterMap::from_pb(
            crate::status::tests::reply([TargetState::Up, TargetState::Down, TargetState::Up]).map.unwrap(),
        )
        .unwrap();
        let mut attr = Attr { ino: 42, size: 3 << 24, mode: 0o644, policy: 2, nlink: 1, ..Attr::default() };
        attr.set_kind(FileKind::Regular);
        attr.mtime = Some(Time { sec: 1_700_000_000, nsec: 5 });
        let run = Extent::blocks(
            BlockAddr { block: BlockId(9), offset: 0 },
            3 * BLOCK_SIZE_MAX as u64,
            Layout::of(Policy::replica(2).unwrap(), BLOCK_SIZE_MAX),
        );
        Stat::new("/a".into(), &attr, None, &[(0, run)], &map).unwrap()
    }

    #[test]
    fn a_run_is_shown_block_by_block_with_its_targets() {
        let stat = sample();
        assert_eq!((stat.extents.len(), stat.blocks.len()), (1, 3));
        assert!(stat.blocks.iter().all(|b| b.targets.len() == 2 && b.placement_group.is_some()));
        assert_eq!(stat.blocks[1].offset, BLOCK_SIZE_MAX as u64);
        let text = stat.text(2);
        for part in ["inode 42", "replica:2", "2023-11-14T22:13:20.000000005Z", "b9", "DOWN", "and 1 more"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn odd_times_are_shown() {
        assert_eq!(time(None), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(time(Some(Time { sec: -5, nsec: 0 })), "-5 s after 1970");
        assert_eq!(time(Some(Time { sec: i64::MAX, nsec: u32::MAX })), format!("{} s after 1970", i64::MAX));
    }

    #[test]
    fn field_names_of_json_are_stable() {
        let json = serde_json::to_value(sample()).unwrap();
        for key in ["inode", "size", "policy", "extents", "blocks", "modified"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert!(json["blocks"][0]["targets"][0].get("server").is_some());
    }
}
