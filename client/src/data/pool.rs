//! Connections by lane and server, opened when first needed and replaced when broken.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{FsError, FsResult, ServerId};
use parking_lot::Mutex;

use super::{
    connection::{Connection, Peer},
    memory,
    socket::Way,
};
use crate::{
    Network, Options,
    engine::{Engine, LaneId, lane},
};

/// After a failed attempt, the server is not tried again for this long: its other users get the same error at once
/// and go to another copy.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

pub(super) struct Pool {
    engine: Arc<Engine>,
    cluster_id: String,
    client: String,
    /// Whether servers on this host are reached through their Unix sockets.
    local: bool,
    /// Whether those may read this process's memory.
    lends: bool,
    network: Option<Arc<dyn Network>>,
    memory: memory::Pool,
    /// How long a server that cannot be reached is expected back.
    patience: Duration,
    slots: Mutex<HashMap<(LaneId, ServerId), Arc<Slot>>>,
    outages: Mutex<HashMap<ServerId, Outage>>,
    /// How servers are reached, as far as that was said.
    said: Mutex<HashMap<ServerId, Way>>,
}

/// One connection's place. The async lock is held while connecting, so that one attempt serves all who wait.
#[derive(Default)]
struct Slot {
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    address: String,
    connection: Option<Arc<Connection>>,
    failed: Option<(Instant, FsError)>,
}

/// Attempts in a row, of any lane, that did not reach a server.
struct Outage {
    first: Instant,
    last: Instant,
}

impl Pool {
    pub(super) fn new(
        engine: Arc<Engine>,
        memory: memory::Pool,
        cluster_id: String,
        options: &Options,
    ) -> Pool {
        Pool {
            engine,
            cluster_id,
            client: options.description.clone(),
            local: options.local_sockets && options.network.is_none(),
            lends: options.local_writes,
            network: options.network.clone(),
            memory,
            patience: options.operation_timeout,
            slots: Mutex::default(),
            outages: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// A usable connection of this thread's lane to `server`, which the map says is at `address`.
    ///
    /// # Errors
    /// `EHOSTUNREACH` when there is none, `EIO` when there has been none for as long as an operation may take.
    pub(super) async fn get(&self, server: ServerId, address: &str) -> FsResult<Arc<Connection>> {
        let slot = self.slots.lock().entry((lane(), server)).or_default().clone();
        let mut state = slot.state.lock().await;
        if state.address != address {
            *state = State { address: address.to_owned(), ..State::default() };
        }
        if let Some(connection) = state.connection.as_ref().filter(|c| c.usable()) {
            return Ok(connection.clone());
        }
        if let Some((at, error)) = &state.failed
            && at.elapsed() < RETRY_PAUSE
        {
            return Err(error.clone());
        }
        let peer = Peer {
            server,
            address: address.to_owned(),
            cluster_id: self.cluster_id.clone(),
            client: self.client.clone(),
            local: self.local,
            lends: self.lends,
            network: self.network.clone(),
        };
        match Connection::open(&self.engine, &peer, &self.memory).await {
            Ok(connection) => {
                self.say(server, address, connection.way());
                self.outages.lock().remove(&server);
                state.failed = None;
                state.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(e) => {
                let error = if self.is_expected(server) { e } else { e.to_users() };
                state.failed = Some((Instant::now(), error.clone()));
                state.connection = None;
                Err(error)
            }
        }
    }

    /// Notes that a server was not reached, and says whether to wait for it: nobody waits longer than the first who found it gone,
    /// or a file of which many pages are out of reach would cost its reader as many waits. After a time in which nobody has
    /// asked, it may have been there in between.
    fn is_expected(&self, server: ServerId) -> bool {
        let now = Instant::now();
        let mut outages = self.outages.lock();
        let outage = outages.entry(server).or_insert(Outage { first: now, last: now });
        if now - outage.last >= self.patience {
            outage.first = now;
        }
        outage.last = now;
        now - outage.first < self.patience
    }

    /// Says once how a server is reached, and again when that has changed.
    fn say(&self, server: ServerId, address: &str, way: &Way) {
        if self.said.lock().insert(server, way.clone()).as_ref() != Some(way) {
            tracing::info!("data server {server} ({address}) is reached over {way}");
        }
    }
}
