//! PostgreSQL, and what speaks its protocol.
//!
//! One table of keys and values. A transaction is one statement, so it is one round trip and its own transaction; it uses
//! nothing that the distributed engines lack. Two connections: reads do not queue behind a commit that waits for the
//! standby.

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio_postgres::{Client, Config, NoTls, Statement, config::TargetSessionAttrs, error::SqlState};

use super::{
    Fault, Limits, Link,
    owner::{OWNER, Write},
};
use crate::store::{Order, Pair, StoreError, StoreResult, url::Place};

const TABLE: &str = "CREATE TABLE IF NOT EXISTS fjord_meta (key bytea PRIMARY KEY, value bytea NOT NULL)";
/// The owner's row is always there, so that two first owners meet at it; empty means no owner.
const OWNER_ROW: &str = "INSERT INTO fjord_meta VALUES ($1, '') ON CONFLICT (key) DO NOTHING";
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

struct Session {
    client: Client,
    apply: Statement,
    up: Statement,
    down: Statement,
}

pub(super) struct Postgres {
    config: Config,
    writing: Mutex<Option<Arc<Session>>>,
    reading: Mutex<Option<Arc<Session>>>,
    place: String,
}

impl Postgres {
    pub(super) async fn open(place: &Place, url: &str) -> StoreResult<Postgres> {
        let mut config: Config = url.parse().map_err(|e: tokio_postgres::Error| StoreError::Place {
            text: place.to_string(),
            why: said(&e),
        })?;
        // Of several hosts, the primary.
        config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        config.application_name("fjord meta").connect_timeout(std::time::Duration::from_secs(1));
        let store = Postgres {
            config,
            writing: Mutex::new(None),
            reading: Mutex::new(None),
            place: place.to_string(),
        };
        match store.connect().await {
            Err(Fault::Fatal(e)) => Err(e),
            // It may come up later.
            Ok(_) | Err(Fault::Unavailable(_)) => Ok(store),
        }
    }

    async fn session(&self, slot: &Mutex<Option<Arc<Session>>>) -> Result<Arc<Session>, Fault> {
        let open = slot.lock().clone().filter(|session| !session.client.is_closed());
        if let Some(session) = open {
            return Ok(session);
        }
        let session = self.connect().await.map_err(|fault| match fault {
            // It was of use once: this is a standby that is not as far yet, or somebody at work on it.
            Fault::Fatal(e) => Fault::Unavailable(e.to_string()),
            other => other,
        })?;
        *slot.lock() = Some(session.clone());
        Ok(session)
    }

    async fn connect(&self) -> Result<Arc<Session>, Fault> {
        let fault = |e| self.fault(&e);
        let (client, connection) = self.config.connect(NoTls).await.map_err(fault)?;
        tokio::spawn(async move {
            if let Err(e) = connection.await {
                tracing::warn!(error = said(&e), "a connection to PostgreSQL ended");
            }
        });
        client.batch_execute(TABLE).await.map_err(fault)?;
        client.execute(OWNER_ROW, &[&OWNER]).await.map_err(fault)?;
        let apply = client.prepare(APPLY).await.map_err(fault)?;
        let up = client.prepare(UP).await.map_err(fault)?;
        let down = client.prepare(DOWN).await.map_err(fault)?;
        Ok(Arc::new(Session { client, apply, up, down }))
    }

    fn fault(&self, e: &tokio_postgres::Error) -> Fault {
        let Some(code) = e.code() else { return Fault::Unavailable(said(e)) };
        match code.code().get(..2).unwrap_or_default() {
            _ if *code == SqlState::DISK_FULL => {
                Fault::Fatal(StoreError::NoSpace { folder: self.place.clone().into() })
            }
            // Who we are, which database, what we may do, and statements that it does not know. A table that two make
            // at the same time is none of these.
            "28" | "3D" | "42" | "0A" | "22" => {
                Fault::Fatal(StoreError::Place { text: self.place.clone(), why: said(e) })
            }
            _ => Fault::Unavailable(said(e)),
        }
    }
}

impl Link for Postgres {
    fn apply<'a>(
        &'a self,
        expected: &'a [u8],
        next: &'a [u8],
        writes: &'a [Write],
    ) -> BoxFuture<'a, Result<bool, Fault>> {
        Box::pin(async move {
            let session = self.session(&self.writing).await?;
            let removed: Vec<&[u8]> =
                writes.iter().filter(|(_, v)| v.is_none()).map(|(k, _)| k.as_slice()).collect();
            let (keys, values): (Vec<&[u8]>, Vec<&[u8]>) =
                writes.iter().filter_map(|(k, v)| Some((k.as_slice(), v.as_deref()?))).unzip();
            let row = session
                .client
                .query_one(&session.apply, &[&OWNER, &expected, &next, &removed, &keys, &values])
                .await
                .map_err(|e| self.fault(&e))?;
            Ok(row.get::<_, i64>(0) == 1)
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
            let rows = session
                .client
                .query(statement, &[&range.start, &range.end, &limit])
                .await
                .map_err(|e| self.fault(&e))?;
            Ok(rows.iter().map(|row| (row.get(0), Bytes::from(row.get::<_, Vec<u8>>(1)))).collect())
        })
    }

    fn limits(&self) -> Limits {
        Limits { writes: 16384, bytes: 16 << 20 }
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
