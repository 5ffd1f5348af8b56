//! Ports of test servers.

use std::{
    net::TcpListener,
    sync::atomic::{AtomicU16, Ordering},
};

/// Next port to try. Below the kernel's ephemeral range, so that no outgoing connection takes the port of a server
/// that a test has killed and will start again.
static NEXT_PORT: AtomicU16 = AtomicU16::new(0);

/// A loopback port that nobody listens on.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let step = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + (u32::from(start) + u32::from(step) * 7) as u16 % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free loopback port in {FIRST}..{}", FIRST + COUNT)
}
