//! Why a session or a data server is turned away. The gRPC layer makes a status of it.

use fjordfs_proto::{FsError, error::Errno};

/// A refusal with a sentence that says what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// The request makes no sense.
    Invalid(String),
    /// Wrong cluster, wrong version: trying again will not help.
    Precondition(String),
    /// The session does not exist.
    NotFound(String),
    /// A newer attachment took the session.
    Aborted(String),
    /// Not now.
    Unavailable(String),
    /// The device is full.
    Exhausted(String),
}

impl From<FsError> for Refusal {
    fn from(e: FsError) -> Refusal {
        match e.errno {
            Errno::ENOSPC => Refusal::Exhausted(e.message),
            Errno::EINVAL => Refusal::Invalid(e.message),
            _ => Refusal::Unavailable(e.message),
        }
    }
}
