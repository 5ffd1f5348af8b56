//! Namespace operations happen exactly once, however often the metaserver dies while they are under way.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::Duration,
};

use fjordfs_tests::{Cluster, Setup, rng};
use rand::Rng;

const WORKERS: usize = 4;
const KILLS: usize = 8;

/// An operation that was executed twice shows as EEXIST or ENOENT, one that was lost as a wrong listing.
#[test]
fn a_dying_metaserver_neither_repeats_nor_loses_operations() {
    let seed = rng::seed("exactly_once");
    let mut random = rng::stream(seed, 0);
    let mut cluster = Cluster::start("exactly-once", Setup::default());
    let mount = cluster.mount();
    let stop = AtomicBool::new(false);
    let rounds = AtomicUsize::new(0);
    let kept: BTreeSet<String> = thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (root, stop, rounds) = (mount.path(), &stop, &rounds);
                scope.spawn(move || {
                    let mut kept = BTreeSet::new();
                    for i in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        kept.extend(round(root, worker, i));
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    kept
                })
            })
            .collect();
        for _ in 0..KILLS {
            let before = rounds.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(random.random_range(200..900)));
            fjordfs_tests::wait::wait_until("work to go on", fjordfs_tests::wait::SOON, || {
                rounds.load(Ordering::Relaxed) > before || workers.iter().any(|w| w.is_finished())
            });
            cluster.kill_meta();
            thread::sleep(Duration::from_millis(random.random_range(0..500)));
            cluster.start_meta();
        }
        stop.store(true, Ordering::Relaxed);
        workers.into_iter().flat_map(|w| w.join().expect("worker")).collect()
    });
    eprintln!("{} rounds, {} files kept", rounds.load(Ordering::Relaxed), kept.len());
    cluster.wait_healthy();
    mount.unmount();
    let again = cluster.mount();
    let found: BTreeSet<String> =
        fs::read_dir(again.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, kept, "FJORD_SEED={seed}");
    for name in &found {
        assert_eq!(fs::metadata(again.join(name)).unwrap().nlink(), 1, "{name}");
        assert_eq!(fs::read(again.join(name)).unwrap(), name.as_bytes());
    }
}

/// Every operation must succeed; returns the name that stays, if one does.
#[track_caller]
fn round(root: &Path, worker: usize, i: usize) -> Option<String> {
    let path = |kind: &str| root.join(format!("{kind}-{worker}-{i}"));
    let done = |what: &str, result: std::io::Result<()>| {
        result.unwrap_or_else(|e| panic!("{what} of worker {worker}, round {i}: {e}"));
    };
    let stays = format!("stays-{worker}-{i}");
    done("create", File::create_new(path("new")).map(drop));
    done("write", fs::write(path("new"), &stays));
    done("rename", fs::rename(path("new"), path("old")));
    done("link", fs::hard_link(path("old"), path("link")));
    done("mkdir", fs::create_dir(path("dir")));
    done("rename into the directory", fs::rename(path("link"), path("dir").join("x")));
    done("unlink", fs::remove_file(path("old")));
    done("symlink", std::os::unix::fs::symlink("dir", path("symlink")));
    done("rename out of the directory", fs::rename(path("dir").join("x"), root.join(&stays)));
    done("rmdir", fs::remove_dir(path("dir")));
    done("unlink of the symlink", fs::remove_file(path("symlink")));
    if i.is_multiple_of(3) {
        return Some(stays);
    }
    done("unlink", fs::remove_file(root.join(&stays)));
    None
}
