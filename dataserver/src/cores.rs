//! One thread per core, each with a runtime on its own io_uring.
//!
//! Work comes in as jobs: closures that make a future on the core's thread, since futures on a ring cannot move between
//! threads. Connections are handed out round robin by the one thread that accepts them, which is even also with few
//! connections (SO_REUSEPORT spreads by hash and is not).

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::mpsc;

use crate::{
    error::StartError,
    listen::{Listener, Socket},
    runtime::{self, Runner},
};

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The threads that serve.
pub(crate) struct Cores {
    cores: Vec<Core>,
    next: AtomicUsize,
}

struct Core {
    jobs: mpsc::UnboundedSender<Job>,
    thread: JoinHandle<()>,
}

/// Gives work to the cores.
#[derive(Clone)]
pub(crate) struct Jobs {
    cores: Vec<mpsc::UnboundedSender<Job>>,
    next: Arc<AtomicUsize>,
}

impl Jobs {
    /// Starts a future on the next core. False when the cores have stopped.
    pub(crate) fn start<F: Future<Output = ()> + 'static>(
        &self,
        make: impl FnOnce() -> F + Send + 'static,
    ) -> bool {
        let i = self.next.fetch_add(1, Ordering::Relaxed) % self.cores.len();
        self.cores[i].send(Box::new(move || Box::pin(make()))).is_ok()
    }

    /// Runs a future on the next core and returns its result; `None` when the cores have stopped.
    pub(crate) async fn run<T, F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (answer, result) = tokio::sync::oneshot::channel();
        // The asker may have given up: then nobody wants the result.
        self.start(move || async move { drop(answer.send(make().await)) });
        result.await.ok()
    }
}

impl Cores {
    /// `poll`: how long a core looks for something to do before it sleeps.
    pub(crate) fn start(count: usize, poll: Duration) -> Result<Cores, StartError> {
        let mut cores = Vec::with_capacity(count);
        for i in 0..count {
            cores.push(start_core(i, poll)?);
        }
        Ok(Cores { cores, next: AtomicUsize::new(0) })
    }

    pub(crate) fn jobs(&self) -> Jobs {
        let next = Arc::new(AtomicUsize::new(self.next.load(Ordering::Relaxed)));
        Jobs { cores: self.cores.iter().map(|c| c.jobs.clone()).collect(), next }
    }

    /// Ends the threads; futures still running are dropped. All [`Jobs`] must be gone by then.
    pub(crate) fn stop(self) {
        let (jobs, threads): (Vec<_>, Vec<_>) = self.cores.into_iter().map(|c| (c.jobs, c.thread)).unzip();
        drop(jobs);
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a core's thread has panicked");
            }
        }
    }
}

fn start_core(number: usize, poll: Duration) -> Result<Core, StartError> {
    let (jobs, mut inbox) = mpsc::unbounded_channel::<Job>();
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(format!("fjord-core-{number}"))
        .spawn(move || {
            let runner = match Runner::new() {
                Ok(runner) => runner,
                Err(e) => {
                    // Whoever waits for it reports it.
                    let _ = ready.send(Err(e));
                    return;
                }
            };
            let _ = ready.send(Ok(()));
            let main = async move {
                while let Some(job) = inbox.recv().await {
                    runtime::spawn(job());
                }
            };
            runner.run(main, poll);
        })
        .map_err(StartError::Thread)?;
    match started.recv() {
        Ok(Ok(())) => Ok(Core { jobs, thread }),
        Ok(Err(e)) => Err(StartError::Uring(e)),
        Err(e) => Err(StartError::Thread(io::Error::other(e))),
    }
}

/// A thread that accepts connections.
pub(crate) struct Acceptor {
    listener: Arc<Listener>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Acceptor {
    /// Hands every connection to `serve`.
    pub(crate) fn start(
        listener: Listener,
        serve: impl Fn(Socket, String) + Send + 'static,
    ) -> Result<Acceptor, StartError> {
        let (listener, stopping) = (Arc::new(listener), Arc::new(AtomicBool::new(false)));
        let (mine, stop) = (listener.clone(), stopping.clone());
        let thread = std::thread::Builder::new()
            .name("fjord-accept".to_owned())
            .spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    match mine.accept() {
                        Ok((socket, peer)) => serve(socket, peer),
                        Err(_) if stop.load(Ordering::SeqCst) => {}
                        Err(e) => {
                            // Most likely no descriptors are left; some will be given back.
                            tracing::warn!("accepting connections: {e}");
                            std::thread::sleep(Duration::from_millis(100));
                        }
                    }
                }
            })
            .map_err(StartError::Thread)?;
        Ok(Acceptor { listener, stopping, thread })
    }

    pub(crate) fn stop(self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.listener.shut();
        if self.thread.join().is_err() {
            tracing::error!("the accepting thread has panicked");
        }
    }
}
