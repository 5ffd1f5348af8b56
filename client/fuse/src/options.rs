//! Mount options, in the style of mount(8): `-o ro,allow_other,threads=4`.

use std::path::PathBuf;
use std::time::Duration;

mod transport;

pub use transport::{Busy, TransportChoice, UringFaults, UringOptions};

/// Smallest request worth negotiating, bytes.
const REQUEST_SIZE_MIN: u64 = 4096;
/// Largest that a kernel can be told (65,535 pages would do; a pinned request of more than this helps nobody), bytes.
const REQUEST_SIZE_MAX: u64 = 16 << 20;
const THREADS_MAX: u64 = 256;
const READ_AHEAD_KB_MAX: u64 = 1 << 20;
/// Longest a stale name or attribute may be believed, by option.
const TIMEOUT_MAX: Duration = Duration::from_secs(3600);

/// How and where to mount.
#[derive(Clone, Debug, PartialEq)]
pub struct MountOptions {
    /// What `/proc/mounts` shows as the device: the metadata server's address.
    pub source: String,
    /// Where.
    pub mountpoint: PathBuf,
    /// The folder that is shown, from the root of the filesystem; `/` is all of it. Any other needs root.
    pub folder: PathBuf,
    /// Refuse every change.
    pub read_only: bool,
    /// Let users other than the mounting one in. On by default for root, whose mounts are meant for everybody; others need
    /// `user_allow_other` in /etc/fuse.conf.
    pub allow_other: bool,
    /// Worker threads; over io_uring at most one for each core.
    pub threads: usize,
    /// How requests come from the kernel.
    pub transport: TransportChoice,
    /// Set-up of the io_uring transport.
    pub uring: UringOptions,
    /// Largest read or write the kernel sends in one request, bytes.
    pub request_size_max: usize,
    /// Largest read only, bytes; `None` is `request_size_max`.
    pub max_read: Option<u32>,
    /// The kernel's readahead window for this mount, KiB; `None` leaves the kernel's default. Needs root.
    pub read_ahead_kb: Option<u32>,
    /// How long the kernel may believe a name without asking. Anything but 0 delays seeing other clients' renames.
    pub entry_timeout: Duration,
    /// How long the kernel may believe attributes without asking. Anything but 0 delays seeing other clients' changes.
    pub attr_timeout: Duration,
    /// Ignore suid and sgid when executing.
    pub nosuid: bool,
    /// Ignore device files.
    pub nodev: bool,
    /// Execute nothing.
    pub noexec: bool,
    /// Leave access times as they are when something is read. For the caller: access times are the filesystem's.
    pub noatime: bool,
    /// Every write is an fsync.
    pub sync: bool,
    /// Mount over a directory that has entries, which are then hidden.
    pub nonempty: bool,
}

/// An `-o` option that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Nobody knows it.
    #[error("unknown mount option `{0}`")]
    Unknown(String),
    /// Its value is missing or not what it should be.
    #[error("mount option `{option}`: {expected}")]
    Value {
        /// The option as given.
        option: String,
        /// What it should look like.
        expected: String,
    },
    /// Understood, but not possible.
    #[error("mount option `{option}` is not supported: {instead}")]
    Unsupported {
        /// The option as given.
        option: String,
        /// What to do.
        instead: &'static str,
    },
}

impl MountOptions {
    /// The defaults.
    pub fn new(source: impl Into<String>, mountpoint: impl Into<PathBuf>) -> MountOptions {
        MountOptions {
            source: source.into(),
            mountpoint: mountpoint.into(),
            folder: PathBuf::from("/"),
            read_only: false,
            allow_other: rustix::process::geteuid().is_root(),
            // At least 2, so that one request that computes does not hold up all others.
            threads: std::thread::available_parallelism().map_or(2, |cores| cores.get().max(2)),
            transport: TransportChoice::default(),
            uring: UringOptions::default(),
            request_size_max: 1 << 20,
            max_read: None,
            read_ahead_kb: Some(4096),
            entry_timeout: Duration::ZERO,
            attr_timeout: Duration::ZERO,
            nosuid: false,
            nodev: false,
            noexec: false,
            noatime: false,
            sync: false,
            nonempty: false,
        }
    }

    /// Applies a comma separated list. Options named in `for_caller` (as `memory` or `close`) are returned with their
    /// values, not interpreted. On an error nothing is to be mounted; the options are then partly applied.
    pub fn apply(
        &mut self,
        list: &str,
        for_caller: &[&str],
    ) -> Result<Vec<(String, Option<String>)>, OptionError> {
        let mut left = Vec::new();
        for option in list.split(',').map(str::trim).filter(|option| !option.is_empty()) {
            let (key, value) = match option.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (option, None),
            };
            if for_caller.contains(&key) {
                left.push((key.to_owned(), value.map(str::to_owned)));
            } else {
                self.apply_one(option, key, value)?;
            }
        }
        Ok(left)
    }

    fn apply_one(&mut self, option: &str, key: &str, value: Option<&str>) -> Result<(), OptionError> {
        if is_for_mount(key) {
            return Ok(());
        }
        if self.uring.apply(option, key, value)? {
            return Ok(());
        }
        let number = |min: u64, max: u64| number(option, value, min, max);
        match key {
            "transport" => self.transport = transport::choice(option, value)?,
            "threads" => self.threads = number(1, THREADS_MAX)? as usize,
            "request_size_max" => {
                self.request_size_max =
                    number(REQUEST_SIZE_MIN, REQUEST_SIZE_MAX)? as usize & !(REQUEST_SIZE_MIN as usize - 1);
            }
            "max_read" => self.max_read = Some(number(REQUEST_SIZE_MIN, REQUEST_SIZE_MAX)? as u32),
            "read_ahead_kb" => self.read_ahead_kb = Some(number(0, READ_AHEAD_KB_MAX)? as u32),
            "entry_timeout" => self.entry_timeout = seconds(option, value)?,
            "attr_timeout" => self.attr_timeout = seconds(option, value)?,
            "fsname" => match value {
                Some(source) if !source.is_empty() => self.source = source.to_owned(),
                _ => return Err(expected(option, "give the name to show, as fsname=NAME")),
            },
            _ if value.is_some() => return Err(OptionError::Unknown(option.to_owned())),
            "ro" => self.read_only = true,
            "rw" => self.read_only = false,
            "allow_other" => self.allow_other = true,
            "noallow_other" => self.allow_other = false,
            // Always in force.
            "default_permissions" => {}
            "nosuid" => self.nosuid = true,
            "suid" => self.nosuid = false,
            "nodev" => self.nodev = true,
            "dev" => self.nodev = false,
            "noexec" => self.noexec = true,
            "exec" => self.noexec = false,
            "noatime" => self.noatime = true,
            "atime" => self.noatime = false,
            "sync" => self.sync = true,
            "async" => self.sync = false,
            "nonempty" => self.nonempty = true,
            "remount" => {
                return Err(unsupported(
                    option,
                    "it is for a mount that is there already: fjord mount or mount(8)",
                ));
            }
            "strictatime" | "norelatime" => {
                return Err(unsupported(
                    option,
                    "access times follow the rules of relatime: leave it out, or give noatime",
                ));
            }
            "allow_root" => return Err(unsupported(option, "use allow_other")),
            _ => return Err(OptionError::Unknown(option.to_owned())),
        }
        Ok(())
    }
}

/// Options that mount(8), systemd or fstab keep for themselves and pass on all the same.
fn is_for_mount(key: &str) -> bool {
    matches!(
        key,
        "_netdev" | "nofail" | "user" | "users" | "nouser" | "owner" | "group" | "auto" | "noauto" | "defaults" | "comment"
            // What `relatime` says is done; Linux itself keeps no access times of FUSE mounts.
            | "relatime" | "nostrictatime" | "lazytime" | "nolazytime" | "diratime" | "nodiratime"
    ) || key.starts_with("x-")
        || key.starts_with("X-")
}

fn expected(option: &str, expected: impl Into<String>) -> OptionError {
    OptionError::Value { option: option.to_owned(), expected: expected.into() }
}

fn unsupported(option: &str, instead: &'static str) -> OptionError {
    OptionError::Unsupported { option: option.to_owned(), instead }
}

fn number(option: &str, value: Option<&str>, min: u64, max: u64) -> Result<u64, OptionError> {
    value
        .and_then(|value| value.parse().ok())
        .filter(|number| (min..=max).contains(number))
        .ok_or_else(|| expected(option, format!("give a whole number from {min} to {max}")))
}

fn seconds(option: &str, value: Option<&str>) -> Result<Duration, OptionError> {
    value
        .and_then(|value| value.parse::<f64>().ok())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .filter(|duration| *duration <= TIMEOUT_MAX)
        .ok_or_else(|| expected(option, format!("give seconds from 0 to {}, as 0.5", TIMEOUT_MAX.as_secs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> MountOptions {
        MountOptions::new("host:7440", "/mnt")
    }

    #[test]
    fn the_usual_style() {
        let mut options = options();
        let left = options
            .apply("ro,nosuid,,noatime,threads=3,read_ahead_kb=128,attr_timeout=0.25,memory=1G,close=sync,verbose", &["memory", "close", "verbose"])
            .unwrap();
        assert!(options.read_only && options.nosuid && options.noatime && !options.nodev);
        assert_eq!((options.threads, options.read_ahead_kb), (3, Some(128)));
        assert_eq!(options.attr_timeout, Duration::from_millis(250));
        let pair = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        assert_eq!(left, [pair("memory", Some("1G")), pair("close", Some("sync")), pair("verbose", None)]);
    }

    #[test]
    fn what_fstab_adds_is_accepted_and_later_options_win() {
        let mut changed = options();
        changed
            .apply(
                "_netdev,nofail,user,noauto,x-systemd.automount,x-gvfs-name=Fjord,defaults,ro,rw,nodev,dev",
                &[],
            )
            .unwrap();
        assert_eq!(changed, options());
    }

    #[test]
    fn errors_name_the_option() {
        for (list, part) in [
            ("ro,frobnicate", "unknown mount option `frobnicate`"),
            ("ro=1", "unknown mount option `ro=1`"),
            ("threads", "whole number from 1 to 256"),
            ("threads=0", "whole number from 1 to 256"),
            ("max_read=-5", "mount option `max_read=-5`"),
            ("attr_timeout=NaN", "seconds from 0"),
            ("attr_timeout=1e300", "seconds from 0"),
            ("remount,ro", "for a mount that is there already"),
            ("fsname=", "fsname=NAME"),
            ("strictatime", "rules of relatime"),
        ] {
            let message = options().apply(list, &[]).unwrap_err().to_string();
            assert!(message.contains(part), "{list}: {message}");
        }
    }

    #[test]
    fn request_sizes_are_whole_pages() {
        let mut options = options();
        options.apply("request_size_max=5000", &[]).unwrap();
        assert_eq!(options.request_size_max, 4096);
    }
}
