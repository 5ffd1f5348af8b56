//! Telling the kernel that what it caches is stale.
//!
//! A notification can block in the kernel on a page that a request holds, so notifications are written by a thread of
//! their own and never while answering a request. The queue is bounded; what does not fit is dropped, which is sound for pages
//! because the next `open` drops them anyway ([`crate::kernel_cache`] is told first). Where somebody waits for one while the thread is
//! blocked on a page of another file, more threads come, and go when there is nothing to do.
//!
//! # Recalls
//! Others wait until a recalled name or attribute is out of use, so recalls must not wait for requests of this mount, which
//! may themselves wait for others. Therefore they have a thread of their own, which uses only notifications that wait for no
//! request: attributes of an inode without its pages, and for names the epoch (Linux 6.16), which makes the kernel ask
//! again for every name before it uses it. To invalidate a single name, the kernel would wait for its directory's lock,
//! which every request in that directory holds. Answers that are on their way while a recall is written are void as
//! well: the kernel notes epoch and attribute version before it asks. Those for which that is not so, [`crate::held`] knows; a recall
//! of what they brought ends when they have been taken in and invalidated then.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use fjordfs_proto::InodeId;
use tokio::sync::oneshot;

use crate::abi::{NotifyInvalEntry, NotifyInvalInode, OutHeader, Pod, answers_can_be_recalled, notify_code};
use crate::held::Held;
use crate::overtaken::Overtaken;
use crate::transport::dev_fuse::write_all;

mod recaller;

use recaller::Recaller;

const QUEUE_MAX: usize = 4096;
/// Until who must not lose a notification looks for room again.
const QUEUE_FULL_WAIT: Duration = Duration::from_millis(1);

/// Until who waits for a notification looks whether anybody can write it.
const STUCK: Duration = Duration::from_millis(20);
/// How long a thread beside the first stays without work.
const LINGER: Duration = Duration::from_secs(10);
/// Most threads: so many files whose pages are held may hold up nobody else.
const WRITERS_MAX: usize = 64;

#[derive(Debug)]
enum Notification {
    Inode(InodeId),
    Entry(InodeId, Box<[u8]>),
    /// As `Inode`, of pages with these bytes, and somebody waits for it.
    Pages(InodeId, Range<u64>, oneshot::Sender<()>),
    Stop,
}

/// Names and attributes that must not be used any more.
#[derive(Debug)]
struct Recall {
    inodes: Vec<InodeId>,
    names: bool,
    done: oneshot::Sender<()>,
}

/// Sends invalidations to the kernel of one mount. Cheap to clone; does nothing once the mount has ended.
#[derive(Clone, Debug)]
pub struct Notifier {
    queue: Sender<Notification>,
    /// As long as the leases that can be recalled, which the metaserver bounds.
    recalls: Sender<Option<Recall>>,
    writers: Arc<Writers>,
    overtaken: Arc<Overtaken>,
}

/// The threads that write notifications.
#[derive(Debug)]
struct Writers {
    fd: Arc<OwnedFd>,
    notifications: Receiver<Notification>,
    idle: AtomicUsize,
    count: AtomicUsize,
}

impl Notifier {
    /// Is told here of pages that are dropped.
    pub(crate) fn overtaken(&self) -> &Arc<Overtaken> {
        &self.overtaken
    }

    /// Cached attributes and pages of an inode are stale. Returns at once.
    pub fn invalidate_inode(&self, ino: InodeId) {
        self.overtaken.dropped(ino);
        self.send(Notification::Inode(ino));
    }

    /// As [`Notifier::invalidate_inode`], of the pages of some bytes only.
    pub(crate) fn invalidate_pages(&self, ino: InodeId, bytes: Range<u64>) {
        self.overtaken.dropped(ino);
        let (done, _nobody_waits) = oneshot::channel();
        self.send(Notification::Pages(ino, bytes, done));
    }

    /// As [`Notifier::invalidate_inode`], of the pages of some bytes only, but returns when the kernel has done it, which can take
    /// requests of this mount.
    pub async fn drop_pages(&self, ino: InodeId, bytes: Range<u64>) {
        self.overtaken.dropped(ino);
        let (done, mut dropped) = oneshot::channel();
        let mut notification = Notification::Pages(ino, bytes, done);
        while let Err(TrySendError::Full(again)) = self.queue.try_send(notification) {
            notification = again;
            tokio::time::sleep(QUEUE_FULL_WAIT).await;
        }
        // Without the threads there is no kernel left that caches anything.
        while tokio::time::timeout(STUCK, &mut dropped).await.is_err() {
            self.writers.reinforce();
        }
    }

    /// What is cached under a name is stale. Returns at once.
    pub fn invalidate_entry(&self, parent: InodeId, name: &[u8]) {
        self.send(Notification::Entry(parent, name.into()));
    }

    /// Attributes of these inodes are not to be used any more, nor, with `names`, any name without asking. `done` is sent when the
    /// kernel has obeyed, or is gone. Returns at once.
    pub fn recall(&self, inodes: Vec<InodeId>, names: bool, done: oneshot::Sender<()>) {
        // Without the thread there is no kernel left that caches anything.
        let _ended = self.recalls.send(Some(Recall { inodes, names, done }));
    }

    fn send(&self, notification: Notification) {
        if let Err(TrySendError::Full(dropped)) = self.queue.try_send(notification) {
            tracing::debug!(?dropped, "too many invalidations waiting; left to the next open");
        }
    }

    /// Ends the threads after what is queued. Waits for room, which there is since the connection is closed by then.
    pub(crate) fn stop(&self) {
        for _ in 0..self.writers.count.load(Ordering::SeqCst) {
            let _already_gone = self.queue.send(Notification::Stop);
        }
        let _already_gone = self.recalls.send(None);
    }
}

/// Starts the threads, which write to `fd`, a clone of the session's descriptor.
pub(crate) fn start(fd: OwnedFd, held: Arc<Held>) -> io::Result<(Notifier, [JoinHandle<()>; 2])> {
    let fd = Arc::new(fd);
    let (queue, notifications) = bounded(QUEUE_MAX);
    let (recalls, recalled) = unbounded();
    let thread = |name: &str| std::thread::Builder::new().name(name.to_owned());
    let (idle, count) = (AtomicUsize::new(0), AtomicUsize::new(1));
    let writers = Arc::new(Writers { fd: fd.clone(), notifications, idle, count });
    let first = writers.clone();
    let notifier = thread("fjord-fuse-notify").spawn(move || first.write(None))?;
    let mut recaller = Recaller::new(fd, held);
    let recaller = thread("fjord-fuse-recall").spawn(move || recaller.obey(&recalled))?;
    Ok((Notifier { queue, recalls, writers, overtaken: Arc::default() }, [notifier, recaller]))
}

impl Writers {
    /// Adds a thread if all are blocked.
    fn reinforce(self: &Arc<Self>) {
        if self.idle.load(Ordering::SeqCst) > 0 {
            return;
        }
        if self.count.fetch_add(1, Ordering::SeqCst) >= WRITERS_MAX {
            self.count.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let writers = self.clone();
        let spawned = std::thread::Builder::new().name("fjord-fuse-notify+".to_owned()).spawn(move || {
            writers.write(Some(LINGER));
            writers.count.fetch_sub(1, Ordering::SeqCst);
        });
        if let Err(e) = spawned {
            self.count.fetch_sub(1, Ordering::SeqCst);
            tracing::warn!("no thread for notifications beside those that are blocked: {e}");
        }
    }

    /// Writes what comes, until told to stop; those with a time for lingering also when nothing has come for so long.
    fn write(&self, linger: Option<Duration>) {
        loop {
            self.idle.fetch_add(1, Ordering::SeqCst);
            let next = match linger {
                None => self.notifications.recv().ok(),
                Some(linger) => self.notifications.recv_timeout(linger).ok(),
            };
            self.idle.fetch_sub(1, Ordering::SeqCst);
            match next {
                None | Some(Notification::Stop) => return,
                Some(notification) => write_notification(&self.fd, notification),
            }
        }
    }
}

/// A process takes over from one that has ended: the kernel sends again what that one has read and not answered, and asks for every
/// name before it uses it again.
pub(crate) fn take_over(fd: &OwnedFd, kernel_minor: u32) -> io::Result<()> {
    if answers_can_be_recalled(kernel_minor) {
        notify(fd, notify_code::INC_EPOCH, &[])?;
    }
    notify(fd, notify_code::RESEND, &[])
}

fn write_notification(fd: &OwnedFd, notification: Notification) {
    let written = match &notification {
        Notification::Inode(ino) => drop_pages(fd, *ino, 0..u64::MAX),
        Notification::Pages(ino, bytes, _) => drop_pages(fd, *ino, bytes.clone()),
        Notification::Entry(parent, name) => {
            let head = NotifyInvalEntry { parent: parent.0, namelen: name.len() as u32, flags: 0 };
            notify(fd, notify_code::INVAL_ENTRY, &[head.as_bytes(), name, &[0]])
        }
        Notification::Stop => Ok(()),
    };
    log_refusal(&notification, written);
    if let Notification::Pages(.., done) = notification {
        // The request may have been given up.
        let _ = done.send(());
    }
}

/// Pages of these bytes, and the attributes.
fn drop_pages(fd: &OwnedFd, ino: InodeId, bytes: Range<u64>) -> io::Result<()> {
    // A negative offset would be of attributes only, and no length is all pages from there on.
    let [off, end] = [bytes.start, bytes.end].map(|at| at.min(i64::MAX.cast_unsigned()).cast_signed());
    notify(fd, notify_code::INVAL_INODE, &[NotifyInvalInode { ino: ino.0, off, len: end - off }.as_bytes()])
}

fn log_refusal(what: impl std::fmt::Debug, written: io::Result<()>) {
    match written {
        Ok(()) => {}
        // Not cached, or no longer mounted.
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::EPERM)
            ) => {}
        Err(e) => tracing::warn!(?what, "the kernel refused an invalidation: {e}"),
    }
}

fn notify(fd: &OwnedFd, code: i32, parts: &[&[u8]]) -> io::Result<()> {
    let body: usize = parts.iter().map(|part| part.len()).sum();
    let header = OutHeader { len: (size_of::<OutHeader>() + body) as u32, error: code, unique: 0 };
    let mut slices = vec![IoSlice::new(header.as_bytes())];
    slices.extend(parts.iter().map(|part| IoSlice::new(part)));
    write_all(fd.as_fd(), &slices)
}
