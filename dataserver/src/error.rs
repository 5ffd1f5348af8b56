//! Why a data server does not start, or did not stop well.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::store::{error::StoreError, label::LabelError};

/// Why a data server does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration contradicts itself.
    #[error("{0}")]
    Config(String),
    /// A target's folder cannot be made or resolved.
    #[error("target {path}: {source}")]
    Path {
        /// As configured.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A target's folder cannot be claimed.
    #[error(transparent)]
    Label(#[from] LabelError),
    /// A target's shards cannot be read.
    #[error("{0}")]
    Store(String),
    /// The listen address cannot be taken.
    #[error(
        "cannot listen on {address}: {source} (is another data server running there? choose another address)"
    )]
    Listen {
        /// As configured.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// No io_uring.
    #[error(
        "cannot set up io_uring: {0} (it needs Linux 5.19, sysctl kernel.io_uring_disabled=0, and in a container a \
         seccomp profile that allows io_uring_setup)"
    )]
    Uring(io::Error),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// The metaserver does not want this data server.
    #[error("metaserver {meta} refused this data server: {message}")]
    Refused {
        /// Its address.
        meta: String,
        /// What it said.
        message: String,
    },
}

impl From<StoreError> for StartError {
    fn from(e: StoreError) -> StartError {
        StartError::Store(e.to_string())
    }
}

/// What did not end well. The server is down in any case; nothing that was acknowledged as synced is lost.
#[derive(Debug, thiserror::Error)]
#[error("data server stopped, but {0}; the next start will take longer")]
pub struct StopError(pub(crate) String);
