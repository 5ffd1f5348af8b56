//! What failed: an errno for the program, and a sentence in the log for what a person should look at.

use std::time::{Duration, Instant};

use fjordfs_proto::{FsError, InodeId, error::Errno};
use parking_lot::Mutex;

use super::Dispatcher;
use crate::{filesystem::Filesystem, reply::Reply, request::Operation};

impl<F: Filesystem> Dispatcher<F> {
    /// The errno for the program, and, for failures that a person should look at, the sentence in the log.
    pub(super) fn failed(&self, what: &'static str, node: InodeId, e: &FsError) -> Reply {
        use Errno::*;
        let serious =
            matches!(e.errno, EIO | EPROTO | EBADMSG | ETIMEDOUT | ENOMEM | ENODEV | ESTALE | EOVERFLOW);
        if serious {
            self.complaints.complain(|suppressed| {
                tracing::warn!(%node, suppressed, "{what} failed: {e}");
            });
        } else {
            tracing::debug!(%node, "{what}: {e}");
        }
        Reply::Error(e.errno.code())
    }
}

pub(super) fn describe(operation: &Operation) -> &'static str {
    match operation {
        Operation::Lookup { .. } => "lookup",
        Operation::Getattr | Operation::Statx => "stat",
        Operation::Setattr(_) => "changing attributes",
        Operation::Readlink => "readlink",
        Operation::Symlink { .. } => "symlink",
        Operation::Mknod { .. } => "mknod",
        Operation::Mkdir { .. } => "mkdir",
        Operation::Unlink { .. } => "unlink",
        Operation::Rmdir { .. } => "rmdir",
        Operation::Rename { .. } => "rename",
        Operation::Link { .. } => "link",
        Operation::Open { .. } => "open",
        Operation::Create { .. } | Operation::Tmpfile { .. } => "create",
        Operation::Getxattr { .. } => "getxattr",
        Operation::Setxattr { .. } => "setxattr",
        Operation::Listxattr { .. } => "listxattr",
        Operation::Removexattr { .. } => "removexattr",
        Operation::Read { .. } => "read",
        Operation::Write { .. } => "write",
        Operation::Fallocate { .. } => "fallocate",
        Operation::CopyFileRange { .. } => "copy_file_range",
        Operation::Lseek { .. } => "lseek",
        Operation::Getlk { .. } | Operation::Setlk { .. } => "locking",
        Operation::Flush { .. } | Operation::Release { .. } => "close",
        Operation::Fsync { .. } => "fsync",
        Operation::Readdir { .. } => "readdir",
        Operation::Statfs => "statfs",
        Operation::Fsyncdir | Operation::Syncfs => "sync",
        _ => "request",
    }
}

/// Keeps a failing cluster from filling the disk with log lines: a few a second, with a count of those left out.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    window: Mutex<Option<(Instant, u32)>>,
}

impl Complaints {
    const PER_SECOND: u32 = 10;

    pub(super) fn complain(&self, log: impl FnOnce(u32)) {
        let mut window = self.window.lock();
        let suppressed = match &mut *window {
            Some((began, count)) if began.elapsed() < Duration::from_secs(1) => {
                *count += 1;
                if *count > Self::PER_SECOND {
                    return;
                }
                0
            }
            Some((_, count)) => count.saturating_sub(Self::PER_SECOND),
            None => 0,
        };
        if window.is_none_or(|(began, _)| began.elapsed() >= Duration::from_secs(1)) {
            *window = Some((Instant::now(), 1));
        }
        drop(window);
        log(suppressed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_few() {
        let complaints = Complaints::default();
        let mut logged = 0;
        for _ in 0..1000 {
            complaints.complain(|_| logged += 1);
        }
        assert!(logged <= 2 * Complaints::PER_SECOND, "{logged}");
        *complaints.window.lock() = Some((Instant::now() - Duration::from_secs(2), 1000));
        complaints.complain(|suppressed| assert_eq!(suppressed, 990));
    }
}
