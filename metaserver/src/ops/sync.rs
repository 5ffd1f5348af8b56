//! Everything before is durable. The operation itself does nothing: its answer waits for the log (`needs_sync`).

use fjordfs_proto::pb::meta::Empty;

use super::EMPTY;

pub(super) fn run() -> Empty {
    EMPTY
}
