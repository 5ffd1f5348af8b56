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
    network: Option<Arc<dyn Network>>,
    memory: memory::Pool,
    slots: Mutex<HashMap<(LaneId, ServerId), Arc<Slot>>>,
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
            network: options.network.clone(),
            memory,
            slots: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// A usable connection of this thread's lane to `server`, which the map says is at `address`.
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
            network: self.network.clone(),
        };
        match Connection::open(&self.engine, &peer, &self.memory).await {
            Ok(connection) => {
                self.say(server, address, connection.way());
                state.failed = None;
                state.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(e) => {
                state.failed = Some((Instant::now(), e.clone()));
                state.connection = None;
                Err(e)
            }
        }
    }

    /// Says once how a server is reached, and again when that has changed.
    fn say(&self, server: ServerId, address: &str, way: &Way) {
        if self.said.lock().insert(server, way.clone()).as_ref() != Some(way) {
            tracing::info!("data server {server} ({address}) is reached over {way}");
        }
    }
}
