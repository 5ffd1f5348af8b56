//! The members of an etcd cluster: which is asked, as whom, and what their errors mean.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    super::Fault,
    pb::{
        AuthenticateRequest, StatusRequest, StatusResponse, auth_client::AuthClient, kv_client::KvClient,
        maintenance_client::MaintenanceClient,
    },
};
use crate::store::{
    StoreError, StoreResult,
    url::{Access, Place},
};

/// Below the time-out of the worker, so that it is this member that is left.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// What a page of pairs may take.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// The first with transactions over keys and linearizable reads as they are used here.
const VERSION_MIN: (u32, u32) = (3, 4);

pub(super) struct Members {
    members: Vec<(String, Channel)>,
    /// The member that answered last.
    at: AtomicUsize,
    login: Option<Login>,
    place: String,
}

struct Login {
    user: String,
    password: String,
    /// Given for the password, until it runs out.
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl Members {
    /// Connects when it is used.
    pub(super) fn new(
        place: &Place,
        hosts: &[String],
        user: Option<&str>,
        access: &Access,
    ) -> StoreResult<Members> {
        let wrong = |why| StoreError::Place { text: place.to_string(), why };
        let tls = tls(access).map_err(wrong)?;
        let mut members = Vec::new();
        for host in hosts {
            let scheme = if tls.is_some() { "https" } else { "http" };
            let mut member = Endpoint::from_shared(format!("{scheme}://{host}"))
                .map_err(|e| wrong(format!("'{host}' is not an address: {e}")))?;
            if let Some(tls) = &tls {
                let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
                let tls = tls.clone().domain_name(name.trim_matches(['[', ']']));
                let bad = |e| wrong(format!("its certificates are of no use: {}", said(&e)));
                member = member.tls_config(tls).map_err(bad)?;
            }
            let channel = member
                .tcp_nodelay(true)
                .connect_timeout(Duration::from_secs(1))
                .http2_keep_alive_interval(Duration::from_secs(1))
                .keep_alive_timeout(Duration::from_secs(1))
                .keep_alive_while_idle(true)
                .timeout(ANSWER_TIMEOUT)
                .connect_lazy();
            members.push((host.clone(), channel));
        }
        let login = match user {
            None => None,
            Some(user) => {
                let password = access.find_password().map_err(wrong)?.ok_or_else(|| {
                    wrong(format!(
                        "no password for '{user}': put it into a file that password-file= names, or into {}",
                        crate::store::url::PASSWORD_VARIABLE
                    ))
                })?;
                Some(Login { user: user.into(), password, token: Mutex::new(None) })
            }
        };
        Ok(Members { members, at: AtomicUsize::new(0), login, place: place.to_string() })
    }

    /// Calls the member that answered last; when it does not, the next call goes to another.
    pub(super) async fn call<Q, T>(
        &self,
        request: Q,
        call: impl AsyncFnOnce(KvClient<Channel>, Request<Q>) -> Result<Response<T>, Status>,
    ) -> Result<T, Fault> {
        let at = self.at.load(Ordering::Relaxed);
        let (_, channel) = &self.members[at % self.members.len()];
        let answer = async {
            let request = self.signed(channel, request).await?;
            let kv = KvClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
            call(kv, request).await.map_err(|status| self.fault(&status))
        };
        let answer = answer.await;
        if let Err(Fault::Unavailable(_)) = &answer {
            // Unless another call has noticed, too.
            let _ = self.at.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        answer.map(Response::into_inner)
    }

    /// A request with our token, if the members want one.
    async fn signed<Q>(&self, channel: &Channel, request: Q) -> Result<Request<Q>, Fault> {
        let mut request = Request::new(request);
        let Some(login) = &self.login else { return Ok(request) };
        let known = login.token.lock().clone();
        let token = match known {
            Some(token) => token,
            None => {
                let ask = AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
                let answer = AuthClient::new(channel.clone()).authenticate(ask).await;
                let answer = answer.map_err(|status| self.login_fault(&login.user, &status))?;
                let token: MetadataValue<Ascii> = answer
                    .into_inner()
                    .token
                    .parse()
                    .map_err(|_| Fault::Unavailable("its token is no text".into()))?;
                *login.token.lock() = Some(token.clone());
                token
            }
        };
        request.metadata_mut().insert("token", token);
        Ok(request)
    }

    fn login_fault(&self, user: &str, status: &Status) -> Fault {
        match status.code() {
            Code::InvalidArgument => {
                self.fatal(&format!("it does not know '{user}' with this password"), status.message())
            }
            Code::FailedPrecondition => {
                self.fatal(&format!("it asks nobody for passwords: leave '{user}@' out"), status.message())
            }
            _ => self.fault(status),
        }
    }

    fn fatal(&self, what: &str, text: &str) -> Fault {
        let why = format!("{what} (etcd says: {text})");
        Fault::Fatal(StoreError::Place { text: self.place.clone(), why })
    }

    fn fault(&self, status: &Status) -> Fault {
        let text = status.message();
        match status.code() {
            Code::ResourceExhausted if text.contains("space exceeded") => Fault::Unavailable(
                "its members are full: compact and defragment them or raise --quota-backend-bytes, then \
                 `etcdctl alarm disarm`; until then operations wait"
                    .into(),
            ),
            // A token that ran out, or that a member lost when it was started again; rights that were changed.
            Code::Unauthenticated if self.login.is_some() => self.log_in_again(text),
            Code::InvalidArgument if self.login.is_some() && text.contains("revision of auth store") => {
                self.log_in_again(text)
            }
            Code::InvalidArgument if text.contains("too many operations") => {
                self.fatal("its members run with a lower --max-txn-ops than the address says", text)
            }
            Code::InvalidArgument if text.contains("too large") => {
                self.fatal("a record is larger than its members take: raise their --max-request-bytes", text)
            }
            Code::InvalidArgument if text.contains("user name is empty") => {
                self.fatal("it wants credentials: write etcd://USER@...", text)
            }
            Code::InvalidArgument => self.fatal("it does not take the transaction", text),
            Code::Unauthenticated => self.fatal("it wants credentials: write etcd://USER@...", text),
            Code::PermissionDenied => self.fatal("this user may not read and write below the prefix", text),
            Code::Unimplemented => self.fatal("it is no etcd of version 3.4 or newer", text),
            // What this host has to say is in the causes.
            code => Fault::Unavailable(match std::error::Error::source(status) {
                Some(cause) => said(cause),
                None => format!("{code:?}: {text}"),
            }),
        }
    }

    fn log_in_again(&self, text: &str) -> Fault {
        if let Some(login) = &self.login {
            *login.token.lock() = None;
        }
        Fault::Unavailable(text.into())
    }

    /// What one member says of itself.
    async fn status(&self, n: usize) -> Result<StatusResponse, Fault> {
        let (_, channel) = &self.members[n % self.members.len()];
        let request = self.signed(channel, StatusRequest {}).await?;
        let answer = MaintenanceClient::new(channel.clone()).status(request).await;
        answer.map(Response::into_inner).map_err(|status| self.fault(&status))
    }

    /// Refuses what is too old.
    pub(super) async fn check_version(&self) -> Result<(), Fault> {
        let mut last = Ok(());
        for n in 0..self.members.len() {
            match self.status(n).await {
                Ok(status) => {
                    let mut numbers = status.version.split('.').map_while(|n| n.parse::<u32>().ok());
                    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
                    if version < VERSION_MIN {
                        return Err(self.fatal("it is no etcd of version 3.4 or newer", &status.version));
                    }
                    self.at.store(n, Ordering::Relaxed);
                    return Ok(());
                }
                Err(fault @ Fault::Fatal(_)) => return Err(fault),
                Err(fault) => last = Err(fault),
            }
        }
        last
    }

    /// A line for people about each member.
    pub(super) async fn health(&self) -> Vec<String> {
        let lines = self.members.iter().enumerate().map(async |(n, (host, _))| {
            match tokio::time::timeout(ANSWER_TIMEOUT, self.status(n)).await {
                Ok(Ok(status)) => {
                    let role = match status.leader {
                        0 => "sees no leader",
                        leader if status.header.is_some_and(|h| h.member_id == leader) => "leader",
                        _ => "follower",
                    };
                    let errors: String = status.errors.iter().map(|e| format!(", {e}")).collect();
                    let mib = status.db_size.cast_unsigned() >> 20;
                    format!("{host}: etcd {}, {role}, {mib} MiB{errors}", status.version)
                }
                Ok(Err(Fault::Unavailable(why))) => format!("{host}: {why}"),
                Ok(Err(Fault::Fatal(e))) => format!("{host}: {e}"),
                Err(_) => format!("{host}: no answer"),
            }
        });
        futures_util::future::join_all(lines).await
    }
}

fn tls(access: &Access) -> Result<Option<ClientTlsConfig>, String> {
    let Some(ca) = &access.ca else { return Ok(None) };
    let read = |file: &std::path::Path| {
        std::fs::read(file).map_err(|e| format!("its certificate {} cannot be read: {e}", file.display()))
    };
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
    if let Some((cert, key)) = &access.identity {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(Some(tls))
}

/// The error with its causes, of which the first only says that there is one.
fn said(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
