//! The runtime of a core: a thread that runs tasks on an io_uring of its own.
//!
//! PERFORMANCE-CRITICAL. The thread sleeps in the same system call that hands operations to the kernel and takes their
//! results: a small read costs three of them in all. (A runtime that waits in epoll for the ring, as tokio-uring does,
//! makes two for every one here.) Nothing that a core runs may block.
//!
//! | file | what it is |
//! |---|---|
//! | `ring.rs` | operations: submitted, completed, abandoned |
//! | `timer.rs` | sleeping and time-outs |
//! | `tasks.rs` | tasks of this core, and waking it from elsewhere |
//!
//! What runs here may use tokio's channels, locks and semaphores, which need no runtime, but none of its timers and sockets.

mod ring;
mod tasks;
mod timer;

use std::{
    cell::RefCell,
    future::Future,
    io,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

pub(crate) use ring::submit;
pub(crate) use timer::{sleep, timeout};

use ring::Ring;
use tasks::{Tasks, Wakeup};
use timer::Timers;

thread_local! {
    static CORE: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

/// What a core's thread works with.
struct Core {
    ring: Ring,
    tasks: Tasks,
    timers: Timers,
}

/// The calling thread's core.
fn current() -> Option<Rc<Core>> {
    CORE.with_borrow(Clone::clone)
}

/// Starts a task on the calling thread's core. A panic of it is logged, and ends only it.
pub(crate) fn spawn(task: impl Future<Output = ()> + 'static) {
    match current() {
        Some(core) => core.tasks.spawn(task),
        None => tracing::error!("a task was started outside of a core; this is a bug, report it"),
    }
}

/// Makes the calling thread a core.
pub(crate) struct Runner {
    core: Rc<Core>,
}

impl Runner {
    /// # Errors
    /// When the kernel refuses a ring.
    pub(crate) fn new() -> io::Result<Runner> {
        let wakeup = Arc::new(Wakeup::new()?);
        let core = Rc::new(Core {
            ring: Ring::new(wakeup.clone())?,
            tasks: Tasks::new(wakeup),
            timers: Timers::default(),
        });
        CORE.set(Some(core.clone()));
        Ok(Runner { core })
    }

    /// Runs `main` and what it starts, until `main` ends; tasks still running then are dropped. Before it sleeps, the thread
    /// looks for something to do for as long as `poll`.
    pub(crate) fn run(self, main: impl Future<Output = ()> + 'static, poll: Duration) {
        let core = &self.core;
        let ended = core.tasks.spawn_main(main);
        loop {
            core.tasks.run();
            if ended.get() {
                break;
            }
            if let Err(e) = core.wait(poll) {
                tracing::error!("a core's ring does not work: {e}");
                break;
            }
        }
        core.tasks.drop_all();
        core.ring.finish();
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        CORE.set(None);
    }
}

impl Core {
    /// Waits until a task can run.
    fn wait(&self, poll: Duration) -> io::Result<()> {
        let begun = Instant::now();
        loop {
            let next = self.timers.fire(Instant::now());
            self.ring.take_completions();
            if self.tasks.can_run() {
                return Ok(());
            }
            if begun.elapsed() >= poll {
                let sleeping = self.tasks.wakeup().sleep();
                let limit = if sleeping.is_some() { next } else { Some(Duration::ZERO) };
                self.ring.wait(limit)?;
                drop(sleeping);
            } else {
                self.ring.flush()?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::fd::AsRawFd,
        sync::atomic::{AtomicBool, Ordering},
    };

    use io_uring_06::{opcode, types};

    use super::*;

    fn on_a_core<T: Send + 'static>(main: impl AsyncFnOnce() -> T + Send + 'static) -> T {
        let (answer, result) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let main = async move { answer.send(main().await).unwrap() };
            Runner::new().unwrap().run(main, Duration::ZERO);
        });
        thread.join().unwrap();
        result.recv().unwrap()
    }

    #[test]
    fn tasks_timers_and_wake_ups_from_other_threads() {
        let order = on_a_core(async || {
            let (tx, mut rx) = tokio::sync::mpsc::unbounded_channel();
            let from_task = tx.clone();
            spawn(async move {
                sleep(Duration::from_millis(20)).await;
                from_task.send("slept").unwrap();
            });
            spawn(async { panic!("on purpose") });
            let (ask, asked) = tokio::sync::oneshot::channel();
            let from_thread = tx;
            std::thread::spawn(move || {
                asked.blocking_recv().unwrap();
                from_thread.send("woken").unwrap();
            });
            let first = rx.recv().await.unwrap();
            ask.send(()).unwrap();
            let second = rx.recv().await.unwrap();
            let late = timeout(Duration::from_millis(5), std::future::pending::<()>()).await;
            let early = timeout(Duration::from_secs(3600), async { 7 }).await;
            (first, second, late.is_err(), early.ok())
        });
        assert_eq!(order, ("slept", "woken", true, Some(7)));
    }

    #[test]
    fn operations_return_what_they_borrowed_also_when_nobody_waits() {
        struct Told(Arc<AtomicBool>, Box<[u8]>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let told = Arc::new(AtomicBool::new(false));
        let (early, read) = on_a_core(async move || {
            let (reader, writer) = std::io::pipe().unwrap();
            let mut writer = writer;
            let mut keep = Told(told.clone(), vec![0; 8].into());
            let entry = opcode::Read::new(types::Fd(reader.as_raw_fd()), keep.1.as_mut_ptr(), 8).build();
            // Given up while the kernel has the buffer.
            assert!(timeout(Duration::from_millis(5), submit(keep, entry)).await.is_err());
            let early = told.load(Ordering::SeqCst);
            std::io::Write::write_all(&mut writer, b"first").unwrap();
            while !told.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(1)).await;
            }
            let mut buffer = vec![0; 8].into_boxed_slice();
            let entry = opcode::Read::new(types::Fd(reader.as_raw_fd()), buffer.as_mut_ptr(), 8).build();
            let second = submit(buffer, entry);
            let write = async {
                sleep(Duration::from_millis(5)).await;
                std::io::Write::write_all(&mut writer, b"second").unwrap();
            };
            let ((n, buffer), ()) = futures_util::future::join(second, write).await;
            (early, buffer[..n.unwrap()].to_vec())
        });
        assert!(!early, "the buffer was freed while the kernel had it");
        assert_eq!(read, b"second");
    }

    #[test]
    fn what_is_in_flight_at_the_end_is_cancelled() {
        let (reader, _writer) = std::io::pipe().unwrap();
        on_a_core(async move || {
            spawn(async move {
                let mut buffer = vec![0; 8].into_boxed_slice();
                let entry = opcode::Read::new(types::Fd(reader.as_raw_fd()), buffer.as_mut_ptr(), 8).build();
                submit((buffer, reader), entry).await.0.unwrap();
            });
            sleep(Duration::from_millis(5)).await;
        });
    }
}
