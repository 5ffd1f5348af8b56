//! The clock, the randomness and the waiting of this process, while a simulation runs: all of them follow from the seed.
//!
//! The C library's functions are defined here, so that every crate in this binary gets these. Outside of a simulation they do
//! what the kernel does. A simulation has its process for itself and one thread.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use libc::{c_int, c_long, c_uint, c_void, clockid_t, epoll_event, size_t, ssize_t, timespec};

static RUNS: AtomicBool = AtomicBool::new(false);
/// Since the simulation began.
static NANOS: AtomicU64 = AtomicU64::new(0);
static RANDOM: AtomicU64 = AtomicU64::new(0);

/// What the clocks say when a simulation begins, seconds.
const MONOTONIC: u64 = 1_000_000;
const WALL: u64 = 1_800_000_000;

const SECOND: u64 = 1_000_000_000;

/// From now on everything follows from the seed.
pub(crate) fn begin(seed: u64) {
    RANDOM.store(seed, Relaxed);
    RUNS.store(true, Relaxed);
}

/// Time since the simulation began.
pub(crate) fn elapsed() -> Duration {
    Duration::from_nanos(NANOS.load(Relaxed))
}

/// splitmix64.
fn random() -> u64 {
    let state = RANDOM.fetch_add(0x9E37_79B9_7F4A_7C15, Relaxed).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mixed = (state ^ state >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    mixed ^ mixed >> 31
}

/// # Safety
/// As of the C library.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    if !RUNS.load(Relaxed) {
        // SAFETY: the caller's pointer, for the call it is meant for.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, c_long::from(clock), time) } as c_int;
    }
    // Each look takes a moment, so that whoever waits by looking comes to an end.
    let now = NANOS.fetch_add(1, Relaxed);
    let base = if clock == libc::CLOCK_REALTIME { WALL } else { MONOTONIC };
    let now = timespec { tv_sec: (base + now / SECOND) as i64, tv_nsec: (now % SECOND) as i64 };
    // SAFETY: the caller's pointer is valid for a timespec.
    unsafe { time.write(now) };
    0
}

/// # Safety
/// As of the C library.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    if !RUNS.load(Relaxed) {
        // SAFETY: the caller's buffer, for the call it is meant for.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, c_long::from(flags)) } as ssize_t;
    }
    // SAFETY: the caller's buffer is valid for this many bytes.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&random().to_le_bytes()[..chunk.len()]);
    }
    length as ssize_t
}

/// # Safety
/// As of the C library.
#[unsafe(no_mangle)]
unsafe extern "C" fn epoll_wait(epoll: c_int, events: *mut epoll_event, max: c_int, timeout: c_int) -> c_int {
    let wait = |timeout: c_int| {
        let [epoll, max, timeout] = [epoll, max, timeout].map(c_long::from);
        // SAFETY: the caller's buffer, for the call it is meant for.
        unsafe { libc::syscall(libc::SYS_epoll_wait, epoll, events, max, timeout) as c_int }
    };
    if !RUNS.load(Relaxed) {
        return wait(timeout);
    }
    assert!(timeout >= 0, "everything waits and nothing will ever happen");
    let ready = wait(0);
    if ready == 0 {
        NANOS.fetch_add(timeout as u64 * 1_000_000, Relaxed);
    }
    ready
}
