//! The verbs of `fjord` as people and scripts use them.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/mounting.rs"]
mod mounting;

use std::{fs, path::Path, thread, time::Duration};

use fjordfs_tests::{
    Cluster, Process, Setup, fault, fjord,
    process::sh,
    rng, run,
    tree::{self, Tree},
    wait::{SOON, wait_for},
};
use serde_json::Value;

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn import_and_export_round_trip() {
    let seed = rng::seed("round_trip");
    let cluster = Cluster::start("round-trip", Setup::default());
    let source = cluster.dir("source");
    Tree::mixed().generate(&source, seed);
    let tagged = ["tagged", "tagged folder"];
    fs::write(source.join(tagged[0]), b"x").unwrap();
    fs::create_dir(source.join(tagged[1])).unwrap();
    let tag = |path: &Path, value: &[u8]| {
        rustix::fs::setxattr(path, "user.tag", value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    let tag_of = |path: &Path| {
        let mut value = [0; 100];
        rustix::fs::getxattr(path, "user.tag", &mut value[..]).map(|length| value[..length].to_vec()).ok()
    };
    tagged.iter().for_each(|name| tag(&source.join(name), name.as_bytes()));
    let remote = format!("{}:/in/by/address", cluster.meta_address());
    cluster.fjord(["import", text(&source), &remote]).ok();
    let mount = cluster.mount();
    tree::assert_same(&source, &mount.join("in/by/address"), tree::ALL);
    // The same through a mount, and back both ways.
    cluster.fjord(["import", text(&source), text(&mount.join("mounted"))]).ok();
    tree::assert_same(&source, &mount.join("mounted"), tree::ALL);
    let back = cluster.dir("back");
    cluster.fjord(["export", &remote, text(&back.join("a"))]).ok();
    tree::assert_same(&source, &back.join("a"), tree::ALL);
    cluster.fjord(["export", text(&mount.join("mounted")), text(&back.join("b"))]).ok();
    tree::assert_same(&source, &back.join("b"), tree::ALL);
    for name in tagged {
        assert_eq!(tag_of(&mount.join("in/by/address").join(name)).as_deref(), Some(name.as_bytes()));
        assert_eq!(tag_of(&back.join("a").join(name)).as_deref(), Some(name.as_bytes()));
    }
    // Also of files that are not copied again.
    tag(&source.join(tagged[0]), b"another");
    rustix::fs::removexattr(source.join(tagged[1]), "user.tag").unwrap();
    // What is there already is not copied again; what differs is.
    fs::write(source.join("new"), b"new").unwrap();
    cluster.fjord(["import", text(&source), text(&mount.join("mounted"))]).ok();
    tree::assert_same(&source, &mount.join("mounted"), tree::ALL);
    assert_eq!(tag_of(&mount.join("mounted").join(tagged[0])).as_deref(), Some(&b"another"[..]));
    assert_eq!(tag_of(&mount.join("mounted").join(tagged[1])), None);
    mount.unmount();
}

#[test]
fn an_import_that_was_killed_goes_on_where_it_was() {
    let seed = rng::seed("resume");
    let cluster = Cluster::start("resume", Setup::default());
    let source = cluster.dir("source");
    Tree { small: 1500, large: 8, ..Tree::mixed() }.generate(&source, seed);
    let target = format!("{}:/in", cluster.meta_address());
    for _ in 0..2 {
        let before = cluster.status().number("inodes");
        let command = cluster.command(["import", text(&source), &target]);
        let mut import = Process::start("fjord import", command, &cluster.folder().join("import.log"));
        wait_for("the import to be under way", SOON, || {
            let s = cluster.try_status()?;
            if s.number("inodes") > before + 100 || !import.running() { Ok(()) } else { Err(s.to_string()) }
        });
        thread::sleep(Duration::from_millis(200));
        import.kill9();
    }
    cluster.fjord(["import", text(&source), &target]).ok();
    let mount = cluster.mount();
    tree::assert_same(&source, &mount.join("in"), tree::ALL);
    mount.unmount();
}

#[test]
fn verification_finds_a_file_that_differs() {
    let cluster = Cluster::start("verify", Setup::policy("replica:1"));
    let source = cluster.dir("source");
    for i in 0..20 {
        fs::write(source.join(format!("f{i}")), rng::bytes(i, 50_000)).unwrap();
    }
    let target = format!("{}:/in", cluster.meta_address());
    cluster.fjord(["import", "--verify", text(&source), &target]).ok();
    // Same length, same time, other bytes: only reading tells.
    let mount = cluster.mount();
    sh(
        mount.path(),
        "cp -a in/f7 keep; printf X | dd of=in/f7 bs=1 seek=4000 conv=notrunc status=none; touch -r keep in/f7; rm keep",
    );
    mount.unmount();
    let verified = cluster.fjord(["import", "--verify", text(&source), &target]);
    let mount = cluster.mount();
    let repaired = fs::read(mount.join("in/f7")).unwrap() == rng::bytes(7, 50_000);
    assert!(repaired || verified.stderr.contains("f7"), "neither repaired nor reported: {verified}");
}

#[test]
fn transfers_say_what_is_wrong() {
    let cluster = Cluster::start("bad-transfer", Setup::policy("replica:1"));
    let here = cluster.dir("here");
    let nobody = cluster.folder().join("nobody/here");
    let target = format!("{}:/in", cluster.meta_address());
    cluster.fjord(["import", text(&nobody), &target]).fails_saying(&["nobody/here"]);
    cluster
        .fjord(["export", &format!("{}:/missing", cluster.meta_address()), text(&here)])
        .fails_saying(&["/missing"]);
    run(fjord(["import", text(&here), text(&cluster.dir("not-in-a-mount"))]))
        .fails_saying(&["not-in-a-mount"]);
    run(fjord(["import", text(&here), "127.0.0.1:9:/in"])).fails_saying(&["127.0.0.1:9"]);
}

fn json(run: &fjordfs_tests::Run) -> Value {
    serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {run}"))
}

#[test]
fn status_and_df_tell_people_and_programs_the_same() {
    let mut cluster = Cluster::start("status", Setup::default());
    let mount = cluster.mount();
    fs::write(mount.join("file"), rng::bytes(1, 20 << 20)).unwrap();
    let s = cluster.wait_status("the file's shards", |s| s.shards() >= 4);
    assert_eq!(s.0["healthy"], true);
    assert_eq!(s.0["default_policy"], "replica:2");
    assert_eq!(s.sessions(), 1);
    assert!(s.number("free") <= s.number("capacity"));
    let people = cluster.fjord(["status"]).ok().stdout;
    for word in
        ["healthy", "data0", "data1", "data2", &cluster.data_address(1), s.0["cluster_id"].as_str().unwrap()]
    {
        assert!(people.contains(word), "'{word}' is missing in\n{people}");
    }
    assert!(people.contains(" over io_uring (") || people.contains(" over /dev/fuse, because"), "{people}");
    // Without --meta or FJORD_META: through the mount.
    let through = run(fjord(["status", "--json", text(&mount.join("file"))])).ok();
    assert_eq!(json(&through)["cluster_id"], s.0["cluster_id"]);
    let df = json(&cluster.fjord(["df", "--json"]).ok());
    let policies = df["policies"].as_array().unwrap();
    let row = policies.iter().find(|p| p["policy"] == "replica:2").unwrap();
    assert_eq!(row["default"], true);
    assert!(row["free"].as_u64() <= row["usable"].as_u64());
    assert!(cluster.fjord(["df"]).ok().stdout.contains("replica:2"));
    // The system's own df sees a filesystem of about that size.
    let system = rustix::fs::statvfs(mount.path()).unwrap();
    let size = system.f_blocks * system.f_frsize;
    let usable = row["usable"].as_u64().unwrap();
    assert!(size > usable / 2 && size < usable * 2, "df says {size}, fjord df {usable}");
    cluster.kill_data(1);
    cluster.wait_status("the dead server to be noticed", |s| s.servers_up() == 2);
    let degraded = cluster.fjord(["status"]);
    assert_eq!(degraded.code(), 1, "a degraded cluster is exit status 1: {degraded}");
    assert!(degraded.stdout.contains("DEGRADED"), "{degraded}");
    mount.unmount();
}

#[test]
fn stat_shows_where_a_file_is() {
    let cluster = Cluster::start("stat", Setup::default());
    let mount = cluster.mount();
    fs::write(mount.join("large"), rng::bytes(1, 40 << 20)).unwrap();
    fs::write(mount.join("tiny"), b"inline").unwrap();
    let shown = json(&run(fjord(["stat", "--json", text(&mount.join("large"))])).ok());
    assert_eq!(shown["size"], 40 << 20, "{shown}");
    let raw = shown.to_string();
    assert!(raw.contains("replica:2"), "{raw}");
    for path in ["large", "tiny"] {
        let people = run(fjord(["stat", text(&mount.join(path))])).ok().stdout;
        assert!(people.contains(path), "{people}");
    }
    let remote = format!("{}:/large", cluster.meta_address());
    assert_eq!(json(&run(fjord(["stat", "--json", &remote])).ok())["size"], 40 << 20);
    run(fjord(["stat", text(&mount.join("missing"))])).fails_saying(&["missing"]);
    mount.unmount();
}

#[test]
fn the_layout_of_a_directory_decides_about_new_files() {
    let cluster = Cluster::start("layout", Setup::policy("replica:1"));
    let mount = cluster.mount();
    let dir = mount.join("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("before"), rng::bytes(1, 1 << 20)).unwrap();
    let get = |path: &Path| run(fjord(["layout", "get", text(path)])).ok().stdout;
    assert!(get(&dir).contains("replica:1"));
    run(fjord(["layout", "set", text(&dir), "replica:3"])).ok();
    assert!(get(&dir).contains("replica:3"));
    assert!(get(mount.path()).contains("replica:1"));
    fs::write(dir.join("after"), rng::bytes(2, 1 << 20)).unwrap();
    fs::create_dir(dir.join("below")).unwrap();
    assert!(get(&dir.join("below")).contains("replica:3"), "directories inherit");
    assert!(get(&dir.join("after")).contains("replica:3"));
    cluster.wait_status("one and three copies", |s| s.shards() == 4);
    run(fjord(["layout", "set", text(&dir), "mirror:2"])).fails_saying(&["mirror:2", "replica:N"]);
    run(fjord(["layout", "set", text(&dir.join("after")), "replica:2"])).fails_saying(&["after", "director"]);
    run(fjord(["layout", "set", text(&mount.join("missing")), "replica:2"])).fails_saying(&["missing"]);
    mount.unmount();
}

#[test]
fn daemons_are_told_apart_by_their_names() {
    let cluster = Cluster::start("names", Setup { servers: 1, ..Setup::policy("replica:1") });
    let mount = cluster.mount();
    for (word, name) in [
        (text(&cluster.meta_folder()), "fjord-meta"),
        (text(&cluster.target_folder(0, 0)), "fjord-data"),
        (text(mount.path()), "fjord-mount"),
    ] {
        let found: Vec<String> = fjordfs_tests::process::fjords_with(word)
            .iter()
            .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim().to_owned())
            .collect();
        assert_eq!(found, [name], "with {word} in the arguments");
    }
    mount.unmount();
}

#[test]
fn completions_and_help() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(fjord(["completions", shell])).ok().stdout;
        assert!(script.contains("import") && script.contains("umount"), "{shell}: {script}");
    }
    let script = run(fjord(["completions", "bash"])).ok().stdout;
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), script).unwrap();
    sh(Path::new("/"), &format!("bash -n {}", file.path().display()));
    let help = run(fjord(["--help"])).ok().stdout;
    for verb in [
        "up", "meta", "data", "mount", "umount", "status", "df", "import", "export", "stat", "bench",
        "layout",
    ] {
        assert!(help.contains(verb), "{verb} is missing in\n{help}");
        run(fjord([verb, "--help"])).ok();
    }
    assert!(run(fjord(["--version"])).ok().stdout.starts_with("fjord "));
}

/// A daemon's configuration file does the same as its flags.
#[test]
fn daemons_read_their_configuration() {
    let cluster = Cluster::start("config-file", Setup { servers: 2, ..Setup::default() });
    let target = cluster.dir("configured");
    let config = cluster.folder().join("data.toml");
    let listen = format!("127.0.0.1:{}", fjordfs_tests::engines::free_port());
    let content = format!(
        "meta = \"{}\"\nlisten = \"{listen}\"\nname = \"configured\"\ntargets = [\"{}@rack9\"]\nvolume_size = \"64MiB\"\ncores = 1\n",
        cluster.meta_address(),
        target.display()
    );
    fs::write(&config, content).unwrap();
    let command = fjord(["data", "--config", text(&config)]);
    let _server = Process::start("the configured server", command, &cluster.folder().join("configured.log"));
    let s = cluster.wait_status("the configured server", |s| s.servers_up() == 3);
    let server = s.list("servers").iter().find(|s| s["name"] == "configured").unwrap();
    assert_eq!(server["address"], listen);
    let of_server = s.list("targets").iter().find(|t| t["server"] == server["id"]).unwrap();
    assert_eq!(of_server["domain"], "rack=rack9,host=configured");
    // It takes part at once.
    let mount = cluster.mount();
    fs::write(mount.join("f"), rng::bytes(1, 100 << 20)).unwrap();
    mount.unmount();
    assert!(!fault::volumes(&target).is_empty(), "the new target got no data");
}
