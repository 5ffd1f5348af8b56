//! `fjord bench`: it measures, says what it cannot, and leaves nothing behind.

use std::fs;

use fjordfs_tests::{
    Cluster, Process, Setup, fjord, run,
    wait::{SOON, wait_for},
};

use super::{json, text};

/// A small benchmark: parts, sizes and rounds that take a second.
fn small_bench<'a>(rest: &[&'a str]) -> Vec<&'a str> {
    let small = ["--size", "8MiB", "--threads", "2", "--files", "40", "--time", "200ms", "--rounds", "2"];
    ["bench"].into_iter().chain(rest.iter().copied()).chain(small).collect()
}

#[test]
fn a_benchmark_measures_every_part_and_cleans_up() {
    let cluster = Cluster::start("bench", Setup::policy("replica:1"));
    let mount = cluster.mount();
    fs::create_dir(mount.join("scratch")).unwrap();
    let (dir, other) = (mount.join("scratch"), cluster.dir("local"));
    let remote = format!("{}:/scratch", cluster.meta_address());
    let figures = [
        "write",
        "read",
        "random",
        "random_p50",
        "random_p99",
        "small_create",
        "small_read",
        "small_stat",
        "small_delete",
        "meta_create",
        "meta_stat",
        "meta_delete",
    ];
    let through_the_mount = run(fjord(small_bench(&[text(&dir), "--compare", text(&other), "--json"]))).ok();
    let through_the_library =
        run(fjord(small_bench(&["--library", &remote, "--json", "--compare", text(&dir)]))).ok();
    for (ran, compared) in [(&through_the_mount, &other), (&through_the_library, &dir)] {
        let report = json(ran);
        assert_eq!(report["compared_with"], text(compared));
        let rows = report["figures"].as_array().unwrap();
        let by_library = !report["in_flight"].is_null();
        for figure in figures {
            let row =
                rows.iter().find(|row| row["figure"] == figure).unwrap_or_else(|| panic!("{figure}: {ran}"));
            // Reads of a batch are not waited for one by one.
            let sides: &[&str] =
                if by_library && row["unit"] == "us" { &["other"] } else { &["ours", "other"] };
            for side in sides {
                assert_eq!(row[side]["rounds"].as_array().unwrap().len(), 2, "{figure}, {side}: {ran}");
                let value = |of: &str| row[side][of].as_f64().unwrap();
                assert!(
                    0.0 < value("min") && value("min") <= value("median") && value("median") <= value("max")
                );
            }
            assert_eq!(row["ratio"].is_null(), sides.len() == 1, "{figure}: {ran}");
        }
        assert_eq!(rows.len(), figures.len());
    }
    assert!(through_the_mount.stderr.contains("round 2 of 2"), "progress is told: {through_the_mount}");
    let people = run(fjord(small_bench(&[text(&dir), "--only", "meta,read", "--quiet"]))).ok();
    assert!(
        people.stdout.contains("sequential read") && people.stdout.contains("empty files: stat"),
        "{people}"
    );
    assert!(!people.stdout.contains("small files") && !people.stdout.contains("with fsync"), "{people}");
    assert_eq!(people.stderr, "");
    for place in [&dir, &other] {
        assert_eq!(fs::read_dir(place).unwrap().count(), 0, "{} is not clean", place.display());
    }
    mount.unmount();
}

#[test]
fn an_interrupted_benchmark_cleans_up() {
    let cluster = Cluster::start("bench-interrupted", Setup::policy("replica:1"));
    let mount = cluster.mount();
    let remote = format!("{}:/", cluster.meta_address());
    for place in [vec![text(mount.path())], vec!["--library", &remote]] {
        let mut command = cluster.command(["bench"]);
        command.args(&place).args(["--only", "random", "--size", "16MiB", "--time", "10m"]);
        let mut bench = Process::start("fjord bench", command, &cluster.folder().join("bench.log"));
        let scratch = || {
            let first = fs::read_dir(mount.path()).unwrap().next()?.ok()?;
            // Written, and now read.
            (fs::metadata(first.path().join("large/f3")).ok()?.len() == 4 << 20).then_some(())
        };
        wait_for("random reads", SOON, || scratch().ok_or("nothing is written yet".to_owned()));
        bench.signal(rustix::process::Signal::INT);
        wait_for("the benchmark to end", SOON, || {
            if bench.running() { Err("it goes on".to_owned()) } else { Ok(()) }
        });
        let log = bench.log();
        assert!(log.contains("cleaning up") && log.contains("interrupted"), "{log}");
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 0, "{place:?} left something: {log}");
    }
    mount.unmount();
}

#[test]
fn nonsense_is_not_measured() {
    let cluster = Cluster::start("bench-nonsense", Setup::policy("replica:1"));
    let mount = cluster.mount();
    fs::write(mount.join("file"), b"x").unwrap();
    let (local, dir) = (cluster.dir("local"), text(mount.path()));
    let remote = |path: &str| format!("{}:{path}", cluster.meta_address());
    let missing = local.join("missing");
    for (words, said) in [
        (vec![text(&local)], vec![text(&local), "not in a FjordFS mount", "--compare"]),
        (vec![&*remote("/")], vec!["--library"]),
        (vec!["--library", &*remote("/file")], vec!["/file", "not a directory"]),
        (vec!["--library", &*remote("/missing")], vec!["/missing"]),
        (vec!["--library", "127.0.0.1:9:/"], vec!["127.0.0.1:9"]),
        (vec![text(&mount.join("file"))], vec!["file", "not a directory"]),
        (vec![dir, "--compare", text(&missing)], vec!["missing"]),
        (vec![dir, "--size", "1000TiB"], vec!["free", "--size"]),
        (vec![dir, "--size", "1MiB", "--threads", "2"], vec!["--size", "2 threads"]),
    ] {
        run(fjord(["bench"].iter().chain(&words))).fails_saying(&said);
    }
    assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 1, "only the file is left");
    assert_eq!(fs::read_dir(&local).unwrap().count(), 0);
    mount.unmount();
}
