//! One seed: what fails, and when; what runs meanwhile; what must hold in the end.

use std::{
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use fjordfs_client::{
    Client, FsResult,
    upkeep::{self, Compaction},
};
use fjordfs_proto::{Policy, SessionId};
use fjordfs_tests::rng::{self, TestRng};
use rand::Rng;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    cluster::Cluster,
    dentries::Dentries,
    fate,
    moves::Rounds,
    network::{Host, Net, Weather},
    programs::{self, Places, Worker},
    record::{Actor, Records, now},
};

const CLIENTS: usize = 3;

/// Longest time of a client alone for which nothing may come of it: it keeps its leases, or asks again.
const SHORT_CUT: Duration = Duration::from_secs(1);
/// Longer than a session lasts.
const LONG_CUT: Duration = Duration::from_secs(9);

/// Everything must have come to its end this long after the last failure.
const PATIENCE: Duration = Duration::from_secs(240);

static TRACE: AtomicU64 = AtomicU64::new(0);
static PRINT: AtomicBool = AtomicBool::new(false);
static VIOLATIONS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Something has happened.
pub(crate) fn trace(what: fmt::Arguments<'_>) {
    let line = format!("{:>10.6} {what}", fate::elapsed().as_secs_f64());
    TRACE.store(xxhash_rust::xxh3::xxh3_64_with_seed(line.as_bytes(), TRACE.load(Relaxed)), Relaxed);
    if PRINT.load(Relaxed) {
        eprintln!("{line}");
    }
}

/// Something has happened that must not.
pub(crate) fn violation(what: String) {
    trace(format_args!("VIOLATION: {what}"));
    let at = fate::elapsed().as_secs_f64();
    VIOLATIONS.lock().unwrap().push(format!("at {at:.3} s: {what}"));
}

/// A task of whatever kind has panicked: nothing may.
pub(crate) fn note_panic(what: &str) {
    PANICS.lock().unwrap().push(what.to_owned());
}

pub(crate) fn panics() -> Vec<String> {
    PANICS.lock().unwrap().clone()
}

/// What became of a seed in which all held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Of everything that happened, in its order.
    pub(crate) trace: u64,
    pub(crate) operations: u64,
    pub(crate) faults: u64,
    seconds: u64,
}

impl Outcome {
    pub(crate) fn add(&mut self, other: &Outcome) {
        self.operations += other.operations;
        self.faults += other.faults;
        self.seconds += other.seconds;
    }

    pub(crate) fn encode(&self) -> String {
        format!("held {} {} {} {}", self.trace, self.operations, self.faults, self.seconds)
    }

    pub(crate) fn decode(text: &str) -> Option<Outcome> {
        let numbers: Vec<u64> =
            text.strip_prefix("held ")?.split(' ').map_while(|n| n.parse().ok()).collect();
        let [trace, operations, faults, seconds] = numbers[..] else { return None };
        Some(Outcome { trace, operations, faults, seconds })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { operations, faults, seconds, .. } = self;
        write!(f, "{operations} operations, {faults} faults, {seconds} simulated seconds")
    }
}

/// What may come of the failures of this seed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    /// Operations may fail, and sessions may be lost.
    pub(crate) may_fail: bool,
    /// The metaserver's host may lose its power: only what was synced is safe.
    pub(crate) power_fails: bool,
}

/// What fails in this seed, and how often.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// Nothing fails but packets, and everything is quick: many moves of files, and nothing else.
    calm: bool,
    cuts: bool,
    meta_kills: bool,
    meta_power: bool,
    data_kills: bool,
    data_power: bool,
    /// All hosts of the cluster lose their power at once.
    outages: bool,
    client_crashes: bool,
    short_partitions: bool,
    long_partitions: bool,
    defer: bool,
    pause_ms: u64,
    every_ms: u64,
    length: Duration,
}

/// Whether garbage is collected and blocks are compacted in this seed. A stream of its own: the other seeds stay what they were.
fn collector(seed: u64) -> Option<TestRng> {
    let mut random = rng::stream(seed, 3);
    random.random_ratio(1, 3).then_some(random)
}

impl Plan {
    fn of(random: &mut TestRng) -> Plan {
        if random.random_ratio(1, 4) {
            return Plan {
                calm: true,
                defer: random.random_ratio(4, 5),
                pause_ms: [1, 5, 30][random.random_range(0..3)],
                every_ms: 1000,
                length: Duration::from_millis(random.random_range(1000..4000)),
                ..Plan::default()
            };
        }
        let meta_power = random.random_ratio(1, 8);
        Plan {
            calm: false,
            cuts: random.random_ratio(3, 4),
            meta_kills: random.random_ratio(1, 2),
            meta_power,
            data_kills: random.random_ratio(1, 2),
            data_power: random.random_ratio(1, 6),
            outages: meta_power && random.random(),
            client_crashes: random.random_ratio(1, 3),
            short_partitions: random.random_ratio(1, 2),
            long_partitions: random.random_ratio(1, 5),
            defer: random.random_ratio(4, 5),
            pause_ms: [20, 100, 400][random.random_range(0..3)],
            every_ms: [150, 500, 1500][random.random_range(0..3)],
            length: Duration::from_millis(random.random_range(3000..8000)),
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            may_fail: self.meta_power || self.data_power || self.client_crashes || self.long_partitions,
            power_fails: self.meta_power || self.data_power,
        }
    }
}

/// Runs a seed.
///
/// # Errors
/// What did not hold.
pub(crate) fn run(seed: u64) -> Result<Outcome, String> {
    simulate(seed, async {
        let world = World::new(seed);
        let plan = world.plan;
        let rules = plan.rules();
        match tokio::time::timeout(PATIENCE + plan.length, world.play()).await {
            Ok(Ok(done)) => done,
            Ok(Err(e)) => {
                violation(format!("with {plan:?}, {rules:?}: {e}"));
                (0, 0)
            }
            Err(_) => {
                violation(format!("with {plan:?}: it did not come to its end"));
                (0, 0)
            }
        }
    })
}

/// Plays in virtual time, with the fate of a seed; `play` says how many operations and faults there were.
///
/// # Errors
/// What did not hold.
pub(crate) fn simulate(seed: u64, play: impl Future<Output = (u64, u64)>) -> Result<Outcome, String> {
    PRINT.store(std::env::var_os("FJORD_TRACE").is_some(), Relaxed);
    fate::begin(seed);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let (operations, faults) = runtime.block_on(play);
    let found = VIOLATIONS.lock().unwrap().iter().take(5).cloned().chain(panics()).collect::<Vec<_>>();
    if !found.is_empty() {
        return Err(found.join("\n"));
    }
    Ok(Outcome { trace: TRACE.load(Relaxed), operations, faults, seconds: fate::elapsed().as_secs() })
}

/// A client and its programs.
struct Seat {
    host: Host,
    actor: Actor,
    session: SessionId,
    client: Client,
    tasks: JoinSet<()>,
    /// What obeys recalls above the library.
    kernel: JoinSet<()>,
}

impl Seat {
    /// Whether the metaserver has given up on what this client had.
    fn is_lost(&self) -> bool {
        self.client.session() != self.session
    }
}

struct World {
    plan: Plan,
    random: TestRng,
    cluster: Cluster,
    records: Arc<Records>,
    rounds: Arc<Rounds>,
    seats: Vec<Option<Seat>>,
    places: Option<Places>,
    until: Instant,
    actors: Actor,
    faults: u64,
    collects: Option<TestRng>,
    collector: JoinSet<()>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = rng::stream(seed, 0);
        let plan = Plan::of(&mut random);
        let (policy, servers) = if random.random() { ("replica:2", 3) } else { ("ec:2+1", 4) };
        let policy: Policy = policy.parse().unwrap();
        let weather = Weather {
            delay_ms: [0, 2, 20, 60][random.random_range(0..4)],
            lost_in: [20, 100, 1000][random.random_range(0..3)],
        };
        let net = Net::new(seed, weather);
        let cluster = Cluster::new(net, seed, servers, policy);
        trace(format_args!("{plan:?} {weather:?} {policy}"));
        World {
            plan,
            random,
            cluster,
            records: Arc::default(),
            rounds: Arc::default(),
            seats: Vec::new(),
            places: None,
            until: Instant::now(),
            actors: 0,
            faults: 0,
            collects: collector(seed),
            collector: JoinSet::new(),
        }
    }

    /// One who collects garbage and compacts all the while, as the metaserver's process does now and then. It may fail, and be killed;
    /// what it has deleted is checked by whoever is to delete it.
    async fn start_collector(&mut self, mut random: TestRng) -> FsResult<()> {
        let host = self.cluster.new_client_host();
        let client = self.cluster.client(host, self.plan.defer).await?;
        let until = self.until;
        trace(format_args!("garbage is collected on h{host}"));
        self.collector.spawn(async move {
            let tell = |what: String| trace(format_args!("collecting: {what}"));
            while Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(random.random_range(1..1500))).await;
                let wanted = Compaction { below: random.random_range(20..=100), rate: 0, dry_run: false };
                let done = async {
                    let collected = upkeep::collect(&client, false, 0, &tell).await?;
                    let compacted = upkeep::compact(&client, wanted, &tell).await?;
                    FsResult::Ok((collected, compacted))
                };
                match done.await {
                    Ok(done) => trace(format_args!("collected: {done:?}")),
                    Err(e) => trace(format_args!("collecting failed: {e}")),
                }
            }
            if let Err(e) = client.shutdown().await {
                trace(format_args!("the collector shut down: {e}"));
            }
        });
        Ok(())
    }

    async fn play(mut self) -> FsResult<(u64, u64)> {
        self.cluster.start_meta();
        (0..self.cluster.servers()).for_each(|at| self.cluster.start_data(at));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let host = self.cluster.new_client_host();
        let first = self.cluster.client(host, true).await?;
        self.places = Some(programs::prepare(&first).await?);
        first.shutdown().await?;
        drop(first);
        self.until = Instant::now() + self.plan.length;
        for at in 0..CLIENTS {
            self.seats.push(None);
            self.take_seat(at).await?;
        }
        if let Some(random) = self.collects.take().filter(|_| !self.plan.calm) {
            self.start_collector(random).await?;
        }
        trace(format_args!("everybody is there"));
        while Instant::now() < self.until {
            let wait = Duration::from_millis(self.random.random_range(1..=self.plan.every_ms));
            tokio::time::sleep(wait).await;
            self.disturb().await?;
        }
        self.finish().await
    }

    async fn take_seat(&mut self, at: usize) -> FsResult<()> {
        let host = self.cluster.new_client_host();
        let client = self.cluster.client(host, self.plan.defer).await?;
        self.actors += 1;
        let (actor, mut tasks) = (self.actors, JoinSet::new());
        trace(format_args!("c{actor} is on h{host}"));
        let worker = self.worker(&client, actor);
        let (session, kernel) = (worker.session, worker.dentries.start());
        worker.start(self.plan.calm, &mut self.random, &mut tasks);
        self.seats[at] = Some(Seat { host, actor, session, client, tasks, kernel });
        Ok(())
    }

    fn worker(&self, client: &Client, actor: Actor) -> Worker {
        Worker {
            client: client.clone(),
            actor,
            session: client.session(),
            places: self.places.unwrap(),
            records: self.records.clone(),
            rounds: self.rounds.clone(),
            dentries: Arc::new(Dentries::new(client.clone())),
            rules: self.plan.rules(),
            until: self.until,
            pause_ms: self.plan.pause_ms,
        }
    }

    /// One failure, and its repair where that takes part.
    async fn disturb(&mut self) -> FsResult<()> {
        self.faults += 1;
        let Plan { cuts, meta_kills, meta_power, data_kills, data_power, .. } = self.plan;
        let down = Duration::from_millis(self.random.random_range(1..1500));
        match self.random.random_range(0..8) {
            0..3 if cuts => {
                self.cluster.net.cut_any();
            }
            3 if meta_kills || meta_power => {
                let power = meta_power && self.random.random();
                let outage = power && self.plan.outages && self.random.random();
                self.cluster.kill_meta(power);
                if power {
                    self.records.lose_appends();
                }
                if outage {
                    (0..self.cluster.servers()).for_each(|at| self.cluster.kill_data(at, true));
                    (0..self.cluster.servers()).for_each(|at| self.cluster.start_data(at));
                }
                tokio::time::sleep(down).await;
                self.cluster.start_meta();
            }
            4 if data_kills || data_power => {
                // One that may lose something is always the same: the others have what it loses.
                let power = data_power && self.random.random();
                let at = if power { 0 } else { self.random.random_range(0..self.cluster.servers()) };
                self.cluster.kill_data(at, power);
                tokio::time::sleep(down).await;
                self.cluster.start_data(at);
                // Nobody else fails before it is known again.
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            5 if self.plan.client_crashes => self.crash_client().await?,
            6 if self.plan.short_partitions => self.part(SHORT_CUT).await,
            7 if self.plan.long_partitions => self.part(LONG_CUT).await,
            _ => self.faults -= 1,
        }
        Ok(())
    }

    async fn crash_client(&mut self) -> FsResult<()> {
        let at = self.random.random_range(0..CLIENTS);
        let Some(seat) = self.seats[at].take() else { return Ok(()) };
        let is_lost = seat.is_lost();
        let Seat { host, actor, tasks, kernel, .. } = seat;
        trace(format_args!("c{actor} crashes"));
        drop((tasks, kernel));
        self.rounds.lose(actor, is_lost);
        self.cluster.net.kill_for_good(host);
        self.records.lose(actor, self.lost_since());
        self.take_seat(at).await
    }

    /// What a client was told from then on may be lost when it dies now. What it decides by itself is sent within a second, as
    /// far as it can be.
    fn lost_since(&self) -> u128 {
        let Plan { cuts, meta_kills, short_partitions, long_partitions, .. } = self.plan;
        match cuts || meta_kills || short_partitions || long_partitions {
            true => 0,
            false => now().saturating_sub(Duration::from_secs(3).as_nanos()),
        }
    }

    /// Somebody cannot be heard, or cannot hear, or both.
    async fn part(&mut self, longest: Duration) {
        let client = self.random.random_range(0..CLIENTS);
        let Some(host) = self.seats[client].as_ref().map(|seat| seat.host) else { return };
        let server = Cluster::host_of_server(self.random.random_range(0..self.cluster.servers()));
        let meta = Cluster::host_of_meta();
        let (a, b) =
            [(host, meta), (host, meta), (host, server), (server, meta)][self.random.random_range(0..4)];
        let ways = self.random.random_range(1..4);
        trace(format_args!("h{a} and h{b} are parted, {ways}"));
        if ways & 1 != 0 {
            self.cluster.net.hold(a, b);
        }
        if ways & 2 != 0 {
            self.cluster.net.hold(b, a);
        }
        let time = self.random.random_range(1..longest.as_millis() as u64);
        tokio::time::sleep(Duration::from_millis(time)).await;
        trace(format_args!("all links are whole"));
        self.cluster.net.release_all();
    }

    /// Nothing fails any more: everything must come to its end, and be there.
    async fn finish(mut self) -> FsResult<(u64, u64)> {
        trace(format_args!("the end begins"));
        let Plan { meta_power, .. } = self.plan;
        let rules = self.plan.rules();
        self.cluster.net.release_all();
        self.cluster.net.set_weather(Weather { delay_ms: 1, lost_in: 1_000_000 });
        for seat in self.seats.iter_mut().flatten() {
            while let Some(ended) = seat.tasks.join_next().await {
                if let Err(e) = ended {
                    violation(format!("a program of c{}: {e}", seat.actor));
                }
            }
        }
        while let Some(ended) = self.collector.join_next().await {
            if let Err(e) = ended {
                violation(format!("the collector: {e}"));
            }
        }
        for seat in std::mem::take(&mut self.seats).into_iter().flatten() {
            trace(format_args!("c{} shuts down", seat.actor));
            if seat.is_lost() {
                self.rounds.lose(seat.actor, true);
            }
            if let Err(e) = seat.client.shutdown().await {
                trace(format_args!("c{} shut down: {e}", seat.actor));
                match rules.may_fail {
                    true => {
                        self.records.lose(seat.actor, 0);
                        self.rounds.lose(seat.actor, seat.is_lost());
                    }
                    false => violation(format!("c{} shut down: {e}", seat.actor)),
                }
            }
        }
        let host = self.cluster.new_client_host();
        let last = self.cluster.client(host, true).await?;
        let places = self.places.unwrap();
        let files = programs::read_all(&last, &places, &self.records, 0, meta_power).await?;
        if !meta_power {
            self.records.check();
        }
        let worker = self.worker(&last, 0);
        let _kernel = worker.dentries.start();
        self.rounds.check(&worker).await?;
        for ino in files {
            self.check_blocks(&last, ino).await?;
        }
        last.shutdown().await?;
        // Sessions of the dead end, and what nobody needs any more is deleted.
        tokio::time::sleep(Duration::from_secs(25)).await;
        let report = self.cluster.check_namespace();
        trace(format_args!("{report:?}"));
        if report.orphans != 0 {
            violation(format!("{} inodes are kept for nobody", report.orphans));
        }
        Ok((self.records.operations(), self.faults))
    }

    /// What a file reaches is on flash, and nobody was told to delete it.
    async fn check_blocks(&self, client: &Client, ino: fjordfs_client::InodeId) -> FsResult<()> {
        for (_, extent) in client.extents(ino).await? {
            for piece in extent.pieces() {
                let block = piece.block.0;
                let flashes = || self.cluster.flash().map(|flash| flash.lock().unwrap());
                if flashes().any(|flash| flash.was_told_to_delete(block)) {
                    violation(format!("block {block} was deleted, and {ino} reaches it"));
                }
                let shards =
                    (0..8).filter(|shard| flashes().any(|flash| flash.holds((block, *shard)))).count();
                if shards == 0 && !self.plan.outages {
                    violation(format!("block {block} of {ino} is nowhere"));
                }
            }
        }
        Ok(())
    }
}
