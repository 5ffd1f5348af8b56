//! Processes die in the middle of work, and the work goes on.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Process, Setup, rng,
    tree::{self, Tree},
    wait::SOON,
    wait_for,
};
use rand::Rng;

/// Large enough that an import of it can be caught in the middle.
fn import_tree() -> Tree {
    Tree { small: 4000, large: 24, ..Tree::mixed() }
}

/// An import under way.
struct Import {
    process: Process,
    source: PathBuf,
}

impl Import {
    fn start(cluster: &Cluster, seed: u64) -> Import {
        let source = cluster.dir("source");
        import_tree().generate(&source, seed);
        let mut command = cluster.command(["import".as_ref(), source.as_os_str()]);
        command.arg(format!("{}:/imported", cluster.meta_address()));
        let process = Process::start("fjord import", command, &cluster.folder().join("import.log"));
        Import { process, source }
    }

    /// Waits until it has done some of its work, and requires that it has not done all.
    fn wait_under_way(&mut self, cluster: &Cluster) {
        wait_for("the import to be under way", SOON, || {
            let s = cluster.try_status()?;
            // Names and bytes come to the servers in batches: that it is there is the first that is seen of it.
            if s.to_string().contains("fjord import") { Ok(()) } else { Err(s.to_string()) }
        });
        thread::sleep(Duration::from_millis(100));
        assert!(
            self.process.running(),
            "the import was over too soon to be disturbed:\n{}",
            self.process.log()
        );
    }

    fn finish(mut self) -> PathBuf {
        let status = self.process.wait();
        assert!(status.success(), "the import ended with {status}:\n{}", self.process.log());
        self.source
    }
}

fn assert_imported(cluster: &Cluster, source: &Path) {
    let mount = cluster.mount();
    tree::assert_same(source, &mount.join("imported"), tree::ALL);
    mount.unmount();
}

#[test]
fn an_import_survives_the_metaserver() {
    let seed = rng::seed("import_meta");
    let mut cluster = Cluster::start("import-meta", Setup::default());
    let mut import = Import::start(&cluster, seed);
    import.wait_under_way(&cluster);
    cluster.kill_meta();
    thread::sleep(Duration::from_secs(1));
    cluster.start_meta();
    cluster.wait_healthy();
    let source = import.finish();
    assert_imported(&cluster, &source);
    cluster.stop();
    cluster.start_all();
    assert_imported(&cluster, &source);
}

#[test]
fn an_import_survives_a_data_server() {
    let seed = rng::seed("import_data");
    let mut cluster = Cluster::start("import-data", Setup::default());
    let mut import = Import::start(&cluster, seed);
    import.wait_under_way(&cluster);
    cluster.kill_data(1);
    let source = import.finish();
    // Whatever the dead server held must be readable from others, and after its return, too.
    assert_imported(&cluster, &source);
    cluster.start_data(1);
    cluster.wait_healthy();
    assert_imported(&cluster, &source);
}

#[test]
fn with_one_data_server_down_reads_and_writes_go_on() {
    one_data_server_down("one-down", "replica:2");
}

#[test]
fn with_one_data_server_down_erasure_coded_reads_and_writes_go_on() {
    one_data_server_down("one-down-ec", "ec:2+1");
}

fn one_data_server_down(name: &str, policy: &str) {
    let mut cluster = Cluster::start(name, Setup::policy(policy));
    let mount = cluster.mount();
    let before: Vec<Vec<u8>> = (0..40).map(|i| rng::bytes(i, 30_000 + i as usize * 50_000)).collect();
    for (i, data) in before.iter().enumerate() {
        let mut file = File::create(mount.join(format!("before{i}"))).unwrap();
        file.write_all(data).unwrap();
        file.sync_all().unwrap();
    }
    // A file that is being written when it happens.
    let mut open = File::create(mount.join("open")).unwrap();
    open.write_all(&rng::bytes(77, 5 << 20)).unwrap();
    for server in 0..3 {
        cluster.kill_data(server);
        for i in 0..10 {
            let data = rng::bytes(1000 + i, 700_000);
            let path = mount.join(format!("during{server}-{i}"));
            let mut file = File::create(&path).unwrap();
            file.write_all(&data).unwrap();
            file.sync_all().unwrap();
            assert!(fs::read(&path).unwrap() == data);
        }
        open.write_all(&rng::bytes(78, 5 << 20)).unwrap();
        open.sync_all().unwrap();
        // A client that has just come, so without anything in memory.
        let fresh = cluster.mount();
        for (i, data) in before.iter().enumerate() {
            assert!(
                fs::read(fresh.join(format!("before{i}"))).unwrap() == *data,
                "before{i}, server {server} down"
            );
        }
        fresh.unmount();
        let s = cluster.wait_status("the server to count as down", |s| s.servers_up() == 2);
        assert_eq!(s.targets_up(), 2);
        cluster.start_data(server);
        cluster.wait_healthy();
    }
    drop(open);
    let mut expected = rng::bytes(77, 5 << 20);
    (0..3).for_each(|_| expected.extend(rng::bytes(78, 5 << 20)));
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.join("open")).unwrap() == expected);
    for server in 0..3 {
        for i in 0..10 {
            let got = fs::read(mount.join(format!("during{server}-{i}"))).unwrap();
            assert!(got == rng::bytes(1000 + i, 700_000), "during{server}-{i}");
        }
    }
}

/// How far the writer got with a file.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Reached {
    Begun,
    Closed,
    Synced,
}

#[test]
fn a_killed_client_leaves_what_it_synced_and_no_garbage() {
    killed_client("client-killed", "close=async");
}

#[test]
fn with_close_sync_a_killed_client_leaves_what_it_closed_as_well() {
    killed_client("client-killed-sync", "close=sync");
}

fn killed_client(name: &str, options: &str) {
    let seed = rng::seed("client_killed");
    let mut random = rng::stream(seed, 0);
    let mut cluster = Cluster::start(name, Setup::default());
    let content = |i: usize| rng::bytes(seed + i as u64, (i * 7919) % 300_000 + 1);
    let mount = cluster.mount_with(options);
    let promises = |reached| match reached {
        Reached::Begun => false,
        Reached::Closed => options == "close=sync",
        Reached::Synced => true,
    };
    let root = mount.path().to_owned();
    // One large file that is never closed, and a stream of others of which every third is synced.
    let endless = rng::bytes(seed, 40 << 20);
    let files: Mutex<Vec<Reached>> = Mutex::default();
    let killed = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0.. {
                files.lock().unwrap().push(Reached::Begun);
                // Errors are what the kill looks like from here.
                let Ok(mut file) = File::create(root.join(format!("f{i}"))) else { return };
                let synced = i % 3 == 0;
                if file.write_all(&content(i)).is_err() || (synced && file.sync_all().is_err()) {
                    return;
                }
                if synced {
                    files.lock().unwrap()[i] = Reached::Synced;
                } else if rustix::io::dup(&file).is_ok_and(close) {
                    files.lock().unwrap()[i] = Reached::Closed;
                } else {
                    return;
                }
            }
        });
        scope.spawn(|| {
            let Ok(mut file) = File::create(root.join("endless")) else { return };
            for part in endless.chunks(100_000) {
                if file.write_all(part).is_err() {
                    return;
                }
                thread::sleep(Duration::from_millis(5));
            }
            // Never closed before the kill.
            while !killed.load(Ordering::Acquire) {
                thread::sleep(Duration::from_millis(10));
            }
        });
        wait_for("some files to be written", SOON, || {
            let n = files.lock().unwrap().len();
            if n > 40 { Ok(()) } else { Err(n) }
        });
        thread::sleep(Duration::from_millis(random.random_range(0..1000)));
        mount.kill9();
        killed.store(true, Ordering::Release);
    });
    let files = files.into_inner().unwrap();
    let mount = cluster.mount();
    let mut promised = 0;
    for (i, reached) in files.iter().enumerate() {
        let expected = content(i);
        match fs::read(mount.join(format!("f{i}"))) {
            Ok(got) if !promises(*reached) => {
                assert!(
                    expected.starts_with(&got),
                    "f{i} holds bytes that were never written (FJORD_SEED={seed})"
                );
            }
            Ok(got) => {
                assert!(got == expected, "f{i}, {reached:?}: {} of {} bytes", got.len(), expected.len());
                promised += 1;
            }
            Err(e) => assert!(!promises(*reached), "f{i}, {reached:?}: {e} (FJORD_SEED={seed})"),
        }
    }
    assert!(promised > 10, "only {promised} of {} files were ever finished", files.len());
    let part = fs::read(mount.join("endless")).unwrap_or_default();
    assert!(endless.starts_with(&part), "the file that was never closed holds bytes that were never written");
    // The next client works as if nothing had been.
    fs::write(mount.join("after"), b"after").unwrap();
    fjordfs_tests::process::sh(mount.path(), "rm -rf -- *");
    mount.unmount();
    // What the dead client had put on the data servers but never committed goes when its session ends.
    wait_for("uncommitted blocks to be swept", 2 * SOON, || {
        let s = cluster.status();
        let clean = s.shards() == 0 && s.blocks_to_delete() == 0 && s.orphans() == 0;
        if clean { Ok(()) } else { Err(s.to_string()) }
    });
    cluster.assert_running();
}

/// close(2) with its result, which `drop` of a file hides. A copy is closed, so that the file itself stays usable.
fn close(fd: std::os::fd::OwnedFd) -> bool {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor was owned and is given up.
    unsafe { libc::close(fd.into_raw_fd()) == 0 }
}

#[test]
fn everything_killed_at_once_comes_back() {
    let seed = rng::seed("all_killed");
    let mut cluster = Cluster::start("all-killed", Setup { servers: 2, ..Setup::default() });
    let source = cluster.dir("source");
    Tree::mixed().generate(&source, seed);
    let mount = cluster.mount();
    fjordfs_tests::process::sh(
        cluster.folder(),
        &format!("cp -a source {0}/ && sync -f {0}", mount.path().display()),
    );
    for round in 0..2 {
        cluster.kill_meta();
        (0..2).for_each(|server| cluster.kill_data(server));
        cluster.start_all();
        // The mount that was there all the time, and a new one.
        tree::assert_same(&source, &mount.join("source"), tree::ALL);
        let fresh = cluster.mount();
        tree::assert_same(&source, &fresh.join("source"), tree::ALL);
        fs::write(fresh.join(format!("after{round}")), b"x").unwrap();
        fresh.unmount();
    }
    mount.unmount();
}
