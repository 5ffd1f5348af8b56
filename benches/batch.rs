//! The batch read against single reads: 256 random reads of 4 KiB, servers and client in this process.

use std::{path::Path, time::Duration};

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fjordfs_client::{BatchOptions, Client, File, Options, ReadRequest};
use fjordfs_dataserver::DataServer;
use fjordfs_metaserver::MetaServer;

const READS: usize = 256;
const FILE_BYTES: usize = 256 << 20;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Servers with one file of noise.
struct Cluster {
    meta: Option<MetaServer>,
    data: Vec<DataServer>,
}

impl Cluster {
    fn start(root: &Path) -> Result<Cluster> {
        let meta = MetaServer::start(fjordfs_metaserver::Config {
            listen: "127.0.0.1:0".parse()?,
            default_policy: "replica:1".parse()?,
            ..fjordfs_metaserver::Config::new(root.join("meta"))
        })?;
        let address = meta.address().to_string();
        let data = (0..3)
            .map(|i| {
                Ok(DataServer::start(fjordfs_dataserver::Config {
                    listen: "127.0.0.1:0".parse()?,
                    name: format!("data-{i}"),
                    cores: 1,
                    ..fjordfs_dataserver::Config::new(&address, [root.join(format!("data-{i}"))])
                })?)
            })
            .collect::<Result<_>>()?;
        Ok(Cluster { meta: Some(meta), data })
    }

    fn address(&self) -> String {
        self.meta.as_ref().map(|meta| meta.address().to_string()).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for data in self.data.drain(..) {
            let _ = data.stop();
        }
        if let Some(meta) = self.meta.take() {
            let _ = meta.stop();
        }
    }
}

async fn prepare(address: &str) -> Result<(Client, File)> {
    let client = Client::connect(address, Options::default()).await?;
    while client.map().targets.values().filter(|t| t.readable()).count() < 3 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let file = client.create_path("/f").await?;
    let piece = Bytes::from(
        (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect::<Vec<u8>>(),
    );
    for at in (0..FILE_BYTES).step_by(piece.len()) {
        file.write_at(at as u64, piece.clone()).await?;
    }
    file.fsync().await?;
    Ok((client, file))
}

fn reads(c: &mut Criterion) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let cluster = Cluster::start(dir.path()).expect("a cluster");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (client, file) = runtime.block_on(prepare(&cluster.address())).expect("a file");
    let spots: Vec<u64> = (0..READS).map(|i| (i * 7919 % (FILE_BYTES / 4096)) as u64 * 4096).collect();
    let requests = || -> Vec<ReadRequest> {
        spots.iter().map(|at| ReadRequest { file: file.clone(), offset: *at, len: 4096 }).collect()
    };
    let mut group = c.benchmark_group("256 random reads of 4 KiB");
    group.throughput(Throughput::Elements(READS as u64)).sample_size(20);
    group.bench_function("one after the other", |b| {
        b.to_async(&runtime).iter(|| async {
            for at in &spots {
                file.read_at(*at, 4096).await.expect("a read");
            }
        });
    });
    group.bench_function("as futures of the caller's", |b| {
        b.to_async(&runtime).iter(|| async {
            let all = spots.iter().map(|at| file.read_at(*at, 4096));
            futures_util::future::try_join_all(all).await.expect("reads").len()
        });
    });
    group.bench_function("one batch, together", |b| {
        b.iter(|| client.read_batch_blocking(requests()).into_iter().all(|r| r.is_ok()));
    });
    group.bench_function("one batch, as they come", |b| {
        b.iter(|| client.batch(requests(), BatchOptions::default()).all(|f| f.result.is_ok()));
    });
    group.finish();
    drop(file);
    runtime.block_on(client.shutdown()).expect("an end");
}

criterion_group!(benches, reads);
criterion_main!(benches);
