//! What a client does differently when another process may go on with its session.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fjordfs_client::{Handover, Options};
use support::{Cluster, read_all, write_file};

/// Whoever asks for a commit waits for the answer.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_appended_is_committed_when_its_caller_knows() {
    let cluster = Cluster::start(3, "replica:1").await;
    let handover = Arc::new(Handover::take_over(Handover::memory().unwrap()).unwrap());
    let followed = cluster.client_with(Options { handover: Some(handover), ..Options::default() }).await;
    write_file(&followed, "/log", b"first ").await;
    let file = followed.open_path("/log").await.unwrap();
    file.append_unanswered(Bytes::from_static(b"second ")).await.unwrap();
    file.fsync().await.unwrap();

    let (at, unanswered) = file.append_unanswered(Bytes::from_static(b"third")).await.unwrap();
    assert_eq!(at, 13);
    assert_eq!(read_all(&file).await, b"first second third", "seen here at once");
    let syncing = tokio::spawn({
        let file = file.clone();
        async move { file.fsync().await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!syncing.is_finished());
    drop(unanswered);
    syncing.await.unwrap().unwrap();
    let other = cluster.client().await;
    assert_eq!(read_all(&other.open_path("/log").await.unwrap()).await, b"first second third");

    // Nobody follows on this one.
    let file = other.open_path("/log").await.unwrap();
    let (_, unanswered) = file.append_unanswered(Bytes::from_static(b"!")).await.unwrap();
    file.fsync().await.unwrap();
    drop(unanswered);
}
