//! Connections by lane and server, opened when first needed and replaced when broken.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{FsError, FsResult, ServerId};
use parking_lot::Mutex;

use super::{buffers::Buffers, connection::Connection};
use crate::engine::{Engine, LaneId, lane};

/// After a failed attempt, the server is not tried again for this long: its other users get the same error at once
/// and go to another copy.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

pub(super) struct Pool {
    engine: Arc<Engine>,
    cluster_id: String,
    client: String,
    buffers: Arc<Buffers>,
    slots: Mutex<HashMap<(LaneId, ServerId), Arc<Slot>>>,
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
    pub(super) fn new(engine: Arc<Engine>, cluster_id: String, client: String) -> Pool {
        Pool { engine, cluster_id, client, buffers: Arc::default(), slots: Mutex::default() }
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
        let buffers = self.buffers.clone();
        let (cluster_id, client) = (&self.cluster_id, &self.client);
        match Connection::open(&self.engine, address, server, cluster_id, client, buffers).await {
            Ok(connection) => {
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
}
