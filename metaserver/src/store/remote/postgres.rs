//! PostgreSQL, and what speaks its protocol.
//!
//! One table of keys and values. A transaction is one statement, so it is one round trip and its own transaction; it uses
//! nothing that the distributed engines lack. Two connections: reads do not queue behind a commit that waits for the
//! standby. What is sent on one connection happens in its order.
//!
//! # Time-outs
//! A statement that is not answered is not sent again on the same connection, where it would only queue, nor soon on
//! another, where it would wait for the first and use up the server's connections: a commit waits for as long as the
//! standby is away. TCP notices a server that is gone ([`session`]). One that is there and silent is left for another
//! connection after [`PATIENCE`], and each time after twice as long.

mod session;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::Mutex;
use tokio_postgres::error::SqlState;

use super::{
    Fault, Limits, Link,
    owner::{OWNER, Write},
};
use crate::store::{Order, Pair, StoreError, StoreResult, url::Place};
use session::{Server, Session};

/// The first part locks the owner's row and, after a wait for it, looks at it again: the rest happens only if it was as expected.
const APPLY: &str = "\
    WITH owner AS (UPDATE fjord_meta SET value = $3 WHERE key = $1 AND value = $2 RETURNING 1), \
    removed AS (DELETE FROM fjord_meta WHERE key = ANY ($4) AND EXISTS (SELECT 1 FROM owner)), \
    written AS (INSERT INTO fjord_meta SELECT w.k, w.v FROM unnest($5::bytea[], $6::bytea[]) AS w (k, v) \
        WHERE EXISTS (SELECT 1 FROM owner) ON CONFLICT (key) DO UPDATE SET value = excluded.value) \
    SELECT count(*) FROM owner";
const UP: &str = "SELECT key, value FROM fjord_meta WHERE key >= $1 AND key < $2 ORDER BY key LIMIT $3";
const DOWN: &str =
    "SELECT key, value FROM fjord_meta WHERE key >= $1 AND key < $2 ORDER BY key DESC LIMIT $3";

const NOTE: &str =
    "INSERT INTO fjord_meta VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";

/// How long a server may be silent, at first.
const PATIENCE: Duration = Duration::from_secs(10);
/// It is doubled so often.
const DOUBLINGS_MAX: u32 = 5;
/// Of reads, which hold nothing up on the server.
const READ_PATIENCE: Duration = Duration::from_millis(1800);

type Slot = Mutex<Option<Arc<Session>>>;

pub(super) struct Postgres {
    servers: Vec<Server>,
    writing: Slot,
    reading: Slot,
    /// Times in a row that a server was left because it was silent.
    silences: AtomicU32,
    place: String,
}

impl Postgres {
    pub(super) async fn open(place: &Place) -> StoreResult<Postgres> {
        let wrong = |why| StoreError::Place { text: place.to_string(), why };
        let Place::Postgres { url, access } = place else {
            return Err(wrong("it is no PostgreSQL".into()));
        };
        let store = Postgres {
            servers: session::servers(url, access).map_err(wrong)?,
            writing: Mutex::default(),
            reading: Mutex::default(),
            silences: AtomicU32::new(0),
            place: place.to_string(),
        };
        match store.connect().await {
            Err(Fault::Fatal(e)) => Err(e),
            Ok(session) => {
                if !session.synchronous {
                    tracing::warn!(
                        store = %place,
                        "no synchronous_standby_names: what was acknowledged last is lost with this server"
                    );
                }
                Ok(store)
            }
            // It may come up later.
            Err(Fault::Unavailable(why)) => {
                tracing::warn!(store = %place, why, "cannot connect yet");
                Ok(store)
            }
        }
    }

    /// The connection in a slot. Whoever comes while another connects waits, in order.
    async fn session(&self, slot: &Slot) -> Result<Arc<Session>, Fault> {
        let mut slot = slot.lock().await;
        if let Some(session) = slot.as_ref().filter(|session| !session.client.is_closed()) {
            return Ok(session.clone());
        }
        let session = self.connect().await.map_err(|fault| match fault {
            // It was of use once: this is a standby that is not as far yet, or somebody at work on it.
            Fault::Fatal(e) => Fault::Unavailable(e.to_string()),
            other => other,
        })?;
        *slot = Some(session.clone());
        Ok(session)
    }

    /// Of several servers, the primary.
    async fn connect(&self) -> Result<Arc<Session>, Fault> {
        let mut why = Vec::new();
        for server in &self.servers {
            match server.connect().await {
                Ok(session) => return Ok(Arc::new(session)),
                Err(session::Error::Postgres(e)) => match self.fault(&e) {
                    fault @ Fault::Fatal(_) => return Err(fault),
                    Fault::Unavailable(text) => why.push(format!("{}: {text}", server.name)),
                },
                Err(session::Error::Unfit(what)) => {
                    return Err(Fault::Fatal(StoreError::Place { text: self.place.clone(), why: what }));
                }
                Err(session::Error::Silent) => why.push(format!("{}: no answer", server.name)),
            }
        }
        Err(Fault::Unavailable(why.join("; ")))
    }

    fn fault(&self, e: &tokio_postgres::Error) -> Fault {
        let Some(code) = e.code() else { return Fault::Unavailable(said(e)) };
        match code.code().get(..2).unwrap_or_default() {
            _ if *code == SqlState::DISK_FULL => Fault::Unavailable(format!(
                "its disk is full, operations wait until there is space: {}",
                said(e)
            )),
            // Who we are, which database, what we may do, and statements that it does not know. A table that two make
            // at the same time is none of these.
            "28" | "3D" | "42" | "0A" | "22" => {
                Fault::Fatal(StoreError::Place { text: self.place.clone(), why: said(e) })
            }
            _ => Fault::Unavailable(said(e)),
        }
    }

    /// Leaves a connection, unless that has happened.
    async fn leave(&self, slot: &Slot, session: &Arc<Session>) {
        let mut slot = slot.lock().await;
        if slot.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
            *slot = None;
        }
    }

    async fn apply_on(
        &self,
        session: &Session,
        expected: &[u8],
        next: &[u8],
        writes: &[Write],
    ) -> Result<bool, Fault> {
        let removed: Vec<&[u8]> =
            writes.iter().filter(|(_, v)| v.is_none()).map(|(k, _)| k.as_slice()).collect();
        let (keys, values): (Vec<&[u8]>, Vec<&[u8]>) =
            writes.iter().filter_map(|(k, v)| Some((k.as_slice(), v.as_deref()?))).unzip();
        let row = session
            .client
            .query_one(&session.apply, &[&OWNER, &expected, &next, &removed, &keys, &values])
            .await
            .map_err(|e| self.fault(&e))?;
        if session.warned() {
            // Somebody has cancelled the wait for the standby: it happened here, and perhaps only here.
            return Err(Fault::Unavailable("it did not wait for its standby".into()));
        }
        Ok(row.get::<_, i64>(0) == 1)
    }
}

impl Link for Postgres {
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>> {
        Box::pin(async move {
            let session = self.session(&self.writing).await?;
            let silences = self.silences.load(Ordering::Relaxed);
            let patience = PATIENCE * 2u32.pow(silences.min(DOUBLINGS_MAX));
            let applying = self.apply_on(&session, &expected, &next, &writes);
            let Ok(result) = tokio::time::timeout(patience, applying).await else {
                self.silences.store(silences + 1, Ordering::Relaxed);
                self.leave(&self.writing, &session).await;
                return Err(Fault::Unavailable(format!(
                    "no answer within {} s: is its synchronous standby away?",
                    patience.as_secs()
                )));
            };
            if result.is_ok() {
                self.silences.store(0, Ordering::Relaxed);
            } else if session.client.is_closed() {
                // The next may be another server: reads shall go there, too.
                *self.reading.lock().await = None;
            }
            result
        })
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        Box::pin(async move {
            let session = self.session(&self.reading).await?;
            let statement = match order {
                Order::Ascending => &session.up,
                Order::Descending => &session.down,
            };
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let params: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&range.start, &range.end, &limit];
            let query = session.client.query(statement, &params);
            let Ok(rows) = tokio::time::timeout(READ_PATIENCE, query).await else {
                self.leave(&self.reading, &session).await;
                return Err(Fault::Unavailable("a read was not answered".into()));
            };
            let rows = rows.map_err(|e| self.fault(&e))?;
            Ok(rows.iter().map(|row| (row.get(0), Bytes::from(row.get::<_, Vec<u8>>(1)))).collect())
        })
    }

    fn limits(&self) -> Limits {
        Limits { writes: 16384, bytes: 16 << 20 }
    }

    fn note(&self, key: Vec<u8>, value: Option<Bytes>) -> BoxFuture<'_, Result<(), Fault>> {
        Box::pin(async move {
            let client = &self.session(&self.reading).await?.client;
            let done = match value {
                Some(value) => client.execute(NOTE, &[&key, &value.as_ref()]).await,
                None => client.execute("DELETE FROM fjord_meta WHERE key = $1", &[&key]).await,
            };
            done.map(drop).map_err(|e| self.fault(&e))
        })
    }

    fn health(&self) -> BoxFuture<'_, Vec<String>> {
        Box::pin(async move {
            let checks = self.servers.iter().map(|server| async {
                let said = match server.look().await {
                    Ok(found) => found,
                    Err(session::Error::Postgres(e)) => said(&e),
                    Err(session::Error::Unfit(why)) => why,
                    Err(session::Error::Silent) => "no answer".into(),
                };
                format!("{}: {said}", server.name)
            });
            futures_util::future::join_all(checks).await
        })
    }

    fn place(&self) -> &str {
        &self.place
    }
}

/// The error with its causes, of which the first only says that there is one.
fn said(e: &tokio_postgres::Error) -> String {
    let mut text = e.to_string();
    let mut cause = std::error::Error::source(e);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
