//! A mount in a process of its own.

use std::{
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    time::Duration,
};

use rustix::{
    mount::{UnmountFlags, unmount},
    process::{Pid, Signal, kill_process},
};

use crate::{
    Process, fjord,
    process::run_within,
    wait::{SOON, wait_for, wait_until},
};

/// A mounted filesystem. Detached, and its process killed, when dropped.
///
/// A watchdog kills the process when the mount is older than [`HUNG_AFTER`]: system calls that hang in it then fail with
/// ENOTCONN, so that the test reports its failure instead of hanging with it.
#[derive(Debug)]
pub struct MountPoint {
    dir: PathBuf,
    process: Process,
    _watchdog: mpsc::Sender<()>,
}

/// Longer than any test takes.
const HUNG_AFTER: Duration = Duration::from_secs(420);

impl MountPoint {
    /// `fjord mount META DIR -f`; returns when it is mounted.
    ///
    /// # Panics
    /// When it is not mounted in time.
    pub fn start(meta: &str, dir: &Path, options: &str, logs: &Path) -> MountPoint {
        MountPoint::of(MountPoint::command(meta, dir, options), dir, logs)
    }

    /// `fjord mount META DIR -f`, to be run.
    pub fn command(meta: &str, dir: &Path, options: &str) -> Command {
        let mut command = fjord(["mount", meta]);
        command.arg(dir).arg("-f");
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        command
    }

    /// Runs a command that stays in the foreground and mounts on `dir`.
    ///
    /// # Panics
    /// When it does not.
    pub fn of(command: Command, dir: &Path, logs: &Path) -> MountPoint {
        let name = format!("the mount {}", dir.display());
        let log = logs.join(format!("{}.log", dir.file_name().unwrap_or_default().to_string_lossy()));
        let mut process = Process::start(&name, command, &log);
        wait_until(&format!("{} to be mounted", dir.display()), SOON, || {
            process.assert_running();
            is_mounted(dir)
        });
        let watchdog = watch(process.pid(), dir);
        MountPoint { dir: dir.to_owned(), process, _watchdog: watchdog }
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A path in the mount.
    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.join(path)
    }

    /// The process that serves it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// `fjord umount` of a client that may have lost what it had not synced: then its process says so, and the command fails, too.
    ///
    /// # Panics
    /// When it does not end, or ends otherwise.
    #[track_caller]
    pub fn unmount_after_trouble(mut self) {
        let mut command = fjord(["umount"]);
        command.arg(&self.dir);
        let run = run_within(command, 3 * SOON);
        let status = self.process.wait();
        assert!(
            status.success() || !run.status.success(),
            "the mount process ended with {status}, but {run}"
        );
        assert!(!is_mounted(&self.dir), "{} is still mounted after `fjord umount`", self.dir.display());
        let honest = status.code() == Some(1) && self.process.log().contains("not everything written below");
        assert!(status.success() || honest, "mount process ended with {status}:\n{}", self.process.log());
    }

    /// `fjord umount`; the process must end cleanly.
    ///
    /// # Panics
    /// When something in that fails.
    #[track_caller]
    pub fn unmount(mut self) {
        let mut command = fjord(["umount"]);
        command.arg(&self.dir);
        let run = run_within(command, 3 * SOON);
        assert!(run.status.success(), "{run}\nits threads:\n{}", self.process.threads());
        assert!(!is_mounted(&self.dir), "{} is still mounted after `fjord umount`", self.dir.display());
        let status = self.process.wait();
        assert!(status.success(), "mount process ended with {status}:\n{}", self.process.log());
    }

    /// kill -9 of the client, then the dead mount is detached.
    pub fn kill9(mut self) {
        self.process.kill9();
    }
}

impl Drop for MountPoint {
    fn drop(&mut self) {
        self.process.kill9();
        detach(&self.dir);
    }
}

/// Whether something is mounted exactly there. Never touches the mount, so it cannot hang.
pub fn is_mounted(dir: &Path) -> bool {
    let mounts = fs::read("/proc/self/mounts").unwrap_or_default();
    mounts
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(1))
        .any(|mounted| mounted == dir.as_os_str().as_bytes())
}

/// Detaches whatever is mounted there.
pub fn detach(dir: &Path) {
    while is_mounted(dir) {
        if unmount(dir, UnmountFlags::DETACH).is_err() {
            return;
        }
    }
}

/// Waits until nothing is mounted there any more.
#[track_caller]
pub fn wait_unmounted(dir: &Path) {
    wait_for("the mount to go", SOON, || if is_mounted(dir) { Err("still mounted") } else { Ok(()) });
}

/// Kills the process after [`HUNG_AFTER`], unless the sender is dropped before.
fn watch(pid: u32, dir: &Path) -> mpsc::Sender<()> {
    let (alive, ended) = mpsc::channel();
    let dir = dir.to_owned();
    std::thread::spawn(move || {
        if ended.recv_timeout(HUNG_AFTER) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{} is older than {HUNG_AFTER:?}: killing its process {pid}", dir.display());
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    });
    alive
}
