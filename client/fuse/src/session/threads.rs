//! The threads that serve a mount: one runtime each, and one transport.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use tokio::runtime::{LocalOptions, LocalRuntime};

use super::{SessionError, io_error};
use crate::buffer::BufferPool;
use crate::dispatch::Dispatcher;
use crate::filesystem::Filesystem;
use crate::options::UringOptions;
use crate::transport::Message;
use crate::transport::dev_fuse::{self, DevFuse};
use crate::transport::io_uring::{IoUring, RegisterError, cpus};
use crate::transport::selection::Plan;
use crate::worker;

use super::departure::Departing;

/// What serving threads share.
pub(super) struct Serving<F: Filesystem> {
    dispatcher: Arc<Dispatcher<F>>,
    pool: Arc<BufferPool>,
    alive: Arc<AtomicUsize>,
    leaving: Departing,
}

impl<F: Filesystem> Clone for Serving<F> {
    fn clone(&self) -> Self {
        Serving {
            dispatcher: Arc::clone(&self.dispatcher),
            pool: Arc::clone(&self.pool),
            alive: Arc::clone(&self.alive),
            leaving: self.leaving.clone(),
        }
    }
}

impl<F: Filesystem> Serving<F> {
    fn new(
        dispatcher: &Arc<Dispatcher<F>>,
        pool: &Arc<BufferPool>,
        threads: usize,
        leaving: Departing,
    ) -> Serving<F> {
        Serving {
            dispatcher: Arc::clone(dispatcher),
            pool: Arc::clone(pool),
            alive: Arc::new(AtomicUsize::new(threads)),
            leaving,
        }
    }

    async fn over_dev_fuse(self, index: usize, device: OwnedFd, early: Vec<Message>) {
        self.dispatcher.filesystem().enter_worker(index);
        self.read_device(index, device, early).await;
        self.end().await;
    }

    /// With `device`, also what the kernel sends only there.
    async fn over_uring(self, index: usize, transport: IoUring, device: Option<OwnedFd>) {
        self.dispatcher.filesystem().enter_worker(index);
        let reader = device.map(|device| {
            let serving = self.clone();
            tokio::task::spawn_local(async move { serving.read_device(index, device, Vec::new()).await })
        });
        let leaving = self.leaving.told.clone();
        report(index, worker::run(transport, Arc::clone(&self.dispatcher), leaving).await);
        if let Some(reader) = reader {
            let _panic_was_reported_by_its_hook = reader.await;
        }
        self.end().await;
    }

    /// `early` was read from the device already.
    async fn read_device(&self, index: usize, device: OwnedFd, early: Vec<Message>) {
        let served = match DevFuse::new(device, Arc::clone(&self.pool), early) {
            Ok(transport) => {
                worker::run(transport, Arc::clone(&self.dispatcher), self.leaving.told.clone()).await
            }
            Err(e) => Err(e),
        };
        report(index, served);
    }

    /// The last thread closes what the kernel left open, unless a successor goes on with that.
    async fn end(self) {
        if *self.leaving.told.borrow() {
            drop(self.leaving.done);
            // What is not done is done again by the successor. Dropping it here would take back what it has begun: a thread that
            // waits for a lock gives up its line. The process ends without that.
            return std::future::pending().await;
        }
        if self.alive.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.dispatcher.close_all().await;
        }
    }
}

fn report(index: usize, served: io::Result<()>) {
    if let Err(e) = served {
        tracing::error!(worker = index, "a FUSE worker stopped serving: {e}");
    }
}

fn runtime() -> io::Result<LocalRuntime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())
}

/// Runs `serving` as a task: waking what `block_on` itself runs would take a system call each time.
fn block_on(runtime: &LocalRuntime, serving: impl Future<Output = ()> + 'static) {
    let _panic_was_reported_by_its_hook = runtime.block_on(async { tokio::task::spawn_local(serving).await });
}

fn spawn(index: usize, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("fjord-fuse-{index}")).spawn(run)
}

/// The device's descriptors for as many threads.
pub(super) fn devices(device: OwnedFd, threads: usize) -> Result<Vec<OwnedFd>, SessionError> {
    let mut devices = Vec::with_capacity(threads);
    for _ in 1..threads {
        let clone = dev_fuse::clone_device(device.as_fd());
        devices.push(clone.map_err(io_error("cloning /dev/fuse for a worker"))?);
    }
    devices.push(device);
    Ok(devices)
}

/// Starts workers that read /dev/fuse, one for each descriptor. `early` was read from the first of them already.
pub(super) fn serve_dev_fuse<F: Filesystem>(
    devices: Vec<OwnedFd>,
    mut early: Vec<Message>,
    dispatcher: &Arc<Dispatcher<F>>,
    pool: &Arc<BufferPool>,
    leaving: &Departing,
) -> Result<Vec<JoinHandle<()>>, SessionError> {
    let threads = devices.len();
    let serving = Serving::new(dispatcher, pool, threads, leaving.clone());
    let mut started = Vec::with_capacity(threads);
    for (index, device) in devices.into_iter().enumerate() {
        // A runtime belongs to its thread. None serves before all have one.
        let (report, made) = channel();
        let (go, told) = channel();
        let serving = serving.clone();
        let early = std::mem::take(&mut early);
        let run = move || {
            let runtime = runtime();
            let reported = report.send(runtime.as_ref().map(drop).map_err(clone_of));
            if let (Ok(runtime), Ok(()), Ok(())) = (runtime, reported, told.recv()) {
                block_on(&runtime, serving.over_dev_fuse(index, device, early));
            }
        };
        let thread = spawn(index, run).map_err(io_error("starting a worker thread"))?;
        let made = made.recv().unwrap_or_else(|e| Err(io::Error::other(e)));
        made.map_err(io_error("starting a worker's runtime"))?;
        started.push((thread, go));
    }
    // A thread that is gone by now has panicked, and is reported when it is joined.
    for (_, go) in &started {
        let _reported_when_joined = go.send(());
    }
    Ok(started.into_iter().map(|(thread, _)| thread).collect())
}

/// Threads with a ring each, which do as they are told until they serve. Dropping this ends them.
pub(super) struct RingThreads<F: Filesystem> {
    threads: Vec<RingThread<F>>,
}

struct RingThread<F: Filesystem> {
    thread: JoinHandle<()>,
    orders: Sender<Order<F>>,
    reports: Receiver<Result<(), RegisterError>>,
}

enum Order<F: Filesystem> {
    /// Give the entries of this session to the kernel, and report.
    Register(OwnedFd),
    /// Serve; with a device, that too.
    Serve(Serving<F>, Option<OwnedFd>),
}

impl<F: Filesystem> RingThreads<F> {
    /// Makes threads, rings and memory: all of them, or none.
    pub(super) fn prepare(
        plan: &Plan,
        options: &UringOptions,
        pool: &Arc<BufferPool>,
    ) -> Result<RingThreads<F>, RegisterError> {
        let mut threads = RingThreads { threads: Vec::new() };
        for (index, share) in plan.shares.iter().enumerate() {
            let (orders, orders_received) = channel();
            let (report, reports) = channel();
            let (share, options, pool) = (share.clone(), options.clone(), Arc::clone(pool));
            let (depth, size_max) = (plan.depth, plan.size_max);
            let run = move || {
                let made = make_ring(index, &share, depth, size_max, &options, pool);
                let reported =
                    report.send(made.as_ref().map(drop).map_err(|e| RegisterError::Ring(clone_of(e))));
                if let (Ok((runtime, transport)), Ok(())) = (made, reported) {
                    obey(index, &runtime, transport, &options, &orders_received, &report);
                }
            };
            let thread = spawn(index, run).map_err(RegisterError::Ring)?;
            threads.threads.push(RingThread { thread, orders, reports });
        }
        threads.reports().map(|()| threads)
    }

    /// Gives the kernel the entries of all queues.
    pub(super) fn register(&self, device: &OwnedFd) -> Result<(), RegisterError> {
        for thread in &self.threads {
            let device = device.try_clone().map_err(RegisterError::Ring)?;
            thread.orders.send(Order::Register(device)).map_err(|_| RegisterError::gone())?;
        }
        self.reports()
    }

    /// One report of each thread: the first failure, if there is one.
    fn reports(&self) -> Result<(), RegisterError> {
        let reports = self
            .threads
            .iter()
            .map(|thread| thread.reports.recv().unwrap_or_else(|_| Err(RegisterError::gone())));
        // All of them: nothing is under way any more when this returns.
        let reports: Vec<_> = reports.collect();
        reports.into_iter().collect()
    }

    /// Starts serving, on the first thread also the device itself.
    pub(super) fn serve(
        self,
        dispatcher: &Arc<Dispatcher<F>>,
        device: OwnedFd,
        pool: &Arc<BufferPool>,
        leaving: &Departing,
    ) -> Vec<JoinHandle<()>> {
        let serving = Serving::new(dispatcher, pool, self.threads.len(), leaving.clone());
        let mut device = Some(device);
        let serve = |ring: RingThread<F>| {
            if ring.orders.send(Order::Serve(serving.clone(), device.take())).is_err() {
                tracing::error!("a FUSE thread is gone before it served; this is a bug, report it");
            }
            ring.thread
        };
        self.threads.into_iter().map(serve).collect()
    }

    /// Waits until rings and threads are gone.
    pub(super) fn end(self) {
        for RingThread { thread, orders, .. } in self.threads {
            drop(orders);
            let _panic_was_reported_by_its_hook = thread.join();
        }
    }
}

/// Everything of a ring's thread that can fail before the kernel knows of it.
fn make_ring(
    index: usize,
    share: &cpus::Share,
    depth: usize,
    size_max: usize,
    options: &UringOptions,
    pool: Arc<BufferPool>,
) -> io::Result<(LocalRuntime, IoUring)> {
    if options.faults.no_ring == Some(index) {
        return Err(io::Error::other("no ring, by order of a test"));
    }
    if let Err(e) = cpus::stay_on(&share.cpus) {
        tracing::debug!("a FUSE thread runs on any CPU: {e}");
    }
    let runtime = runtime()?;
    let transport = {
        let _inside = runtime.enter();
        IoUring::new(&share.queues, depth, size_max, pool, options.poll)?
    };
    Ok((runtime, transport))
}

/// Does as it is told until there is nobody to tell.
fn obey<F: Filesystem>(
    index: usize,
    runtime: &LocalRuntime,
    transport: IoUring,
    options: &UringOptions,
    orders: &Receiver<Order<F>>,
    report: &Sender<Result<(), RegisterError>>,
) {
    while let Ok(order) = orders.recv() {
        match order {
            Order::Register(device) => {
                let _nobody_waits = report.send(transport.register(device.as_fd(), options.faults.bad_queue));
            }
            Order::Serve(serving, device) => {
                transport.set_busy(options.faults.busy.clone());
                return block_on(runtime, serving.over_uring(index, transport, device));
            }
        }
    }
}

/// An `io::Error` for somebody else.
fn clone_of(e: &io::Error) -> io::Error {
    e.raw_os_error().map_or_else(|| io::Error::other(e.to_string()), io::Error::from_raw_os_error)
}
