//! Metaservers, the servers of their store, data servers and clients on hosts of their own; everything that can go wrong with the metadata goes
//! wrong, in an order that follows from a seed.
//!
//! Meanwhile clients make, append, rename and remove ([`super::work`]), look at what others have just published, count under a
//! lock, and import trees, each by a client that comes and goes. No operation may fail, be lost or be done twice, nobody may see what is older than what was published before, and no lock may
//! be held by two.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Seek, Write},
    net::Ipv4Addr,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use fjordfs_tests::{
    Cluster, MountPoint, Network, Setup,
    engines::{Etcd, Hosts, Postgres},
    fjord,
    locks::{self, Kind},
    network::HostNo,
    process::{own_descriptors, run_within},
    rng,
    tree::{ALL, Tree, assert_same},
    wait::wait_for,
};
use rand::{Rng, seq::SliceRandom};
use rustix::process::Signal;

use super::{TAKE_OVER_MAX, found, work};

const STANDBYS: usize = 2;
const CLIENTS: usize = 2;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Fault {
    /// kill -9, and started again.
    KillOwner,
    /// SIGSTOP until another serves.
    PauseOwner,
    /// Nothing reaches the owner's host or comes from it until another serves.
    CutOwner,
    /// The owner does not reach the store, but everybody reaches the owner.
    CutOwnerFromStore,
    /// The owner lets go of the store.
    HandOver,
    /// kill -9 of the leader of etcd, and started again.
    KillLeader,
    /// SIGSTOP of the leader of etcd, or of PostgreSQL's primary, for some seconds.
    PauseLeader,
    /// Nothing reaches the host of the leader, or of the primary, or comes from it, for some seconds.
    CutLeader,
    /// kill -9 of two members of three, and started again after some seconds.
    KillQuorum,
    /// The servers of the store do not reach each other for some seconds; everybody reaches them.
    CutMembers,
    /// kill -9 of PostgreSQL's standby, and started again after some seconds.
    KillReplica,
    /// kill -9 of PostgreSQL's primary; the standby is promoted. For good: the last fault of a run.
    Promote,
}

/// Those after which another owns the store.
pub(super) const OF_OWNERS: [Fault; 5] =
    [Fault::KillOwner, Fault::PauseOwner, Fault::CutOwner, Fault::CutOwnerFromStore, Fault::HandOver];
/// Those of the store.
const OF_ETCD: [Fault; 5] =
    [Fault::KillLeader, Fault::PauseLeader, Fault::CutLeader, Fault::KillQuorum, Fault::CutMembers];

const OF_POSTGRES: [Fault; 4] = [Fault::PauseLeader, Fault::CutLeader, Fault::CutMembers, Fault::KillReplica];

/// Hosts of the store's servers, behind all others.
struct Members {
    network: Arc<Network>,
    first: HostNo,
}

impl Hosts for Members {
    fn address(&self, n: usize) -> Ipv4Addr {
        Network::address(self.first + n)
    }

    fn enter(&self, command: &mut Command, n: usize) {
        self.network.enter(command, self.first + n);
    }

    fn on(&self, n: usize, act: &mut (dyn FnMut() + Send)) {
        self.network.on(self.first + n, act);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Engine {
    Etcd,
    Postgres,
}

/// The servers of the store.
enum Store {
    Etcd(Etcd),
    Postgres(Postgres),
}

impl Store {
    /// Number of the server that leads.
    fn leader(&self) -> usize {
        match self {
            Store::Etcd(etcd) => etcd.leader(),
            Store::Postgres(_) => 0,
        }
    }

    fn servers(&self) -> usize {
        match self {
            Store::Etcd(_) => 3,
            Store::Postgres(_) => 2,
        }
    }

    fn signal(&self, n: usize, signal: Signal) {
        match self {
            Store::Etcd(etcd) => etcd.signal_member(n, signal),
            Store::Postgres(postgres) => postgres.signal_server(n, signal),
        }
    }

    fn kill(&mut self, n: usize) {
        match self {
            Store::Etcd(etcd) => etcd.kill_member(n),
            Store::Postgres(postgres) => postgres.kill_server(n),
        }
    }

    fn start(&mut self, n: usize) {
        match self {
            Store::Etcd(etcd) => etcd.start_member(n),
            Store::Postgres(postgres) => postgres.start_server(n),
        }
    }

    fn promote(&self) {
        if let Store::Postgres(postgres) = self {
            postgres.promote();
        }
    }
}

pub(super) struct Stage {
    cluster: Cluster,
    store: Store,
    network: Arc<Network>,
    first_member: HostNo,
    /// Times from a fault to the next owner's first word.
    take_overs: Vec<Duration>,
}

/// Whether a metaserver's log ends with it serving.
fn serves(log: &str) -> bool {
    log.rfind("listening on") > log.rfind("standing by")
}

impl Stage {
    pub(super) fn new(engine: Engine, seed: u64) -> Stage {
        let mut setup = Setup { servers: 2, standbys: STANDBYS, ..Setup::default() };
        let first_member = setup.hosts(CLIENTS);
        let network = Arc::new(Network::new(first_member + 3, seed));
        let hosts = Box::new(Members { network: Arc::clone(&network), first: first_member });
        let (store, url) = match engine {
            Engine::Etcd => {
                let etcd = Etcd::start_on(hosts);
                let url = etcd.url("fjord");
                (Store::Etcd(etcd), url)
            }
            Engine::Postgres => {
                let mut postgres = Postgres::start_on(hosts);
                let url = postgres.url();
                (Store::Postgres(postgres), url)
            }
        };
        setup.store = Some(url);
        setup.network = Some(Arc::clone(&network));
        let cluster = Cluster::start("takeover-faults", setup);
        Stage { cluster, store, network, first_member, take_overs: Vec::new() }
    }

    pub(super) fn mount(&self, client: usize) -> MountPoint {
        let dir = self.cluster.dir(&format!("client{client}"));
        MountPoint::of(self.cluster.mount_command(client, &dir, ""), &dir, self.cluster.folder())
    }

    fn log(&mut self, n: usize) -> String {
        self.cluster.metaserver(n).as_ref().map(|server| server.log()).unwrap_or_default()
    }

    /// Waits until one serves and the others stand by.
    pub(super) fn wait_settled(&mut self) -> usize {
        wait_for("one owner, and standbys", TAKE_OVER_MAX, || {
            let logs: Vec<String> = (0..=STANDBYS).map(|n| self.log(n)).collect();
            let serving: Vec<usize> = (0..=STANDBYS).filter(|n| serves(&logs[*n])).collect();
            match serving[..] {
                [owner] if logs.iter().all(|log| log.contains("standing by")) => Ok(owner),
                _ => Err(format!("{serving:?} serve: {}", logs.join("\n---\n"))),
            }
        })
    }

    fn wait_other(&mut self, owner: usize, since: Instant) {
        wait_for("another owner", TAKE_OVER_MAX, || {
            let other = (0..=STANDBYS).find(|n| *n != owner && serves(&self.log(*n)));
            other.ok_or_else(|| format!("nobody took over from {owner}"))
        });
        self.take_overs.push(since.elapsed());
    }

    fn each_way(from: HostNo, to: HostNo, act: impl Fn(HostNo, HostNo)) {
        act(from, to);
        act(to, from);
    }

    /// Cuts or joins a host and others.
    fn part(&self, host: HostNo, others: impl Iterator<Item = HostNo>, cut: bool) {
        for other in others.filter(|other| *other != host) {
            Stage::each_way(
                host,
                other,
                |a, b| {
                    if cut { self.network.cut(a, b) } else { self.network.join(a, b) }
                },
            );
        }
    }

    /// One fault from its beginning to its end.
    pub(super) fn suffer(&mut self, fault: Fault, owner: usize, lasts: Duration) {
        let begun = Instant::now();
        let host = self.cluster.setup().metaserver_host(owner);
        let members = self.first_member..self.first_member + self.store.servers();
        let everybody = 0..self.network.hosts();
        match fault {
            Fault::KillOwner => {
                *self.cluster.metaserver(owner) = None;
                self.wait_other(owner, begun);
                self.cluster.start_metaserver(owner);
            }
            Fault::PauseOwner => {
                self.cluster.metaserver(owner).as_mut().unwrap().signal(Signal::STOP);
                self.wait_other(owner, begun);
                self.cluster.metaserver(owner).as_mut().unwrap().signal(Signal::CONT);
            }
            Fault::CutOwner | Fault::CutOwnerFromStore => {
                let from = if fault == Fault::CutOwner { everybody } else { members };
                self.part(host, from.clone(), true);
                self.wait_other(owner, begun);
                self.part(host, from, false);
            }
            Fault::HandOver => {
                self.cluster.fjord(["meta", "handover"]).ok();
                self.wait_other(owner, begun);
            }
            Fault::KillLeader => {
                let leader = self.store.leader();
                self.store.kill(leader);
                std::thread::sleep(lasts);
                self.store.start(leader);
            }
            Fault::PauseLeader => {
                let leader = self.store.leader();
                self.store.signal(leader, Signal::STOP);
                std::thread::sleep(lasts);
                self.store.signal(leader, Signal::CONT);
            }
            Fault::CutLeader => {
                let leader = self.first_member + self.store.leader();
                self.part(leader, everybody.clone(), true);
                std::thread::sleep(lasts);
                self.part(leader, everybody, false);
            }
            Fault::KillQuorum => {
                let leader = self.store.leader();
                let two = [leader, (leader + 1) % 3];
                two.iter().for_each(|n| self.store.kill(*n));
                std::thread::sleep(lasts);
                two.iter().for_each(|n| self.store.start(*n));
            }
            Fault::KillReplica => {
                self.store.kill(1);
                std::thread::sleep(lasts);
                self.store.start(1);
            }
            Fault::Promote => {
                self.store.kill(0);
                std::thread::sleep(lasts);
                self.store.promote();
            }
            Fault::CutMembers => {
                members.clone().for_each(|member| self.part(member, members.clone(), true));
                std::thread::sleep(lasts);
                members.clone().for_each(|member| self.part(member, members.clone(), false));
            }
        }
    }
}

/// Between two steps of those who could take all of the processors.
const PAUSE: Duration = Duration::from_millis(2);

/// Publishes ever higher numbers until told to stop.
fn publish(file: &Path, published: &AtomicU64, stop: &AtomicBool) {
    let next = file.with_extension("next");
    for n in 1u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        fs::write(&next, n.to_string()).unwrap();
        fs::rename(&next, file).unwrap();
        published.store(n, Ordering::SeqCst);
        std::thread::sleep(PAUSE);
    }
}

/// Looks at what is published, by way of another client; returns how often.
fn look(file: &Path, published: &AtomicU64, stop: &AtomicBool) -> u64 {
    let mut looks = 0;
    while !stop.load(Ordering::Relaxed) {
        let least = published.load(Ordering::SeqCst);
        if least == 0 {
            continue;
        }
        let seen: u64 = fs::read_to_string(file).unwrap().parse().unwrap();
        assert!(seen >= least, "{seen} was read after {least} had been published");
        looks += 1;
        std::thread::sleep(PAUSE);
    }
    looks
}

/// Adds one to the number in a file again and again, each time under its lock; returns how often.
fn count(file: &Path, stop: &AtomicBool) -> u64 {
    let mut file = fs::File::options().read(true).write(true).open(file).unwrap();
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        locks::flock(&file, Kind::Write, true).unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        let number: u64 = text.trim().parse().unwrap();
        file.rewind().unwrap();
        write!(file, "{}", number + 1).unwrap();
        locks::flock(&file, Kind::Unlock, true).unwrap();
        times += 1;
    }
    times
}

/// Copied in again and again while faults happen: small enough that it is begun, and ends, at many moments.
const IMPORTED: Tree = Tree {
    directories: 6,
    small: 60,
    small_max: 40_000,
    large: 1,
    large_size: 3 << 20,
    sparse: 1,
    symlinks: 6,
    hard_links: 4,
};

/// Longer than an import waits for what does not answer.
const IMPORT_MAX: Duration = Duration::from_secs(180);

/// Where the import with this number goes.
fn imported(number: u64) -> String {
    format!("import{number}")
}

/// Imports `source` again and again, each time with a client of its own; returns how often.
fn import(source: &Path, meta: &str, network: &Network, stop: &AtomicBool) -> u64 {
    let mut times = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut command = fjord(["import", "--quiet", "--meta", meta]);
        command.arg(source).arg(format!("/{}", imported(times)));
        network.enter(&mut command, Setup::ADMIN_HOST);
        run_within(command, IMPORT_MAX).ok();
        times += 1;
    }
    times
}

/// Lets everybody end when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Lets every kind of fault of the store happen once, and of its owners so often; returns how long take-overs took.
fn run(engine: Engine, seed: u64, of_owners: usize) -> Vec<Duration> {
    let mut rng = rng::stream(seed, 0x7a4e);
    let (of_store, last): (&[Fault], _) = match engine {
        Engine::Etcd => (&OF_ETCD, None),
        Engine::Postgres => (&OF_POSTGRES, Some(Fault::Promote)),
    };
    let mut faults = [&OF_OWNERS.repeat(of_owners), of_store].concat();
    faults.shuffle(&mut rng);
    faults.extend(last);
    eprintln!("takeover faults on {engine:?}: seed {seed}: {faults:?}");
    let mut stage = Stage::new(engine, seed);
    let mounts = [stage.mount(0), stage.mount(1)];
    let [a, b] = [mounts[0].path(), mounts[1].path()];
    fs::write(a.join("count"), "0").unwrap();
    let source = stage.cluster.dir("source");
    IMPORTED.generate(&source, seed);
    let (meta, network) = (stage.cluster.meta_address(), Arc::clone(&stage.network));
    let (stop, published) = (&AtomicBool::new(false), &AtomicU64::new(0));
    std::thread::scope(|scope| {
        let stopping = Stop(stop);
        let workers = [a.join("one"), b.join("two")].map(|folder| {
            scope.spawn(move || {
                own_descriptors();
                (work(&folder, stop), folder)
            })
        });
        scope.spawn(move || publish(&a.join("published"), published, stop));
        let looker = scope.spawn(move || look(&b.join("published"), published, stop));
        let counters = [a, b].map(|mount| {
            scope.spawn(move || {
                own_descriptors();
                count(&mount.join("count"), stop)
            })
        });
        let importer = scope.spawn(|| import(&source, &meta, &network, stop));
        for fault in faults {
            let owner = stage.wait_settled();
            std::thread::sleep(Duration::from_millis(rng.random_range(200..1200)));
            eprintln!("{fault:?}, the owner is {owner}");
            stage.suffer(fault, owner, Duration::from_millis(rng.random_range(1000..6000)));
        }
        stage.wait_settled();
        // Something that needs the store.
        fs::create_dir(a.join("after")).unwrap();
        drop(stopping);
        let counted: u64 = counters.map(|counter| counter.join().unwrap()).iter().sum();
        for mount in [a, b] {
            assert_eq!(fs::read_to_string(mount.join("count")).unwrap(), counted.to_string());
        }
        let looks = looker.join().unwrap();
        let imports = importer.join().unwrap();
        assert!(
            looks > 0 && counted > 0 && imports > 0,
            "{looks} looks, {counted} counted, {imports} imports"
        );
        for n in 0..imports {
            let there = [a, b][n as usize % CLIENTS].join(imported(n));
            assert_same(&source, &there, ALL);
        }
        for worker in workers {
            let (there, folder) = worker.join().unwrap();
            assert!(there.len() > 2, "hardly anything was done in {}", folder.display());
            for mount in [a, b] {
                assert_eq!(found(&mount.join(folder.file_name().unwrap())), there);
            }
        }
        eprintln!("seed {seed} held: {looks} looks, {counted} counted, {imports} imports");
    });
    mounts.into_iter().for_each(MountPoint::unmount);
    stage.cluster.assert_running();
    stage.take_overs
}

/// The order that a landing has to hold; the soak looks for others that do not.
const SEED: u64 = 1;

#[test]
fn nothing_is_lost_whatever_happens_to_owners_and_to_etcd() {
    run(Engine::Etcd, rng::given().unwrap_or(SEED), 1);
}

#[test]
fn nothing_is_lost_whatever_happens_to_owners_and_to_postgres() {
    run(Engine::Postgres, rng::given().unwrap_or(SEED), 1);
}

#[test]
#[ignore = "takes as long as FJORD_SOAK_MINUTES says: tests/run soak MINUTES takeovers"]
fn soak() {
    let minutes: u64 = std::env::var("FJORD_SOAK_MINUTES").unwrap().parse().unwrap();
    let until = Instant::now() + Duration::from_secs(60 * minutes);
    let first = rng::seed("soak");
    // By engine, and the seconds that they took.
    let mut take_overs: BTreeMap<Engine, BTreeMap<u64, u64>> = BTreeMap::new();
    for (seed, engine) in (first..).zip([Engine::Etcd, Engine::Postgres].into_iter().cycle()) {
        if Instant::now() >= until {
            break;
        }
        for took in run(engine, seed, 4) {
            *take_overs.entry(engine).or_default().entry(took.as_secs()).or_default() += 1;
        }
        for (engine, seconds) in &take_overs {
            let all: u64 = seconds.values().sum();
            eprintln!(
                "soak: seeds {first} to {seed} held; {all} take-overs on {engine:?}, by seconds that they took: {seconds:?}"
            );
        }
    }
}
