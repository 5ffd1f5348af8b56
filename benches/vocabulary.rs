//! Costs of the arithmetic on the hot paths: checksums, frame headers, extent maps, placement.

use std::{collections::BTreeMap, hint::black_box};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use fjordfs_benches::lone_extent;
use fjordfs_proto::{
    Domain, ExtentMap, TargetId,
    block::{first_bad_page, page_crcs},
    frame::{Header, Opcode},
    placement::place,
};

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("page checksums");
    for (name, len) in [("4 KiB", 4 << 10), ("1 MiB", 1 << 20), ("16 MiB", 16 << 20)] {
        let data = vec![0x5a; len];
        let crcs = page_crcs(&data);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(format!("compute {name}"), |b| b.iter(|| page_crcs(black_box(&data))));
        group
            .bench_function(format!("verify {name}"), |b| b.iter(|| first_bad_page(black_box(&data), &crcs)));
    }
}

fn headers(c: &mut Criterion) {
    let header = Header {
        opcode: Opcode::ReadShard,
        reply: false,
        status: 0,
        request: 7,
        body_len: 40,
        payload_len: 0,
    };
    c.bench_function("frame header round trip", |b| b.iter(|| Header::decode(&black_box(header).encode())));
}

fn extents(c: &mut Criterion) {
    let fragmented: ExtentMap = {
        let mut map = ExtentMap::default();
        for i in 0..100_000 {
            map.insert(i * 4096, lone_extent(i, 4096));
        }
        map
    };
    c.bench_function("cover 1 MiB of a file of 100,000 extents", |b| {
        b.iter(|| fragmented.cover(black_box(123 << 20..124 << 20)).len());
    });
    c.bench_function("overwrite 4 KiB across two extents", |b| {
        let mut map = fragmented.clone();
        let mut i = 0;
        b.iter(|| {
            i = (i + 7919) % 99_999;
            map.insert(i * 4096 + 2048, lone_extent(200_000 + i, 4096)).len()
        });
    });
}

fn placement(c: &mut Criterion) {
    let targets: BTreeMap<TargetId, Domain> =
        (1..=48).map(|i| (TargetId(i), Domain::of_map(&format!("rack-{}", i % 12)))).collect();
    let mut group = c.benchmark_group("placement");
    group.sample_size(10);
    group.bench_function("fill 1,024 groups of 3 over 48 targets", |b| {
        b.iter(|| place(None, &targets, 3, 1024))
    });
}

criterion_group!(benches, checksums, headers, extents, placement);
criterion_main!(benches);
