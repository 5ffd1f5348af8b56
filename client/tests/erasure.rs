//! Erasure-coded files against real servers in this process: with any M of them gone nothing is lost, and reads and
//! writes go on.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use bytes::Bytes;
use fjordfs_client::{Client, Errno};
use fjordfs_proto::{Layout, Policy, Source};
use support::{Cluster, pattern, read_all, wait_down};

const FILES: [(&str, usize); 5] = [
    ("/inline", 100),
    ("/copies", 70_000),
    ("/split", 1_234_567),
    ("/block", 16 << 20),
    ("/blocks", (33 << 20) + 4097),
];

/// Each in blocks of its own.
async fn write_files(client: &Client) {
    for (name, len) in FILES {
        write_synced(client, name, pattern(len as u64, len)).await;
    }
}

async fn write_synced(client: &Client, path: &str, data: Vec<u8>) {
    let file = client.create_path(path).await.unwrap();
    file.write_at(0, Bytes::from(data)).await.unwrap();
    file.fsync().await.unwrap();
}

/// Whole files, and ranges at and across the seams.
async fn check_files(client: &Client) {
    for (name, len) in FILES {
        let file = client.open_path(name).await.unwrap();
        let expected = pattern(len as u64, len);
        for at in (0..12).map(|i| len / 12 * i) {
            for (from, length) in [(at, 1), (at.saturating_sub(3000), 6000), (at & !4095, 4096)] {
                let end = (from + length).min(len);
                let got = file.read_at(from as u64, length).await.unwrap().concat();
                assert!(got == expected[from..end], "{name}: {length} bytes at {from}");
                let mut memory = vec![0; length];
                let n = file.read_into(from as u64, &mut memory).await.unwrap();
                assert!(memory[..n] == expected[from..end], "{name}: {length} bytes at {from} into memory");
            }
        }
        assert!(read_all(&file).await == expected, "{name} differs");
    }
}

async fn layouts(client: &Client, path: &str) -> Vec<Layout> {
    let ino = client.open_path(path).await.unwrap().ino();
    let extents = client.extents(ino).await.unwrap();
    extents
        .into_iter()
        .filter_map(|(_, extent)| match extent.source {
            Source::Blocks { layout, .. } => Some(layout),
            Source::Inline(_) => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn large_blocks_are_split_and_small_ones_copied() {
    let cluster = Cluster::start(3, "ec:2+1").await;
    let (writer, reader) = (cluster.client().await, cluster.client().await);
    write_files(&writer).await;
    check_files(&reader).await;
    let (ec, copies) = (Policy::ec(2, 1).unwrap(), Policy::replica(2).unwrap());
    let policies = |layouts: Vec<Layout>| layouts.into_iter().map(Layout::policy).collect::<Vec<_>>();
    assert_eq!(policies(layouts(&reader, "/copies").await), [copies]);
    assert_eq!(policies(layouts(&reader, "/split").await), [ec]);
    // Full blocks are one run; the rest of the file has shards of its own size.
    let blocks = layouts(&reader, "/blocks").await;
    assert_eq!(blocks[0], Layout::of(ec, 16 << 20));
    assert!(blocks.len() == 2 && policies(blocks).iter().all(|policy| *policy == ec));
}

#[tokio::test(flavor = "multi_thread")]
async fn any_server_may_go_and_reads_and_writes_go_on() {
    for gone in 0..3 {
        let mut cluster = Cluster::start(3, "ec:2+1").await;
        let client = cluster.client().await;
        write_files(&client).await;
        cluster.stop_data(gone);
        // Nobody knows yet that it is gone.
        let fresh = cluster.client().await;
        check_files(&fresh).await;
        let data = pattern(7, 20 << 20);
        write_synced(&fresh, "/at-once", data.clone()).await;

        wait_down(&fresh, 1).await;
        write_synced(&fresh, "/later", data.clone()).await;
        let reader = cluster.client().await;
        check_files(&reader).await;
        for path in ["/at-once", "/later"] {
            assert!(read_all(&reader.open_path(path).await.unwrap()).await == data, "{path} without {gone}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_may_go_where_there_are_two_parity_shards() {
    let mut cluster = Cluster::start(6, "ec:4+2").await;
    let client = cluster.client().await;
    write_files(&client).await;
    cluster.stop_data(1);
    cluster.stop_data(4);
    let reader = cluster.client().await;
    check_files(&reader).await;
    wait_down(&reader, 2).await;
    let data = pattern(8, 17 << 20);
    write_synced(&reader, "/new", data.clone()).await;
    assert!(read_all(&cluster.client().await.open_path("/new").await.unwrap()).await == data);
    // One more is one too many: an error, and no other bytes.
    cluster.stop_data(0);
    let file = cluster.client().await.open_path("/block").await.unwrap();
    let error = file.read_at(0, 1 << 24).await.unwrap_err();
    assert_eq!(error.errno, Errno::EIO);
    assert!(error.message.contains("fewer than 4 shards"), "{error}");
}
