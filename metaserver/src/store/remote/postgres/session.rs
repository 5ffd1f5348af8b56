//! Connections to PostgreSQL: to which server, as whom, encrypted or not, and with which settings.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio_postgres::{
    AsyncMessage, Client, Config, NoTls, Socket, Statement,
    config::{Host, SslMode, TargetSessionAttrs},
    error::{Severity, SqlState},
    tls::MakeTlsConnect,
};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{APPLY, DOWN, OWNER, UP, said};
use crate::store::url::{Access, Secret};

const TABLE: &str = "CREATE TABLE IF NOT EXISTS fjord_meta (key bytea PRIMARY KEY, value bytea NOT NULL)";
/// The owner's row is always there, so that two first owners meet at it; empty means no owner.
const OWNER_ROW: &str = "INSERT INTO fjord_meta VALUES ($1, '') ON CONFLICT (key) DO NOTHING";
/// What the database or the user may be set to, and must not be here: a statement that is cancelled while it waits for the
/// standby, or that does not wait, is reported as a success.
const SETTINGS: [&str; 3] =
    ["SET synchronous_commit = on", "SET statement_timeout = 0", "SET lock_timeout = 0"];

/// From the first word to a session that can be used.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// The first that has all of this and is still maintained; what speaks the protocol names such a version, too.
const VERSION_MIN: u32 = 120_000;

pub(super) enum Error {
    Postgres(tokio_postgres::Error),
    /// It cannot be used, ever.
    Unfit(String),
    Silent,
}

impl From<tokio_postgres::Error> for Error {
    fn from(e: tokio_postgres::Error) -> Error {
        Error::Postgres(e)
    }
}

/// One server.
pub(super) struct Server {
    /// For people.
    pub(super) name: String,
    config: Config,
    tls: Option<MakeRustlsConnect>,
}

pub(super) struct Session {
    pub(super) client: Client,
    pub(super) apply: Statement,
    pub(super) up: Statement,
    pub(super) down: Statement,
    /// Its commits wait for a standby.
    pub(super) synchronous: bool,
    warned: Arc<AtomicBool>,
}

impl Session {
    /// Whether the server has warned of something since it was asked last. What it says stands before the answer that it
    /// concerns.
    pub(super) fn warned(&self) -> bool {
        self.warned.swap(false, Ordering::Relaxed)
    }
}

/// The servers of an address, with all that is needed to connect.
pub(super) fn servers(Secret(url): &Secret, access: &Access) -> Result<Vec<Server>, String> {
    let config: Config = url.parse().map_err(|e: tokio_postgres::Error| said(&e))?;
    let tls = tls(access)?;
    let password = match config.get_password() {
        Some(password) => Some(password.to_vec()),
        None => access.find_password()?.map(String::into_bytes),
    };
    if config.get_hosts().is_empty() {
        return Err("it names no host".into());
    }
    let ports = config.get_ports();
    let server = |(n, host): (usize, &Host)| {
        let port = ports.get(n).or(ports.first()).copied().unwrap_or(5432);
        let mut one = Config::new();
        one.application_name("fjord meta")
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            .ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable })
            .connect_timeout(Duration::from_secs(1))
            // A host that is gone without a word is noticed within some seconds, whether something was sent to it or not.
            .keepalives_idle(Duration::from_secs(2))
            .keepalives_interval(Duration::from_secs(1))
            .keepalives_retries(3)
            .tcp_user_timeout(Duration::from_secs(4))
            .port(port);
        config.get_user().map(|user| one.user(user));
        config.get_dbname().map(|name| one.dbname(name));
        config.get_options().map(|options| one.options(options));
        password.as_ref().map(|password| one.password(password));
        let name = match host {
            Host::Tcp(name) => {
                one.host(name);
                format!("{name}:{port}")
            }
            Host::Unix(path) => {
                one.host_path(path);
                path.display().to_string()
            }
        };
        Server { name, config: one, tls: tls.clone() }
    };
    Ok(config.get_hosts().iter().enumerate().map(server).collect())
}

impl Server {
    /// A session on this server, if it is the primary.
    pub(super) async fn connect(&self) -> Result<Session, Error> {
        let connecting = async {
            let (client, warned) = self.reach(&self.config).await?;
            let version = show(&client, "server_version_num").await?;
            if version.as_deref().and_then(|v| v.parse::<u32>().ok()).is_some_and(|v| v < VERSION_MIN) {
                let version = version.unwrap_or_default();
                return Err(Error::Unfit(format!("it is PostgreSQL {version}: 12 or newer is needed")));
            }
            for setting in SETTINGS {
                match client.batch_execute(setting).await {
                    // Another engine, which has no such setting.
                    Err(e) if e.code() == Some(&SqlState::UNDEFINED_OBJECT) => {}
                    other => other?,
                }
            }
            let standbys = show(&client, "synchronous_standby_names").await?;
            client.batch_execute(TABLE).await?;
            client.execute(OWNER_ROW, &[&OWNER]).await?;
            Ok(Session {
                apply: client.prepare(APPLY).await?,
                up: client.prepare(UP).await?,
                down: client.prepare(DOWN).await?,
                synchronous: standbys.is_none_or(|names| !names.is_empty()),
                client,
                warned,
            })
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.unwrap_or(Err(Error::Silent))
    }

    async fn reach(&self, config: &Config) -> Result<(Client, Arc<AtomicBool>), tokio_postgres::Error> {
        match &self.tls {
            Some(tls) => open(config, tls.clone()).await,
            None => open(config, NoTls).await,
        }
    }

    /// What this server says of itself, for people.
    pub(super) async fn look(&self) -> Result<String, Error> {
        let looking = async {
            let mut config = self.config.clone();
            config.target_session_attrs(TargetSessionAttrs::Any);
            let (client, _) = self.reach(&config).await?;
            let version = show(&client, "server_version").await?.unwrap_or_default();
            let standby = client.query_one("SELECT pg_is_in_recovery()", &[]).await;
            let role = match standby.map(|row| row.get::<_, bool>(0)) {
                Ok(true) => ", standby".into(),
                Ok(false) => {
                    let names = show(&client, "synchronous_standby_names").await?.unwrap_or_default();
                    // Others than a superuser see that there are standbys, not all of what they are.
                    let row = client.query_one("SELECT count(*) FROM pg_stat_replication", &[]).await?;
                    let standbys: i64 = row.get(0);
                    match names.is_empty() {
                        true => format!(", primary, {standbys} standbys, none of them synchronous"),
                        false => format!(", primary, {standbys} standbys, waits for '{names}'"),
                    }
                }
                // Another engine.
                Err(_) => String::new(),
            };
            Ok(format!("PostgreSQL {version}{role}"))
        };
        tokio::time::timeout(CONNECT_TIMEOUT, looking).await.unwrap_or(Err(Error::Silent))
    }
}

/// A setting; none when this engine has no such.
async fn show(client: &Client, name: &str) -> Result<Option<String>, tokio_postgres::Error> {
    match client.query_one(&format!("SHOW {name}"), &[]).await {
        Ok(row) => row.try_get(0).map(Some),
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(None),
        Err(e) => Err(e),
    }
}

async fn open<T>(config: &Config, tls: T) -> Result<(Client, Arc<AtomicBool>), tokio_postgres::Error>
where
    T: MakeTlsConnect<Socket>,
    T::Stream: Send + 'static,
{
    let (client, mut connection) = config.connect(tls).await?;
    let warned = Arc::new(AtomicBool::new(false));
    let seen = warned.clone();
    tokio::spawn(async move {
        let mut messages = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
        while let Some(message) = messages.next().await {
            match message {
                Ok(AsyncMessage::Notice(notice)) if notice.parsed_severity() == Some(Severity::Warning) => {
                    tracing::warn!(notice = notice.message(), "PostgreSQL");
                    seen.store(true, Ordering::Relaxed);
                }
                Ok(_) => {}
                Err(e) => {
                    tracing::warn!(error = said(&e), "a connection to PostgreSQL ended");
                    break;
                }
            }
        }
    });
    Ok((client, warned))
}

fn tls(access: &Access) -> Result<Option<MakeRustlsConnect>, String> {
    let Some(ca) = &access.ca else { return Ok(None) };
    let mut roots = rustls::RootCertStore::empty();
    for authority in certificates(ca)? {
        roots.add(authority).map_err(|e| format!("{} is no authority: {e}", ca.display()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(roots);
    let config = match &access.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let secret = PrivateKeyDer::from_pem_file(key)
                .map_err(|e| format!("its key {} cannot be read: {e}", key.display()))?;
            builder
                .with_client_auth_cert(certificates(cert)?, secret)
                .map_err(|e| format!("{} and {} do not fit: {e}", cert.display(), key.display()))?
        }
    };
    Ok(Some(MakeRustlsConnect::new(config)))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bad = |e| format!("its certificate {} cannot be read: {e}", file.display());
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(file).map_err(bad)?.collect();
    let found = found.map_err(bad)?;
    if found.is_empty() {
        return Err(format!("{} holds no certificate in PEM", file.display()));
    }
    Ok(found)
}
