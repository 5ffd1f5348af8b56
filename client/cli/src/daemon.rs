//! What the three daemons share: saying that they are ready, waiting for a signal, living no longer than `fjord up`.

use std::{
    io::Write,
    net::{SocketAddr, ToSocketAddrs},
    os::unix::net::UnixDatagram,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Set by `fjord up` to its process id in the environment of its children.
pub(crate) const PARENT_ENV: &str = "FJORD_UP_PID";

/// Why a daemon stops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stop {
    /// SIGINT or SIGTERM.
    Asked,
    /// The `fjord up` that started it is gone.
    Orphaned,
}

/// The signals a daemon listens to, from its first moment on.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    orphan: Signal,
}

/// Sent by the kernel when `fjord up` dies. No one else has a use for it.
const ORPHAN_SIGNAL: rustix::process::Signal = rustix::process::Signal::USR1;

impl Signals {
    /// Starts to listen. Under `fjord up`, also arranges to be told of its death.
    pub(crate) fn listen() -> anyhow::Result<Signals> {
        let on = |kind| signal(kind).context("cannot listen to signals");
        let signals = Signals {
            interrupt: on(SignalKind::interrupt())?,
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            orphan: on(SignalKind::user_defined1())?,
        };
        if let Some(parent) = std::env::var(PARENT_ENV).ok().and_then(|pid| pid.parse::<i32>().ok()) {
            rustix::process::set_parent_process_death_signal(Some(ORPHAN_SIGNAL))
                .context("cannot ask to be told when `fjord up` ends")?;
            // It may have died before we asked.
            if rustix::process::getppid().is_none_or(|pid| pid.as_raw_nonzero().get() != parent) {
                bail!("`fjord up` (process {parent}) has ended already");
            }
        }
        Ok(signals)
    }

    /// Waits for a reason to stop. A hangup (the terminal closed) is one only for what runs in the foreground, and
    /// there it means the same as Ctrl-C.
    pub(crate) async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.interrupt.recv() => Stop::Asked,
            _ = self.terminate.recv() => Stop::Asked,
            _ = self.hangup.recv() => Stop::Asked,
            _ = self.orphan.recv() => Stop::Orphaned,
        }
    }
}

/// How long an orphaned server stays, so that the orphaned mount beside it can flush into it.
pub(crate) const ORPHAN_GRACE: Duration = Duration::from_secs(2);

/// Tells whoever waits that this daemon serves now: one line on standard output, and systemd's notification.
pub(crate) fn announce(line: &str) {
    // A closed standard output is no reason to stop serving.
    let _ = writeln!(std::io::stdout(), "{line}").and_then(|()| std::io::stdout().flush());
    if let Err(e) = notify_systemd("READY=1") {
        tracing::warn!("cannot notify systemd: {e}");
    }
}

fn notify_systemd(state: &str) -> std::io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    // A leading '@' means the abstract namespace.
    let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str());
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => {
            <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name)?
        }
        None => std::os::unix::net::SocketAddr::from_pathname(&path)?,
    };
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// The address a listener is to use; host names are allowed.
pub(crate) fn listen_address(text: &str) -> anyhow::Result<SocketAddr> {
    text.to_socket_addrs()
        .map_err(|e| {
            anyhow::anyhow!(
                "'{text}' is no address to listen on ({e}): write HOST:PORT, for example 0.0.0.0:7440"
            )
        })?
        .next()
        .with_context(|| format!("'{text}' names no address"))
}

/// A runtime for the thread that waits for signals; servers have their own.
pub(crate) fn control_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

/// A runtime for verbs that move data.
pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses() {
        assert_eq!(listen_address("127.0.0.1:0").unwrap().port(), 0);
        assert!(listen_address("localhost:7440").unwrap().ip().is_loopback());
        for bad in ["7440", "127.0.0.1", "127.0.0.1:99999", ""] {
            assert!(listen_address(bad).unwrap_err().to_string().contains("HOST:PORT"), "{bad}");
        }
    }
}
