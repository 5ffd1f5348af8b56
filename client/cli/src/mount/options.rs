//! `-o` options: those of the mount itself are fjordfs_fuse's, those of the client are read here.

use std::{
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, anyhow, ensure};
use fjordfs_client::Options;
use fjordfs_fuse::{MountOptions, OptionError, TransportChoice, TransportKind};

use crate::{
    data,
    mount::supervisor::supervisor_pid,
    units::{ByteSize, Span, within},
};

/// The end of `fjord mount --help`.
pub(crate) const HELP: &str = "\
Options (-o, separated by commas):
  ro, rw                read only; read and write (default)
  remount               change ro, nosuid, nodev, noexec or their opposites of a mount in use
  allow_other           let other users in (default for root; noallow_other turns it off)
  nosuid,nodev,noexec,noatime,sync   as in mount(8)
  nonempty              mount over a folder that has files
  memory=SIZE           most memory for file data (default 2GiB)
  timeout=TIME          give up on servers that do not answer after this long (default 2m)
  hedge=TIME            ask another copy when the first is silent for this long (default 500ms)
  readahead=SIZE        how far sequential readers are read ahead (default 16MiB)
  dirty_age=TIME        commit what was written after this long at the latest (default 1s)
  close=async|sync      async (default): what nobody else uses is decided here and sent to the
                        metaserver within a second, or when somebody asks; sync: close, create,
                        unlink, ... wait for the metaserver
  local_sockets=on|off  use the Unix sockets of data servers on this host (default on)
  local_reads=on|off    read shards of data servers on this host from their files (default on)
  local_writes=on|off   have them read what is written from the mount's memory (default on)
  engine_threads=N      threads for connections and background work (default 2)
  threads=N             threads that serve the kernel (default: one for each core, at least 2;
                        over io_uring at most one each)
  transport=KIND        io_uring, dev_fuse, or auto (default): io_uring where the kernel has it;
                        the log says which, and why
  uring_depth=N         requests in flight per CPU over io_uring (default 32)
  uring_payload=SIZE    largest request over io_uring (default: request_size_max,
                        less with many CPUs)
  uring_memory=SIZE     most memory for requests over io_uring (default 256MiB): the depth is
                        reduced to fit
  poll_us=N             look for requests this long before sleeping, over io_uring (default 0):
                        quicker answers to few callers, for that much more CPU
  request_size_max=N    largest request of the kernel, bytes (default 1048576)
  read_ahead_kb=N       the kernel's own readahead (default 4096, needs root)
  entry_timeout=SECONDS, attr_timeout=SECONDS
                        how long the kernel trusts names and attributes at least, with or
                        without a lease (default 0: only with one)
  supervise=KIND        on: a supervisor holds the mount, and when the process that serves it
                        dies another takes over (over /dev/fuse; needs Linux 6.9); off; auto
                        (default): on where requests come over /dev/fuse anyway, off over
                        io_uring, whose requests Linux cannot send to another process
  fsname=NAME           the device name to show
  log=FILE              log of a mount in the background

Examples:
  fjord mount meta1:7440 /mnt/fjord
  fjord mount meta1:7440:/teams/vision /mnt/vision   one folder of it, as root
  fjord mount meta1:7440 /mnt/fjord -o ro,memory=8GiB
  mount -t fuse.fjord meta1:7440 /mnt/fjord          with deploy/install.sh
  meta1:7440 /mnt/fjord fuse.fjord _netdev,nofail 0 0       a line of /etc/fstab";

/// Everything that a mount can be told.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) fuse: MountOptions,
    pub(crate) client: Options,
    /// Log of a background mount.
    pub(crate) log: Option<PathBuf>,
    pub(crate) supervise: Supervise,
}

/// Whether a mount is to outlive the process that serves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Supervise {
    /// Where it costs nothing: over /dev/fuse.
    #[default]
    Auto,
    On,
    Off,
}

/// A server that answers needs some time, and nobody waits for months.
const TIMEOUTS: RangeInclusive<Span> = Span(Duration::from_secs(1))..=Span(LONGEST);
const HEDGES: RangeInclusive<Span> = Span(Duration::from_millis(1))..=Span(LONGEST);
/// Below, hardly anything shares a block with anything else.
const DIRTY_AGES: RangeInclusive<Span> = Span(Duration::from_millis(10))..=Span(LONGEST);
const LONGEST: Duration = Duration::from_secs(30 * 24 * 3600);
const MEMORIES: RangeInclusive<ByteSize> = ByteSize(Options::MEMORY_MIN)..=ByteSize(Options::MEMORY_MAX);

/// First version of Linux whose FUSE sends requests again (`FUSE_NOTIFY_RESEND`).
const RESENDS_FROM: (u32, u32) = (6, 9);

fn kernel_resends() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= RESENDS_FROM
}

const OURS: [&str; 12] = [
    "memory",
    "timeout",
    "hedge",
    "readahead",
    "dirty_age",
    "close",
    "local_sockets",
    "local_reads",
    "local_writes",
    "engine_threads",
    "supervise",
    "log",
];

/// Reads a comma separated list.
///
/// # Errors
/// Names the option; `sloppy` lets unknown ones pass.
pub(crate) fn parse(list: &str, meta: &str, dir: &Path, sloppy: bool) -> anyhow::Result<Settings> {
    // The process that a user would look for, and that stays.
    let pid = supervisor_pid().unwrap_or_else(std::process::id);
    let description = format!("{} {pid} {}", data::hostname(), dir.display());
    let mut settings = Settings {
        fuse: MountOptions::new(meta, dir),
        client: Options { description, drop_behind: true, ..Options::default() },
        log: None,
        supervise: Supervise::Auto,
    };
    for option in list.split(',') {
        match settings.fuse.apply(option, &OURS) {
            Ok(ours) => ours.iter().try_for_each(|(key, value)| settings.ours(key, value.as_deref()))?,
            Err(OptionError::Unknown(option)) if sloppy => {
                tracing::debug!("unknown mount option '{option}' left out")
            }
            Err(e @ OptionError::Unknown(_)) => return Err(anyhow!("{e}: `fjord mount --help` lists them")),
            Err(e) => return Err(e.into()),
        }
    }
    settings.client.access_times = !settings.fuse.noatime && !settings.fuse.read_only;
    Ok(settings)
}

fn on_or_off(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("'{other}' is neither on nor off")),
    }
}

impl Settings {
    /// Whether a supervisor is to hold the mount.
    ///
    /// # Errors
    /// Why the one that was insisted on is not possible.
    pub(crate) fn is_supervised(&self) -> anyhow::Result<bool> {
        match self.supervise {
            Supervise::Off => Ok(false),
            Supervise::On => {
                ensure!(
                    self.fuse.transport != TransportChoice::IoUring,
                    "mount option `supervise=on`: not over io_uring, whose requests Linux cannot send to another process; \
                     leave transport=io_uring out"
                );
                ensure!(
                    kernel_resends(),
                    "mount option `supervise=on`: this kernel cannot send requests to another process (Linux 6.9 and later can)"
                );
                Ok(true)
            }
            // A transport that is not possible is the mount's to report.
            Supervise::Auto => Ok(kernel_resends()
                && fjordfs_fuse::planned_transport(&self.fuse)
                    .is_ok_and(|planned| planned.kind == TransportKind::DevFuse)),
        }
    }

    fn ours(&mut self, key: &str, value: Option<&str>) -> anyhow::Result<()> {
        let value = value
            .filter(|value| !value.is_empty())
            .with_context(|| format!("mount option `{key}` needs a value: {key}=VALUE"))?;
        let wrong = |e: String| anyhow!("mount option `{key}`: {e}");
        let named = format!("mount option `{key}`");
        let size = |range| anyhow::Ok(within(&named, value.parse::<ByteSize>().map_err(wrong)?, range)?.0);
        let time = |range| anyhow::Ok(within(&named, value.parse::<Span>().map_err(wrong)?, range)?.0);
        match key {
            "memory" => self.client.memory_max = size(MEMORIES)?,
            "timeout" => self.client.operation_timeout = time(TIMEOUTS)?,
            "hedge" => self.client.hedge_delay = time(HEDGES)?,
            "readahead" => self.client.readahead = size(ByteSize(0)..=*MEMORIES.end())?,
            "dirty_age" => self.client.dirty_age_max = time(DIRTY_AGES)?,
            "close" => {
                self.client.defer = match value {
                    "async" => true,
                    "sync" => false,
                    _ => return Err(wrong(format!("'{value}' is neither async nor sync"))),
                }
            }
            "local_sockets" => self.client.local_sockets = on_or_off(value).map_err(wrong)?,
            "local_reads" => self.client.local_reads = on_or_off(value).map_err(wrong)?,
            "local_writes" => self.client.local_writes = on_or_off(value).map_err(wrong)?,
            "engine_threads" => {
                let threads: u8 =
                    value.parse().map_err(|_| wrong(format!("'{value}' is not a number from 1 to 64")))?;
                ensure!(
                    (1..=64).contains(&threads),
                    "mount option `engine_threads`: from 1 to 64 are possible"
                );
                self.client.threads = threads.into();
            }
            "supervise" => {
                self.supervise = match value {
                    "auto" => Supervise::Auto,
                    "on" => Supervise::On,
                    "off" => Supervise::Off,
                    other => return Err(wrong(format!("'{other}' is neither auto, on nor off"))),
                }
            }
            "log" => self.log = Some(value.into()),
            _ => return Err(wrong("is not known".to_owned())),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(list: &str) -> anyhow::Result<Settings> {
        parse(list, "m:1", Path::new("/mnt"), false)
    }

    #[test]
    fn both_kinds_of_options() {
        let s =
            of("ro,memory=256MiB,timeout=30s,nonempty,_netdev,log=/tmp/x,engine_threads=4,local_reads=off,local_writes=off")
                .unwrap();
        assert!(s.fuse.read_only && s.fuse.nonempty);
        assert_eq!((s.client.memory_max, s.client.operation_timeout), (256 << 20, Duration::from_secs(30)));
        assert_eq!((s.client.threads, s.log), (4, Some("/tmp/x".into())));
        assert!(!s.client.local_reads && of("").unwrap().client.local_reads);
        assert!(!s.client.local_writes && of("").unwrap().client.local_writes);
        assert!(!of("local_sockets=off").unwrap().client.local_sockets && s.client.local_sockets);
        assert_eq!(s.fuse.source, "m:1");
        assert!(of("").unwrap().client.access_times && !s.client.access_times);
        assert!(!of("noatime").unwrap().client.access_times);
    }

    #[test]
    fn mistakes_are_named() {
        for (list, part) in [
            ("frobnicate", "frobnicate"),
            ("memory", "memory=VALUE"),
            ("memory=1MiB", "128 MiB"),
            ("memory=lots", "lots"),
            ("memory=15E", "mount option `memory` is 15.0 EiB: from 128 MiB to 1.00 PiB is possible"),
            ("timeout=0s", "mount option `timeout` is 0s: from 1s to 30 days is possible"),
            ("timeout=200years", "30 days"),
            ("dirty_age=0s", "from 10ms to 30 days"),
            ("readahead=2P", "`readahead`"),
            ("timeout=soon", "soon"),
            ("engine_threads=0", "from 1 to 64"),
            ("local_sockets=maybe", "neither on nor off"),
            ("log=", "log=VALUE"),
        ] {
            let error = format!("{:#}", of(list).unwrap_err());
            assert!(error.contains(part), "{list}: {error}");
        }
        assert!(parse("frobnicate,ro", "m:1", Path::new("/mnt"), true).unwrap().fuse.read_only);
    }

    #[test]
    fn the_help_names_every_option_of_ours() {
        for option in OURS {
            assert!(HELP.contains(&format!("  {option}=")), "{option}");
        }
    }
}
