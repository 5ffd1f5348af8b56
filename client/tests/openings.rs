//! Files opened under a lease, of which the server does not know: they are there as long as they are open, whoever removes their
//! names meanwhile, and no longer.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::time::Duration;

use fjordfs_client::{Client, File, NewFile};
use fjordfs_proto::{InodeId, ROOT_INODE, error::Errno};
use support::{Cluster, pattern, read_all, write_file};

/// More than is kept with the inode: it needs blocks, which go when the file does.
const LEN: usize = 300_000;

/// Two clients, and a file of the first that the second has a lease on.
async fn two(cluster: &Cluster) -> (Client, Client, Vec<u8>) {
    let (writer, reader) = (cluster.client().await, cluster.client().await);
    let data = pattern(3, LEN);
    write_file(&writer, "/f", &data).await;
    writer.sync_all().await.unwrap();
    reader.stat("/f").await.unwrap();
    (writer, reader, data)
}

/// Until deletions have reached the data servers, if there are any.
async fn deletions() {
    tokio::time::sleep(Duration::from_secs(3)).await;
}

async fn assert_gone(client: &Client, files_before: u64, file: File) {
    assert_eq!(client.statfs().await.unwrap().files, files_before, "kept while it is open");
    drop(file);
    for _ in 0..300 {
        if client.statfs().await.unwrap().files < files_before {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("nobody has it open, and it is still there");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_remove_or_replace_stays_while_it_is_open() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (writer, reader, data) = two(&cluster).await;
    let file = reader.open_path("/f").await.unwrap();
    let files = writer.statfs().await.unwrap().files;
    writer.remove_file("/f").await.unwrap();
    deletions().await;
    assert!(read_all(&file).await == data);
    assert_gone(&writer, files, file).await;

    write_file(&writer, "/g", &data).await;
    write_file(&writer, "/other", b"other").await;
    writer.sync_all().await.unwrap();
    reader.stat("/g").await.unwrap();
    let file = reader.open_path("/g").await.unwrap();
    let files = writer.statfs().await.unwrap().files;
    writer.rename_path("/other", "/g").await.unwrap();
    deletions().await;
    assert!(read_all(&file).await == data);
    assert_eq!(read_all(&reader.open_path("/g").await.unwrap()).await, b"other");
    assert_gone(&writer, files, file).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_this_client_removes_or_replaces_stays_while_it_is_open() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (_writer, reader, data) = two(&cluster).await;
    let file = reader.open_path("/f").await.unwrap();
    let files = reader.statfs().await.unwrap().files;
    reader.remove_file("/f").await.unwrap();
    deletions().await;
    assert!(read_all(&file).await == data);
    assert_gone(&reader, files, file).await;

    // Now by itself, in a directory of its own.
    reader.create_dir_all("/own").await.unwrap();
    write_file(&reader, "/own/g", &data).await;
    write_file(&reader, "/own/other", b"other").await;
    reader.sync_all().await.unwrap();
    let file = reader.open_path("/own/g").await.unwrap();
    let files = reader.statfs().await.unwrap().files;
    reader.rename_path("/own/other", "/own/g").await.unwrap();
    reader.publish().await.unwrap();
    deletions().await;
    assert!(read_all(&file).await == data);
    assert_gone(&reader, files, file).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_metaserver_that_was_started_again_learns_what_is_open() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let (writer, reader, data) = two(&cluster).await;
    let file = reader.open_path("/f").await.unwrap();
    cluster.restart_meta().await;
    let files = writer.statfs().await.unwrap().files;
    writer.remove_file("/f").await.unwrap();
    deletions().await;
    assert!(read_all(&file).await == data);
    assert_eq!(writer.statfs().await.unwrap().files, files);
    assert_gone(&writer, files, file).await;
}

/// Whoever has waited for the answer is gone when it comes.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_opened_too_late_is_closed_again() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let (writer, impatient) =
        (cluster.client().await, cluster.client_that_waits(Duration::from_secs(1)).await);
    let files = writer.statfs().await.unwrap().files;
    write_file(&writer, "/f", b"not leased to the other").await;
    writer.sync_all().await.unwrap();
    let f = InodeId(writer.stat("/f").await.unwrap().ino);
    cluster.stop_meta().await;
    let new = NewFile { mode: 0o644, umask: 0, uid: 0, gid: 0, exclusive: true };
    let (opened, made) = tokio::join!(impatient.open(f), impatient.create(ROOT_INODE, b"g", new));
    assert_eq!(opened.err().unwrap().errno, Errno::ETIMEDOUT);
    assert_eq!(made.err().unwrap().errno, Errno::ETIMEDOUT);
    cluster.start_meta().await;
    for name in ["/f", "/g"] {
        let mut tries = 0..300;
        while writer.stat(name).await.is_err() {
            tries.next().expect("it was asked for, and is never made");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        writer.remove_file(name).await.unwrap();
    }
    for _ in 0..300 {
        if writer.statfs().await.unwrap().files == files {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("they are still open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_open_shows_what_others_have_written() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (writer, reader, data) = two(&cluster).await;
    let first = reader.open_path("/f").await.unwrap();
    assert!(read_all(&first).await == data);
    for i in 0..20 {
        let data = pattern(i, LEN + i as usize);
        write_file(&writer, "/f", &data).await;
        assert!(read_all(&reader.open_path("/f").await.unwrap()).await == data, "round {i}");
        // Under the lease this time.
        assert!(read_all(&reader.open_path("/f").await.unwrap()).await == data, "round {i} again");
    }
    drop(first);
}
