//! A cluster of real processes on loopback: one metaserver and any number of data servers, each of which can be
//! killed and started again.

use std::{
    ffi::OsString,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use crate::{
    MountPoint, Network, Process, Run, Scratch,
    engines::free_port,
    fjord,
    network::HostNo,
    process::run,
    status::Status,
    wait::{SOON, wait_for},
};

/// What a cluster shall look like.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Data servers, each a process and a failure domain of its own.
    pub servers: usize,
    /// Targets of each data server.
    pub targets: usize,
    /// Default policy.
    pub policy: String,
    /// Most bytes a target may hold; `None`: what its disk has.
    pub capacity_max: Option<u64>,
    /// Bytes of a volume file: small, because every target of every test preallocates one.
    pub volume_size: u64,
    /// Bytes per second that a data server copies to complete groups; `None`: the default.
    pub rebuild_rate: Option<u64>,
    /// Where the targets of server `i` lie; default: in the scratch folder.
    pub roots: Vec<PathBuf>,
    /// Silence after which a data server counts as down.
    pub down_after: Duration,
    /// How long a target is down until its groups are rebuilt without it.
    pub out_after: Duration,
    /// Silence after which a session ends.
    pub session_timeout: Duration,
    /// How often the metaserver collects garbage and compacts; zero: when it is told to. `None`: the default.
    pub gc_interval: Option<Duration>,
    /// Failure domain of server `i`; default: each is one of its own.
    pub domains: Vec<String>,
    /// Where the metadata is; default: in the scratch folder.
    pub store: Option<String>,
    /// Metaservers that stand by at first; needs a store that they can reach.
    pub standbys: usize,
    /// Where the metadata folder lies; default: in the scratch folder.
    pub meta_root: Option<PathBuf>,
    /// Hosts to run on, one for each process ([`Setup::META_HOST`] and so on); default: this one.
    pub network: Option<Arc<Network>>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            servers: 3,
            targets: 1,
            policy: "replica:2".into(),
            capacity_max: None,
            volume_size: 256 << 20,
            rebuild_rate: None,
            roots: Vec::new(),
            down_after: Duration::from_secs(3),
            out_after: Duration::from_secs(600),
            session_timeout: Duration::from_secs(10),
            gc_interval: None,
            domains: Vec::new(),
            store: None,
            standbys: 0,
            meta_root: None,
            network: None,
        }
    }
}

impl Setup {
    /// Host of the metaserver.
    pub const META_HOST: HostNo = 0;
    /// Host of admin verbs.
    pub const ADMIN_HOST: HostNo = 1;

    /// Host of a data server.
    pub fn data_host(server: usize) -> HostNo {
        2 + server
    }

    /// Host of metaserver `n`: 0 for the first, others stand by.
    pub fn metaserver_host(&self, n: usize) -> HostNo {
        if n == 0 { Setup::META_HOST } else { 1 + self.servers + n }
    }

    /// Host of the client with this number.
    pub fn client_host(&self, client: usize) -> HostNo {
        2 + self.servers + self.standbys + client
    }

    /// Hosts of a network for this many clients.
    pub fn hosts(&self, clients: usize) -> usize {
        self.client_host(clients)
    }

    /// The default with another policy.
    pub fn policy(policy: &str) -> Setup {
        Setup { policy: policy.into(), ..Setup::default() }
    }
}

/// A running cluster. Everything ends and disappears when it is dropped.
#[derive(Debug)]
pub struct Cluster {
    setup: Setup,
    meta_port: u16,
    meta: Option<Process>,
    standby_ports: Vec<u16>,
    standbys: Vec<Option<Process>>,
    data_ports: Vec<u16>,
    data: Vec<Option<Process>>,
    mounts: std::cell::Cell<usize>,
    scratch: Scratch,
}

impl Cluster {
    /// Starts a cluster and waits until it is healthy.
    ///
    /// # Panics
    /// When it does not become healthy.
    pub fn start(name: &str, setup: Setup) -> Cluster {
        let mut cluster = Cluster {
            meta_port: free_port(),
            meta: None,
            standby_ports: (0..setup.standbys).map(|_| free_port()).collect(),
            standbys: (0..setup.standbys).map(|_| None).collect(),
            data_ports: (0..setup.servers).map(|_| free_port()).collect(),
            data: (0..setup.servers).map(|_| None).collect(),
            mounts: 0.into(),
            scratch: Scratch::new(name),
            setup,
        };
        cluster.start_meta();
        // The first is the owner, whoever starts how fast.
        if cluster.setup.standbys > 0 {
            wait_for("the first owner", SOON, || cluster.owner().ok_or("nobody listens".to_owned()));
        }
        for standby in 1..=cluster.setup.standbys {
            cluster.start_metaserver(standby);
        }
        for server in 0..cluster.setup.servers {
            cluster.start_data(server);
        }
        cluster.wait_healthy();
        cluster
    }

    /// A folder for the test's own files, on the same disk.
    pub fn dir(&self, name: &str) -> PathBuf {
        self.scratch.dir(name)
    }

    /// `host:port` of the metaserver, or of all of them.
    pub fn meta_address(&self) -> String {
        let all: Vec<String> =
            (0..=self.setup.standbys).map(|n| self.metaserver_address(n).to_string()).collect();
        all.join(",")
    }

    fn metaserver_address(&self, n: usize) -> SocketAddr {
        (self.address_of(self.setup.metaserver_host(n)), self.metaserver_port(n)).into()
    }

    fn address_of(&self, host: HostNo) -> Ipv4Addr {
        if self.setup.network.is_some() { Network::address(host) } else { Ipv4Addr::LOCALHOST }
    }

    fn placed(&self, mut command: Command, host: HostNo) -> Command {
        if let Some(network) = &self.setup.network {
            network.enter(&mut command, host);
        }
        command
    }

    fn metaserver_port(&self, n: usize) -> u16 {
        if n == 0 { self.meta_port } else { self.standby_ports[n - 1] }
    }

    /// Number of the metaserver that serves: 0 for the first, others stand by.
    pub fn owner(&self) -> Option<usize> {
        let listens = |address| TcpStream::connect(address).is_ok();
        (0..=self.setup.standbys).find(|n| {
            let address = self.metaserver_address(*n);
            match &self.setup.network {
                None => listens(address),
                Some(network) => network.on(Setup::ADMIN_HOST, || listens(address)),
            }
        })
    }

    /// Starts metaserver `n` (again).
    pub fn start_metaserver(&mut self, n: usize) {
        let log = self.scratch.path().join(format!("meta{n}.log"));
        let process = Process::start(&format!("metaserver {n}"), self.metaserver_command(n), &log);
        *self.metaserver(n) = Some(process);
    }

    /// Metaservers that are started from now on find the metadata there.
    pub fn set_store(&mut self, store: String) {
        self.setup.store = Some(store);
    }

    /// Metaservers that are started from now on collect garbage so often.
    pub fn set_gc_interval(&mut self, interval: Duration) {
        self.setup.gc_interval = Some(interval);
    }

    /// Metaserver `n`, if it has not been killed. Taken out and dropped, it gets kill -9.
    pub fn metaserver(&mut self, n: usize) -> &mut Option<Process> {
        if n == 0 { &mut self.meta } else { &mut self.standbys[n - 1] }
    }

    /// `host:port` of a data server.
    pub fn data_address(&self, server: usize) -> String {
        format!("{}:{}", self.address_of(Setup::data_host(server)), self.data_ports[server])
    }

    /// Folder of the metaserver.
    pub fn meta_folder(&self) -> PathBuf {
        self.setup.meta_root.clone().unwrap_or_else(|| self.scratch.path().to_owned()).join("meta")
    }

    /// Folder of a target.
    pub fn target_folder(&self, server: usize, target: usize) -> PathBuf {
        let root = self.setup.roots.get(server).cloned();
        root.unwrap_or_else(|| self.scratch.path().join(format!("data{server}")))
            .join(format!("target{target}"))
    }

    /// The command that starts the metaserver.
    pub fn meta_command(&self) -> Command {
        self.metaserver_command(0)
    }

    fn metaserver_command(&self, n: usize) -> Command {
        let mut command = fjord(["meta"]);
        match &self.setup.store {
            Some(store) => command.args(["--store", store]),
            None => command.arg("--data").arg(self.meta_folder()),
        };
        command.args(["--listen", &self.metaserver_address(n).to_string()]);
        command.args(["--policy", &self.setup.policy]);
        command.args(["--down-after", &seconds(self.setup.down_after)]);
        command.args(["--out-after", &seconds(self.setup.out_after)]);
        command.args(["--session-timeout", &seconds(self.setup.session_timeout)]);
        if let Some(interval) = self.setup.gc_interval {
            command.args(["--gc-interval", &seconds(interval)]);
        }
        self.placed(command, self.setup.metaserver_host(n))
    }

    /// The command that starts a data server.
    pub fn data_command(&self, server: usize) -> Command {
        let mut command =
            fjord(["data", "--meta", &self.meta_address(), "--listen", &self.data_address(server)]);
        command.args(["--name", &format!("data{server}"), "--cores", "1"]);
        command.args(["--volume-size", &self.setup.volume_size.to_string()]);
        if let Some(max) = self.setup.capacity_max {
            command.args(["--capacity-max", &max.to_string()]);
        }
        if let Some(rate) = self.setup.rebuild_rate {
            command.args(["--rebuild-rate", &rate.to_string()]);
        }
        if let Some(domain) = self.setup.domains.get(server) {
            command.args(["--domain", domain]);
        }
        for target in 0..self.setup.targets {
            let folder = self.target_folder(server, target);
            std::fs::create_dir_all(&folder).expect("target folder");
            command.arg("--target").arg(folder);
        }
        self.placed(command, Setup::data_host(server))
    }

    /// Starts the metaserver (again).
    pub fn start_meta(&mut self) {
        let log = self.scratch.path().join("meta.log");
        self.meta = Some(Process::start("the metaserver", self.meta_command(), &log));
    }

    /// Starts a data server (again).
    pub fn start_data(&mut self, server: usize) {
        let log = self.scratch.path().join(format!("data{server}.log"));
        let name = format!("data server {server}");
        self.data[server] = Some(Process::start(&name, self.data_command(server), &log));
    }

    /// kill -9.
    pub fn kill_meta(&mut self) {
        self.meta = None;
    }

    /// kill -9.
    pub fn kill_data(&mut self, server: usize) {
        self.data[server] = None;
    }

    /// SIGTERM; it must end cleanly.
    pub fn stop_data(&mut self, server: usize) {
        if let Some(mut process) = self.data[server].take() {
            process.stop();
        }
    }

    /// Stops everything cleanly, data servers first.
    pub fn stop(&mut self) {
        for server in 0..self.data.len() {
            self.stop_data(server);
        }
        if let Some(mut meta) = self.meta.take() {
            meta.stop();
        }
    }

    /// Starts everything that does not run, and waits until it is healthy.
    pub fn start_all(&mut self) {
        if self.meta.is_none() {
            self.start_meta();
        }
        for server in 0..self.data.len() {
            if self.data[server].is_none() {
                self.start_data(server);
            }
        }
        self.wait_healthy();
    }

    /// The running metaserver.
    ///
    /// # Panics
    /// When the test has killed it.
    pub fn meta(&mut self) -> &mut Process {
        self.meta.as_mut().expect("the metaserver has been killed")
    }

    /// A running data server.
    ///
    /// # Panics
    /// When the test has killed it.
    pub fn data(&mut self, server: usize) -> &mut Process {
        self.data[server].as_mut().expect("the data server has been killed")
    }

    /// Requires that nothing has died by itself.
    ///
    /// # Panics
    /// When something has.
    #[track_caller]
    pub fn assert_running(&mut self) {
        for process in self.meta.iter_mut().chain(self.data.iter_mut().flatten()) {
            process.assert_running();
        }
    }

    /// An admin verb of this cluster.
    pub fn command<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = fjord(args.into_iter().map(Into::into));
        command.env("FJORD_META", self.meta_address());
        self.placed(command, Setup::ADMIN_HOST)
    }

    /// Runs an admin verb of this cluster to its end.
    pub fn fjord<S: Into<OsString>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        run(self.command(args))
    }

    /// What `fjord status --json` says, or why it does not.
    ///
    /// # Errors
    /// The standard error of the command.
    pub fn try_status(&self) -> Result<Status, String> {
        // Exit status 1 also means "degraded": that is an answer, too.
        let got = self.fjord(["status", "--json"]);
        if got.stdout.is_empty() { Err(got.stderr) } else { Status::parse(&got.stdout) }
    }

    /// What `fjord status --json` says.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn status(&self) -> Status {
        self.try_status().unwrap_or_else(|e| panic!("fjord status: {e}"))
    }

    /// Waits until `fjord status` fits.
    ///
    /// # Panics
    /// When it does not within a minute.
    #[track_caller]
    pub fn wait_status(&self, what: &str, fits: impl Fn(&Status) -> bool) -> Status {
        wait_for(what, 2 * SOON, || {
            let status = self.try_status()?;
            if fits(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// Waits until every server and target is up.
    #[track_caller]
    pub fn wait_healthy(&mut self) {
        let (servers, targets) = (self.setup.servers, self.setup.servers * self.setup.targets);
        wait_for("all servers and targets up", 2 * SOON, || {
            self.assert_running();
            // One that was just started again still counts as up from before.
            let silent = |p: &&Process| !p.log().contains("listening on");
            if let Some(process) = self.meta.iter().chain(self.data.iter().flatten()).find(silent) {
                return Err(format!("{} does not listen yet", process.name()));
            }
            let status = self.try_status()?;
            let up = status.servers_up() == servers && status.targets_up() == targets;
            if up { Ok(()) } else { Err(status.to_string()) }
        });
    }

    /// Mounts the cluster on a new folder.
    pub fn mount(&self) -> MountPoint {
        self.mount_with("")
    }

    /// Mounts the cluster on a new folder with `-o` options.
    pub fn mount_with(&self, options: &str) -> MountPoint {
        self.mounts.set(self.mounts.get() + 1);
        let dir = self.scratch.dir(&format!("mount{}", self.mounts.get()));
        MountPoint::start(&self.meta_address(), &dir, options, self.scratch.path())
    }

    /// What it was made of.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Host of the client with this number.
    pub fn client_host(&self, client: usize) -> HostNo {
        self.setup.client_host(client)
    }

    /// The command that mounts the cluster on a folder, from the host of a client.
    pub fn mount_command(&self, client: usize, dir: &Path, options: &str) -> Command {
        let command = MountPoint::command(&self.meta_address(), dir, options);
        self.placed(command, self.setup.client_host(client))
    }

    /// Folder of everything.
    pub fn folder(&self) -> &Path {
        self.scratch.path()
    }
}

fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs())
}
