//! The verbs of `fjord` as people and scripts use them.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use fjordfs_tests::{
    Cluster, Process, Setup, fault, fjord, fjord_bin,
    mountpoint::{detach, is_mounted, wait_unmounted},
    process::{have, sh},
    rng, run,
    tree::{self, Tree},
    wait::{SOON, wait_for, wait_until},
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

/// `/sbin/mount.fuse.fjord`, for as long as this lives.
struct MountHelper(PathBuf);

impl MountHelper {
    fn install() -> MountHelper {
        let path = PathBuf::from("/sbin/mount.fuse.fjord");
        // What a person has installed is not replaced by the binary under test.
        assert!(!path.exists(), "{} exists already: remove it to run this test", path.display());
        let _ = fs::remove_file(&path);
        symlink(fjord_bin(), &path).unwrap();
        MountHelper(path)
    }
}

impl Drop for MountHelper {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A folder that is unmounted whatever happens.
struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// Of a mount that is read-only, nosuid and nodev: it becomes writable and read-only again, and nothing else changes.
fn remounts(cluster: &Cluster, dir: &Path) {
    let options = || sh(cluster.folder(), &format!("findmnt -no VFS-OPTIONS {}", dir.display())).stdout;
    sh(cluster.folder(), &format!("mount -o remount,rw {}", dir.display()));
    let mut file = fs::File::create(dir.join("r")).unwrap();
    file.write_all(b"written").unwrap();
    let ro = format!("mount -o remount,ro {}", dir.display());
    let busy = run(shell(&ro));
    busy.fails_saying(&["in use"]);
    drop(file);
    wait_until("the file to be closed", SOON, || run(shell(&ro)).status.success());
    assert_eq!(fs::write(dir.join("r"), b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(fs::read(dir.join("r")).unwrap(), b"written");
    let options = options();
    for word in ["ro", "nosuid", "nodev", "noatime"] {
        assert!(options.trim().split(',').any(|option| option == word), "'{word}' is missing in {options}");
    }
    let elsewhere = cluster.dir("no-mount");
    run(fjord(["mount", "nowhere:1", text(&elsewhere), "-o", "remount,ro"]))
        .fails_saying(&["no FjordFS is mounted on", text(&elsewhere)]);
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    command
}

#[test]
fn a_folder_is_mounted_without_what_is_around_it() {
    let cluster = Cluster::start("folder", Setup::default());
    let whole = cluster.mount();
    fs::create_dir_all(whole.join("teams/vision/deep")).unwrap();
    fs::write(whole.join("teams/secret"), b"secret").unwrap();
    fs::write(whole.join("teams/vision/f"), b"shared").unwrap();
    symlink("/teams/vision", whole.join("link")).unwrap();
    for (source, options) in [("/teams/vision", "nosuid,noatime"), ("/link", "rw")] {
        let dir = Unmounted(cluster.dir("one"));
        let source = format!("{}:{source}", cluster.meta_address());
        run(fjord(["mount", &source, text(&dir.0), "-o", options])).ok();
        assert_eq!(fs::read(dir.0.join("f")).unwrap(), b"shared");
        let up = dir.0.join("deep/../..").canonicalize().unwrap();
        assert_eq!(up, dir.0.parent().unwrap().canonicalize().unwrap(), "above it is what it is mounted in");
        symlink("../secret", dir.0.join("out")).unwrap();
        assert_eq!(fs::read(dir.0.join("out")).unwrap_err().kind(), ErrorKind::NotFound);
        fs::remove_file(dir.0.join("out")).unwrap();
        // Both see what the other does, and the verbs know where it is.
        fs::write(dir.0.join("deep/g"), source.as_bytes()).unwrap();
        assert_eq!(fs::read(whole.join("teams/vision/deep/g")).unwrap(), source.as_bytes());
        let stat = run(fjord(["stat", text(&dir.0.join("f"))])).ok().stdout;
        assert!(stat.starts_with("/teams/vision/f:"), "{stat}");
        let line = format!("findmnt -no FSTYPE,SOURCE,OPTIONS {}", dir.0.display());
        let found = sh(cluster.folder(), &line).stdout;
        assert!(found.starts_with("fuse.fjord") && found.contains("[/teams/vision]"), "{found}");
        assert_eq!(found.contains("nosuid"), options.contains("nosuid"), "{found}");
        run(fjord(["mount", "nowhere:1", text(&dir.0), "-o", "remount,ro"])).ok();
        assert_eq!(fs::write(dir.0.join("f"), b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
        run(fjord(["mount", "nowhere:1", text(&dir.0), "-o", "remount,rw"])).ok();
        run(fjord(["umount", text(&dir.0)])).ok();
        assert!(!is_mounted(&dir.0));
    }
    let dir = Unmounted(cluster.dir("none"));
    for (folder, word) in [("/teams/missing", "No such file"), ("/teams/secret", "Not a directory")] {
        let source = format!("{}:{folder}", cluster.meta_address());
        run(fjord(["mount", &source, text(&dir.0)])).fails_saying(&[folder, word]);
        assert!(!is_mounted(&dir.0));
    }
    whole.unmount();
}

#[test]
fn mount8_and_fstab() {
    let cluster = Cluster::start("mount8", Setup::default());
    let dir = Unmounted(cluster.dir("by-mount8"));
    let meta = cluster.meta_address();
    let _helper = MountHelper::install();
    let line = format!("mount -t fuse.fjord -o nosuid,nodev,noatime,ro {meta} {}", dir.0.display());
    sh(cluster.folder(), &line);
    assert!(is_mounted(&dir.0));
    let options =
        sh(cluster.folder(), &format!("findmnt -no FSTYPE,SOURCE,OPTIONS {}", dir.0.display())).stdout;
    for word in ["fuse.fjord", meta.as_str(), "nosuid", "nodev", "noatime", "ro"] {
        assert!(options.contains(word), "'{word}' is missing in {options}");
    }
    let error = fs::write(dir.0.join("f"), b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    remounts(&cluster, &dir.0);
    sh(cluster.folder(), &format!("umount {}", dir.0.display()));
    wait_unmounted(&dir.0);
    // An fstab of our own: mount(8) reads source, type and options from it.
    let fstab = cluster.folder().join("fstab");
    fs::write(
        &fstab,
        format!("{meta} {} fuse.fjord rw,noauto,x-systemd.automount,_netdev 0 0\n", dir.0.display()),
    )
    .unwrap();
    sh(cluster.folder(), &format!("mount -T {} {}", fstab.display(), dir.0.display()));
    fs::write(dir.0.join("f"), b"x").unwrap();
    run(fjord(["umount", text(&dir.0)])).ok();
    assert!(!is_mounted(&dir.0));
    // Unmounted by umount(8), everything written must have arrived, too.
    sh(cluster.folder(), &format!("mount -T {} {}", fstab.display(), dir.0.display()));
    assert_eq!(fs::read(dir.0.join("f")).unwrap(), b"x");
    fs::write(dir.0.join("g"), rng::bytes(3, 3 << 20)).unwrap();
    sh(cluster.folder(), &format!("umount {}", dir.0.display()));
    let mount = cluster.mount();
    assert!(fs::read(mount.join("g")).unwrap() == rng::bytes(3, 3 << 20));
    mount.unmount();
}

#[test]
fn a_mount_in_the_background_and_its_end() {
    let cluster = Cluster::start("background", Setup::default());
    let dir = Unmounted(cluster.dir("background"));
    let log = cluster.folder().join("background-mount.log");
    let option = format!("log={}", log.display());
    cluster.fjord(["mount", &cluster.meta_address(), text(&dir.0), "-o", &option]).ok();
    assert!(is_mounted(&dir.0));
    let open = fs::File::create(dir.0.join("f")).unwrap();
    // In use: refused with a reason, not hung, and nothing is torn down.
    cluster.fjord(["umount", text(&dir.0)]).fails_saying(&[text(&dir.0), "in use"]);
    fs::write(dir.0.join("g"), b"still works").unwrap();
    drop(open);
    cluster.fjord(["umount", text(&dir.0)]).ok();
    assert!(!is_mounted(&dir.0));
    let left = fjordfs_tests::process::fjords_with(text(&dir.0));
    assert!(left.is_empty(), "processes {left:?} are left of the mount");
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    if !have("fusermount3") || !have("setpriv") {
        return;
    }
    let cluster = Cluster::start("user", Setup::default());
    let home = cluster.dir("home");
    fs::set_permissions(cluster.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let bin = cluster.folder().join("fjord");
    // The binary may lie below a folder that only root can enter.
    fs::copy(fjord_bin(), &bin).unwrap();
    std::os::unix::fs::chown(&home, Some(65_534), Some(65_534)).unwrap();
    let mountpoint = home.join("mnt");
    let dir = Unmounted(mountpoint.clone());
    let root_mount = cluster.mount();
    fs::create_dir(root_mount.join("users")).unwrap();
    fs::set_permissions(root_mount.join("users"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::create_dir(root_mount.join("private")).unwrap();
    fs::set_permissions(root_mount.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    let device = fs::metadata("/dev/fuse").unwrap().permissions();
    if device.mode() & 0o006 != 0o006 {
        eprintln!("/dev/fuse is closed to users on this machine: opened for the length of this test");
    }
    let _open = OpenDevice::new(device);
    let as_user = |line: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
            "bash",
            "-euc",
            line,
        ]);
        command.env("HOME", &home).current_dir("/");
        run(command)
    };
    let (bin, mnt) = (bin.display(), mountpoint.display());
    as_user(&format!(
        "mkdir {mnt}; {bin} mount {} {mnt} -o log={}",
        cluster.meta_address(),
        home.join("log").display()
    ))
    .ok();
    let said = as_user(&format!(
        "cd {mnt}/users; echo mine >f; stat -c %u:%g f; cat f; ls {mnt}/private || echo refused"
    ))
    .ok();
    assert_eq!(said.stdout.lines().collect::<Vec<_>>(), ["65534:65534", "mine", "refused"], "{said}");
    as_user(&format!("{bin} umount {mnt}")).ok();
    assert!(!is_mounted(&dir.0));
    assert_eq!(fs::read(root_mount.join("users/f")).unwrap(), b"mine\n");
    root_mount.unmount();
}

/// `/dev/fuse` for everyone, as distributions set it, and as it was again afterwards.
struct OpenDevice(fs::Permissions);

impl OpenDevice {
    fn new(before: fs::Permissions) -> OpenDevice {
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        OpenDevice(before)
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
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
