//! Random reads of one file through the client library's batches.
//!
//! `library_read META PATH BYTES THREADS IN_FLIGHT SECONDS`: each thread has as many reads of BYTES under way, at multiples of
//! BYTES. Prints the reads and the seconds they took.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use fjordfs_client::{BatchOptions, Client, File, Options, Order, ReadRequest};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Reads in a batch for each that is under way, so that batches are rarely drained.
const BATCH_LENGTH: usize = 16;

/// One thread's reads; how many there were.
fn read(
    client: &Client,
    file: &File,
    bytes: usize,
    in_flight: usize,
    seed: u64,
    until: Instant,
) -> Result<u64> {
    let places = (file.size() / bytes as u64).max(1);
    let (mut state, mut done) = (seed, 0);
    while Instant::now() < until {
        let mut request = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ReadRequest { file: file.clone(), offset: (state >> 33) % places * bytes as u64, len: bytes }
        };
        // A reader with one request at a time waits for each, as a program on a mount does.
        let length = if in_flight == 1 { 1 } else { BATCH_LENGTH * in_flight };
        let requests = (0..length).map(|_| request()).collect();
        for finished in client.batch(requests, BatchOptions { order: Order::Completion, in_flight }) {
            finished.result?;
            done += 1;
            if Instant::now() >= until {
                break;
            }
        }
    }
    Ok(done)
}

#[allow(clippy::print_stdout, reason = "a program")]
fn run(args: &[String]) -> Result<()> {
    let [meta, path, bytes, threads, in_flight, seconds] = args else {
        return Err("usage: library_read META PATH BYTES THREADS IN_FLIGHT SECONDS".into());
    };
    let (bytes, threads): (usize, u64) = (bytes.parse()?, threads.parse()?);
    let (in_flight, seconds): (usize, f64) = (in_flight.parse()?, seconds.parse()?);
    if bytes == 0 || threads == 0 || in_flight == 0 || !(0.01..1e6).contains(&seconds) {
        return Err("BYTES, THREADS and IN_FLIGHT from 1, SECONDS from 0.01".into());
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let client = runtime.block_on(Client::connect(meta, Options::default()))?;
    let file = runtime.block_on(client.open_path(path))?;
    // Connections and threads are made once in a client's life.
    read(&client, &file, bytes, in_flight, 0, Instant::now() + Duration::from_millis(50))?;
    let began = Instant::now();
    let until = began + Duration::from_secs_f64(seconds);
    let reads = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=threads)
            .map(|seed| {
                scope.spawn({
                    let (client, file) = (&client, &file);
                    move || read(client, file, bytes, in_flight, seed << 32, until)
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into())))
            .sum::<Result<u64>>()
    })?;
    println!("{reads} {:.6}", began.elapsed().as_secs_f64());
    drop(file);
    runtime.block_on(client.shutdown())?;
    Ok(())
}

#[allow(clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("library_read: {e}");
            ExitCode::FAILURE
        }
    }
}
