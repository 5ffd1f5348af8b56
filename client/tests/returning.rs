//! Servers that are away for a while are waited for, where nobody else has what they have.

#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::{
    collections::HashSet,
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use fjordfs_client::{Errno, Network, Options, Wire};
use futures_util::future::BoxFuture;
use support::{Cluster, pattern, wait_down, wait_until, write_file};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Long enough for a wait that should not be there to show, and for each of the attempts before the server is back to fail.
const AWAY: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread")]
async fn reads_go_on_when_the_only_server_is_back() {
    for policy in ["replica:1", "ec:2+1"] {
        let mut cluster = Cluster::start(if policy == "replica:1" { 1 } else { 3 }, policy).await;
        let data = pattern(1, 20 << 20);
        let writer = cluster.client().await;
        write_file(&writer, "/f", &data).await;
        writer.sync_all().await.unwrap();
        let gone = if policy == "replica:1" { 0..1 } else { 1..3 };
        for declared in [false, true] {
            let reader = cluster.client().await;
            let file = reader.open_path("/f").await.unwrap();
            gone.clone().for_each(|i| cluster.stop_data(i));
            if declared {
                wait_down(&reader, gone.len()).await;
            }
            let read = tokio::spawn(async move {
                let (mut parts, mut into) = (Vec::new(), vec![0; 1 << 20]);
                for at in (0..20 << 20).step_by(2 << 20) {
                    parts.push(file.read_at(at, 1 << 20).await?.concat());
                    let filled = file.read_into(at + (1 << 20), &mut into).await?;
                    parts.push(into[..filled].to_vec());
                }
                Ok::<_, fjordfs_client::FsError>(parts.concat())
            });
            tokio::time::sleep(AWAY).await;
            assert!(!read.is_finished(), "{policy}: nobody has all of it");
            for i in gone.clone() {
                cluster.start_data(i).await;
            }
            assert!(read.await.unwrap().unwrap() == data, "{policy}, declared down: {declared}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_stored_does_not_hold_up_what_can() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    let stuck = client.create_path("/stuck").await.unwrap();
    cluster.stop_data(0);
    stuck.write_at(0, Bytes::from(pattern(5, 1 << 20))).await.unwrap();
    for name in ["/a", "/b"] {
        // The first may be flushed together with what is stuck. Its bytes need no data server.
        let file = client.create_path(name).await.unwrap();
        file.write_at(0, Bytes::from_static(b"tiny")).await.unwrap();
        wait_until("the tiny file to be committed", || client.dirty_bytes() == 1 << 20).await;
    }
    cluster.start_data(0).await;
    wait_until("everything to be committed", || client.dirty_bytes() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fsync_ends_when_enough_servers_are_back() {
    let mut cluster = Cluster::start(3, "ec:2+1").await;
    let client = cluster.client().await;
    let data = pattern(2, 20 << 20);
    let file = client.create_path("/f").await.unwrap();
    file.write_at(0, Bytes::from(data.clone())).await.unwrap();
    file.flush().await.unwrap();
    // Somebody looks at it, so it is committed.
    let reader = cluster.client().await;
    reader.open_path("/f").await.unwrap();
    (0..2).for_each(|i| cluster.stop_data(i));
    wait_down(&client, 2).await;
    let fsync = tokio::spawn(async move { file.fsync().await });
    tokio::time::sleep(AWAY).await;
    assert!(!fsync.is_finished(), "one of three shards is not enough");
    // Two are.
    cluster.start_data(1).await;
    fsync.await.unwrap().unwrap();
    assert!(support::read_all(&reader.open_path("/f").await.unwrap()).await == data);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_longer_than_an_operation_may_take() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_that_waits(Duration::from_secs(2)).await;
    let file = client.create_path("/f").await.unwrap();
    file.write_at(0, Bytes::from(pattern(3, 5 << 20))).await.unwrap();
    file.flush().await.unwrap();
    let other = cluster.client_that_waits(Duration::from_secs(2)).await;
    let read = other.open_path("/f").await.unwrap();
    cluster.stop_data(0);
    let error = read.read_at(0, 4096).await.unwrap_err();
    assert!(error.errno == Errno::EIO && error.message.contains("data server"), "{error}");
    assert_eq!(file.fsync().await.unwrap_err().errno, Errno::EIO);
}

/// Else a file of which much cannot be read, as when a page is rotten and a server gone, would take its reader a wait for each.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_waited_for_once_and_not_by_every_read() {
    const WAIT: Duration = Duration::from_secs(3);
    const READS: u32 = 100;
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_that_waits(WAIT).await;
    let data = pattern(8, 20 << 20);
    write_file(&client, "/f", &data).await;
    client.sync_all().await.unwrap();
    let reader = cluster.client_that_waits(WAIT).await;
    let file = reader.open_path("/f").await.unwrap();
    cluster.stop_data(0);
    let reads = async {
        for i in 0..READS {
            let e = file.read_at(u64::from(i) * 100_000, 4096).await.unwrap_err();
            assert_eq!(e.errno, Errno::EIO, "{e}");
        }
    };
    tokio::time::timeout(WAIT * READS / 4, reads).await.expect("they do not all wait");
    // Whoever is back is asked.
    cluster.start_data(0).await;
    let read = async || file.read_at(100_000, 4096).await;
    while read().await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(support::read_all(&file).await == data);
}

/// A kernel may have heard of the size with the bytes that are lost, and would show zeros there.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_at_the_end_is_an_error_and_no_end_of_file() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_that_waits(Duration::from_secs(1)).await;
    let file = client.create_path("/f").await.unwrap();
    let kept = pattern(4, 100_000);
    file.write_at(0, Bytes::from(kept.clone())).await.unwrap();
    file.fsync().await.unwrap();
    cluster.stop_data(0);
    file.append(Bytes::from(pattern(5, 100_000))).await.unwrap();
    assert_eq!(file.size(), 200_000);
    assert_eq!(file.fsync().await.unwrap_err().errno, Errno::EIO);
    assert_eq!((file.size(), file.size_told()), (100_000, 200_000));
    assert_eq!(file.read_at(150_000, 4096).await.unwrap_err().errno, Errno::EIO);
    assert_eq!(file.read_at(98_304, 4096).await.unwrap_err().errno, Errno::EIO);
    // What was committed stays.
    cluster.start_data(0).await;
    assert!(file.read_at(0, 98_304).await.unwrap().concat() == kept[..98_304]);
    // Nobody goes by the old size for long.
    wait_until("the file ends where it does", || file.size_told() == 100_000).await;
    assert!(support::read_all(&file).await == kept);
}

/// Whoever else closes the file, or is closed for, takes no report from who wrote: an fsync that succeeds means that it is all there.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_write_back_is_told_to_every_handle() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_that_waits(Duration::from_secs(1)).await;
    let writer = client.create_path("/f").await.unwrap();
    writer.fsync().await.unwrap();
    // Other opens of it, from before.
    let [released, closed, writes] = [(); 3].map(|()| client.open_path("/f"));
    let (released, closed, writes) = (released.await.unwrap(), closed.await.unwrap(), writes.await.unwrap());
    cluster.stop_data(0);
    writer.write_at(0, Bytes::from(pattern(6, 100_000))).await.unwrap();
    assert_eq!(closed.fsync().await.unwrap_err().errno, Errno::EIO);
    closed.close().await.unwrap();
    // What the kernel does when a descriptor is gone, which may be long after.
    released.leave().await.unwrap_err();
    assert_eq!(writer.fsync().await.unwrap_err().errno, Errno::EIO);
    writes.write_at(0, Bytes::from_static(b"more")).await.unwrap_err();
    // Once each, and who comes later has nothing to do with it.
    cluster.start_data(0).await;
    writer.fsync().await.unwrap();
    writes.fsync().await.unwrap();
    client.open_path("/f").await.unwrap().fsync().await.unwrap();
}

/// A file that nobody else uses is committed a moment after its close.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_back_that_fails_after_the_close_is_told_to_who_waits_for_everything() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_that_waits(Duration::from_secs(1)).await;
    cluster.stop_data(0);
    let file = client.create_path("/f").await.unwrap();
    file.write_at(0, Bytes::from(pattern(7, 100_000))).await.unwrap();
    file.close().await.unwrap();
    wait_until("it is given up", || client.dirty_bytes() == 0).await;
    let error = client.sync_all().await.unwrap_err();
    assert!(error.errno == Errno::EIO && error.message.contains("is lost"), "{error}");
    client.sync_all().await.expect("it was told");
}

/// A network that loses what some addresses answer, for one client, or what is sent to them, too.
#[derive(Clone, Debug)]
struct Lossy {
    takes_in: bool,
    silent: Arc<Mutex<HashSet<String>>>,
}

struct LossyWire {
    network: Lossy,
    address: String,
    stream: TcpStream,
}

impl Network for Lossy {
    fn connect(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn Wire>>> {
        let (network, address) = (self.clone(), address.to_owned());
        Box::pin(async move {
            let stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(LossyWire { network, address, stream }) as Box<dyn Wire>)
        })
    }
}

impl LossyWire {
    fn is_silent(&self) -> bool {
        self.network.silent.lock().unwrap().contains(&self.address)
    }

    fn is_stuck(&self) -> bool {
        !self.network.takes_in && self.is_silent()
    }
}

impl AsyncRead for LossyWire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.is_silent() { Poll::Pending } else { Pin::new(&mut self.stream).poll_read(cx, buf) }
    }
}

impl AsyncWrite for LossyWire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.is_stuck() { Poll::Pending } else { Pin::new(&mut self.stream).poll_write(cx, buf) }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_stuck() { Poll::Pending } else { self.stream.poll_write_ready(cx) }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// It is up for everybody else, so nobody declares it down, and this client's writes would wait as long as an operation may take.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_one_client_does_not_reach_holds_up_none_of_its_writes() {
    // With four servers there are groups without the silent one; with three there are none. Much more is written than the client
    // has memory for.
    for (servers, takes_in) in [(4, true), (3, true), (3, false)] {
        let cluster = Cluster::start(servers, "ec:2+1").await;
        let network = Lossy { takes_in, silent: Arc::default() };
        let options = Options {
            memory_max: 64 << 20,
            operation_timeout: Duration::from_secs(300),
            hedge_delay: Duration::from_millis(100),
            network: Some(Arc::new(network.clone())),
            ..Options::default()
        };
        let client = cluster.client_with(options).await;
        let data = pattern(9, 40 << 20);
        // All servers are known, and have something to be synced.
        let before = client.create_path("/before").await.unwrap();
        before.write_at(0, Bytes::from(data.clone())).await.unwrap();
        before.flush().await.unwrap();
        let silent = cluster.data[0].as_ref().unwrap().address().to_string();
        network.silent.lock().unwrap().insert(silent);
        let work = async {
            before.fsync().await.unwrap();
            let file = client.create_path("/f").await.unwrap();
            for i in 0..4 {
                file.write_at(i * data.len() as u64, Bytes::from(data.clone())).await.unwrap();
            }
            file.fsync().await.unwrap();
        };
        tokio::time::timeout(Duration::from_secs(250), work).await.expect("others have all that is needed");
        let other = cluster.client().await;
        for path in ["/before", "/f"] {
            let bytes = support::read_all(&other.open_path(path).await.unwrap()).await;
            assert!(bytes.chunks(data.len()).all(|chunk| chunk == data), "{path}");
        }
    }
}
