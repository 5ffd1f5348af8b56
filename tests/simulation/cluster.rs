//! Who runs: one metaserver, some data servers, some clients. Killing and starting them.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use fjordfs_client::{Client, FsResult, Options};
use fjordfs_metaserver::{
    Config,
    fsck::{self, Report},
    serve_store,
    store::Idle,
};
use fjordfs_proto::Policy;
use fjordfs_tests::rng;
use futures_util::StreamExt;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::{
    data_server::{self, Server},
    disk::{Disk, Drive},
    network::{Host, Net, address},
    run::{trace, violation},
};

const META: Host = 0;
/// The first data server; the first client.
const DATA: Host = 1;
const CLIENT: Host = 10;

/// Times that are short, so that much happens.
const SESSION_TIMEOUT: Duration = Duration::from_secs(6);
const HEARTBEAT: Duration = Duration::from_millis(500);
const DOWN_AFTER: Duration = Duration::from_millis(2500);
/// How long clients wait: longer than all that is done to them.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(60);
/// Ten of these are the longest that a writer waits for a server that says nothing.
const HEDGE_DELAY: Duration = Duration::from_millis(200);

/// See the module.
pub(crate) struct Cluster {
    pub(crate) net: Net,
    drive: Drive,
    meta: Option<JoinHandle<()>>,
    policy: Policy,
    data: Vec<(Server, Option<JoinSet<()>>)>,
    next_client: Host,
}

impl Cluster {
    pub(crate) fn new(net: Net, seed: u64, servers: usize, policy: Policy) -> Cluster {
        let drive = Arc::new(Mutex::new(Disk::new(rng::stream(seed, 2))));
        let data = (0..servers).map(|at| {
            let host = DATA + at as Host;
            (data_server::new(host, rng::stream(seed, 100 + u64::from(host)), drive.clone()), None)
        });
        Cluster { net, drive: drive.clone(), meta: None, policy, data: data.collect(), next_client: CLIENT }
    }

    fn disk(&self) -> Disk {
        self.drive.lock().unwrap().clone()
    }

    pub(crate) fn servers(&self) -> usize {
        self.data.len()
    }

    pub(crate) fn host_of_server(at: usize) -> Host {
        DATA + at as Host
    }

    pub(crate) const fn host_of_meta() -> Host {
        META
    }

    pub(crate) fn flash(&self) -> impl Iterator<Item = &Server> {
        self.data.iter().map(|(server, _)| server)
    }

    // ---- the metaserver ----

    pub(crate) fn start_meta(&mut self) {
        trace(format_args!("the metaserver starts"));
        let mut config = Config::new("/nowhere");
        config.default_policy = self.policy;
        config.pg_count = 8;
        config.session_timeout = SESSION_TIMEOUT;
        config.heartbeat = HEARTBEAT;
        config.down_after = DOWN_AFTER;
        let connections = UnboundedReceiverStream::new(self.net.listen(META)).map(Ok::<_, Infallible>);
        let store = Arc::new(self.disk());
        self.meta = Some(tokio::spawn(async move {
            let ended = serve_store(store, "simulated", &config, connections).await;
            violation(format!("the metaserver has ended by itself: {ended:?}"));
        }));
    }

    /// Kills it, or its host with it.
    pub(crate) fn kill_meta(&mut self, power: bool) {
        trace(format_args!("the metaserver is killed, power {power}"));
        let left = self.disk().after_crash(power);
        *self.drive.lock().unwrap() = left;
        self.net.kill(META);
        if let Some(meta) = self.meta.take() {
            meta.abort();
        }
        self.check_namespace();
    }

    /// What is committed must make sense at any moment.
    pub(crate) fn check_namespace(&self) -> Report {
        let report = fsck::check(&Idle(&self.disk())).unwrap();
        for problem in &report.problems {
            violation(format!("fsck: {problem}"));
        }
        report
    }

    // ---- data servers ----

    pub(crate) fn start_data(&mut self, at: usize) {
        let host = DATA + at as Host;
        trace(format_args!("h{host} starts"));
        let connections = self.net.listen(host);
        let (server, running) = &mut self.data[at];
        *running = Some(data_server::start(server, self.net.of(host), META, connections));
    }

    pub(crate) fn kill_data(&mut self, at: usize, power: bool) {
        let host = DATA + at as Host;
        trace(format_args!("h{host} is killed, power {power}"));
        let (server, running) = &mut self.data[at];
        *running = None;
        if power {
            server.lock().unwrap().lose_unsynced();
        }
        self.net.kill(host);
    }

    // ---- clients ----

    pub(crate) fn new_client_host(&mut self) -> Host {
        self.next_client += 1;
        self.next_client - 1
    }

    /// A client on a host; waits until the metaserver is there.
    pub(crate) fn client(&self, host: Host, defer: bool) -> impl Future<Output = FsResult<Client>> + use<> {
        let options = Options {
            description: format!("h{host}"),
            operation_timeout: OPERATION_TIMEOUT,
            hedge_delay: HEDGE_DELAY,
            network: Some(Arc::new(self.net.of(host))),
            defer,
            ..Options::default()
        };
        async move {
            loop {
                match Client::connect(&address(META), options.clone()).await {
                    Err(e) if e.errno == fjordfs_client::Errno::ETIMEDOUT => {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    other => return other,
                }
            }
        }
    }
}
