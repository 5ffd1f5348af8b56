//! The batch read against real servers in this process: it returns what single reads return, whatever is asked.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::time::Duration;

use bytes::Bytes;
use fjordfs_client::{
    AttrChange, BatchOptions, Client, Errno, File, Finished, FsResult, Options, Order, Planned, ReadInto,
    ReadRequest,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};
use support::{Cluster, pattern, wait_until, write_file};

/// Files of every kind that a read tells apart, with their names.
async fn files(client: &Client) -> Vec<File> {
    let sizes =
        [("/empty", 0), ("/inline", 100), ("/packed", 5000), ("/odd", 1_234_567), ("/large", 40 << 20)];
    let mut files = Vec::new();
    for (name, len) in sizes {
        write_file(client, name, &pattern(len as u64, len)).await;
        files.push(client.open_path(name).await.unwrap());
    }
    // Holes, an overwrite, and bytes that are not committed.
    let holed = client.create_path("/holed").await.unwrap();
    holed.write_at(3 << 20, Bytes::from(pattern(7, 300_000))).await.unwrap();
    holed.flush().await.unwrap();
    client.setattr(holed.ino(), AttrChange { size: Some(9 << 20), ..Default::default() }).await.unwrap();
    holed.write_at((3 << 20) + 4000, Bytes::from(pattern(8, 10_000))).await.unwrap();
    files.push(holed);
    files
}

fn text(result: &FsResult<Vec<Bytes>>) -> Result<Vec<u8>, Errno> {
    result.as_ref().map(|parts| parts.concat()).map_err(|e| e.errno)
}

/// Reads everything in every way there is and compares with single reads.
async fn compare(client: &Client, requests: Vec<ReadRequest>, options: BatchOptions) {
    let mut expected = Vec::new();
    for r in &requests {
        expected.push(text(&r.file.read_at(r.offset, r.len).await));
    }
    let together = client.read_batch(requests.clone()).await;
    assert!(together.iter().map(text).eq(expected.iter().cloned()), "together");

    let mut seen = vec![false; requests.len()];
    let mut batch = client.batch(requests.clone(), options);
    let mut turn = 0;
    while let Some(Finished { index, result }) = batch.finished().await {
        assert!(!std::mem::replace(&mut seen[index], true), "{index} came twice");
        assert!(text(&result) == expected[index], "{index} with {options:?}");
        assert!(options.order == Order::Completion || index == turn);
        turn += 1;
        assert_eq!(batch.remaining(), requests.len() - turn);
    }
    assert!(seen.iter().all(|s| *s));

    let mut buffers: Vec<Vec<u8>> = requests.iter().map(|r| vec![0xAA; r.len]).collect();
    let mut reads: Vec<ReadInto<'_>> = requests
        .iter()
        .zip(&mut buffers)
        .map(|(r, buffer)| ReadInto { file: r.file.clone(), offset: r.offset, buffer })
        .collect();
    let lengths = client.read_into(&mut reads).await;
    for ((length, buffer), expected) in lengths.into_iter().zip(buffers).zip(expected) {
        let length = length.map_err(|e| e.errno);
        assert_eq!(length, expected.as_ref().map(Vec::len).map_err(|e| *e));
        let length = length.unwrap_or_default();
        assert!(buffer[..length] == expected.unwrap_or_default(), "into a buffer");
        assert!(buffer[length..].iter().all(|b| *b == 0xAA), "behind the end");
    }
}

#[test]
fn a_batch_returns_what_single_reads_return() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (cluster, client, files) = runtime.block_on(async {
        let cluster = Cluster::start(3, "replica:1").await;
        let client = cluster.client().await;
        let files = files(&client).await;
        (cluster, client, files)
    });
    let read =
        (0..files.len(), 0u64..1_000_000, prop_oneof![0usize..9000, Just(200_000usize), Just(2 << 20)]);
    let batch = (
        proptest::collection::vec(read, 0..60),
        prop_oneof![Just(Order::Completion), Just(Order::Request)],
        1usize..100,
    );
    let mut runner = TestRunner::new(Config { cases: 40, failure_persistence: None, ..Config::default() });
    runner
        .run(&batch, |(reads, order, in_flight)| {
            let requests = reads
                .into_iter()
                .map(|(i, at, len)| {
                    // Mostly inside, sometimes across the end or beyond it.
                    let offset = files[i].size() * at / 900_000;
                    ReadRequest { file: files[i].clone(), offset, len }
                })
                .collect();
            runtime.block_on(compare(&client, requests, BatchOptions { order, in_flight }));
            Ok(())
        })
        .unwrap();
    runtime.block_on(client.shutdown()).unwrap();
    drop(cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_without_a_runtime_read_batches() {
    let cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client().await;
    let data = pattern(9, 3 << 20);
    write_file(&client, "/f", &data).await;
    let file = client.open_path("/f").await.unwrap();
    let loaders: Vec<_> = (0..4usize)
        .map(|loader| {
            let (client, file, data) = (client.clone(), file.clone(), data.clone());
            std::thread::spawn(move || {
                let spots: Vec<usize> =
                    (0..500).map(|i| (i + loader) * 7_919 % (data.len() - 4096)).collect();
                let request = |at: &usize| ReadRequest { file: file.clone(), offset: *at as u64, len: 4096 };
                let batch = client.batch(spots.iter().map(request).collect(), BatchOptions::default());
                assert_eq!(batch.size_hint(), (500, Some(500)));
                for Finished { index, result } in batch {
                    assert!(result.unwrap().concat() == data[spots[index]..spots[index] + 4096]);
                }
                let results = client.read_batch_blocking(spots.iter().map(request).collect());
                for (at, result) in spots.iter().zip(results) {
                    assert!(result.unwrap().concat() == data[*at..at + 4096]);
                }
                let mut buffer = vec![0; 10_000];
                let mut read = [ReadInto { file: file.clone(), offset: 77, buffer: &mut buffer }];
                assert_eq!(client.read_into_blocking(&mut read)[0].as_ref().unwrap(), &10_000);
                assert!(buffer == data[77..10_077]);
            })
        })
        .collect();
    for loader in loaders {
        tokio::task::spawn_blocking(move || loader.join()).await.unwrap().unwrap();
    }
    client.shutdown().await.unwrap();
}

/// More than memory allows, and the results of the first are left lying while the second is read.
#[tokio::test(flavor = "multi_thread")]
async fn batches_larger_than_memory_do_not_wait_for_each_other() {
    let cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client_with(Options { memory_max: Options::MEMORY_MIN, ..Options::default() }).await;
    let data = pattern(3, 48 << 20);
    write_file(&client, "/f", &data).await;
    let file = client.open_path("/f").await.unwrap();
    let requests = |len: usize| -> Vec<ReadRequest> {
        (0..data.len() / len)
            .map(|i| ReadRequest { file: file.clone(), offset: (i * len) as u64, len })
            .collect()
    };
    for order in [Order::Completion, Order::Request] {
        let options = BatchOptions { order, in_flight: 100 };
        let left = client.batch(requests(1 << 20), options);
        let abandoned = client.batch(requests(3 << 20), options);
        for Finished { index, result } in client.batch(requests(24 << 20), options) {
            assert!(result.unwrap().concat() == data[index * (24 << 20)..][..24 << 20]);
        }
        drop(abandoned);
        for Finished { index, result } in left {
            assert!(result.unwrap().concat() == data[index << 20..][..1 << 20]);
        }
    }
    client.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_concerns_its_read_only() {
    let mut cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client_that_waits(Duration::from_secs(5)).await;
    let data = pattern(5, 96 << 20);
    write_file(&client, "/f", &data).await;
    client.shutdown().await.unwrap();
    let client = cluster.client_that_waits(Duration::from_secs(5)).await;
    let file = client.open_path("/f").await.unwrap();
    cluster.stop_data(1);
    let spots: Vec<usize> = (0..96).map(|i| (i * 37 % 96) << 20).collect();
    let requests =
        spots.iter().map(|at| ReadRequest { file: file.clone(), offset: *at as u64, len: 4096 }).collect();
    let results = client.read_batch(requests).await;
    let failed = results.iter().filter(|r| r.is_err()).count();
    assert!((1..96).contains(&failed), "{failed} of 96 failed with one of three servers gone");
    for (at, result) in spots.iter().zip(results) {
        match result {
            Ok(parts) => assert!(parts.concat() == data[*at..at + 4096]),
            Err(e) => assert_eq!(e.errno, Errno::EIO, "{e}"),
        }
    }
}

/// After the plan, nobody but memory is left to read from.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_planned_is_in_memory() {
    let mut cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client().await;
    files(&client).await;
    client.shutdown().await.unwrap();
    let client = cluster.client_that_waits(Duration::from_secs(5)).await;
    let large = client.open_path("/large").await.unwrap();
    let holed = client.open_path("/holed").await.unwrap();
    let path = |path: &str| Planned::Path(path.into());
    let plan = vec![
        Planned::Range(large.clone(), 5_000_000..9_000_000),
        path("/odd"),
        path("/missing"),
        path("/packed"),
        path("/inline"),
        path("/empty"),
        Planned::File(holed.clone()),
        // Beyond the end there is nothing to fetch.
        Planned::Range(large.clone(), 50 << 20..u64::MAX),
    ];
    let errors = client.prefetch(plan).done().await;
    assert_eq!(errors.iter().map(|(i, e)| (*i, e.errno)).collect::<Vec<_>>(), [(2, Errno::ENOENT)]);
    let opened = [client.open_path("/odd").await.unwrap(), client.open_path("/packed").await.unwrap()];
    (0..3).for_each(|i| cluster.stop_data(i));
    let data = pattern(40 << 20, 40 << 20);
    let read = |file: File, at: u64, len: usize| async move { text(&file.read_at(at, len).await) };
    assert!(read(large.clone(), 5_000_000, 4_000_000).await.unwrap() == data[5_000_000..9_000_000]);
    for (file, len) in opened.into_iter().zip([1_234_567, 5000]) {
        assert!(read(file, 0, len).await.unwrap() == pattern(len as u64, len));
    }
    assert!(read(holed, 3 << 20, 300_000).await.unwrap()[..4000] == pattern(7, 300_000)[..4000]);
    assert_eq!(read(large, 20 << 20, 4096).await, Err(Errno::EIO), "this was not planned");
}

/// A plan far larger than the memory for it waits for its reader, and ends with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_plan_stays_a_bounded_way_ahead_of_its_reader() {
    let cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client_with(Options { memory_max: Options::MEMORY_MIN, ..Options::default() }).await;
    let data = pattern(3, 64 << 20);
    write_file(&client, "/f", &data).await;
    // Bytes that are not committed are in memory anyway.
    client.sync_all().await.unwrap();
    let file = client.open_path("/f").await.unwrap();
    // Backwards, so that no reader's own read-ahead does the work.
    let order: Vec<u64> = (0..64).rev().map(|i| i << 20).collect();
    let plan = order.iter().map(|at| Planned::Range(file.clone(), *at..at + (1 << 20))).collect();
    let prefetch = client.prefetch(plan);
    let share = Options::MEMORY_MIN / 16;
    wait_until("the plan to fill its share", || prefetch.ahead() == share).await;
    for at in &order {
        let read = file.read_at(*at, 1 << 20).await.unwrap().concat();
        assert!(read == data[*at as usize..][..1 << 20]);
        assert!(prefetch.ahead() <= share);
    }
    assert!(prefetch.done().await.is_empty());
    // Dropped, a plan ends although nobody has read what it fetched.
    let other = cluster.client().await;
    write_file(&other, "/g", &data).await;
    other.shutdown().await.unwrap();
    let file = client.open_path("/g").await.unwrap();
    drop(client.prefetch(vec![Planned::File(file.clone())]));
    let again = client.prefetch(vec![Planned::File(file)]);
    wait_until("the next plan to get its share", || again.ahead() > 0).await;
    drop(again);
    client.shutdown().await.unwrap();
}
