//! Folders for the data of one test.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU16, Ordering},
};

use tempfile::TempDir;

/// A folder on a real disk (`FJORD_TEST_DIR`, default `/var/tmp`: data servers want O_DIRECT, which tmpfs lacks).
/// Removed when dropped, unless `FJORD_KEEP` is set.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
}

impl Scratch {
    /// A new, empty folder whose name tells the test.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn new(name: &str) -> Scratch {
        let parent = std::env::var_os("FJORD_TEST_DIR").unwrap_or_else(|| "/var/tmp".into());
        let mut dir = tempfile::Builder::new()
            .prefix(&format!("fjord-test-{name}-"))
            .tempdir_in(&parent)
            .unwrap_or_else(|e| panic!("scratch folder in {}: {e}", Path::new(&parent).display()));
        if std::env::var_os("FJORD_KEEP").is_some() {
            dir.disable_cleanup(true);
            eprintln!("{name}: keeping {}", dir.path().display());
        }
        Scratch { dir }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A new subfolder.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }
}

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
