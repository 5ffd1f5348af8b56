//! A connection to the kernel: what is negotiated, and the worker threads.
//!
//! # What INIT asks for, and what it leaves out
//! | flag | why |
//! |---|---|
//! | `ASYNC_READ`, `ASYNC_DIO`, `PARALLEL_DIROPS` | many requests at once; the filesystem orders nothing by arrival |
//! | `BIG_WRITES`, `MAX_PAGES` | requests of up to 1 MiB |
//! | `ATOMIC_O_TRUNC` | `open(O_TRUNC)` is one request, and the truncation cannot be lost between two |
//! | `DIRECT_IO_ALLOW_MMAP` | files opened with `O_DIRECT|O_APPEND` can still be mapped |
//! | `DO_READDIRPLUS`, `READDIRPLUS_AUTO` | only while attributes may be cached: with timeouts of 0 the kernel would throw away what a listing brought, and ask for each name again |
//! | not `AUTO_INVAL_DATA` | it asks for attributes before *every* cached read, and drops a file's pages after this mount's own writes. Changes by others are seen without it: at `open`, because pages are kept only while the version of the bytes stands, and while open whenever the kernel learns of another size (a growing log) |
//! | not `EXPLICIT_INVAL_DATA` | it would also switch off the last of these: the last page of a file that another client extends would end in zeros |
//! | not `WRITEBACK_CACHE` | the client library buffers dirty data under its own memory limit and packs it into blocks; a second dirty cache in the kernel would hide appends, sizes and times of other clients, and double the memory |
//! | not `HANDLE_KILLPRIV*` | without it the kernel itself drops suid and sgid, with a SETATTR before the write |
//! | not `EXPORT_SUPPORT`, `CACHE_SYMLINKS`, `DONT_MASK` | lookups of ".." are not served; a symbolic link replaced by another client must be seen; the kernel applies the umask |
//! | not `POSIX_LOCKS`, `FLOCK_LOCKS` | locks hold among the processes of one mount, kept by the kernel |

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::task::LocalSet;

use crate::abi::{self, InitIn, InitOut, Pod, init_flag, opcode};
use crate::buffer::BufferPool;
use crate::dispatch::Dispatcher;
use crate::filesystem::Filesystem;
use crate::notify::{self, Notifier};
use crate::options::MountOptions;
use crate::reply::{Reply, Validity};
use crate::transport::Message;
use crate::transport::dev_fuse::{self, DevFuse};
use crate::worker;

/// The kernel sends INIT at once; this long without one means that something else reads the device.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests the kernel sends without a waiting process (readahead, direct asynchronous I/O, releases).
const BACKGROUND_MAX: u16 = 512;
/// From here on the kernel holds back readahead.
const CONGESTION_THRESHOLD: u16 = 384;

/// Recycled read buffers, per worker.
const IDLE_BUFFERS_PER_WORKER: usize = 8;

const PAGE: usize = 4096;

/// Why a connection could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The kernel's protocol is too old.
    #[error("the kernel speaks FUSE {major}.{minor}; FjordFS needs 7.31 (Linux 5.4) or later")]
    KernelTooOld {
        /// The kernel's major version.
        major: u32,
        /// The kernel's minor version.
        minor: u32,
    },
    /// No INIT came.
    #[error("the kernel did not begin the FUSE session within {} s; look at `dmesg`", INIT_TIMEOUT.as_secs())]
    NoInit,
    /// The mount was undone before it was in service.
    #[error("unmounted before it was in service")]
    Unmounted,
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// How it failed.
        source: io::Error,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> SessionError {
    move |source| SessionError::Io { what, source }
}

/// The threads of a mount.
#[derive(Debug)]
pub(crate) struct Session {
    workers: Vec<JoinHandle<()>>,
    notifications: Option<(Notifier, [JoinHandle<()>; 2])>,
}

impl Session {
    /// Answers INIT on the device of a fresh mount and starts its workers.
    pub(crate) fn start<F: Filesystem>(
        fs: F,
        device: OwnedFd,
        options: &MountOptions,
    ) -> Result<Session, SessionError> {
        let size_max = options.request_size_max;
        let threads = options.threads.max(1);
        let pool = BufferPool::new(size_max, IDLE_BUFFERS_PER_WORKER * threads);
        let validity = Validity { entry: options.entry_timeout, attr: options.attr_timeout };
        let kernel_minor = initialize(&device, &pool, size_max, validity)?;

        let clone = || dev_fuse::clone_device(device.as_fd());
        let (notifier, notify_threads) =
            clone().and_then(notify::start).map_err(io_error("starting the notifier"))?;
        let dispatcher = Arc::new(Dispatcher::new(fs, validity, size_max, kernel_minor, notifier.clone()));
        dispatcher.filesystem().mounted(notifier.clone());
        let mut session = Session { workers: Vec::new(), notifications: Some((notifier, notify_threads)) };

        // Every descriptor before any thread: a failure here leaves nothing running.
        let mut devices = Vec::with_capacity(threads);
        for _ in 1..threads {
            devices.push(clone().map_err(io_error("cloning /dev/fuse for a worker"))?);
        }
        devices.push(device);
        let alive = Arc::new(AtomicUsize::new(devices.len()));
        for (index, device) in devices.into_iter().enumerate() {
            let context = Worker {
                index,
                device,
                pool: Arc::clone(&pool),
                dispatcher: Arc::clone(&dispatcher),
                alive: Arc::clone(&alive),
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(io_error("starting a worker's runtime"))?;
            let thread = std::thread::Builder::new()
                .name(format!("fjord-fuse-{index}"))
                .spawn(move || runtime.block_on(LocalSet::new().run_until(context.run())))
                .map_err(io_error("starting a worker thread"))?;
            session.workers.push(thread);
        }
        Ok(session)
    }

    /// Waits until the mount has ended and everything it began is done.
    pub(crate) fn join(&mut self) {
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                tracing::error!("a FUSE worker thread panicked; this is a bug, report it");
            }
        }
        if let Some((notifier, threads)) = self.notifications.take() {
            notifier.stop();
            for thread in threads {
                let _panic_was_reported_by_its_hook = thread.join();
            }
        }
    }

    /// Whether the mount has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.workers.iter().all(JoinHandle::is_finished)
    }
}

/// What one worker thread needs.
struct Worker<F: Filesystem> {
    index: usize,
    device: OwnedFd,
    pool: Arc<BufferPool>,
    dispatcher: Arc<Dispatcher<F>>,
    alive: Arc<AtomicUsize>,
}

impl<F: Filesystem> Worker<F> {
    async fn run(self) {
        self.dispatcher.filesystem().enter_worker(self.index);
        let served = match DevFuse::new(self.device, self.pool) {
            Ok(transport) => worker::run(transport, Arc::clone(&self.dispatcher)).await,
            Err(e) => Err(e),
        };
        if let Err(e) = served {
            tracing::error!(worker = self.index, "a FUSE worker stopped serving: {e}");
        }
        if self.alive.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.dispatcher.close_all().await;
        }
    }
}

/// Reads INIT and answers it. The kernel's minor version.
fn initialize(
    device: &OwnedFd,
    pool: &Arc<BufferPool>,
    size_max: usize,
    validity: Validity,
) -> Result<u32, SessionError> {
    let deadline = Instant::now() + INIT_TIMEOUT;
    let mut buffer = pool.take();
    loop {
        wait_readable(device, deadline)?;
        let len = match dev_fuse::read_request(device.as_fd(), buffer.request_mut()) {
            Ok(len) => len,
            Err(e) => match e.raw_os_error() {
                Some(libc::EAGAIN | libc::EINTR | libc::ENOENT) => continue,
                Some(libc::ENODEV) => return Err(SessionError::Unmounted),
                _ => return Err(io_error("reading the first FUSE request")(e)),
            },
        };
        let Some(message) = Message::from_bytes(buffer.copy_request(len)) else { continue };
        let unique = message.header.unique;
        let answer = |reply: &Reply| {
            dev_fuse::send(device.as_fd(), unique, reply).map_err(io_error("answering the kernel's INIT"))
        };
        if message.header.opcode != opcode::INIT {
            answer(&Reply::Error(libc::EIO))?;
            continue;
        }
        let init = InitIn::from_prefix(&message.fixed);
        if init.major > abi::KERNEL_VERSION {
            // A newer kernel offers again what we name.
            answer(&Reply::of(&InitOut {
                major: abi::KERNEL_VERSION,
                minor: abi::KERNEL_MINOR_VERSION,
                ..InitOut::default()
            }))?;
            continue;
        }
        if init.major < abi::KERNEL_VERSION || init.minor < abi::KERNEL_MINOR_VERSION_MIN {
            let _the_mount_fails_anyway = answer(&Reply::Error(libc::EPROTO));
            return Err(SessionError::KernelTooOld { major: init.major, minor: init.minor });
        }
        let out = negotiate(&init, size_max, validity);
        answer(&Reply::of(&out))?;
        tracing::debug!(
            kernel_minor = init.minor,
            flags = format_args!("{:#x}", out.flags),
            out.max_write,
            "FUSE session began"
        );
        return Ok(init.minor);
    }
}

fn wait_readable(device: &OwnedFd, deadline: Instant) -> Result<(), SessionError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(SessionError::NoInit);
    }
    let mut poll = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive during the call. Interruptions are as good as readiness: the caller reads and comes back.
    unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as libc::c_int + 1) };
    Ok(())
}

/// The answer to INIT.
fn negotiate(init: &InitIn, size_max: usize, validity: Validity) -> InitOut {
    let offered = u64::from(init.flags) | u64::from(init.flags2) << 32;
    let mut wanted = init_flag::ASYNC_READ
        | init_flag::ATOMIC_O_TRUNC
        | init_flag::BIG_WRITES
        | init_flag::ASYNC_DIO
        | init_flag::PARALLEL_DIROPS
        | init_flag::MAX_PAGES
        | init_flag::INIT_EXT
        | init_flag::DIRECT_IO_ALLOW_MMAP;
    if !validity.attr.is_zero() {
        wanted |= init_flag::DO_READDIRPLUS | init_flag::READDIRPLUS_AUTO;
    }
    let flags = wanted & offered;
    InitOut {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION.min(init.minor),
        max_readahead: init.max_readahead,
        flags: flags as u32, // the low half
        flags2: (flags >> 32) as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: size_max as u32,
        time_gran: 1,
        // The kernel lowers it to fs.fuse.max_pages_limit.
        max_pages: size_max.div_ceil(PAGE).min(usize::from(u16::MAX)) as u16,
        ..InitOut::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_is_taken() {
        let all = InitIn {
            major: 7,
            minor: 99,
            max_readahead: 131_072,
            flags: u32::MAX,
            flags2: u32::MAX,
            unused: [0; 11],
        };
        let out = negotiate(&all, 1 << 20, Validity::default());
        assert_eq!((out.major, out.minor, out.max_pages, out.max_write), (7, 45, 256, 1 << 20));
        let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
        assert_ne!(flags & init_flag::DIRECT_IO_ALLOW_MMAP, 0);
        for refused in [
            init_flag::WRITEBACK_CACHE,
            init_flag::AUTO_INVAL_DATA,
            init_flag::EXPLICIT_INVAL_DATA,
            init_flag::DO_READDIRPLUS,
            init_flag::POSIX_LOCKS,
            init_flag::FLOCK_LOCKS,
            init_flag::OVER_IO_URING,
            init_flag::HANDLE_KILLPRIV | init_flag::HANDLE_KILLPRIV_V2,
            init_flag::EXPORT_SUPPORT | init_flag::CACHE_SYMLINKS | init_flag::DONT_MASK,
        ] {
            assert_eq!(flags & refused, 0, "{refused:#x}");
        }
        let none = negotiate(&InitIn { flags: 0, flags2: 0, minor: 31, ..all }, 1 << 20, Validity::default());
        assert_eq!((none.flags, none.flags2, none.minor), (0, 0, 31));
    }

    #[test]
    fn listings_bring_attributes_only_when_they_may_be_cached() {
        let all = InitIn { major: 7, minor: 45, flags: u32::MAX, flags2: u32::MAX, ..InitIn::default() };
        let validity = Validity { entry: Duration::ZERO, attr: Duration::from_secs(1) };
        assert_ne!(u64::from(negotiate(&all, 1 << 20, validity).flags) & init_flag::DO_READDIRPLUS, 0);
    }
}
