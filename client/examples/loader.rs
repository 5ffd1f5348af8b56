//! Loads samples in random order as a trainer does: loader threads without a runtime, many reads of each under way, and the
//! next epoch's files fetched while this one is read.
//!
//! ```sh
//! cargo run --release -- up /mnt/fjord          # in another terminal
//! cargo run --release -p fjordfs-client --example loader -- 127.0.0.1:7440
//! ```

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use fjordfs_client::{BatchOptions, Client, File, FsResult, Options, Order, Planned, ReadRequest};

const SHARDS: u64 = 4;
const SAMPLE: usize = 16 << 10;
const SAMPLES_PER_SHARD: u64 = 2048;
const LOADERS: u64 = 2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let meta = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7440".into());
    let runtime = tokio::runtime::Runtime::new()?;
    let client = runtime.block_on(Client::connect(&meta, Options::default()))?;
    let shards = Arc::new(runtime.block_on(write_shards(&client))?);

    // What comes next is told while the first epoch is read; dropping the plan would end it.
    let next = (0..SHARDS).map(|shard| Planned::Path(path(shard))).collect();
    let plan = client.prefetch(next);

    let started = Instant::now();
    let loaders: Vec<_> = (0..LOADERS)
        .map(|loader| {
            let (client, shards) = (client.clone(), shards.clone());
            std::thread::spawn(move || load(&client, &shards, loader))
        })
        .collect();
    let mut bytes = 0;
    for loader in loaders {
        bytes += loader.join().expect("a loader does not panic")?;
    }
    report(bytes, started);
    drop(plan);

    runtime.block_on(async {
        for shard in 0..SHARDS {
            client.remove_file(&path(shard)).await?;
        }
        client.remove_dir("/loader-example").await?;
        client.shutdown().await
    })?;
    Ok(())
}

fn path(shard: u64) -> String {
    format!("/loader-example/{shard}.bin")
}

async fn write_shards(client: &Client) -> FsResult<Vec<File>> {
    client.create_dir_all("/loader-example").await?;
    let mut shards = Vec::new();
    for shard in 0..SHARDS {
        let file = client.create_path(&path(shard)).await?;
        for sample in 0..SAMPLES_PER_SHARD {
            let bytes = Bytes::from(vec![(shard + sample) as u8; SAMPLE]);
            file.write_at(sample * SAMPLE as u64, bytes).await?;
        }
        file.flush().await?;
        shards.push(file);
    }
    Ok(shards)
}

/// One loader's share of an epoch: every sample once, in an order of its own. Blocks its thread, not a runtime.
fn load(client: &Client, shards: &[File], loader: u64) -> FsResult<usize> {
    let samples = SHARDS * SAMPLES_PER_SHARD / LOADERS;
    let requests: Vec<ReadRequest> = (0..samples)
        .map(|i| {
            let sample = (i * 7919 % samples) * LOADERS + loader;
            let (shard, within) = (sample / SAMPLES_PER_SHARD, sample % SAMPLES_PER_SHARD);
            ReadRequest { file: shards[shard as usize].clone(), offset: within * SAMPLE as u64, len: SAMPLE }
        })
        .collect();
    // In the order of the epoch; Order::Completion would not wait for a slow server.
    let options = BatchOptions { order: Order::Request, ..BatchOptions::default() };
    let mut bytes = 0;
    for sample in client.batch(requests, options) {
        // An error concerns one sample: a trainer may leave it out.
        bytes += sample.result?.iter().map(Bytes::len).sum::<usize>();
    }
    Ok(bytes)
}

#[allow(clippy::print_stdout, reason = "an example talks to its user")]
fn report(bytes: usize, started: Instant) {
    let (mib, seconds) = (bytes >> 20, started.elapsed().as_secs_f64());
    println!(
        "{mib} MiB in samples of {} KiB in {seconds:.2} s, {:.0} MiB/s",
        SAMPLE >> 10,
        mib as f64 / seconds
    );
}
