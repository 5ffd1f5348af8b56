//! The mount behaves as a local directory does: the same random operations, the same results.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use fjordfs_tests::{Cluster, Setup, differential::Pair, differential::sequence, rng, wait::SOON};

/// Sequences of one run, each in a directory of its own.
const SEQUENCES: u64 = 40;
/// Operations of a sequence.
const LENGTH: usize = 120;

#[test]
fn random_operations_do_what_they_do_locally() {
    let seed = rng::seed("differential");
    rustix::process::umask(rustix::fs::Mode::empty());
    let mut cluster = Cluster::start("differential", Setup::default());
    let mount = cluster.mount();
    let mut pair = Pair::new(&cluster.dir("local"), mount.path());
    for i in 0..SEQUENCES {
        let ops = sequence(&mut rng::stream(seed, i), LENGTH);
        if let Some(failure) = pair.run(&ops) {
            panic!("FJORD_SEED={seed}, sequence {i}: {}", pair.explain(&ops, &failure));
        }
    }
    // What a client sees of its own writes could come out of its memory: another client's view cannot.
    let dir = mount.path().to_owned();
    mount.unmount();
    cluster.stop();
    cluster.start_all();
    let logs = cluster.folder().to_owned();
    let again = fjordfs_tests::MountPoint::start(&cluster.meta_address(), &dir, "", &logs);
    assert_eq!(
        pair.compare_all(),
        None,
        "after unmount and restart of the cluster (FJORD_SEED={seed}, {SOON:?})"
    );
    again.unmount();
    cluster.assert_running();
}

/// The generator must produce sequences in which a good part of operations succeeds, else the comparison is idle.
#[test]
fn sequences_are_not_idle_and_the_oracle_agrees_with_itself() {
    rustix::process::umask(rustix::fs::Mode::empty());
    let scratch = fjordfs_tests::Scratch::new("oracle");
    let mut pair = Pair::new(&scratch.dir("left"), &scratch.dir("right"));
    let seed = rng::seed("oracle");
    for i in 0..SEQUENCES {
        let ops = sequence(&mut rng::stream(seed, i), LENGTH);
        assert_eq!(pair.run(&ops), None, "a local directory differs from another one (FJORD_SEED={seed})");
    }
    let entries = fjordfs_tests::tree::count(&scratch.dir("left"));
    assert!(entries > 4 * SEQUENCES as usize, "only {entries} entries are left by {SEQUENCES} sequences");
}
