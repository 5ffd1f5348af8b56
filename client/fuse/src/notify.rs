//! Telling the kernel that what it caches is stale.
//!
//! A notification can block in the kernel on a page that a request holds, so notifications are written by a thread of
//! their own and never while answering a request. The queue is bounded; what does not fit is dropped, which is sound for pages
//! because the next `open` drops them anyway ([`crate::kernel_cache`] is told first).

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;

use fjordfs_proto::InodeId;

use crate::abi::{NotifyInvalEntry, NotifyInvalInode, OutHeader, Pod, notify_code};
use crate::transport::dev_fuse::write_all;

const QUEUE_MAX: usize = 4096;

#[derive(Debug)]
enum Notification {
    Inode(InodeId),
    Entry(InodeId, Box<[u8]>),
    Stop,
}

/// Sends invalidations to the kernel of one mount. Cheap to clone; does nothing once the mount has ended.
#[derive(Clone, Debug)]
pub struct Notifier {
    queue: SyncSender<Notification>,
}

impl Notifier {
    /// Cached attributes and pages of an inode are stale. Returns at once.
    pub fn invalidate_inode(&self, ino: InodeId) {
        self.send(Notification::Inode(ino));
    }

    /// What is cached under a name is stale. Returns at once.
    pub fn invalidate_entry(&self, parent: InodeId, name: &[u8]) {
        self.send(Notification::Entry(parent, name.into()));
    }

    fn send(&self, notification: Notification) {
        if let Err(TrySendError::Full(dropped)) = self.queue.try_send(notification) {
            tracing::debug!(?dropped, "too many invalidations waiting; left to the next open");
        }
    }

    /// Ends the thread after what is queued. Waits for room, which there is since the connection is closed by then.
    pub(crate) fn stop(&self) {
        let _already_gone = self.queue.send(Notification::Stop);
    }
}

/// Starts the thread, which writes to `fd`, a clone of the session's descriptor.
pub(crate) fn start(fd: OwnedFd) -> io::Result<(Notifier, JoinHandle<()>)> {
    let (queue, notifications) = sync_channel(QUEUE_MAX);
    let thread = std::thread::Builder::new()
        .name("fjord-fuse-notify".to_owned())
        .spawn(move || write_notifications(&fd, &notifications))?;
    Ok((Notifier { queue }, thread))
}

fn write_notifications(fd: &OwnedFd, notifications: &Receiver<Notification>) {
    while let Ok(notification) = notifications.recv() {
        let written = match &notification {
            // An offset of 0 and no length: all pages, and the attributes.
            Notification::Inode(ino) => notify(
                fd,
                notify_code::INVAL_INODE,
                &[NotifyInvalInode { ino: ino.0, off: 0, len: 0 }.as_bytes()],
            ),
            Notification::Entry(parent, name) => {
                let head = NotifyInvalEntry { parent: parent.0, namelen: name.len() as u32, flags: 0 };
                notify(fd, notify_code::INVAL_ENTRY, &[head.as_bytes(), name, &[0]])
            }
            Notification::Stop => return,
        };
        match written {
            Ok(()) => {}
            // Not cached, or no longer mounted.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::EPERM)
                ) => {}
            Err(e) => tracing::warn!(?notification, "the kernel refused an invalidation: {e}"),
        }
    }
}

fn notify(fd: &OwnedFd, code: i32, parts: &[&[u8]]) -> io::Result<()> {
    let body: usize = parts.iter().map(|part| part.len()).sum();
    let header = OutHeader { len: (size_of::<OutHeader>() + body) as u32, error: code, unique: 0 };
    let mut slices = vec![IoSlice::new(header.as_bytes())];
    slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    write_all(fd.as_fd(), &slices)
}
