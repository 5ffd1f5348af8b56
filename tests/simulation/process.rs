//! A process of its own for each seed: forked, so that addresses and the counters of libraries are the same for all of them,
//! and whatever a simulation leaves behind ends with it.

use std::{
    collections::VecDeque,
    fs::File,
    io::{Read, Write},
    os::fd::FromRawFd,
    panic::{self, AssertUnwindSafe},
    thread,
};

use crate::run::{self, Outcome};

/// A simulation that takes longer has lost its way, seconds of real time.
const LIMIT: u32 = 120;

/// What became of a seed.
pub(crate) type Result = std::result::Result<Outcome, String>;

struct Child {
    seed: u64,
    pid: libc::pid_t,
    result: File,
}

/// What runs a seed.
type Simulation = fn(u64) -> Result;

/// Runs a seed.
pub(crate) fn run(seed: u64) -> Result {
    run_this(run::run, seed)
}

/// Runs a seed of another simulation.
pub(crate) fn run_this(simulation: Simulation, seed: u64) -> Result {
    start(simulation, seed).finish()
}

/// Runs seeds, as many at a time as there are processors; the results are in their order.
pub(crate) fn run_all(seeds: &[u64]) -> impl Iterator<Item = (u64, Result)> + '_ {
    let width = thread::available_parallelism().map_or(1, usize::from);
    let mut seeds = seeds.iter();
    let mut running: VecDeque<Child> = VecDeque::new();
    std::iter::from_fn(move || {
        while running.len() < width
            && let Some(seed) = seeds.next()
        {
            running.push_back(start(run::run, *seed));
        }
        let child = running.pop_front()?;
        Some((child.seed, child.finish()))
    })
}

fn start(simulation: Simulation, seed: u64) -> Child {
    let mut ends = [0; 2];
    // SAFETY: an array of two descriptors, as asked for.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: each is open and nobody else's.
    let [result, mut told] = ends.map(|fd| unsafe { File::from_raw_fd(fd) });
    // SAFETY: the child uses nothing that another thread may have held locked: the C library looks after its allocator.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: no arguments that could be wrong.
            unsafe { libc::alarm(LIMIT) };
            let text = simulate(simulation, seed);
            let status = i32::from(told.write_all(text.as_bytes()).is_err());
            drop(told);
            // SAFETY: ends the process, without what the parent has registered to be done then.
            unsafe { libc::_exit(status) }
        }
        pid => {
            assert!(pid > 0, "cannot fork");
            Child { seed, pid, result }
        }
    }
}

fn simulate(simulation: Simulation, seed: u64) -> String {
    panic::set_hook(Box::new(|info| run::note_panic(&info.to_string())));
    let result = panic::catch_unwind(AssertUnwindSafe(|| simulation(seed)));
    match result {
        Ok(Ok(outcome)) => outcome.encode(),
        Ok(Err(why)) => why,
        Err(_) => format!("panicked: {}", run::panics().join("\n")),
    }
}

impl Child {
    fn finish(mut self) -> Result {
        let mut text = String::new();
        self.result.read_to_string(&mut text).map_err(|e| e.to_string())?;
        let mut status = 0;
        // SAFETY: a child of this process, waited for once.
        unsafe { libc::waitpid(self.pid, &mut status, 0) };
        if status != 0 && text.is_empty() {
            return Err(format!("ended with status {status:#x}; 0xe is longer than {LIMIT} s"));
        }
        Outcome::decode(&text).ok_or(text)
    }
}
