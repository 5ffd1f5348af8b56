//! `fjord df`: how much fits, by policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::ExitCode,
};

use fjordfs_proto::{Domain, Policy};
use serde::Serialize;

use crate::{
    daemon,
    locate::{self, MetaArg},
    report, rpc,
    status::Status,
    units::ByteSize,
};

/// Show how many bytes of files fit into a cluster, by policy.
///
/// FREE is what still fits, USABLE what an empty cluster would take. Both count copies, failure domains and unequal
/// targets: blocks need room on as many different domains as they have copies.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  fjord df
  fjord df /mnt/fjord --json")]
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
    let df = Df::new(&Status::new(meta, reply)?);
    if args.json {
        report::print_json(&df)?;
    } else {
        report::print(&df.text())?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Df {
    cluster_id: String,
    raw_capacity: u64,
    raw_free: u64,
    policies: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    policy: String,
    default: bool,
    losses_survived: usize,
    usable: u64,
    free: u64,
}

impl Df {
    fn new(status: &Status) -> Df {
        let up: Vec<_> = status.targets.iter().filter(|t| t.state == "up").collect();
        let domains: Vec<Domain> = up.iter().map(|t| Domain::of_map(&t.domain)).collect();
        let racks: BTreeSet<&str> = domains.iter().map(|domain| domain.rack.as_str()).collect();
        // What may have one shard of a block: a rack where there are enough, else a host.
        let places = |width: usize, bytes: fn(&crate::status::Target) -> u64| {
            let mut sums: BTreeMap<(&str, &str), Vec<u64>> = BTreeMap::new();
            for (target, domain) in up.iter().zip(&domains) {
                let host = if racks.len() >= width { "" } else { domain.host.as_str() };
                sums.entry((&domain.rack, host)).or_default().push(bytes(target));
            }
            sums.into_values().collect::<Vec<_>>()
        };
        let shown = (1..=3).filter_map(Policy::replica).map(|p| p.to_string());
        let mut policies: Vec<String> = shown.chain([status.default_policy.clone()]).collect();
        policies.sort();
        policies.dedup();
        let rows = policies.into_iter().filter_map(|name| {
            let policy: Policy = name.parse().ok()?;
            (policy.width() <= up.len()).then(|| Row {
                default: name == status.default_policy,
                policy: name,
                losses_survived: policy.losses_survived(),
                usable: usable(&places(policy.width(), |t| t.capacity), policy),
                free: usable(&places(policy.width(), |t| if t.full { 0 } else { t.free }), policy),
            })
        });
        Df {
            cluster_id: status.cluster_id.clone(),
            raw_capacity: status.capacity,
            raw_free: status.free,
            policies: rows.collect(),
        }
    }

    fn text(&self) -> String {
        let mut table = report::table(&["POLICY", ">USABLE", ">FREE", ">USED", "SURVIVES THE LOSS OF"]);
        for row in &self.policies {
            let used = 100.0 - 100.0 * row.free as f64 / row.usable.max(1) as f64;
            table.add_row([
                row.policy.clone(),
                ByteSize(row.usable).to_string(),
                ByteSize(row.free).to_string(),
                format!("{:.0}%", used.clamp(0.0, 100.0)),
                match (row.losses_survived, row.default) {
                    (0, false) => "nothing".to_owned(),
                    (0, true) => "nothing (default)".to_owned(),
                    (n, false) => crate::units::count(n as u64, "target"),
                    (n, true) => format!("{} (default)", crate::units::count(n as u64, "target")),
                },
            ]);
        }
        let mut text = report::lines(&table);
        if self.policies.is_empty() {
            text = "no target is up: `fjord status` shows why\n".to_owned();
        }
        text
    }
}

/// Bytes of files that fit under a policy.
fn usable(domains: &[Vec<u64>], policy: Policy) -> u64 {
    shards_fit(domains, policy.width()).saturating_mul(policy.data_shards().into())
}

/// Bytes of one shard of everything that fit when each block needs room in `width` different domains, or on that many
/// different targets where there are fewer domains.
///
/// With x bytes of files, a place of size f can hold at most min(f, x) of their copies, and x fits exactly when these
/// sum up to x × copies. The largest such x is found by bisection.
fn shards_fit(domains: &[Vec<u64>], width: usize) -> u64 {
    let places: Vec<u64> = if domains.len() >= width {
        domains.iter().map(|targets| targets.iter().sum()).collect()
    } else {
        domains.iter().flatten().copied().collect()
    };
    let fits = |x: u64| {
        let room: u128 = places.iter().map(|f| u128::from((*f).min(x))).sum();
        room >= u128::from(x) * width as u128
    };
    let (mut low, mut high) = (0, places.iter().fold(0u64, |sum, f| sum.saturating_add(*f)));
    while low < high {
        let middle = high - (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;
    use fjordfs_proto::cluster::TargetState;

    #[test]
    fn copies_and_unequal_targets_count() {
        let each = |sizes: &[u64]| sizes.iter().map(|s| vec![*s]).collect::<Vec<_>>();
        assert_eq!(shards_fit(&each(&[100, 100, 100]), 1), 300);
        assert_eq!(shards_fit(&each(&[100, 100, 100]), 2), 150);
        assert_eq!(shards_fit(&each(&[100, 100, 100]), 3), 100);
        // The large one can only hold one copy of each block.
        assert_eq!(shards_fit(&each(&[1000, 10, 10]), 2), 20);
        assert_eq!(shards_fit(&[], 2), 0);
        assert_eq!(shards_fit(&each(&[u64::MAX, u64::MAX]), 2), u64::MAX);
        // Two domains of two targets: a copy in each domain. Three copies cannot have a domain each.
        assert_eq!(shards_fit(&[vec![50, 50], vec![50, 50]], 2), 100);
        assert_eq!(shards_fit(&[vec![50, 50], vec![50, 50]], 3), 66);
    }

    #[test]
    fn it_agrees_with_a_greedy_filler() {
        // Oracle: put one unit at a time on the places with the most room.
        let mut seed = 1u64;
        for _ in 0..200 {
            let mut next = || {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                seed >> 33
            };
            let places: Vec<u64> = (0..2 + next() % 5).map(|_| next() % 40).collect();
            let copies = (1 + next() % 2) as usize;
            let mut room = places.clone();
            let mut stored = 0;
            loop {
                room.sort_unstable_by(|a, b| b.cmp(a));
                if room[copies - 1] == 0 {
                    break;
                }
                room[..copies].iter_mut().for_each(|r| *r -= 1);
                stored += 1;
            }
            let domains: Vec<Vec<u64>> = places.iter().map(|p| vec![*p]).collect();
            assert_eq!(shards_fit(&domains, copies), stored, "{places:?} with {copies} copies");
        }
    }

    #[test]
    fn policies_that_cannot_be_placed_are_not_shown() {
        let status = Status::new(
            "m:1".into(),
            crate::status::tests::reply([TargetState::Down, TargetState::Up, TargetState::Up]),
        )
        .unwrap();
        let df = Df::new(&status);
        let names: Vec<_> = df.policies.iter().map(|r| r.policy.as_str()).collect();
        assert_eq!(names, ["replica:1", "replica:2"]);
        assert!(df.text().contains("1 target (default)"));
        assert_eq!(df.policies[1].free, 60 << 30);
    }

    #[test]
    fn racks_count_where_there_are_enough() {
        let reply = crate::status::tests::reply([TargetState::Up; 3]);
        let mut status = Status::new("m:1".into(), reply).unwrap();
        let free = |status: &Status, policy: &str| {
            Df::new(status).policies.iter().find(|row| row.policy == policy).map(|row| row.free)
        };
        let apart = free(&status, "replica:2").unwrap();
        // Two of the three share a rack now, so the third has a copy of everything.
        for (target, domain) in status.targets.iter_mut().zip(["rack=a,host=1", "rack=a,host=2", "b"]) {
            target.domain = domain.into();
        }
        assert!(free(&status, "replica:2").unwrap() < apart);
        assert_eq!(free(&status, "replica:2").unwrap(), status.targets[2].free);
    }
}
