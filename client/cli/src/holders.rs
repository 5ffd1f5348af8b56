//! Which processes keep a mount busy, and which one serves it. Reads `/proc` only, never the mount itself.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::mounts;

/// A process that uses something below a mount point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Holder {
    pub(crate) pid: u32,
    /// Name of its program.
    pub(crate) program: String,
    /// What it holds.
    pub(crate) path: PathBuf,
}

/// Processes with a current folder, root, program, open file or mapping below `mountpoint`.
///
/// Without root, those of other users cannot be seen.
pub(crate) fn of(mountpoint: &Path) -> Vec<Holder> {
    pids()
        .filter(|pid| *pid != std::process::id())
        .filter_map(|pid| {
            let path = held_below(&PathBuf::from(format!("/proc/{pid}")), mountpoint)?;
            Some(Holder { pid, program: program(pid), path })
        })
        .collect()
}

/// A process of each other mount namespace in which the filesystem with this device number is mounted, and where.
///
/// Without root, those of other users cannot be seen.
pub(crate) fn in_other_namespaces(device: &str) -> Vec<Holder> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen: HashSet<PathBuf> = namespace("self").into_iter().collect();
    pids()
        .filter(|pid| namespace(&pid.to_string()).is_some_and(|namespace| seen.insert(namespace)))
        .filter_map(|pid| {
            let mounts = mounts::read_of(&pid.to_string()).ok()?;
            let path = mounts.into_iter().find(|mount| mount.device == device)?.mountpoint;
            Some(Holder { pid, program: program(pid), path })
        })
        .collect()
}

/// For people: `bash (process 812, /mnt/fjord/x), vim (process 900, /mnt/fjord/a.txt) and 3 more`.
pub(crate) fn describe(holders: &[Holder]) -> String {
    const SHOWN_MAX: usize = 5;
    if holders.is_empty() {
        return "a process that cannot be seen from here (try as root)".to_owned();
    }
    let mut text = holders
        .iter()
        .take(SHOWN_MAX)
        .map(|h| format!("{} (process {}, {})", h.program, h.pid, h.path.display()))
        .collect::<Vec<_>>()
        .join(", ");
    if holders.len() > SHOWN_MAX {
        text.push_str(&format!(" and {} more", holders.len() - SHOWN_MAX));
    }
    text
}

/// The `fjord mount` processes that serve the filesystem with this device number, which is seen on `mountpoint`: others may serve one
/// that was detached there before, and is still in use.
pub(crate) fn servers_of(mountpoint: &Path, device: &str) -> Vec<u32> {
    pids()
        .filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut words = line.split(|b| *b == 0).skip(1);
            words.next() == Some(b"mount")
                && words.any(|word| {
                    // As given on its command line, which may be relative to its folder.
                    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
                    word == mountpoint.as_os_str().as_bytes()
                        || cwd.join(OsStr::from_bytes(word)) == mountpoint
                })
                && Fuse::of(*pid).is_some_and(|fuse| fuse.may_be(device))
        })
        .collect()
}

/// The filesystems that a process serves.
#[derive(Clone, Debug)]
pub(crate) struct Fuse {
    /// Their device numbers; none when the kernel does not tell.
    devices: HashSet<String>,
}

impl Fuse {
    /// `None` when it has no `/dev/fuse` open. See `fuse_dev_show_fdinfo` in Linux: the number of the connection is that of the
    /// device.
    pub(crate) fn of(pid: u32) -> Option<Fuse> {
        let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let fuse = |path: &PathBuf| fs::read_link(path).is_ok_and(|target| target == Path::new("/dev/fuse"));
        let mut open = open.map(|entry| entry.path()).filter(fuse).peekable();
        open.peek()?;
        let connection = |path: PathBuf| {
            let info =
                fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", path.file_name()?.to_str()?)).ok()?;
            let number = info.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?;
            Some(format!("0:{}", number.trim()))
        };
        Some(Fuse { devices: open.filter_map(connection).collect() })
    }

    /// False when it is another one for certain.
    pub(crate) fn may_be(&self, device: &str) -> bool {
        self.devices.is_empty() || self.devices.contains(device)
    }
}

/// Waits until none of the processes exists any more; false when `patience` was not enough.
pub(crate) fn wait_gone(pids: &[u32], patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        if !pids.iter().any(|pid| alive(*pid)) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Whether the process exists and is not merely waiting to be reaped.
pub(crate) fn alive(pid: u32) -> bool {
    // pid (program) state …; the program's name may contain anything, so the last ')' counts.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .ok()
        .and_then(|stat| stat.rsplit_once(')').map(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X'])))
        .unwrap_or(false)
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
}

fn program(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// The first thing below `mountpoint` that a process (its folder in /proc) holds.
fn held_below(process: &Path, mountpoint: &Path) -> Option<PathBuf> {
    let below = |link: PathBuf| fs::read_link(link).ok().filter(|path| path.starts_with(mountpoint));
    ["cwd", "root", "exe"].iter().find_map(|name| below(process.join(name))).or_else(|| {
        ["fd", "map_files"]
            .iter()
            .flat_map(|folder| fs::read_dir(process.join(folder)).into_iter().flatten().flatten())
            .find_map(|entry| below(entry.path()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_that_sits_in_a_folder_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let mut child =
            Command::new("sleep").arg("60").current_dir(&real).stdin(Stdio::null()).spawn().unwrap();
        // The child changes its folder a moment after it appears.
        let deadline = Instant::now() + Duration::from_secs(20);
        while of(&real).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let found = of(&real);
        assert!(alive(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.iter().map(|h| h.pid).collect::<Vec<_>>(), [child.id()]);
        assert_eq!(found[0].path, real);
        assert!(!alive(child.id()));
        assert!(wait_gone(&[child.id()], Duration::ZERO));
    }

    #[test]
    fn many_holders_are_summed_up() {
        let holder = |pid| Holder { pid, program: "bash".into(), path: "/m".into() };
        let text = describe(&(1..=7).map(holder).collect::<Vec<_>>());
        assert!(text.starts_with("bash (process 1, /m), ") && text.ends_with(" and 2 more"), "{text}");
        assert!(describe(&[]).contains("root"));
    }
}
