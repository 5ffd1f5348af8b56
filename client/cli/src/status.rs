//! `fjord status`: is everything up, and how full is it?

mod healing;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use fjordfs_proto::{
    ClusterMap, TargetId,
    cluster::{ServerState, TargetState},
    pb::meta::StatusReply,
};
use serde::Serialize;

use self::healing::Healing;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report, rpc,
    units::{self, ByteSize},
};

/// Show servers, targets, placement groups and clients of a cluster.
///
/// Exit status 1 when a server or a target is not up, when there is none, or when the metaserver cannot take changes.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord status
  fjord status /mnt/fjord
  fjord status --meta meta1:7440 --json | jq '.targets[] | select(.state != \"up\")'")]
pub(crate) struct Args {
    #[command(flatten)]
    meta: MetaArg,
    /// A path in a mount of the cluster
    path: Option<PathBuf>,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let meta = locate::cluster(&args.meta, args.path.as_deref())?;
    let reply = daemon::control_runtime()?.block_on(rpc::status(&meta))?;
    let status = Status::new(meta, reply)?;
    if args.json {
        report::print_json(&status)?;
    } else {
        report::print(&status.text())?;
    }
    Ok(if status.healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Everything that is shown; serialised, it is the output of `--json`.
#[derive(Serialize, Debug)]
pub(crate) struct Status {
    pub(crate) meta: String,
    pub(crate) cluster_id: String,
    pub(crate) version: String,
    pub(crate) engine: String,
    pub(crate) epoch: u64,
    pub(crate) healthy: bool,
    /// Why the metaserver refuses changes; empty: it does not.
    pub(crate) trouble: String,
    pub(crate) default_policy: String,
    pub(crate) capacity: u64,
    pub(crate) free: u64,
    pub(crate) inodes: u64,
    pub(crate) blocks_to_delete: u64,
    pub(crate) orphans: u64,
    pub(crate) servers: Vec<Server>,
    pub(crate) targets: Vec<Target>,
    pub(crate) placement: Vec<Placement>,
    pub(crate) sessions: Vec<Session>,
    pub(crate) healing: Healing,
}

#[derive(Serialize, Debug)]
pub(crate) struct Server {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) state: &'static str,
}

#[derive(Serialize, Debug)]
pub(crate) struct Target {
    pub(crate) id: u64,
    pub(crate) server: u64,
    pub(crate) path: String,
    pub(crate) domain: String,
    pub(crate) state: &'static str,
    pub(crate) full: bool,
    pub(crate) capacity: u64,
    pub(crate) free: u64,
    pub(crate) shards: u64,
    /// Placement groups of the current era that it is in.
    pub(crate) groups: u64,
    pub(crate) message: String,
    pub(crate) scrub: Scrub,
}

/// Scrubbing of a target, since its server started.
#[derive(Serialize, Debug, Default)]
pub(crate) struct Scrub {
    pub(crate) target: u64,
    pub(crate) running: bool,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: u64,
    /// End of the last complete pass, milliseconds since 1970; 0: none.
    pub(crate) completed_ms: u64,
    pub(crate) shards_bad: u64,
    pub(crate) shards_repaired: u64,
}

/// Placement groups of one width, over all eras.
#[derive(Serialize, Debug, PartialEq)]
pub(crate) struct Placement {
    pub(crate) width: usize,
    pub(crate) groups: usize,
    /// Some member cannot be read.
    pub(crate) degraded: usize,
    /// Blocks of the default policy cannot be read, or where its groups are of another width, no block at all.
    pub(crate) unavailable: usize,
    /// Of the others: so many members cannot be read that blocks with one parity shard, as a directory may have them, cannot.
    pub(crate) lacking: usize,
}

#[derive(Serialize, Debug)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) client: String,
    pub(crate) attached: bool,
    pub(crate) handles: u32,
    /// Inodes whose names or attributes it may cache.
    pub(crate) leases: u64,
    /// Ranges and whole files that its programs have locked.
    pub(crate) locks: u64,
    /// Those that they wait for.
    pub(crate) lock_waits: u64,
    pub(crate) idle_ms: u64,
}

impl Status {
    /// # Errors
    /// When the map contradicts itself.
    pub(crate) fn new(meta: String, reply: StatusReply) -> anyhow::Result<Status> {
        let map = ClusterMap::from_pb(reply.map.unwrap_or_default())?;
        let reports: BTreeMap<u64, _> = reply.targets.into_iter().map(|t| (t.target, t)).collect();
        let mut groups: BTreeMap<TargetId, u64> = BTreeMap::new();
        for table in map.eras.last().iter().flat_map(|era| era.tables.values()) {
            for member in &table.members {
                *groups.entry(*member).or_default() += 1;
            }
        }
        let targets: Vec<Target> = map
            .targets
            .iter()
            .map(|(id, t)| {
                let report = reports.get(&id.0).cloned().unwrap_or_default();
                let scrub = report.scrub.unwrap_or_default();
                Target {
                    id: id.0,
                    server: t.server.0,
                    path: report.path,
                    domain: t.domain.clone(),
                    state: target_state(t.state),
                    full: t.full,
                    capacity: report.capacity,
                    free: report.free,
                    shards: report.shards,
                    groups: groups.get(id).copied().unwrap_or_default(),
                    message: report.message,
                    scrub: Scrub {
                        target: id.0,
                        running: scrub.running,
                        bytes_done: scrub.bytes_done,
                        bytes_total: scrub.bytes_total,
                        completed_ms: scrub.completed_ms,
                        shards_bad: scrub.shards_bad,
                        shards_repaired: scrub.shards_repaired,
                    },
                }
            })
            .collect();
        let servers: Vec<Server> = map
            .servers
            .iter()
            .map(|(id, s)| Server {
                id: id.0,
                name: s.name.clone(),
                address: s.address.clone(),
                state: server_state(s.state),
            })
            .collect();
        let up = |t: &&Target| t.state == "up";
        Ok(Status {
            meta,
            epoch: map.epoch.0,
            healthy: reply.trouble.is_empty() && all_up(&servers, &targets),
            trouble: reply.trouble,
            default_policy: map.default_policy.to_string(),
            capacity: targets.iter().filter(up).map(|t| t.capacity).sum(),
            free: targets.iter().filter(up).map(|t| t.free).sum(),
            inodes: reply.inodes,
            blocks_to_delete: reply.blocks_to_delete,
            orphans: reply.orphans,
            placement: placement(&map),
            healing: reply.healing.unwrap_or_default().into(),
            sessions: reply
                .sessions
                .into_iter()
                .map(|s| Session {
                    id: s.session,
                    client: s.client,
                    attached: s.attached,
                    handles: s.handles,
                    leases: s.leases,
                    locks: s.locks,
                    lock_waits: s.lock_waits,
                    idle_ms: s.idle_ms,
                })
                .collect(),
            cluster_id: map.cluster_id,
            version: reply.version,
            engine: reply.engine,
            servers,
            targets,
        })
    }

    /// Whether everything serves, if the metaserver takes changes or not.
    pub(crate) fn is_up(&self) -> bool {
        all_up(&self.servers, &self.targets)
    }

    fn text(&self) -> String {
        let mut out = String::new();
        let health = match self.healthy {
            true => "healthy",
            false if self.targets.is_empty() => "NO TARGETS, nothing can be stored",
            false => "DEGRADED",
        };
        // Writing to a String does not fail.
        let _ = writeln!(
            out,
            "cluster {} at {}: {health}\nmetaserver {} ({}), map {}, {}, new files {}\n",
            self.cluster_id,
            self.meta,
            self.version,
            self.engine,
            fjordfs_proto::Epoch(self.epoch),
            units::count(self.inodes, "inode"),
            self.default_policy
        );
        if !self.trouble.is_empty() {
            let _ = writeln!(out, "the metaserver has TROUBLE: {}\n", self.trouble);
        }
        out += &report::lines(&self.target_table());
        let _ = writeln!(
            out,
            "\n{} of {} free on targets that are up (raw; `fjord df` shows what fits under each policy)",
            ByteSize(self.free),
            ByteSize(self.capacity)
        );
        for p in &self.placement {
            let _ = write!(out, "{} of {}", units::count(p.groups as u64, "placement group"), p.width);
            let _ = match (p.degraded, p.unavailable, p.lacking) {
                (0, ..) => write!(out, ": all whole"),
                (degraded, 0, 0) => write!(out, ": {degraded} degraded, every block can be read"),
                (degraded, 0, _) => write!(out, ": {degraded} degraded"),
                (degraded, gone, _) => write!(out, ": {degraded} degraded, of these {gone} CANNOT BE READ"),
            };
            if p.lacking > 0 {
                let (lacking, k) = (p.lacking, p.width - 1);
                let _ =
                    write!(out, ", {lacking} lack 2 or more members: ec:{k}+1 blocks there CANNOT BE READ");
            }
            out.push('\n');
        }
        out += &self.healing.text();
        for t in self.targets.iter().filter(|t| t.scrub.shards_bad > 0) {
            let (bad, repaired) = (t.scrub.shards_bad, t.scrub.shards_repaired);
            let _ = writeln!(
                out,
                "{} on {} found damaged, {repaired} repaired (`fjord scrub status`)",
                units::count(bad, "shard"),
                TargetId(t.id)
            );
        }
        if self.blocks_to_delete > 0 {
            let _ = writeln!(out, "{} to delete", units::count(self.blocks_to_delete, "block"));
        }
        if !self.sessions.is_empty() {
            let _ = writeln!(out);
            out += &report::lines(&self.session_table());
        }
        for t in self.targets.iter().filter(|t| !t.message.is_empty()) {
            let _ = writeln!(out, "\n{} ({}): {}", TargetId(t.id), t.path, t.message);
        }
        out
    }

    pub(crate) fn target_table(&self) -> comfy_table::Table {
        let mut table = report::table(&[
            "SERVER",
            "ADDRESS",
            "STATE",
            "TARGET",
            "STATE",
            ">FREE",
            ">CAPACITY",
            ">SHARDS",
            ">PGS",
            "PATH",
        ]);
        for server in &self.servers {
            let mut of_server = self.targets.iter().filter(|t| t.server == server.id).peekable();
            let named = [server.name.clone(), server.address.clone(), server.state.to_owned()];
            if of_server.peek().is_none() {
                table.add_row(named.clone());
            }
            for (i, t) in of_server.enumerate() {
                let head = if i == 0 { named.clone() } else { Default::default() };
                let state =
                    if t.full && t.state == "up" { "up, full".to_owned() } else { t.state.to_owned() };
                table.add_row(head.into_iter().chain([
                    TargetId(t.id).to_string(),
                    state,
                    ByteSize(t.free).to_string(),
                    ByteSize(t.capacity).to_string(),
                    units::grouped(t.shards),
                    t.groups.to_string(),
                    if t.domain == server.name {
                        t.path.clone()
                    } else {
                        format!("{} @{}", t.path, t.domain)
                    },
                ]));
            }
        }
        table
    }

    fn session_table(&self) -> comfy_table::Table {
        let mut table = report::table(&[">SESSION", "CLIENT", ">OPEN FILES", ">LEASES", ">LOCKS", "SEEN"]);
        for s in &self.sessions {
            let idle = Duration::from_secs(s.idle_ms / 1000);
            table.add_row([
                s.id.to_string(),
                s.client.clone(),
                s.handles.to_string(),
                s.leases.to_string(),
                match s.lock_waits {
                    0 => s.locks.to_string(),
                    waits => format!("{} + {waits} waiting", s.locks),
                },
                match s.attached {
                    true => "attached".to_owned(),
                    false => format!("gone for {}", humantime::format_duration(idle)),
                },
            ]);
        }
        table
    }
}

/// There is something, and nothing of it is away.
fn all_up(servers: &[Server], targets: &[Target]) -> bool {
    !targets.is_empty()
        && servers.iter().all(|s| s.state == "up")
        && targets.iter().all(|t| matches!(t.state, "up" | "draining"))
}

fn placement(map: &ClusterMap) -> Vec<Placement> {
    let readable: BTreeSet<TargetId> =
        map.targets.iter().filter(|(_, t)| t.readable()).map(|(id, _)| *id).collect();
    let mut by_width: BTreeMap<usize, Placement> = BTreeMap::new();
    for (width, table) in map.eras.iter().flat_map(|era| &era.tables) {
        let sum = by_width.entry(*width).or_insert(Placement {
            width: *width,
            groups: 0,
            degraded: 0,
            unavailable: 0,
            lacking: 0,
        });
        // The map knows widths, not policies: another policy may have groups of the same width, also as copies of small blocks.
        let needed = match map.default_policy {
            policy if policy.width() == *width => policy.data_shards().into(),
            _ => 1,
        };
        for group in table.members.chunks(*width) {
            let alive = group.iter().filter(|t| readable.contains(t)).count();
            sum.groups += 1;
            sum.degraded += usize::from(alive < *width);
            sum.unavailable += usize::from(alive < needed);
            sum.lacking += usize::from(alive >= needed && alive + 1 < *width);
        }
    }
    by_width.into_values().collect()
}

pub(crate) fn server_state(state: ServerState) -> &'static str {
    match state {
        ServerState::Up => "up",
        ServerState::Down => "down",
        ServerState::Unspecified => "unknown",
    }
}

pub(crate) fn target_state(state: TargetState) -> &'static str {
    match state {
        TargetState::Up => "up",
        TargetState::Down => "down",
        TargetState::Out => "out",
        TargetState::Draining => "draining",
        TargetState::Failed => "failed",
        TargetState::Unspecified => "unknown",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use fjordfs_proto::{
        Policy,
        pb::{common, meta},
    };

    /// Three servers with a target of `capacity` and `free` each, two eras of `replica:2` groups.
    pub(crate) fn reply(states: [TargetState; 3]) -> StatusReply {
        let server = |id: u64| common::Server {
            id,
            address: format!("127.0.0.1:{}", 7440 + id),
            name: format!("data-{id}"),
            state: if states[id as usize - 1] == TargetState::Up {
                ServerState::Up
            } else {
                ServerState::Down
            }
            .into(),
        };
        let target = |id: u64| common::Target {
            id,
            server: id,
            domain: format!("data-{id}"),
            state: states[id as usize - 1].into(),
            full: false,
        };
        let table = |members: &[u64]| common::PgTable {
            width: 2,
            pg_count: members.len() as u32 / 2,
            members: members.to_vec(),
            moves: Vec::new(),
        };
        StatusReply {
            map: Some(common::ClusterMap {
                cluster_id: "c-1".into(),
                epoch: 7,
                servers: (1..=3).map(server).collect(),
                targets: (1..=3).map(target).collect(),
                eras: vec![
                    common::Era { first_block: 1, tables: vec![table(&[1, 2])] },
                    common::Era { first_block: 9, tables: vec![table(&[1, 2, 2, 3, 3, 1])] },
                ],
                default_policy: 2,
            }),
            targets: (1..=3)
                .map(|id| meta::TargetReport {
                    target: id,
                    path: format!("/data-{id}"),
                    capacity: 100 << 30,
                    free: 60 << 30,
                    shards: 12_345,
                    ..Default::default()
                })
                .collect(),
            sessions: vec![meta::SessionReport {
                session: 5,
                client: "node1 812 /mnt/fjord".into(),
                attached: true,
                handles: 3,
                leases: 120,
                locks: 2,
                lock_waits: 1,
                idle_ms: 0,
            }],
            inodes: 30_000,
            version: "0.1.0".into(),
            engine: "fjall".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_healthy_cluster() {
        let status = Status::new("m:1".into(), reply([TargetState::Up; 3])).unwrap();
        assert!(status.healthy);
        assert_eq!((status.capacity, status.free), (300 << 30, 180 << 30));
        assert_eq!(
            status.placement,
            [Placement { width: 2, groups: 4, degraded: 0, unavailable: 0, lacking: 0 }]
        );
        let text = status.text();
        for part in [
            "healthy",
            "data-2",
            "2 + 1 waiting",
            "127.0.0.1:7443",
            "12,345",
            "node1 812 /mnt/fjord",
            "all whole",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn what_is_down_is_seen() {
        let one =
            Status::new("m:1".into(), reply([TargetState::Down, TargetState::Up, TargetState::Up])).unwrap();
        assert!(!one.healthy);
        assert_eq!(
            one.placement,
            [Placement { width: 2, groups: 4, degraded: 3, unavailable: 0, lacking: 0 }]
        );
        assert!(one.text().contains("every block can be read"));
        let two = Status::new("m:1".into(), reply([TargetState::Down, TargetState::Down, TargetState::Up]))
            .unwrap();
        assert_eq!(two.placement[0].unavailable, 2);
        assert!(two.text().contains("CANNOT BE READ"));
    }

    /// Groups of three: what two losses mean depends on the policy of the blocks.
    #[test]
    fn what_cannot_be_read_is_counted_by_policy() {
        let groups_of_three = |policy: Policy| {
            let mut reply = reply([TargetState::Up, TargetState::Down, TargetState::Down]);
            let map = reply.map.as_mut().unwrap();
            map.default_policy = policy.code().into();
            let table = common::PgTable { width: 3, pg_count: 1, members: vec![1, 2, 3], moves: Vec::new() };
            map.eras = vec![common::Era { first_block: 1, tables: vec![table] }];
            Status::new("m:1".into(), reply).unwrap()
        };
        let ec = groups_of_three(Policy::ec(2, 1).unwrap());
        assert_eq!((ec.placement[0].unavailable, ec.placement[0].lacking), (1, 0));
        assert!(ec.text().contains("of these 1 CANNOT BE READ"), "{}", ec.text());
        for copies in [2, 3] {
            let status = groups_of_three(Policy::replica(copies).unwrap());
            assert_eq!((status.placement[0].unavailable, status.placement[0].lacking), (0, 1));
            let text = status.text();
            assert!(!text.contains("every block can be read"), "{text}");
            assert!(text.contains("1 lack 2 or more members: ec:2+1 blocks"), "{text}");
        }
    }

    #[test]
    fn a_metaserver_that_takes_no_changes_is_not_healthy() {
        let full = StatusReply { trouble: "the metadata disk is full".into(), ..reply([TargetState::Up; 3]) };
        let status = Status::new("m:1".into(), full).unwrap();
        assert!(!status.healthy && status.text().contains("TROUBLE: the metadata disk is full"));
    }

    #[test]
    fn a_cluster_without_targets_is_not_healthy() {
        let mut empty = reply([TargetState::Up; 3]);
        let map = empty.map.as_mut().unwrap();
        (map.targets, map.servers, map.eras) = Default::default();
        let status = Status::new("m:1".into(), empty).unwrap();
        assert!(!status.healthy && status.text().contains("NO TARGETS"), "{}", status.text());
    }

    #[test]
    fn a_rebuild_is_told_with_its_pace() {
        let healing = meta::Healing {
            moves_left: 30,
            moves_done: 10,
            bytes_copied: 500 << 20,
            elapsed_ms: 5000,
            eta_ms: 15_000,
            shards_lost: 1,
            problems: vec!["pg3 of b1 on t2: why".into()],
            ..Default::default()
        };
        let mut told = reply([TargetState::Up, TargetState::Out, TargetState::Up]);
        told.healing = Some(healing);
        told.targets[0].scrub =
            Some(meta::ScrubReport { shards_bad: 3, shards_repaired: 2, ..Default::default() });
        let text = Status::new("m:1".into(), told).unwrap().text();
        for part in [
            "10 of 40 group members done",
            "500 MiB copied",
            "100 MiB/s",
            "to go",
            "1 shard CANNOT BE RESTORED",
            "pg3 of b1 on t2: why",
            "3 shards on t1 found damaged, 2 repaired",
        ] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
    }

    #[test]
    fn field_names_of_json_are_stable() {
        let json =
            serde_json::to_value(Status::new("m:1".into(), reply([TargetState::Up; 3])).unwrap()).unwrap();
        let keys =
            |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ");
        assert_eq!(
            keys(&json),
            "blocks_to_delete capacity cluster_id default_policy engine epoch free healing healthy inodes meta orphans \
             placement servers sessions targets trouble version"
        );
        assert_eq!(keys(&json["servers"][0]), "address id name state");
        assert_eq!(
            keys(&json["targets"][0]),
            "capacity domain free full groups id message path scrub server shards state"
        );
        assert_eq!(
            keys(&json["targets"][0]["scrub"]),
            "bytes_done bytes_total completed_ms running shards_bad shards_repaired target"
        );
        assert_eq!(
            keys(&json["healing"]),
            "bytes_copied checks_left elapsed_ms eta_ms moves_done moves_left problems rates rebalancing \
             shards_copied shards_lost"
        );
        assert_eq!(keys(&json["placement"][0]), "degraded groups lacking unavailable width");
        assert_eq!(keys(&json["sessions"][0]), "attached client handles id idle_ms leases lock_waits locks");
    }

    #[test]
    fn a_map_that_contradicts_itself_is_an_error() {
        let mut bad = reply([TargetState::Up; 3]);
        bad.map.as_mut().unwrap().targets[0].server = 99;
        assert!(Status::new("m:1".into(), bad).is_err());
    }
}
