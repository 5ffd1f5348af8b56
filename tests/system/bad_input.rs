//! Wrong input of people: a clear error that names the thing, and nothing lost. Wrong input from the network is in
//! `noise.rs`.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Process, Setup,
    engines::free_port,
    fault, fjord,
    process::{Run, run_within},
    rng, run,
    scratch::Scratch,
    wait::{SOON, wait_for},
};

fn fjord_run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    run(fjord(args))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A daemon that must refuse to start: ends by itself, not with success, and says why.
#[track_caller]
fn refuses(command: std::process::Command, words: &[&str]) {
    run_within(command, SOON).fails_saying(words);
}

#[test]
fn a_mount_says_what_is_wrong_with_it() {
    let mut cluster = Cluster::start("bad-mount", Setup::default());
    let empty = cluster.dir("empty");
    let meta = cluster.meta_address();
    let nobody = format!("127.0.0.1:{}", free_port());
    let mount = |meta: &str, dir: &Path, options: &str| {
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        fjord_run(["mount", meta, text(dir)].into_iter().chain(options))
    };
    mount(&nobody, &empty, "").fails_saying(&[&nobody]);
    mount("nonsense", &empty, "").fails_saying(&["'nonsense' is not the address of a metaserver"]);
    mount("127.0.0.1:18650:", &empty, "").fails_saying(&["is not the address of a metaserver"]);
    mount(&meta, &empty, "memory=15E").fails_saying(&["`memory`", "is possible"]);
    mount("no.such.host.invalid:7440", &empty, "").fails_saying(&["no.such.host.invalid"]);
    // The address of a data server instead of the metaserver's.
    let data = cluster.data_address(0);
    mount(&data, &empty, "").fails_saying(&[&data]);
    let full = cluster.dir("full");
    fs::write(full.join("file"), b"x").unwrap();
    mount(&meta, &full, "").fails_saying(&[text(&full), "not empty"]);
    mount(&meta, &full.join("file"), "").fails_saying(&[text(&full.join("file")), "not a"]);
    mount(&meta, &empty, "rw,nonsense=3").fails_saying(&["nonsense"]);
    let mounted = cluster.mount();
    mount(&meta, mounted.path(), "").fails_saying(&["mounted already", "umount"]);
    fjord_run(["umount", text(&empty)]).fails_saying(&[text(&empty), "nothing is mounted"]);
    assert!(fs::read_dir(&empty).unwrap().next().is_none(), "a failed mount leaves nothing behind");
    assert!(!fjordfs_tests::mountpoint::is_mounted(&empty));
    mount(&meta, &full.join("file/below"), "").fails_saying(&["mount point", text(&full), "not a directory"]);
    mounted.unmount();
    cluster.assert_running();
}

#[test]
fn wrong_usage_exits_with_2_and_names_the_word() {
    let scratch = Scratch::new("usage");
    let dir = scratch.dir("d");
    for (args, word) in [
        (vec!["mnt"], "mnt"),
        (vec!["up", text(&dir), "--policy", "mirror:2"], "replica:N"),
        (vec!["up", text(&dir), "--policy", "ec:31+2"], "ec:K+M"),
        (vec!["meta", "--data", text(&dir), "--policy", "replica:0"], "replica:N"),
        (vec!["meta", "--down-after", "soon"], "soon"),
        (vec!["data", "--volume-size", "many"], "many"),
    ] {
        let run = fjord_run(args).fails_saying(&[word]);
        assert_eq!(run.code(), 2, "{run}");
    }
    // What no cluster works with.
    let out_of_bounds = |args: &[&str], words: &[&str]| refuses(fjord(args), words);
    for (option, value, possible) in [
        ("--session-timeout", "0s", "from 1s to 1 day"),
        ("--heartbeat", "0s", "from 100ms to 1m"),
        ("--heartbeat", "10s", "down-after (at least two heartbeats) is 5s: from 20s"),
        ("--down-after", "1s", "from 2s to 1h"),
        ("--log-sync", "100years", "from 1ms to 1m"),
        ("--gc-interval", "1ms", "only by `fjord gc`"),
    ] {
        let words = [option.trim_start_matches('-'), possible];
        out_of_bounds(&["meta", "--data", text(&dir), option, value], &words);
    }
    for (option, value, possible) in [
        ("--capacity-max", "0", "from 64.0 MiB"),
        ("--rebuild-rate", "1", "no limit"),
        ("--scrub-rate", "1", "no limit"),
        ("--cores", "4096", "from 0 to 1024"),
        ("--advertise", "0.0.0.0:1", "0.0.0.0:1"),
        ("--advertise", "host:0", "host:0"),
    ] {
        let words = [option.trim_start_matches('-'), possible];
        out_of_bounds(&["data", "--meta", "127.0.0.1:1", "--target", text(&dir), option, value], &words);
    }
    // Right as such, but not here. The default data folder may hold somebody's filesystem.
    let data = scratch.path().join("data");
    fjord_run(["up", text(&dir), "--data", text(&data), "--policy", "ec:8+2"])
        .fails_saying(&["ec:8+2", "--servers 10"]);
}

#[test]
fn a_bad_configuration_file_is_named_with_its_line() {
    let scratch = Scratch::new("config");
    let file = scratch.path().join("fjord.toml");
    for (verb, content, words) in [
        ("meta", "data = \"/x\"\npolcy = \"replica:2\"\n", vec!["fjord.toml", "polcy", "line 2"]),
        ("meta", "data = \n", vec!["fjord.toml", "line 1"]),
        ("meta", "data = \"/x\"\npolicy = \"raid\"\n", vec!["fjord.toml", "raid", "line 2"]),
        ("data", "volume_size = -1\n", vec!["fjord.toml", "line 1"]),
        ("meta", "data = \"/x\"\nstore = \"fjall:/y\"\n", vec!["`data`", "`store`"]),
        ("meta", "heartbeat = 1\n", vec!["line 1", "\"1s\""]),
    ] {
        fs::write(&file, content).unwrap();
        fjord_run([verb, "--config", text(&file)]).fails_saying(&words);
    }
    fjord_run(["meta", "--config", text(&scratch.path().join("missing.toml"))])
        .fails_saying(&["missing.toml"]);
}

#[test]
fn daemons_refuse_ports_and_folders_that_are_in_use() {
    let mut cluster = Cluster::start("in-use", Setup::default());
    let other = cluster.dir("other");
    let port = cluster.meta_address();
    refuses(fjord(["meta", "--data", text(&other), "--listen", &port]), &[&port, "in use"]);
    let fresh = format!("127.0.0.1:{}", free_port());
    let meta_folder = cluster.meta_folder();
    refuses(fjord(["meta", "--data", text(&meta_folder), "--listen", &fresh]), &[text(&meta_folder), "use"]);
    let target = cluster.target_folder(0, 0);
    let meta = cluster.meta_address();
    refuses(
        fjord(["data", "--meta", &meta, "--listen", &fresh, "--target", text(&target)]),
        &[text(&target), "use"],
    );
    let taken = cluster.data_address(0);
    refuses(
        fjord(["data", "--meta", &meta, "--listen", &taken, "--target", text(&other)]),
        &[&taken, "in use"],
    );
    // A store that nobody answers for is not one that somebody owns.
    let backup = cluster.folder().join("backup");
    cluster.fjord(["meta", "backup", text(&backup)]).ok();
    let nowhere = format!("etcd://127.0.0.1:{}/x", free_port());
    let restored = fjord_run(["meta", "restore", text(&backup), "--store", &nowhere]);
    restored.fails_saying(&[&nowhere, "Connection refused"]);
    // A backup that comes to nothing leaves nothing.
    cluster.fjord(["meta", "backup", text(&other)]).fails_saying(&[text(&other)]);
    assert!(!other.with_extension("part").exists());
    cluster.assert_running();
    cluster.wait_healthy();
}

#[test]
fn folders_of_another_cluster_or_a_newer_version_are_refused_and_left_alone() {
    let mut ours =
        Cluster::start("ours", Setup { servers: 1, policy: "replica:1".into(), ..Setup::default() });
    let theirs =
        Cluster::start("theirs", Setup { servers: 1, policy: "replica:1".into(), ..Setup::default() });
    let mount = ours.mount();
    let content = rng::bytes(5, 3 << 20);
    fs::write(mount.join("precious"), &content).unwrap();
    mount.unmount();
    ours.stop_data(0);
    let target = ours.target_folder(0, 0);
    let listen = format!("127.0.0.1:{}", free_port());
    refuses(
        fjord(["data", "--meta", &theirs.meta_address(), "--listen", &listen, "--target", text(&target)]),
        &[text(&target), "cluster"],
    );
    // Neither side has been changed by the attempt.
    assert_eq!(theirs.status().targets_up(), 1);
    ours.start_all();
    let mount = ours.mount();
    assert!(fs::read(mount.join("precious")).unwrap() == content);
    mount.unmount();
    ours.stop();
    let kept = fault::files(&target);
    let labels: Vec<(PathBuf, Vec<u8>)> = fault::files(ours.folder())
        .into_iter()
        .filter(|f| fs::metadata(f).is_ok_and(|m| m.len() < 64 << 10))
        .map(|f| (f.clone(), fs::read(&f).unwrap()))
        .collect();
    fault::make_newer(&target);
    fault::make_newer(&ours.meta_folder());
    refuses(ours.meta_command(), &[text(&ours.meta_folder()), "999"]);
    // The data server is asked with a metaserver that works, so that it is the label it stumbles over.
    refuses(
        fjord(["data", "--meta", &theirs.meta_address(), "--listen", &listen, "--target", text(&target)]),
        &[text(&target), "999"],
    );
    assert_eq!(fault::files(&target), kept, "a refused folder must be left alone");
    labels.iter().for_each(|(path, raw)| fs::write(path, raw).unwrap());
    ours.start_all();
    let mount = ours.mount();
    assert!(fs::read(mount.join("precious")).unwrap() == content);
}

#[test]
fn writing_and_reading_without_any_data_server_ends_in_an_error_and_not_in_a_hang() {
    let mut cluster = Cluster::start("all-down", Setup { servers: 2, ..Setup::default() });
    let mount = cluster.mount_with("timeout=5s");
    let content = rng::bytes(1, 1 << 20);
    fs::write(mount.join("before"), &content).unwrap();
    fs::File::open(mount.join("before")).and_then(|file| file.sync_all()).unwrap();
    (0..2).for_each(|server| cluster.kill_data(server));
    let fresh = cluster.mount_with("timeout=5s");
    let read = fs::read(fresh.join("before")).expect_err("no copy can be reached");
    eprintln!("read: {read}");
    let write = fs::File::create(fresh.join("during")).and_then(|mut file| {
        use std::io::Write;
        file.write_all(&content)?;
        file.sync_all()
    });
    eprintln!("write: {}", write.expect_err("no target can be reached"));
    // Back again, everything is there.
    cluster.start_all();
    wait_for("reads to work again", 2 * SOON, || match fs::read(fresh.join("before")) {
        Ok(got) if got == content => Ok(()),
        Ok(_) => panic!("wrong bytes"),
        Err(e) => Err(e),
    });
    fs::write(fresh.join("afterwards"), &content).unwrap();
    drop(fresh);
    mount.unmount();
}

/// A data server started before its metaserver waits for it instead of giving up.
#[test]
fn a_data_server_waits_for_its_metaserver() {
    let scratch = Scratch::new("waits");
    let (meta, data) = (format!("127.0.0.1:{}", free_port()), format!("127.0.0.1:{}", free_port()));
    let target = scratch.dir("target");
    let command = fjord(["data", "--meta", &meta, "--listen", &data, "--target", text(&target)]);
    let mut server = Process::start("the data server", command, &scratch.path().join("data.log"));
    std::thread::sleep(Duration::from_secs(2));
    server.assert_running();
    wait_for("the log to name the metaserver", SOON, || {
        let log = server.log();
        if log.contains(&meta) { Ok(()) } else { Err(log) }
    });
    let command =
        fjord(["meta", "--listen", &meta, "--policy", "replica:1", "--data", text(&scratch.dir("meta"))]);
    let _meta_server = Process::start("the metaserver", command, &scratch.path().join("meta.log"));
    wait_for("the target to be up", 2 * SOON, || {
        let status = run(fjord(["status", "--json", "--meta", &meta]));
        let up = fjordfs_tests::status::Status::parse(&status.stdout).is_ok_and(|s| s.targets_up() == 1);
        if up { Ok(()) } else { Err(status) }
    });
}
