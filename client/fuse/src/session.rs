//! A connection to the kernel: from INIT to the threads that serve it.
//!
//! # Beginning over io_uring
//! Nothing that can fail is left for later than it must be: rings, memory and threads are there before INIT is answered, so that a
//! failure is answered with /dev/fuse. Once INIT is answered the kernel holds back all requests until every CPU's queue has an
//! entry; when it refuses one that is needed, it goes back to /dev/fuse by itself, and so do we.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::buffer::BufferPool;
use crate::dispatch::Dispatcher;
use crate::filesystem::Filesystem;
use crate::held::Held;
use crate::notify::{self, Notifier};
use crate::options::{MountOptions, TransportChoice};
use crate::reply::Validity;
use crate::transport::dev_fuse;
use crate::transport::io_uring::RegisterError;
use crate::transport::selection::{Selection, TransportInfo, TransportKind};

mod again;
mod departure;
mod init;
mod threads;

use again::Again;
pub use departure::Departure;
use departure::{Departing, departure};
use init::{INIT_TIMEOUT, Init};
use threads::RingThreads;

/// Buffers that wait to be used again, bytes. Written data comes back a block at a time and from several blocks at once: with room for one
/// block, a sixth of a stream's CPU time went to the kernel's clearing of fresh memory. Not by worker: what many of them have in flight
/// is bounded by the client's memory.
const IDLE_BUFFERS: usize = 96 << 20;

/// Why a connection could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The kernel's protocol is too old.
    #[error("the kernel speaks FUSE {major}.{minor}; FjordFS needs 7.34 (Linux 5.14) or later")]
    KernelTooOld {
        /// The kernel's major version.
        major: u32,
        /// The kernel's minor version.
        minor: u32,
    },
    /// No INIT came.
    #[error("the kernel did not begin the FUSE session within {} s; look at `dmesg`", INIT_TIMEOUT.as_secs())]
    NoInit,
    /// A successor could not get what this process has read.
    #[error("the kernel cannot send requests again (that came with Linux 6.9): mount with supervise=off")]
    NoResend,
    /// The mount was undone before it was in service.
    #[error("unmounted before it was in service")]
    Unmounted,
    /// The transport that was asked for is not possible, or failed where there is no way back.
    #[error("the transport io_uring is not possible: {0}; mount with transport=auto or transport=dev_fuse")]
    Transport(String),
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
    transport: TransportInfo,
    departure: Departure,
}

/// What the kernel and a mount have agreed on when it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Minor version of the kernel's protocol.
    pub kernel_minor: u32,
    /// Largest request, bytes.
    pub size_max: u32,
}

/// Takes a copy of the descriptors that requests are read from, before any is.
pub(crate) type Keep<'a> = &'a mut dyn FnMut(&[OwnedFd], Agreed) -> io::Result<()>;

fn buffers(options: &MountOptions) -> Arc<BufferPool> {
    BufferPool::new(options.request_size_max, IDLE_BUFFERS / options.request_size_max.max(1))
}

impl Session {
    /// Answers INIT on the device of a fresh mount and starts its workers.
    pub(crate) fn start<F: Filesystem>(
        fs: F,
        device: OwnedFd,
        options: &MountOptions,
        selection: Selection,
        keep: Option<Keep<'_>>,
    ) -> Result<Session, SessionError> {
        let pool = buffers(options);
        let init = Init::read(&device, &pool)?;
        if keep.is_some() && !init.can_resend() {
            return Err(SessionError::NoResend);
        }
        let is_must = options.transport == TransportChoice::IoUring;
        let or_dev_fuse =
            |reason: String| if is_must { Err(SessionError::Transport(reason)) } else { Ok(Some(reason)) };

        let (rings, mut fallback) = match selection {
            Selection::DevFuse { fallback } => (None, fallback),
            Selection::IoUring(_) if !init.offers_uring() => {
                (None, or_dev_fuse("the kernel does not offer it to this mount".to_owned())?)
            }
            Selection::IoUring(plan) => match RingThreads::prepare(&plan, &options.uring, &pool) {
                Ok(threads) => (Some((plan, threads)), None),
                Err(e) => (None, or_dev_fuse(format!("a ring could not be set up: {e}"))?),
            },
        };
        let size_max = rings.as_ref().map_or(options.request_size_max, |(plan, _)| plan.size_max);
        init.answer(&device, size_max, rings.is_some())?;

        let agreed = Agreed { kernel_minor: init.kernel_minor(), size_max: size_max as u32 };
        let (mut session, dispatcher, leaving) = Session::begin(fs, device.as_fd(), options, agreed, 1)?;

        if let Some((plan, threads)) = rings {
            match threads.register(&device) {
                Ok(()) => {
                    session.transport.kind = plan.kind();
                    session.workers = threads.serve(&dispatcher, device, &pool, &leaving);
                    return Ok(session);
                }
                Err(e @ RegisterError::Refused { .. }) => {
                    threads.end();
                    fallback = or_dev_fuse(e.to_string())?;
                }
                Err(RegisterError::Ended) => return Err(SessionError::Unmounted),
                Err(e) => return Err(SessionError::Transport(e.to_string())),
            }
        }
        session.transport.fallback = fallback;
        // Every descriptor before any thread: a failure here leaves nothing running.
        let devices = threads::devices(device, options.threads.max(1))?;
        if let Some(keep) = keep {
            keep(&devices, agreed).map_err(io_error("handing the descriptors to the supervisor"))?;
        }
        session.workers = threads::serve_dev_fuse(devices, Vec::new(), &dispatcher, &pool, &leaving)?;
        Ok(session)
    }

    /// Goes on with a session that a former process has begun. Numbers before `first_number` are of files that it has opened.
    pub(crate) fn resume<F: Filesystem>(
        fs: F,
        devices: Vec<OwnedFd>,
        options: &MountOptions,
        agreed: Agreed,
        first_number: u64,
    ) -> Result<Session, SessionError> {
        let Some(device) = devices.first() else { return Err(SessionError::Unmounted) };
        let pool = buffers(options);
        let (mut session, dispatcher, leaving) =
            Session::begin(fs, device.as_fd(), options, agreed, first_number)?;
        dispatcher.take_over();
        // Before anybody reads: what was read by then comes once more.
        let again =
            notify::take_over(device, agreed.kernel_minor).and_then(|()| Again::read(device.as_fd(), &pool));
        let again = again.map_err(|e| match e.raw_os_error() {
            Some(libc::ENODEV | libc::ENOTCONN | libc::EPERM) => SessionError::Unmounted,
            _ => io_error("asking the kernel for the requests under way")(e),
        })?;
        dispatcher.filesystem().come_again(&again.numbers());
        session.workers = threads::serve_dev_fuse(devices, again.messages, &dispatcher, &pool, &leaving)?;
        Ok(session)
    }

    /// Everything but the workers.
    fn begin<F: Filesystem>(
        fs: F,
        device: BorrowedFd<'_>,
        options: &MountOptions,
        agreed: Agreed,
        first_number: u64,
    ) -> Result<(Session, Arc<Dispatcher<F>>, Departing), SessionError> {
        let validity = Validity { entry: options.entry_timeout, attr: options.attr_timeout };
        let held = Arc::new(Held::default());
        let (notifier, notify_threads) = dev_fuse::clone_device(device)
            .and_then(|device| notify::start(device, Arc::clone(&held)))
            .map_err(io_error("starting the notifier"))?;
        let Agreed { kernel_minor, size_max } = agreed;
        let size_max = size_max as usize;
        let dispatcher =
            Dispatcher::new(fs, validity, size_max, kernel_minor, notifier.clone(), held, first_number);
        dispatcher.filesystem().mounted(notifier.clone());
        let (departure, leaving) = departure();
        let session = Session {
            workers: Vec::new(),
            notifications: Some((notifier, notify_threads)),
            transport: TransportInfo { kind: TransportKind::DevFuse, fallback: None },
            departure,
        };
        Ok((session, Arc::new(dispatcher), leaving))
    }

    /// For leaving the mount to another process.
    pub(crate) fn departure(&self) -> Departure {
        self.departure.clone()
    }

    /// How requests come.
    pub(crate) fn transport(&self) -> &TransportInfo {
        &self.transport
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
