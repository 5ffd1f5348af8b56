//! Ports of test servers.

use std::{
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
};

/// Below the kernel's ephemeral range, so that no outgoing connection takes the port of a server that a test has killed and
/// will start again.
const FIRST: u16 = 20_000;
const COUNT: u16 = 12_000;

/// How many this process has tried.
static TRIED: AtomicU16 = AtomicU16::new(0);

/// What tells other test processes that a port is this one's, whether or not a server listens there just now. The kernel ends it with
/// the process.
static CLAIMS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A loopback port that nobody listens on, and that no other test process gets while this one lives.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    // Each process begins elsewhere: a server of one that has just ended may still be talked to.
    let start = std::process::id() % u32::from(COUNT);
    let tried = (0..COUNT).map(|_| TRIED.fetch_add(1, Ordering::Relaxed));
    first_free(tried.map(|tried| FIRST + ((start + u32::from(tried)) % u32::from(COUNT)) as u16))
        .unwrap_or_else(|| panic!("no free loopback port in {FIRST}..{}", FIRST + COUNT))
}

fn first_free(mut ports: impl Iterator<Item = u16>) -> Option<u16> {
    ports.find(|port| {
        let Some(claim) = claim(*port) else { return false };
        let is_free = TcpListener::bind(("127.0.0.1", *port)).is_ok();
        if is_free {
            CLAIMS.lock().unwrap_or_else(PoisonError::into_inner).push(claim);
        }
        is_free
    })
}

/// `None` when it is another's.
fn claim(port: u16) -> Option<UnixListener> {
    let name = SocketAddr::from_abstract_name(format!("fjord-test-port-{port}"));
    UnixListener::bind_addr(&name.expect("a short name")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing listens on it yet: that is what two processes saw.
    #[test]
    fn a_port_is_given_out_once() {
        let all = || FIRST..FIRST + COUNT;
        let port = first_free(all()).unwrap();
        assert!(TcpListener::bind(("127.0.0.1", port)).is_ok());
        assert_ne!(first_free(all()), Some(port));
    }
}
