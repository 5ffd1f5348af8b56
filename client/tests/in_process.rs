//! The library against real servers in this process: what one client promises itself and others.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

mod support;

use std::time::Duration;

use bytes::Bytes;
use fjordfs_client::{
    Allocation, AttrChange, Client, CopiedRange, Errno, File, InodeId, NewFile, Options, SetXattrMode,
};
use fjordfs_proto::{Policy, Source};
use support::{Cluster, pattern, read_all, write_file};

#[tokio::test(flavor = "multi_thread")]
async fn what_one_client_closes_another_reads() {
    let cluster = Cluster::start(3, "replica:2").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    for (name, len) in
        [("/empty", 0), ("/inline", 100), ("/small", 5000), ("/odd", 1_234_567), ("/large", 40 << 20)]
    {
        let data = pattern(len as u64, len);
        write_file(&a, name, &data).await;
        let file = b.open_path(name).await.unwrap();
        assert!(read_all(&file).await == data, "{name} differs");
    }
    let entries = b.read_dir("/").await.unwrap();
    assert_eq!(entries.len(), 5);
    a.shutdown().await.unwrap();
    b.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn uncommitted_writes_are_read_back_and_survive_overwrites_and_truncates() {
    let cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client().await;
    let file = client.create_path("/f").await.unwrap();
    let mut expected = pattern(1, 20 << 20);
    file.write_at(0, Bytes::from(expected.clone())).await.unwrap();
    file.write_at(1000, Bytes::from_static(b"over")).await.unwrap();
    expected[1000..1004].copy_from_slice(b"over");
    assert!(read_all(&file).await == expected);
    file.flush().await.unwrap();
    assert!(read_all(&file).await == expected);
    client.setattr(file.ino(), AttrChange { size: Some(70_000), ..Default::default() }).await.unwrap();
    client.setattr(file.ino(), AttrChange { size: Some(90_000), ..Default::default() }).await.unwrap();
    expected.truncate(70_000);
    expected.resize(90_000, 0);
    assert!(read_all(&file).await == expected);
    file.write_at(80_000, Bytes::from_static(b"tail")).await.unwrap();
    expected[80_000..80_004].copy_from_slice(b"tail");
    file.fsync().await.unwrap();
    let other = cluster.client().await;
    assert!(read_all(&other.open_path("/f").await.unwrap()).await == expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn small_files_closed_together_share_blocks() {
    let cluster = Cluster::start(3, "replica:1").await;
    let client = cluster.client().await;
    let writers = (0..200u64).map(|i| {
        let client = client.clone();
        tokio::spawn(async move { write_file(&client, &format!("/{i}"), &pattern(i, 20_000)).await })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    client.sync_all().await.unwrap();
    let mut blocks = std::collections::BTreeSet::new();
    for i in 0..200u64 {
        let file = client.open_path(&format!("/{i}")).await.unwrap();
        assert!(read_all(&file).await == pattern(i, 20_000));
        for (_, extent) in client.extents(file.ino()).await.unwrap() {
            blocks.extend(extent.pieces().map(|p| p.block));
        }
    }
    assert!(blocks.len() < 150, "200 files lie in {} blocks", blocks.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn tiny_files_live_in_the_metadata() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    write_file(&client, "/tiny", b"hello").await;
    let file = client.open_path("/tiny").await.unwrap();
    let extents = client.extents(file.ino()).await.unwrap();
    assert!(matches!(&extents[..], [(0, e)] if matches!(&e.source, Source::Inline(data) if data == "hello")));
    assert_eq!(read_all(&file).await, b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn appends_from_two_clients_lose_nothing() {
    let cluster = Cluster::start(3, "replica:1").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    write_file(&a, "/log", b"").await;
    let appender = |client: Client, tag: u8| async move {
        let file = client.open_path("/log").await.unwrap();
        for i in 0..100u8 {
            file.append(Bytes::from(vec![tag, i, b'\n'])).await.unwrap();
            if i % 7 == 0 {
                file.flush().await.unwrap();
            }
        }
        file.close().await.unwrap();
    };
    tokio::join!(appender(a.clone(), b'a'), appender(b.clone(), b'b'));
    let data = read_all(&cluster.client().await.open_path("/log").await.unwrap()).await;
    assert_eq!(data.len(), 600);
    for tag in *b"ab" {
        let seen: Vec<u8> = data.chunks(3).filter(|c| c[0] == tag).map(|c| c[1]).collect();
        assert_eq!(seen, (0..100).collect::<Vec<u8>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_data_server_gone_reads_and_writes_go_on() {
    let mut cluster = Cluster::start(3, "replica:2").await;
    let client = cluster.client().await;
    write_file(&client, "/before", &pattern(1, 30 << 20)).await;
    cluster.stop_data(1);
    let file = client.open_path("/before").await.unwrap();
    assert!(read_all(&file).await == pattern(1, 30 << 20));
    let file = client.create_path("/after").await.unwrap();
    file.write_at(0, Bytes::from(pattern(2, 30 << 20))).await.unwrap();
    file.fsync().await.unwrap();
    let fresh = cluster.client().await;
    assert!(read_all(&fresh.open_path("/after").await.unwrap()).await == pattern(2, 30 << 20));
    assert!(read_all(&fresh.open_path("/before").await.unwrap()).await == pattern(1, 30 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_data_is_an_error_and_never_zeros() {
    let mut cluster = Cluster::start(2, "replica:1").await;
    let client = cluster.client().await;
    write_file(&client, "/f", &pattern(3, 64 << 20)).await;
    client.sync_all().await.unwrap();
    cluster.stop_data(0);
    let fresh = cluster.client_that_waits(Duration::from_secs(3)).await;
    let file = fresh.open_path("/f").await.unwrap();
    let expected = pattern(3, 64 << 20);
    let (mut right, mut failed) = (0, 0);
    for offset in (0..expected.len()).step_by(1 << 20) {
        match file.read_at(offset as u64, 1 << 20).await {
            Ok(parts) => {
                assert!(parts.concat() == expected[offset..offset + (1 << 20)]);
                right += 1;
            }
            Err(e) => {
                assert_eq!(e.errno, Errno::EIO);
                failed += 1;
            }
        }
    }
    assert!(right > 0 && failed > 0, "{right} read, {failed} failed");
}

#[tokio::test(flavor = "multi_thread")]
async fn dirty_data_stays_within_its_bound_and_writers_wait() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client_with(Options { memory_max: Options::MEMORY_MIN, ..Options::default() }).await;
    let bound = Options::MEMORY_MIN * 3 / 8;
    let file = client.create_path("/f").await.unwrap();
    for i in 0..300u64 {
        // Scattered, so that full runs do not form by themselves.
        let at = (i * 7919 % 300) << 21;
        file.write_at(at, Bytes::from(vec![i as u8 | 1; 1 << 20])).await.unwrap();
        assert!(client.dirty_bytes() <= bound, "{} dirty", client.dirty_bytes());
    }
    file.fsync().await.unwrap();
    file.close().await.unwrap();
    assert_eq!(client.dirty_bytes(), 0);
    let file = client.open_path("/f").await.unwrap();
    for i in 0..300u64 {
        let at = (i * 7919 % 300) << 21;
        let read = file.read_at(at, 1 << 20).await.unwrap().concat();
        assert!(read.iter().all(|b| *b == i as u8 | 1), "run {i}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_follow_links_and_errors_name_the_path() {
    let cluster = Cluster::start(1, "replica:1").await;
    let client = cluster.client().await;
    let dir = InodeId(client.create_dir_all("/a/b").await.unwrap().ino);
    write_file(&client, "/a/b/f", b"x").await;
    let link = |target: &str| fjordfs_client::NewNode {
        kind: fjordfs_client::FileKind::Symlink,
        mode: 0o777,
        umask: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: target.into(),
    };
    client.make(dir, b"up", link("../b/f")).await.unwrap();
    client.make(dir, b"loop", link("loop")).await.unwrap();
    assert_eq!(client.stat("/a/b/up").await.unwrap().ino, client.stat("/a/b/f").await.unwrap().ino);
    assert_eq!(client.stat("/a/b/loop").await.unwrap_err().errno, Errno::ELOOP);
    let e = client.stat("/a/nope/f").await.unwrap_err();
    assert_eq!(e.errno, Errno::ENOENT);
    assert!(e.message.contains("/a/nope/f"), "{}", e.message);
    assert_eq!(client.stat("/a/b/f/g").await.unwrap_err().errno, Errno::ENOTDIR);
    assert_eq!(client.remove_dir("/a").await.unwrap_err().errno, Errno::ENOTEMPTY);
}

/// Copies all of it, as programs do.
async fn copy_all(source: &File, target: &File, from: u64, to: u64, length: u64) -> u64 {
    let mut done = 0;
    while done < length {
        let range = CopiedRange {
            from: from + done,
            to: to + done,
            length: length - done,
            clear_suid: false,
            same_as: None,
        };
        match target.copy_from(source, range).await.unwrap() {
            0 => break,
            copied => done += copied,
        }
    }
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_share_blocks_or_move_bytes_and_read_the_same() {
    let cluster = Cluster::start(2, "replica:2").await;
    let (writer, client) = (cluster.client().await, cluster.client().await);
    let data = pattern(3, 9 << 20);
    write_file(&writer, "/source", &data).await;
    let source = client.open_path("/source").await.unwrap();
    // Not committed yet: it is part of the copy all the same.
    source.write_at(100, Bytes::from_static(b"written here")).await.unwrap();
    let mut expected = data.clone();
    expected[100..112].copy_from_slice(b"written here");
    let single = InodeId(client.create_dir_all("/single").await.unwrap().ino);
    let policy = Some(Policy::replica(1).unwrap());
    client.setattr(single, AttrChange { policy, ..AttrChange::default() }).await.unwrap();
    for path in ["/shared", "/single/copied"] {
        let target = client.create_path(path).await.unwrap();
        target.write_at(0, Bytes::from(vec![7; 1000])).await.unwrap();
        assert_eq!(copy_all(&source, &target, 50, 500, 1 << 40).await, (9 << 20) - 50);
        target.fsync().await.unwrap();
        assert!(read_all(&target).await == [&[7; 500][..], &expected[50..]].concat(), "{path}");
        let extents = client.extents(target.ino()).await.unwrap();
        let of_source = client.extents(source.ino()).await.unwrap();
        let blocks = |extents: &[(u64, fjordfs_proto::Extent)]| -> std::collections::BTreeSet<u64> {
            extents.iter().flat_map(|(_, e)| e.pieces().map(|p| p.block.0).collect::<Vec<_>>()).collect()
        };
        let shares = !blocks(&extents).is_disjoint(&blocks(&of_source));
        assert_eq!(shares, path == "/shared");
    }
    // Within one file, and only where it does not overlap itself.
    let overlapping = CopiedRange { from: 0, to: 10, length: 20, clear_suid: false, same_as: None };
    assert_eq!(source.copy_from(&source, overlapping).await.unwrap_err().errno, Errno::EINVAL);
    assert_eq!(copy_all(&source, &source, 0, 9 << 20, 1000).await, 1000);
    expected.extend_from_within(..1000);
    assert!(read_all(&source).await == expected);
    // As often as one likes: what an fsync has to wait for is counted once, not doubled by each copy.
    for _ in 0..48 {
        assert_eq!(copy_all(&source, &source, 0, 9 << 20, 1000).await, 1000);
    }
    source.fsync().await.unwrap();
    assert!(read_all(&source).await == expected);
    // The others see it, also when the source is gone.
    client.remove_file("/source").await.unwrap();
    drop(source);
    let seen = writer.open_path("/shared").await.unwrap();
    assert!(read_all(&seen).await[500..] == expected[50..9 << 20]);
    client.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_are_punched_through_what_is_written_and_what_is_committed() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (client, other) = (cluster.client().await, cluster.client().await);
    let mut expected = pattern(5, 3 << 20);
    let file = client.create_path("/f").await.unwrap();
    file.write_at(0, Bytes::from(expected.clone())).await.unwrap();
    file.flush().await.unwrap();
    file.write_at(1 << 20, Bytes::from(vec![9; 1 << 20])).await.unwrap();
    expected[1 << 20..2 << 20].fill(9);
    let clear = Allocation { clear: true, keep_size: true, clear_suid: false };
    file.allocate(1000..(1 << 20) + 1000, clear).await.unwrap();
    expected[1000..(1 << 20) + 1000].fill(0);
    assert!(read_all(&file).await == expected);
    assert_eq!(
        (file.seek_hole(5).await.unwrap(), file.seek_data(1000).await.unwrap()),
        (1000, (1 << 20) + 1000)
    );
    // The end of the file is cut out and stays the end; a longer one is a hole.
    file.allocate((3 << 20) - 10..4 << 20, clear).await.unwrap();
    file.allocate(0..5 << 20, Allocation::default()).await.unwrap();
    expected[(3 << 20) - 10..].fill(0);
    expected.resize(5 << 20, 0);
    assert!(read_all(&file).await == expected);
    assert_eq!(file.seek_data(4 << 20).await.unwrap_err().errno, Errno::ENXIO);
    assert_eq!(file.allocate(5..5, clear).await.unwrap_err().errno, Errno::EINVAL);
    assert_eq!(file.allocate(0..1 << 63, clear).await.unwrap_err().errno, Errno::EFBIG);
    let seen = other.open_path("/f").await.unwrap();
    assert!(read_all(&seen).await == expected);
    client.shutdown().await.unwrap();
}

/// Whatever one client has cached, it does not show once another client's change was answered.
#[tokio::test(flavor = "multi_thread")]
async fn caches_are_recalled_before_a_change_is_answered() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    let dir = InodeId(a.create_dir_all("/d").await.unwrap().ino);
    let new = NewFile { mode: 0o600, umask: 0, uid: 0, gid: 0, exclusive: true };
    for i in 0..30 {
        let name = format!("f{i}");
        let bytes = name.as_bytes();
        assert_eq!(a.lookup(dir, bytes).await.unwrap_err().errno, Errno::ENOENT);
        let (attr, file) = b.create(dir, bytes, new).await.unwrap();
        let ino = InodeId(attr.ino);
        assert_eq!(a.lookup(dir, bytes).await.unwrap().ino, attr.ino);
        assert!(a.name_left(dir, bytes, Some(ino)) > Duration::ZERO, "cached");
        let attr = a.getattr(ino).await.unwrap();
        assert!(a.attr_left(&attr) > Duration::ZERO, "cached");

        b.setattr(ino, AttrChange { mode: Some(0o640), ..Default::default() }).await.unwrap();
        assert_eq!(a.attr_left(&attr), Duration::ZERO);
        assert_eq!(a.getattr(ino).await.unwrap().mode, 0o640);
        file.write_at(0, Bytes::from_static(b"12345")).await.unwrap();
        file.flush().await.unwrap();
        assert_eq!(a.getattr(ino).await.unwrap().size, 5);
        let second = format!("g{i}");
        b.link(ino, dir, second.as_bytes()).await.unwrap();
        assert_eq!(a.lookup(dir, bytes).await.unwrap().nlink, 2);
        b.rename(dir, bytes, dir, b"moved", 0).await.unwrap();
        assert_eq!(a.lookup(dir, bytes).await.unwrap_err().errno, Errno::ENOENT);
        assert_eq!(a.lookup(dir, b"moved").await.unwrap().ino, attr.ino);
        assert_eq!(a.get_xattr(ino, b"user.x").await.unwrap_err().errno, Errno::ENODATA);
        b.set_xattr(ino, b"user.x", Bytes::from_static(b"y"), SetXattrMode::Any).await.unwrap();
        assert_eq!(a.get_xattr(ino, b"user.x").await.unwrap(), "y");
        assert_eq!(a.list_xattrs(ino).await.unwrap(), ["user.x"]);
        b.unlink(dir, second.as_bytes()).await.unwrap();
        assert_eq!(a.getattr(ino).await.unwrap().nlink, 1);
        assert_eq!(a.lookup(dir, second.as_bytes()).await.unwrap_err().errno, Errno::ENOENT);
    }
    a.shutdown().await.unwrap();
    b.shutdown().await.unwrap();
}

/// Others have given it the name that it is known by now, and this client has not looked since.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_written_is_committed_before_a_renaming_by_a_name_that_is_not_cached() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    let dir = InodeId(a.create_dir_all("/d").await.unwrap().ino);
    let new = NewFile { mode: 0o600, umask: 0, uid: 0, gid: 0, exclusive: true };
    let (attr, file) = a.create(dir, b"f", new).await.unwrap();
    b.rename(dir, b"f", dir, b"moved", 0).await.unwrap();
    file.write_at(0, Bytes::from_static(b"12345")).await.unwrap();
    assert_eq!(a.name_left(dir, b"moved", Some(InodeId(attr.ino))), Duration::ZERO, "not cached");
    a.rename(dir, b"moved", dir, b"named", 0).await.unwrap();
    assert_eq!(b.lookup(dir, b"named").await.unwrap().size, 5);
    drop(file);
}

/// A listener stands for a kernel that caches: the other client's change waits until it has let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_waits_until_the_caches_below_have_let_go() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    let mut recalls = a.recalls();
    write_file(&b, "/f", b"x").await;
    let attr = a.stat("/f").await.unwrap();
    let ino = InodeId(attr.ino);
    let change = AttrChange { mode: Some(0o711), ..Default::default() };
    let changing = tokio::spawn(async move { b.setattr(ino, change).await.map(|attr| (attr, b)) });
    let recalled = recalls.recv().await.unwrap();
    assert_eq!(recalled.inodes, [ino]);
    // Who asks meanwhile waits as well: nobody sees the change while somebody may still use what was before.
    let asking = {
        let c = cluster.client().await;
        tokio::spawn(async move { c.getattr(ino).await.map(|attr| (attr.mode, c)) })
    };
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!changing.is_finished() && !asking.is_finished());
    recalled.done.send(()).unwrap();
    let (changed, b) = changing.await.unwrap().unwrap();
    assert_eq!(changed.mode, 0o711);
    assert_eq!(asking.await.unwrap().unwrap().0, 0o711);
    drop(b);
}

/// What nobody lets go of has run out once a lease's time has passed.
#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_answer_holds_nobody_up_for_good() {
    let cluster = Cluster::start(1, "replica:1").await;
    let (a, b) = (cluster.client().await, cluster.client().await);
    let recalls = a.recalls();
    write_file(&b, "/f", b"x").await;
    let ino = InodeId(a.stat("/f").await.unwrap().ino);
    b.setattr(ino, AttrChange { mode: Some(0o711), ..Default::default() }).await.unwrap();
    assert_eq!(a.getattr(ino).await.unwrap().mode, 0o711);
    drop(recalls);
}
