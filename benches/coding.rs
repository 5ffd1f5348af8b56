//! Costs of erasure coding, per byte of the block: encoding with its checksums, and restoring one and two data shards,
//! which should cost about as much as encoding one and two parity shards.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fjordfs_proto::{
    BLOCK_SIZE_MAX, Layout, Policy,
    block::page_crcs_of,
    coding::{Code, encode},
};

/// A full block as it leaves a file: 128 KiB at a time.
fn block() -> Vec<Bytes> {
    (0..BLOCK_SIZE_MAX / (128 << 10)).map(|i| Bytes::from(vec![i as u8; 128 << 10])).collect()
}

fn layouts() -> impl Iterator<Item = (String, Layout)> {
    [(2, 1), (4, 2), (8, 2), (10, 4)].into_iter().filter_map(|(k, m)| {
        let policy = Policy::ec(k, m)?;
        Some((policy.to_string(), Layout::of(policy, BLOCK_SIZE_MAX)))
    })
}

fn encoding(c: &mut Criterion) {
    let parts = block();
    let mut group = c.benchmark_group("encode a block");
    group.throughput(Throughput::Bytes(BLOCK_SIZE_MAX as u64));
    group.bench_function("checksums alone", |b| {
        b.iter(|| page_crcs_of(black_box(&parts).iter().map(|p| &p[..])))
    });
    for (name, layout) in layouts() {
        // Parity goes where the last one was, as in a client.
        let mut kept: Vec<Vec<u8>> = Vec::new();
        group.bench_function(&name, |b| {
            b.iter(|| {
                let shards =
                    encode(layout, black_box(&parts), |size| kept.pop().unwrap_or_else(|| vec![0; size]));
                let parity = shards.parts.into_iter().skip(layout.needed()).flatten();
                kept.extend(parity.filter_map(|bytes| bytes.try_into_mut().ok()).map(Vec::from));
            });
        });
    }
}

fn restoring(c: &mut Criterion) {
    let parts = block();
    for (name, layout) in layouts() {
        let Some(code) = Code::of(layout) else { continue };
        let shards: Vec<Vec<u8>> =
            encode(layout, &parts, |size| vec![0; size]).parts.iter().map(|parts| parts.concat()).collect();
        let mut group = c.benchmark_group(format!("restore shards of {name}"));
        group.throughput(Throughput::Bytes(BLOCK_SIZE_MAX as u64));
        for lost in 1..=(shards.len() - layout.needed()).min(2) as u8 {
            let present: Vec<(u8, &[u8])> =
                (lost..).zip(&shards[usize::from(lost)..]).map(|(i, shard)| (i, &shard[..])).collect();
            group.bench_function(format!("{lost} lost"), |b| {
                b.iter(|| (0..lost).map(|lost| code.restore(black_box(&present), lost)).collect::<Vec<_>>());
            });
        }
        let small: Vec<(u8, &[u8])> = (1..).zip(&shards[1..]).map(|(i, shard)| (i, &shard[..4096])).collect();
        group.throughput(Throughput::Bytes(4096));
        group.bench_function("4 KiB of one", |b| b.iter(|| code.restore(black_box(&small), 0)));
    }
}

criterion_group!(benches, encoding, restoring);
criterion_main!(benches);
