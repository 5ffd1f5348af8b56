//! Writes a checkpoint of several shards in parallel, renames it into place and reads it back in one batch.
//!
//! ```sh
//! cargo run --release -- up /mnt/fjord          # in another terminal
//! cargo run --release -p fjordfs-client --example checkpoint -- 127.0.0.1:7440
//! ```

use std::time::Instant;

use bytes::Bytes;
use fjordfs_client::{Client, FsResult, Options, ReadRequest};

const SHARDS: u64 = 8;
const SHARD_BYTES: usize = 32 << 20;

#[tokio::main]
async fn main() -> FsResult<()> {
    let meta = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:7440".into());
    let client = Client::connect(&meta, Options::default()).await?;
    client.create_dir_all("/checkpoints/step-100.tmp").await?;

    let started = Instant::now();
    let writers = (0..SHARDS).map(|shard| {
        let client = client.clone();
        tokio::spawn(async move {
            let file = client.create_path(&format!("/checkpoints/step-100.tmp/{shard}.bin")).await?;
            file.write_at(0, Bytes::from(vec![shard as u8 + 1; SHARD_BYTES])).await?;
            file.fsync().await?;
            file.close().await
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("a writer does not panic")?;
    }
    // Readers see the old checkpoint or the new one, never half of it.
    client.rename_path("/checkpoints/step-100.tmp", "/checkpoints/step-100").await?;
    client.sync_all().await?;
    report("written and synced", started);

    let started = Instant::now();
    let mut requests = Vec::new();
    for shard in 0..SHARDS {
        let file = client.open_path(&format!("/checkpoints/step-100/{shard}.bin")).await?;
        let step = 4 << 20;
        requests.extend((0..SHARD_BYTES as u64 / step).map(|i| ReadRequest {
            file: file.clone(),
            offset: i * step,
            len: step as usize,
        }));
    }
    let per_shard = requests.len() / SHARDS as usize;
    for (i, read) in client.read_batch(requests).await.into_iter().enumerate() {
        let expected = (i / per_shard) as u8 + 1;
        assert!(read?.iter().all(|part| part.iter().all(|b| *b == expected)));
    }
    report("read back and compared", started);

    for entry in client.read_dir("/checkpoints/step-100").await? {
        client
            .remove_file(&format!("/checkpoints/step-100/{}", String::from_utf8_lossy(&entry.name)))
            .await?;
    }
    client.remove_dir("/checkpoints/step-100").await?;
    client.shutdown().await
}

#[allow(clippy::print_stdout, reason = "an example talks to its user")]
fn report(what: &str, started: Instant) {
    let total = (SHARDS * SHARD_BYTES as u64) >> 20;
    let seconds = started.elapsed().as_secs_f64();
    println!("{total} MiB {what} in {seconds:.2} s, {:.0} MiB/s", total as f64 / seconds);
}
