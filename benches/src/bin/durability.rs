//! What placement means for durability: a cluster of 2 PB, the loss of one target, and the years to data loss.
//!
//! `durability [SERVERS TARGETS RACKS PGS K M TB]` makes the table with the function that metaservers use, and prints how even it
//! is, who takes part when a target is lost, how long that takes, and how often more than M members of a group are gone at once.
//! No cluster is needed; the output is the table in the README's section on operation.
//!
//! # Model
//! Targets fail independently at a constant rate. A failure is noticed after the out-after time, and then the target's groups are
//! rebuilt one after the other, in any order. Data is lost when M + 1 members of one group are gone and not rebuilt. That is
//! simulated with the table itself at failure rates so high that it happens often enough to be counted, and compared with the
//! formula; the formula then gives the years at real rates, at which a simulation would see nothing. Not in the model: failures that
//! come together (firmware, power, people), and sectors that are found to be unreadable while nothing is left to spare.

#![allow(clippy::print_stdout, reason = "the table is what this is for")]

use std::{
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    process::ExitCode,
};

use fjordfs_proto::{
    Domain, PgId, TargetId,
    cluster::{PgTable, mix},
    placement::{place, repair},
};

/// `fjord data --rebuild-rate`: what a server reads from others at most, bytes per second.
const RATE_DEFAULT: f64 = (256u64 << 20) as f64;
/// What a server with 100 Gbit/s can read while half of that is left to clients, bytes per second.
const RATE_FAST: f64 = 6.25e9;
/// `fjord meta --out-after`, seconds.
const OUT_AFTER: f64 = 600.0;
const YEAR: f64 = 365.25 * 86_400.0;

/// Failures of a target per year, and who says so.
const RATES: [(f64, &str); 2] =
    [(0.0090, "Backblaze, SSDs of 2018 to mid-2023: 0.90 % a year"), (0.0450, "five times that")];

struct Cluster {
    targets: BTreeMap<TargetId, Domain>,
    table: PgTable,
    servers: usize,
    k: usize,
    m: usize,
    /// Bytes of shards on a target.
    filled: f64,
}

impl Cluster {
    fn new([servers, each, racks, pgs, k, m, tb]: [usize; 7]) -> Option<Cluster> {
        let domain = |i: usize| {
            let server = i % servers;
            Domain { rack: format!("r{}", server % racks), host: format!("h{server}") }
        };
        let targets: BTreeMap<TargetId, Domain> =
            (0..servers * each).map(|i| (TargetId(i as u64 + 1), domain(i))).collect();
        let table = place(None, &targets, k + m, pgs)?;
        let raw = tb as f64 * 1e12 * (k + m) as f64 / k as f64;
        let filled = raw / targets.len() as f64;
        Some(Cluster { targets, table, servers, k, m, filled })
    }

    fn groups_of(&self) -> BTreeMap<TargetId, usize> {
        let mut groups: BTreeMap<TargetId, usize> = self.targets.keys().map(|t| (*t, 0)).collect();
        for target in &self.table.members {
            *groups.entry(*target).or_default() += 1;
        }
        groups
    }

    /// Most members of one group in one rack, and on one host.
    fn nearness(&self) -> (usize, usize) {
        let most = |key: &dyn Fn(&Domain) -> String| {
            let fullest = |group: &[TargetId]| {
                let mut counts: HashMap<String, usize> = HashMap::new();
                for target in group {
                    *counts.entry(key(&self.targets[target])).or_default() += 1;
                }
                counts.into_values().max().unwrap_or(0)
            };
            self.table.members.chunks(self.table.width).map(fullest).max().unwrap_or(0)
        };
        (most(&|d| d.rack.clone()), most(&|d| d.host.clone()))
    }

    /// When a target is gone: who reads or is read, and the busiest server's share of what is read, 1 being even.
    fn rebuild(&self, gone: TargetId) -> (usize, f64) {
        let mut left = self.targets.clone();
        left.remove(&gone);
        let moves = repair(&self.table, &left, |_| true);
        let mut busy: BTreeSet<TargetId> = moves.values().copied().collect();
        let mut reads: BTreeMap<&str, usize> = BTreeMap::new();
        for (cell, target) in &moves {
            busy.extend(self.table.group(PgId((cell / self.table.width) as u32)));
            *reads.entry(&left[target].host).or_default() += 1;
        }
        busy.remove(&gone);
        let busiest = reads.values().max().copied().unwrap_or(0) as f64;
        (busy.len(), busiest * self.servers as f64 / moves.len().max(1) as f64)
    }

    /// Seconds to rebuild a target: the busiest server reads K bytes for each that it restores.
    fn rebuild_time(&self, rate: f64, unevenness: f64) -> f64 {
        self.filled * self.k as f64 / self.servers as f64 * unevenness / rate
    }

    /// Losses per second by the formula, for `rate` failures of a target per second.
    ///
    /// A member of a group is gone from its failure to the rebuild of that group, which is `out_after` and then anywhere up to
    /// `rebuild` later. That M + 1 given members are gone at once begins this often: each in turn comes last, and finds the others
    /// gone. Summed over groups and choices of members.
    fn losses(&self, rate: f64, out_after: f64, rebuild: f64) -> f64 {
        let n = self.m + 1;
        let gone = rate * (out_after + rebuild / 2.0);
        let choices = (0..n).map(|i| (self.k + self.m - i) as f64 / (i + 1) as f64).product::<f64>();
        self.table.pg_count() as f64 * choices * n as f64 * rate * gone.powi(self.m as i32)
    }

    /// Losses per second when failures are played one by one: until `losses` were seen. A target that has failed is new at once, and
    /// groups that have lost data begin anew.
    fn simulate(&self, rate: f64, out_after: f64, rebuild: f64, losses: usize) -> f64 {
        let mut random = Random(7);
        let mut groups: HashMap<TargetId, Vec<usize>> = HashMap::new();
        for (cell, target) in self.table.members.iter().enumerate() {
            groups.entry(*target).or_default().push(cell / self.table.width);
        }
        let ids: Vec<TargetId> = self.targets.keys().copied().collect();
        let mut missing: HashMap<usize, BTreeMap<TargetId, f64>> = HashMap::new();
        // When what is missing is there again, so that little is kept.
        let mut returns: BinaryHeap<(std::cmp::Reverse<u64>, usize)> = BinaryHeap::new();
        let (mut now, mut seen) = (0.0f64, 0);
        while seen < losses {
            now += -random.unit().ln() / (rate * ids.len() as f64);
            while let Some((std::cmp::Reverse(at), group)) = returns.peek().copied() {
                if at as f64 / 1e3 > now {
                    break;
                }
                returns.pop();
                if let Some(members) = missing.get_mut(&group) {
                    members.retain(|_, until| *until > now);
                    if members.is_empty() {
                        missing.remove(&group);
                    }
                }
            }
            let target = ids[(random.next() % ids.len() as u64) as usize];
            for group in &groups[&target] {
                let until = now + out_after + random.unit() * rebuild;
                let members = missing.entry(*group).or_default();
                members.retain(|_, until| *until > now);
                members.insert(target, until);
                returns.push((std::cmp::Reverse((until * 1e3) as u64), *group));
                if members.len() > self.m {
                    seen += 1;
                    members.clear();
                }
            }
        }
        seen as f64 / now
    }
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 += 1;
        mix(self.0)
    }

    /// Above 0, up to 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 1.0) / (1u64 << 53) as f64
    }
}

fn print(cluster: &Cluster, tb: usize, racks: usize) {
    let Cluster { k, m, servers, table, targets, .. } = cluster;
    let groups = cluster.groups_of();
    let ideal = table.members.len() as f64 / targets.len() as f64;
    let (least, most) = (groups.values().min().unwrap_or(&0), groups.values().max().unwrap_or(&0));
    let (in_rack, on_host) = cluster.nearness();
    let losses: Vec<(usize, f64)> = targets.keys().map(|target| cluster.rebuild(*target)).collect();
    let fewest = losses.iter().map(|(busy, _)| *busy).min().unwrap_or(0);
    let unevenness = losses.iter().map(|(_, uneven)| *uneven).fold(0.0, f64::max);
    println!(
        "{tb} TB of files, ec:{k}+{m}: {servers} servers in {racks} racks, {} targets of {:.1} TB of shards, {} groups",
        targets.len(),
        cluster.filled / 1e12,
        table.pg_count()
    );
    println!("groups of a target     {least} to {most}, ideal {ideal:.1}");
    println!("members of a group     at most {in_rack} in a rack, {on_host} on a host");
    println!(
        "a target is rebuilt by at least {fewest} of the {} others ({:.0} %)",
        targets.len() - 1,
        100.0 * fewest as f64 / (targets.len() - 1) as f64
    );
    println!();
    println!("| each server reads | a target is rebuilt in | failures of a target | years to data loss |");
    println!("|---|---|---|---|");
    for (name, rate) in [("256 MiB/s (default)", RATE_DEFAULT), ("6.25 GB/s", RATE_FAST)] {
        let rebuild = cluster.rebuild_time(rate, unevenness);
        for (afr, source) in RATES {
            let years = 1.0 / (cluster.losses(afr / YEAR, OUT_AFTER, rebuild) * YEAR);
            println!("| {name} | {:.1} h | {source} | {years:.1e} |", rebuild / 3600.0);
        }
    }
    let rebuild = cluster.rebuild_time(RATE_DEFAULT, unevenness);
    println!();
    for afr in [20.0, 40.0, 80.0] {
        let (counted, formula) = (
            cluster.simulate(afr / YEAR, OUT_AFTER, rebuild, 300),
            cluster.losses(afr / YEAR, OUT_AFTER, rebuild),
        );
        println!(
            "check at {afr} failures of each target a year: {:.3e} losses a year counted, {:.3e} by the formula ({:.2})",
            counted * YEAR,
            formula * YEAR,
            counted / formula
        );
    }
}

fn main() -> ExitCode {
    let mut settings = [40, 8, 8, 4096, 8, 2, 2000];
    for (setting, argument) in settings.iter_mut().zip(std::env::args().skip(1)) {
        match argument.parse() {
            Ok(number) if number > 0 => *setting = number,
            _ => {
                eprintln!("usage: durability [SERVERS TARGETS RACKS PGS K M TB], all above 0");
                return ExitCode::from(2);
            }
        }
    }
    let Some(cluster) = Cluster::new(settings) else {
        eprintln!("there are fewer targets than shards of a block");
        return ExitCode::FAILURE;
    };
    print(&cluster, settings[6], settings[2]);
    ExitCode::SUCCESS
}
