//! Faults on schedule under a workload that knows what it was promised.
//!
//! [`run`] makes a cluster of hosts and faulty disks from a seed, lets [`workload`] write and read on two clients while the
//! [`schedule`] of the same seed goes wrong in front of them, then lifts every fault, waits until the cluster says that it is
//! healthy, and checks what was acknowledged from a client that has nothing cached: at once, after a scrub, and once more
//! with one data server gone; where servers are in racks ([`run_racks`]), without a whole rack, and without as many others. The seed is printed; the same seed gives the same schedule (the interleaving with the workload is
//! the kernel's).
//!
//! # What may happen, and what not
//! While something is wrong an operation may fail with any errno, and is then neither done nor undone: every later state
//! must be explained by it having happened or not. It must end. What was acknowledged (by `fsync`, and for names by `fsync` of
//! the folder) holds from then on, for every client. What a read returns is right, whenever it is.

mod content;
mod director;
mod ledger;
mod schedule;
mod workload;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rand::Rng;

pub use self::schedule::{Fault, Schedule, Shape, Step};
use self::{director::Director, ledger::Ledger, workload::Workload};
use crate::{
    Cluster, MountPoint, Network, Scratch, Setup,
    disk::FaultyDisk,
    rng,
    status::Status,
    wait::{SOON, wait_for},
};

/// Clients that work all the time.
const CLIENTS: usize = 2;

/// Options of these clients. One waits for the metaserver at every close, the other decides itself.
const OPTIONS: [&str; CLIENTS] = ["timeout=20s", "timeout=20s,close=sync"];

/// What a run did; for the report of a soak.
#[derive(Clone, Default, Debug)]
pub struct Counts {
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Operations of the workload that succeeded, and that failed.
    pub operations: (u64, u64),
    /// States acknowledged.
    pub acknowledged: u64,
    /// Reads that were verified while things went wrong.
    pub reads_verified: u64,
    /// Packets that the network delivered, and that it dropped on purpose.
    pub packets: (u64, u64),
    /// Operations of disks that failed, lagged or lied.
    pub disk_hits: u64,
    /// The longest that an operation took.
    pub longest: Duration,
}

impl Counts {
    /// Adds another run's.
    pub fn add(&mut self, other: &Counts) {
        for (kind, n) in &other.faults {
            *self.faults.entry(kind.clone()).or_default() += n;
        }
        self.operations.0 += other.operations.0;
        self.operations.1 += other.operations.1;
        self.acknowledged += other.acknowledged;
        self.reads_verified += other.reads_verified;
        self.packets.0 += other.packets.0;
        self.packets.1 += other.packets.1;
        self.disk_hits += other.disk_hits;
        self.longest = self.longest.max(other.longest);
    }
}

/// Runs the schedule of a seed.
///
/// # Panics
/// When a promise was broken, or the cluster does not become healthy again: with the seed, the steps, and what was seen.
pub fn run(seed: u64) -> Counts {
    play(seed, &Schedule::new(seed))
}

/// Runs a schedule of racks that fail as a whole.
///
/// # Panics
/// As [`run`].
pub fn run_racks(seed: u64) -> Counts {
    play(seed, &Schedule::of_racks(seed))
}

fn play(seed: u64, schedule: &Schedule) -> Counts {
    eprintln!("chaos: seed {seed}\n{schedule}");
    let shape = schedule.shape;
    let scratch = Scratch::new("chaos");
    let disk = |name: &str, n: usize| FaultyDisk::new(scratch.path(), name, seed ^ n as u64);
    let disks: Vec<FaultyDisk> = (0..shape.servers).map(|n| disk(&format!("disk{n}"), n)).collect();
    let meta_disk = disk("meta-disk", shape.servers);
    let mut setup = Setup {
        servers: shape.servers,
        volume_size: 64 << 20,
        roots: disks.iter().map(|disk| disk.path().to_owned()).collect(),
        meta_root: Some(meta_disk.path().to_owned()),
        down_after: Duration::from_secs(2),
        out_after: Duration::from_secs(600),
        session_timeout: Duration::from_secs(8),
        domains: shape.domains(),
        ..Setup::policy(shape.policy)
    };
    let network = Arc::new(Network::new(setup.hosts(CLIENTS), seed));
    setup.network = Some(Arc::clone(&network));
    let cluster = Cluster::start("chaos", setup);
    let ledger = Arc::new(Ledger::new(seed));
    let mut director = Director::new(cluster, network, disks, meta_disk, shape);
    for (client, options) in OPTIONS.iter().enumerate() {
        director.mount(client, options);
    }
    let mounts: Vec<PathBuf> = (0..CLIENTS).map(|client| director.client_dir(client)).collect();
    let workload = Workload::start(&ledger, &mounts);
    director.play(schedule);
    let operations = workload.stop();
    let faults = director.faults.clone();
    let mut counts = Counts {
        faults,
        operations: (operations.succeeded, operations.failed),
        acknowledged: ledger.acknowledged(),
        reads_verified: operations.reads_verified,
        packets: director.network.counts(),
        disk_hits: director.disk_hits(),
        longest: operations.longest,
    };
    director.unmount_clients();
    let cluster = &mut director.cluster;
    wait_healthy(cluster, shape.servers);
    verify(cluster, &ledger, "after it healed", schedule.forgets());
    scrub(cluster);
    wait_healthy(cluster, shape.servers);
    counts.reads_verified += ledger.files() as u64;
    let lost = rng::stream(seed, 0x60ae).random_range(0..shape.servers);
    let mut losses: Vec<BTreeSet<usize>> = vec![shape.rack_of(lost).collect()];
    if shape.rack > 1 {
        // As many targets, of two racks.
        losses.push([lost, (lost + shape.rack) % shape.servers].into());
    }
    for gone in losses {
        gone.iter().for_each(|n| cluster.kill_data(*n));
        let left = shape.servers - gone.len();
        cluster.wait_status("servers to be missed", |status| status.servers_up() == left);
        verify(cluster, &ledger, &format!("without data servers {gone:?}"), schedule.forgets());
        counts.reads_verified += ledger.files() as u64;
        if shape.rack > 1 {
            gone.iter().for_each(|n| cluster.start_data(*n));
            wait_healthy(cluster, shape.servers);
        }
    }
    ledger.assert_kept(&format!("seed {seed}, which does\n{schedule}"));
    eprintln!("chaos: seed {seed} held: {counts:?}");
    counts
}

/// Whether nothing is left to mend.
fn whole(status: &Status, servers: usize) -> bool {
    let number = |list: &serde_json::Value, key: &str| list[key].as_u64().unwrap_or(u64::MAX);
    let degraded: u64 = status.list("placement").iter().map(|p| number(p, "degraded")).sum();
    let healing = &status.0["healing"];
    status.servers_up() == servers
        && status.targets_up() == servers
        && degraded == 0
        && number(healing, "moves_left") == 0
        && number(healing, "checks_left") == 0
}

fn wait_healthy(cluster: &mut Cluster, servers: usize) {
    cluster.assert_running();
    wait_for("the cluster to be whole again", 3 * SOON, || {
        let status = cluster.try_status()?;
        if whole(&status, servers) { Ok(()) } else { Err(status.to_string()) }
    });
}

fn scrub(cluster: &Cluster) {
    let passes = |status: &Status| -> Vec<u64> {
        status.list("targets").iter().map(|t| t["scrub"]["completed_ms"].as_u64().unwrap_or(0)).collect()
    };
    let before = passes(&cluster.status());
    cluster.fjord(["scrub", "start"]).ok();
    wait_for("the scrub of all targets", 3 * SOON, || {
        let status = cluster.try_status()?;
        let done = passes(&status).iter().zip(&before).all(|(now, before)| now > before);
        if done { Ok(()) } else { Err(status.to_string()) }
    });
}

/// Reads everything on a new mount. `forgets`: what was written and never synced may have become unreadable.
fn verify(cluster: &Cluster, ledger: &Ledger, when: &str, forgets: bool) {
    let dir = cluster.dir("verify");
    let mount = MountPoint::of(cluster.mount_command(0, &dir, "timeout=60s"), &dir, cluster.folder());
    for worker in 0..ledger.workers() {
        workload::verify(mount.path(), ledger, worker, when, forgets);
    }
    mount.unmount();
}

/// Changes some bytes that a target has stored: bits that rotted. Returns how many places.
fn rot(backing: &Path, rng: &mut rng::TestRng) -> usize {
    let mut changed = 0;
    for volume in crate::fault::volumes(backing) {
        let pages = crate::fault::find_written(&volume);
        for _ in 0..8.min(pages.len()) {
            let offset = pages[rng.random_range(0..pages.len())] + rng.random_range(0..4096);
            if fs::metadata(&volume).is_ok_and(|m| offset < m.len()) {
                crate::fault::flip(&crate::fault::Place { file: volume.clone(), offset }, 1);
                changed += 1;
            }
        }
    }
    changed
}
