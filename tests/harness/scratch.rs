//! Folders for the data of one test.

use std::{
    fs,
    path::{Path, PathBuf},
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
