//! Settings of a metaserver.

use std::{
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroU8,
    path::PathBuf,
    time::Duration,
};

use fjordfs_proto::Policy;

use crate::store::{FjallOptions, Place};

/// Port of a metaserver when nothing else is said.
pub const PORT_DEFAULT: u16 = 7440;

/// Settings of a metaserver.
#[derive(Clone, Debug)]
pub struct Config {
    /// Folder of the metadata; made when it does not exist.
    pub data: PathBuf,
    /// Where the metadata is when it is not in the folder; then the folder is not used.
    pub store: Option<Place>,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Policy of the root directory of a new filesystem. An existing one keeps its own.
    pub default_policy: Policy,
    /// Placement groups per table.
    pub pg_count: usize,
    /// A client that is silent for longer loses its session.
    pub session_timeout: Duration,
    /// How often data servers report.
    pub heartbeat: Duration,
    /// A data server that is silent for longer is down.
    pub down_after: Duration,
    /// A target that is down or failed for longer is out: its groups are rebuilt on others.
    pub out_after: Duration,
    /// Longest time until an acknowledged operation survives power failure, too.
    pub log_sync: Duration,
    /// Memory and disk of the storage engine.
    pub engine: FjallOptions,
}

impl Config {
    /// Defaults for everything but the folder.
    pub fn new(data: impl Into<PathBuf>) -> Config {
        Config {
            data: data.into(),
            store: None,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, PORT_DEFAULT)),
            default_policy: Policy::Replica(const { NonZeroU8::new(2).expect("2 is not 0") }),
            pg_count: 64,
            session_timeout: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
            down_after: Duration::from_secs(5),
            out_after: Duration::from_secs(600),
            log_sync: Duration::from_millis(100),
            engine: FjallOptions::default(),
        }
    }
}
