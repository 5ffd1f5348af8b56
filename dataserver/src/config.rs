//! What a data server is told, and whether that makes sense.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use fjordfs_proto::Domain;

use crate::error::StartError;

/// A folder to store shards in, best one per flash device.
#[derive(Clone, Debug)]
pub struct TargetConfig {
    /// Created if missing.
    pub path: PathBuf,
    /// Failure domain: copies of a block go to different ones. `None` is the server's.
    pub domain: Option<Domain>,
}

/// How a data server runs.
#[derive(Clone, Debug)]
pub struct Config {
    /// `host:port` of the metaserver.
    pub meta: String,
    /// Where clients connect; port 0 takes a free one.
    pub listen: SocketAddr,
    /// `host:port` that clients are told, if not `listen`. Needed when `listen` is a wildcard and this host reaches
    /// the metaserver by another address than clients reach this host.
    pub advertise: Option<String>,
    /// Failure domain of targets that name none; `None` is a host of the server's name that shares nothing with others.
    pub domain: Option<Domain>,
    /// For people, and the failure domain when none is named.
    pub name: String,
    /// At least one.
    pub targets: Vec<TargetConfig>,
    /// Threads that serve clients, one io_uring each; 0 is one per CPU.
    pub cores: usize,
    /// How long a core looks for requests before it sleeps. What comes within this time is answered without waking a thread;
    /// the CPU time is spent also when nothing comes.
    pub poll: Duration,
    /// Of a volume file, bytes; smaller ones are made where space is short. 64 MiB to 4 GiB.
    pub volume_size: u64,
    /// How often the index is saved: a start after a crash reads what was written since.
    pub checkpoint_interval: Duration,
    /// Most bytes of shards per target, for tests and shared disks; `None` is what the filesystem has.
    pub capacity_max: Option<u64>,
    /// Most bytes per second that are copied from other servers to complete placement groups; 0 is no limit.
    pub rebuild_rate: u64,
    /// How long after the beginning of a scrub the next one begins; zero: only when an administrator asks for it.
    pub scrub_interval: Duration,
    /// Most bytes per second that the scrub of a target reads; 0 is no limit.
    pub scrub_rate: u64,
}

/// A tenth of what a flash device of today reads and writes: users hardly notice, and 8 TB on one target, shared by forty servers,
/// are back in a quarter of an hour.
const REBUILD_RATE_DEFAULT: u64 = 256 << 20;

/// Two weeks, and what gets through 8 TB in about that time with half to spare.
const SCRUB_INTERVAL_DEFAULT: Duration = Duration::from_secs(14 * 24 * 3600);
const SCRUB_RATE_DEFAULT: u64 = 16 << 20;

/// Bounds of `volume_size`: a volume must hold some whole blocks, and positions in it have 20 bits of pages.
const VOLUME_SIZES: std::ops::RangeInclusive<u64> = 64 << 20..=4 << 30;

impl Config {
    /// The defaults for a server that stores in `targets`.
    pub fn new(meta: impl Into<String>, targets: impl IntoIterator<Item = PathBuf>) -> Config {
        Config {
            meta: meta.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            domain: None,
            name: "data".to_owned(),
            targets: targets.into_iter().map(|path| TargetConfig { path, domain: None }).collect(),
            cores: 0,
            poll: Duration::ZERO,
            volume_size: 1 << 30,
            checkpoint_interval: Duration::from_secs(60),
            capacity_max: None,
            rebuild_rate: REBUILD_RATE_DEFAULT,
            scrub_interval: SCRUB_INTERVAL_DEFAULT,
            scrub_rate: SCRUB_RATE_DEFAULT,
        }
    }

    /// Checks what can be checked without touching a target, and returns the targets with absolute paths.
    pub(crate) fn validate(&self) -> Result<Vec<TargetConfig>, StartError> {
        let invalid = |what: String| Err(StartError::Config(what));
        if self.targets.is_empty() {
            return invalid(
                "a data server needs at least one target: name a folder to store shards in".into(),
            );
        }
        for meta in self.meta.split(',') {
            if !meta
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            {
                return invalid(format!("metaserver address '{meta}' is not host:port"));
            }
        }
        if let Some(advertise) = &self.advertise {
            let Some((host, port)) = advertise.rsplit_once(':').filter(|(host, _)| !host.is_empty()) else {
                return invalid(format!("advertised address '{advertise}' is not host:port"));
            };
            let nowhere = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified());
            if nowhere || !port.parse::<u16>().is_ok_and(|port| port > 0) {
                return invalid(format!(
                    "advertised address '{advertise}' cannot be connected to: write the host and the port that clients reach this server by"
                ));
            }
        }
        if !VOLUME_SIZES.contains(&self.volume_size) {
            return invalid(format!("volume size {} is not between 64 MiB and 4 GiB", self.volume_size));
        }
        if self.checkpoint_interval.is_zero() {
            return invalid("the checkpoint interval must not be zero".into());
        }
        let mut targets = Vec::with_capacity(self.targets.len());
        for target in &self.targets {
            let path = absolute(&target.path)
                .map_err(|source| StartError::Path { path: target.path.clone(), source })?;
            targets.push(TargetConfig { path, domain: target.domain.clone() });
        }
        for (i, a) in targets.iter().enumerate() {
            for b in &targets[..i] {
                let (a, b) = (&a.path, &b.path);
                if a == b {
                    return invalid(format!("target {} is named twice", a.display()));
                }
                if a.starts_with(b) || b.starts_with(a) {
                    return invalid(format!(
                        "targets {} and {} lie one inside the other",
                        b.display(),
                        a.display()
                    ));
                }
            }
        }
        Ok(targets)
    }

    pub(crate) fn core_count(&self) -> usize {
        match self.cores {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        }
    }
}

/// Creates the folder if needed; its path without links, so that one folder has one name. Folders above it are not made:
/// where they are missing, a device is not mounted, and its shards must not land on the disk below.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    if path.exists() && !path.is_dir() {
        return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a directory"));
    }
    match std::fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let why = "the folder above it is missing: mount the device or make the folder";
            return Err(io::Error::new(e.kind(), why));
        }
        made => made?,
    }
    path.canonicalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let (a, inside, file) = (dir.path().join("a"), dir.path().join("a/b"), dir.path().join("file"));
        std::fs::write(&file, "").unwrap();
        let check = |config: Config| config.validate().map(|t| t.len()).map_err(|e| e.to_string());
        let meta = "localhost:7440";
        assert_eq!(check(Config::new(meta, [a.clone()])), Ok(1));
        let refused = [
            (Config::new(meta, []), "at least one target"),
            (Config::new(meta, [a.clone(), a.join("../a")]), "named twice"),
            (Config::new(meta, [a.clone(), inside]), "one inside the other"),
            (Config::new(meta, [file.clone()]), "not a directory"),
            (Config::new(meta, [file.join("x")]), "file/x"),
            (Config::new(meta, [dir.path().join("missing/x")]), "above it is missing"),
            (Config::new("localhost", [a.clone()]), "host:port"),
            (Config { volume_size: 1 << 20, ..Config::new(meta, [a.clone()]) }, "volume size"),
            (Config { advertise: Some(":1".into()), ..Config::new(meta, [a.clone()]) }, "advertised"),
            (Config { advertise: Some("h:0".into()), ..Config::new(meta, [a.clone()]) }, "connected to"),
            (
                Config { advertise: Some("0.0.0.0:1".into()), ..Config::new(meta, [a.clone()]) },
                "connected to",
            ),
            (Config { advertise: Some("[::]:1".into()), ..Config::new(meta, [a.clone()]) }, "connected to"),
            (Config { advertise: Some("h".into()), ..Config::new(meta, [a.clone()]) }, "host:port"),
            (Config { checkpoint_interval: Duration::ZERO, ..Config::new(meta, [a]) }, "interval"),
        ];
        for (config, reason) in refused {
            let e = check(config).unwrap_err();
            assert!(e.contains(reason), "{e}");
        }
    }
}
