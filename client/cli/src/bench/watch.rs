//! Progress, and the wish to stop.

use std::{
    fmt,
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What threads under way look at and tell.
pub(super) struct Watch {
    stop: AtomicBool,
    bar: ProgressBar,
    /// A line for each phase instead of a bar.
    lines: bool,
}

impl Watch {
    /// A bar on a terminal, lines elsewhere; nothing when `quiet`.
    pub(super) fn new(quiet: bool) -> Watch {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::new(0);
        if quiet || !terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}") {
            bar.set_style(style);
        }
        Watch { stop: AtomicBool::new(false), bar, lines: !quiet && !terminal }
    }

    /// A phase begins that comes to `total` of whatever it counts.
    pub(super) fn begin(&self, what: &str, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(0);
        self.bar.set_message(what.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    /// It has ended with this result.
    pub(super) fn end(&self, what: &str, result: &str) {
        if self.lines {
            eprintln!("{what}: {result}");
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn did(&self, n: u64) {
        self.bar.inc(n);
    }

    pub(super) fn has_done(&self, n: u64) {
        self.bar.set_position(n);
    }

    /// All threads shall end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Relaxed);
    }

    pub(super) fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// # Errors
    /// When it is time to stop.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.stopped() { Err(Stopped.into()) } else { Ok(()) }
    }
}

/// Why a thread ended early: somebody else has the reason.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Stopped {}

/// Listens to Ctrl-C and its like from now on.
pub(super) struct Interrupts([Signal; 3]);

impl Interrupts {
    /// Call it inside a runtime.
    pub(super) fn listen() -> std::io::Result<Interrupts> {
        Ok(Interrupts([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }

    /// The first one ends the measurement, which then cleans up; the second one ends this process.
    pub(super) async fn obey(mut self, watch: Arc<Watch>) {
        self.next().await;
        watch.stop();
        watch
            .bar
            .suspend(|| eprintln!("stopping and cleaning up; once more ends at once and leaves the files"));
        self.next().await;
        std::process::exit(130);
    }
}
