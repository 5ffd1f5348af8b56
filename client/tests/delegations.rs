//! What a client decides by itself must be what the metaserver makes of it: one client works in a directory that is delegated to
//! it, another looks, and both have to see the same.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use fjordfs_client::{
    Attr, AttrChange, Client, Errno, FileKind, InodeId, NewFile, NewNode, Options, SetTime, Time,
};
use proptest::prelude::*;
use support::{Cluster, pattern, read_all, write_file};

/// Names in the directory and in each other: few, so that operations meet.
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

#[derive(Clone, Debug)]
enum Op {
    Create(usize, usize, u32),
    Write(usize, usize, u16),
    Mkdir(usize, u32),
    Symlink(usize, usize),
    Unlink(usize, usize),
    Rmdir(usize),
    Rename((usize, usize), (usize, usize), bool),
    Chmod(usize, usize, u32),
    Chown(usize, usize, u32),
    Times(usize, usize, i64),
    Truncate(usize, usize, u16),
    Link((usize, usize), (usize, usize)),
    /// The other client looks at everything.
    Look,
}

/// Where a name is: 0 is the directory itself, others are directories in it.
fn place() -> impl Strategy<Value = (usize, usize)> {
    (0..3usize, 0..NAMES.len())
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (place(), any::<u32>()).prop_map(|((d, n), mode)| Op::Create(d, n, mode & 0o7777)),
        3 => (place(), 0..9000u16).prop_map(|((d, n), len)| Op::Write(d, n, len)),
        3 => (0..NAMES.len(), any::<u32>()).prop_map(|(n, mode)| Op::Mkdir(n, mode & 0o3777 | 0o700)),
        1 => place().prop_map(|(d, n)| Op::Symlink(d, n)),
        2 => place().prop_map(|(d, n)| Op::Unlink(d, n)),
        1 => (0..NAMES.len()).prop_map(Op::Rmdir),
        3 => (place(), place(), any::<bool>()).prop_map(|(a, b, keep)| Op::Rename(a, b, keep)),
        2 => (place(), any::<u32>()).prop_map(|((d, n), mode)| Op::Chmod(d, n, mode & 0o7777)),
        1 => (place(), 0..3u32).prop_map(|((d, n), uid)| Op::Chown(d, n, uid)),
        2 => (place(), 1..1_000_000i64).prop_map(|((d, n), at)| Op::Times(d, n, at)),
        1 => (place(), 0..6000u16).prop_map(|((d, n), size)| Op::Truncate(d, n, size)),
        1 => (place(), place()).prop_map(|(a, b)| Op::Link(a, b)),
        2 => Just(Op::Look),
    ]
}

/// The directories of a case as the working client finds them by name.
struct Worker {
    client: Client,
    top: InodeId,
}

impl Worker {
    async fn directory(&self, d: usize) -> Option<InodeId> {
        if d == 0 {
            return Some(self.top);
        }
        let attr = self.client.lookup(self.top, NAMES[d].as_bytes()).await.ok()?;
        (attr.kind() == FileKind::Directory).then_some(InodeId(attr.ino))
    }

    async fn inode(&self, d: usize, n: usize) -> Option<InodeId> {
        let directory = self.directory(d).await?;
        self.client.lookup(directory, NAMES[n].as_bytes()).await.ok().map(|attr| InodeId(attr.ino))
    }

    /// Does it, or is refused: both clients see the outcome.
    async fn run(&self, op: &Op) -> Option<()> {
        let c = &self.client;
        let name = |n: usize| NAMES[n].as_bytes();
        let new = |mode| NewFile { mode, umask: 0o022, uid: 1, gid: 2, exclusive: true };
        match *op {
            Op::Create(d, n, mode) => drop(c.create(self.directory(d).await?, name(n), new(mode)).await),
            Op::Write(d, n, len) => {
                let ino = self.inode(d, n).await?;
                if c.getattr(ino).await.ok()?.kind() == FileKind::Regular {
                    let (_, file) = c.open(ino).await.ok()?;
                    file.write_at(u64::from(len) / 3, Bytes::from(vec![len as u8; len.into()]))
                        .await
                        .unwrap();
                    file.close().await.unwrap();
                }
            }
            Op::Mkdir(n, mode) => {
                let node = NewNode {
                    kind: FileKind::Directory,
                    mode,
                    umask: 0o022,
                    uid: 3,
                    gid: 4,
                    rdev: 0,
                    target: vec![],
                };
                drop(c.make(self.top, name(n), node).await);
            }
            Op::Symlink(d, n) => {
                let node = NewNode {
                    kind: FileKind::Symlink,
                    mode: 0o777,
                    umask: 0o022,
                    uid: 3,
                    gid: 4,
                    rdev: 0,
                    target: b"there".to_vec(),
                };
                drop(c.make(self.directory(d).await?, name(n), node).await);
            }
            Op::Unlink(d, n) => drop(c.unlink(self.directory(d).await?, name(n)).await),
            Op::Rmdir(n) => drop(c.rmdir(self.top, name(n)).await),
            Op::Rename((d, n), (e, m), keep) => {
                let (from, to) = (self.directory(d).await?, self.directory(e).await?);
                drop(c.rename(from, name(n), to, name(m), u32::from(keep)).await);
            }
            Op::Chmod(d, n, mode) => {
                drop(
                    c.setattr(self.inode(d, n).await?, AttrChange { mode: Some(mode), ..Default::default() })
                        .await,
                );
            }
            Op::Chown(d, n, uid) => {
                drop(
                    c.setattr(self.inode(d, n).await?, AttrChange { uid: Some(uid), ..Default::default() })
                        .await,
                );
            }
            Op::Times(d, n, sec) => {
                let to = Some(SetTime::To(Time { sec, nsec: 5 }));
                drop(
                    c.setattr(
                        self.inode(d, n).await?,
                        AttrChange { mtime: to, atime: Some(SetTime::Now), ..Default::default() },
                    )
                    .await,
                );
            }
            Op::Truncate(d, n, size) => {
                drop(
                    c.setattr(
                        self.inode(d, n).await?,
                        AttrChange { size: Some(size.into()), ..Default::default() },
                    )
                    .await,
                );
            }
            Op::Link((d, n), (e, m)) => {
                drop(c.link(self.inode(d, n).await?, self.directory(e).await?, name(m)).await);
            }
            Op::Look => {}
        }
        Some(())
    }
}

/// What a client sees of an inode, but for what a commit that is to come will add.
fn shown(attr: Attr) -> Attr {
    Attr { allocated: 0, data_version: 0, ..attr }
}

/// Everything below a directory: attributes by path, with a link's target or a file's bytes.
async fn tree(client: &Client, top: InodeId) -> BTreeMap<String, (Attr, Vec<u8>)> {
    let mut seen = BTreeMap::new();
    let mut todo = vec![(String::new(), top)];
    while let Some((path, ino)) = todo.pop() {
        let attr = client.getattr(ino).await.unwrap();
        let content = match attr.kind() {
            FileKind::Directory => {
                for entry in client.readdir(ino, 0, 100, true).await.unwrap().entries {
                    let name = std::str::from_utf8(&entry.name).unwrap();
                    todo.push((format!("{path}/{name}"), InodeId(entry.ino)));
                }
                Vec::new()
            }
            FileKind::Symlink => client.readlink(ino).await.unwrap(),
            _ => read_all(&client.open(ino).await.unwrap().1).await,
        };
        seen.insert(path, (shown(attr), content));
    }
    seen
}

/// What the working client has decided about these paths, before anybody asks the server.
async fn decided(
    client: &Client,
    top: InodeId,
    paths: &BTreeMap<String, (Attr, Vec<u8>)>,
) -> Vec<Option<Attr>> {
    let mut attrs = Vec::new();
    for path in paths.keys() {
        let mut found = client.getattr(top).await.ok();
        for name in path.split('/').skip(1) {
            let Some(parent) = found else { break };
            found = client.lookup(InodeId(parent.ino), name.as_bytes()).await.ok();
        }
        attrs.push(found.map(shown));
    }
    attrs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn both_clients_see_the_same(ops in proptest::collection::vec(op(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let cluster = Cluster::start(1, "replica:1").await;
            // The one look would change what the other has cached: of access times nobody is told.
            let quiet = || Options { access_times: false, ..Options::default() };
            let (client, other) = (cluster.client_with(quiet()).await, cluster.client_with(quiet()).await);
            let top = InodeId(client.create_dir_all("/top").await.unwrap().ino);
            let worker = Worker { client, top };
            for op in ops.iter().chain([&Op::Look]) {
                if !matches!(op, Op::Look) {
                    worker.run(op).await;
                    continue;
                }
                // A listing would bring everything to the server, so the names come from what can be there at all.
                let mut paths = BTreeMap::from([(String::new(), (Attr::default(), Vec::new()))]);
                for name in NAMES {
                    paths.insert(format!("/{name}"), (Attr::default(), Vec::new()));
                    for below in NAMES {
                        paths.insert(format!("/{name}/{below}"), (Attr::default(), Vec::new()));
                    }
                }
                let here = decided(&worker.client, top, &paths).await;
                let there = tree(&other, top).await;
                for (path, attr) in paths.keys().zip(here) {
                    assert_eq!(attr, there.get(path).map(|(attr, _)| *attr), "{path} after {op:?}");
                }
                assert_eq!(tree(&worker.client, top).await, there);
            }
            worker.client.shutdown().await.unwrap();
            other.shutdown().await.unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_and_closed_is_there_for_who_asks_and_after_a_drop() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    client.create_dir_all("/d").await.unwrap();
    for i in 0..50 {
        write_file(&client, &format!("/d/{i}"), &[i; 10_000]).await;
    }
    let other = cluster.client().await;
    for i in 0..50 {
        let file = other.open_path(&format!("/d/{i}")).await.unwrap();
        assert_eq!(read_all(&file).await, [i; 10_000], "closed is visible");
    }
    client.create_dir_all("/d/e/f").await.unwrap();
    drop(client);
    // Dropped without a word: names go to the server all the same.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while other.stat("/d/e/f").await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "what was decided before the drop never arrived");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_delegations_every_operation_is_the_servers() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_with(Options { defer: false, ..Options::default() }).await;
    client.create_dir_all("/d").await.unwrap();
    write_file(&client, "/d/f", &[7; 9000]).await;
    assert_eq!(client.dirty_bytes(), 0, "close has committed");
    let attr = client.stat("/d/f").await.unwrap();
    assert_eq!((attr.size, attr.data_version > 0), (9000, true));
}

/// As tools copy trees: many files at a time, each written in pieces side by side under a name of its own, given its times and then
/// its name.
#[tokio::test(flavor = "multi_thread")]
async fn copied_files_have_the_bytes_and_times_they_were_given() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    let directory = InodeId(client.create_dir_all("/d").await.unwrap().ino);
    let other = cluster.client().await;
    let lengths = [10usize, 5000, 300_000, 17 << 20, 33 << 20, 35_387_278, 39_106_542];
    let to = |i: usize| Time { sec: 1000 + i as i64, nsec: 7 };
    let copies = lengths.into_iter().enumerate().map(|(i, len)| {
        let client = client.clone();
        tokio::spawn(async move {
            let new = NewFile { mode: 0o600, umask: 0, uid: 0, gid: 0, exclusive: false };
            let partial = format!("{i}.partial");
            let (attr, file) = client.create(directory, partial.as_bytes(), new).await.unwrap();
            let data = Bytes::from(pattern(i as u64, len));
            let piece = |at: usize| file.write_at(at as u64, data.slice(at..len.min(at + (1 << 20))));
            for group in (0..len).step_by(1 << 20).collect::<Vec<_>>().chunks(8) {
                let pieces: Vec<_> = group.iter().rev().map(|at| piece(*at)).collect();
                futures_util::future::try_join_all(pieces).await.unwrap();
            }
            file.clone().close().await.unwrap();
            // Some end in a hole, which is made with the times.
            let size = (i % 2 == 1).then_some(len as u64 + 5000);
            let change = AttrChange { size, mtime: Some(SetTime::To(to(i))), ..Default::default() };
            assert_eq!(client.setattr(InodeId(attr.ino), change).await.unwrap().mtime, Some(to(i)));
            let name = i.to_string();
            client.rename(directory, partial.as_bytes(), directory, name.as_bytes(), 0).await.unwrap();
        })
    });
    for copy in copies.collect::<Vec<_>>() {
        copy.await.unwrap();
    }
    client.shutdown().await.unwrap();
    for (i, len) in lengths.into_iter().enumerate() {
        let file = other.open_path(&format!("/d/{i}")).await.unwrap();
        let size = len as u64 + if i % 2 == 1 { 5000 } else { 0 };
        assert_eq!((file.attr().mtime, file.attr().size), (Some(to(i)), size), "{i}, {len} bytes");
        let mut expected = pattern(i as u64, len);
        expected.resize(file.attr().size as usize, 0);
        assert!(read_all(&file).await == expected, "{i}, {len} bytes");
    }
}

/// The metaserver is gone for a while: what was decided before and during that time is there afterwards, once.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_decided_survives_the_metaserver() {
    let mut cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    client.create_dir_all("/d").await.unwrap();
    for i in 0..300 {
        write_file(&client, &format!("/d/{i}"), &[1; 5000]).await;
    }
    for i in 0..100 {
        client.remove_file(&format!("/d/{i}")).await.unwrap();
    }
    cluster.restart_meta().await;
    client.create_dir_all("/d/after").await.unwrap();
    let other = cluster.client().await;
    let names = other.read_dir("/d").await.unwrap();
    assert_eq!(names.len(), 201);
    for i in [100, 200, 299] {
        assert_eq!(read_all(&other.open_path(&format!("/d/{i}")).await.unwrap()).await, [1; 5000]);
    }
    assert_eq!(other.stat("/d/5").await.unwrap_err().errno, Errno::ENOENT);
    client.sync_all().await.unwrap();
}
