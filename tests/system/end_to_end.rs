//! The main job on real input: one command mounts it, real data goes in and comes back.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::{Pid, Signal, kill_process};

use fjordfs_tests::{
    Cluster, MountPoint, Process, Scratch, Setup,
    engines::free_port,
    fjord,
    mountpoint::{detach, is_mounted, wait_unmounted},
    process::{fjords_with, have, run_within, sh},
    run, tree,
    wait::{SOON, wait_for, wait_until},
};

/// How much of the toolchain and the registry is copied: `FJORD_REAL_FILES` files of `FJORD_REAL_MIB` MiB altogether at
/// most. The default suits a debug build; 100000 and 10000 copy all there is.
fn limits() -> (usize, u64) {
    let number = |name: &str, default: u64| {
        let set = std::env::var(name).ok();
        set.map_or(default, |text| {
            text.parse().unwrap_or_else(|_| panic!("{name} must be a number, not '{text}'"))
        })
    };
    (number("FJORD_REAL_FILES", 1500) as usize, number("FJORD_REAL_MIB", 200) << 20)
}

/// Real folders of source code and libraries, as many as fit into the [`limits`].
fn real_folders() -> Vec<PathBuf> {
    let sysroot = run({
        let mut rustc = Command::new("rustc");
        rustc.args(["--print", "sysroot"]);
        rustc
    })
    .ok();
    let sysroot = PathBuf::from(sysroot.stdout.trim());
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo =
        cargo.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"))).unwrap_or_default();
    let mut candidates =
        vec![sysroot.join("lib"), sysroot.join("etc"), sysroot.join("libexec"), sysroot.join("share")];
    for registry in fs::read_dir(cargo.join("registry/src")).into_iter().flatten().flatten() {
        let mut crates: Vec<PathBuf> =
            fs::read_dir(registry.path()).into_iter().flatten().flatten().map(|e| e.path()).collect();
        crates.sort();
        candidates.extend(crates);
    }
    let (files_max, bytes_max) = limits();
    let (mut files, mut bytes) = (0, 0);
    candidates.retain(|dir| {
        let (more_files, more_bytes) = extent(dir);
        let fits = more_files > 0 && files + more_files <= files_max && bytes + more_bytes <= bytes_max;
        if fits {
            files += more_files;
            bytes += more_bytes;
        }
        fits
    });
    eprintln!("copying {files} files, {} MiB from {} folders", bytes >> 20, candidates.len());
    assert!(files > 200, "too little real data on this machine");
    candidates
}

fn extent(dir: &Path) -> (usize, u64) {
    let all = fjordfs_tests::fault::files(dir);
    (all.len(), all.iter().filter_map(|f| fs::metadata(f).ok()).map(|m| m.len()).sum())
}

/// `fjord up`, in the foreground of a process of its own.
struct Up {
    process: Process,
    dir: PathBuf,
    meta: String,
}

impl Up {
    fn start(scratch: &Scratch, meta: &str) -> Up {
        Up::start_with(scratch, meta, &[])
    }

    fn start_with(scratch: &Scratch, meta: &str, more: &[&str]) -> Up {
        let dir = scratch.dir("up");
        let mut command = fjord(["up"]);
        command.arg(&dir).args(["--servers", "3", "--policy", "replica:2", "--meta-listen", meta, "--data"]);
        command.arg(scratch.path().join("data")).args(more);
        let process = Process::start("fjord up", command, &scratch.path().join("up.log"));
        let mut up = Up { process, dir, meta: meta.into() };
        wait_until("fjord up to mount", 2 * SOON, || {
            up.process.assert_running();
            is_mounted(&up.dir)
        });
        // It must say what to do next.
        wait_for("fjord up to say what to do next", SOON, || {
            let log = up.process.log();
            if log.contains("fjord ") && log.contains(&*up.dir.to_string_lossy()) { Ok(()) } else { Err(log) }
        });
        up
    }

    fn stop(mut self) {
        self.process.stop();
        wait_unmounted(&self.dir);
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.process.kill9();
        detach(&self.dir);
    }
}

#[test]
fn up_takes_real_data_in_and_gives_it_back_also_after_a_restart() {
    let scratch = Scratch::new("up");
    let folders = real_folders();
    let meta = format!("127.0.0.1:{}", free_port());
    let up = Up::start(&scratch, &meta);
    fs::create_dir(up.dir.join("real")).unwrap();
    for folder in &folders {
        let mut copy = Command::new("cp");
        copy.args(["-a", "--"]).arg(folder).arg(up.dir.join("real"));
        run_within(copy, 10 * SOON).ok();
    }
    let second = MountPoint::start(&up.meta, &scratch.dir("second"), "", scratch.path());
    for folder in &folders {
        let copy = second.join("real").join(folder.file_name().unwrap());
        let mut diff = Command::new("diff");
        diff.args(["-r", "--no-dereference", "--"]).arg(folder).arg(&copy);
        run_within(diff, 10 * SOON).ok();
        // diff sees names and bytes only.
        tree::assert_same(folder, &copy, tree::ALL);
    }
    second.unmount();
    up.stop();
    let up = Up::start(&scratch, &meta);
    for folder in &folders {
        tree::assert_same(folder, &up.dir.join("real").join(folder.file_name().unwrap()), tree::ALL);
    }
    up.stop();
}

#[test]
fn up_stops_cleanly_and_refuses_to_run_twice() {
    let scratch = Scratch::new("up-twice");
    let meta = format!("127.0.0.1:{}", free_port());
    let up = Up::start(&scratch, &meta);
    fs::write(up.dir.join("f"), b"kept").unwrap();
    let second = |dir: &Path, meta: &str| {
        let mut command = fjord(["up"]);
        command.arg(dir).args(["--meta-listen", meta, "--data"]).arg(scratch.path().join("data"));
        run_within(command, SOON)
    };
    second(&up.dir, &meta).fails_saying(&[&up.dir.to_string_lossy()]);
    let other = format!("127.0.0.1:{}", free_port());
    second(&scratch.dir("elsewhere"), &other)
        .fails_saying(&["in use by another", &scratch.path().join("data").to_string_lossy()]);
    let file = scratch.path().join("file");
    fs::write(&file, b"x").unwrap();
    second(&file, &other).fails_saying(&[&file.to_string_lossy()]);
    assert_eq!(fs::read(up.dir.join("f")).unwrap(), b"kept");
    up.stop();
    let left = fjords_with(&meta);
    assert!(left.is_empty(), "processes {left:?} are left behind after `fjord up` ended");
    let up = Up::start(&scratch, &meta);
    assert_eq!(fs::read(up.dir.join("f")).unwrap(), b"kept");
    up.stop();
}

/// Whoever runs it from a script must not take that for success.
#[test]
fn up_fails_when_what_was_written_last_could_not_be_stored() {
    let scratch = Scratch::new("up-lost");
    let meta = format!("127.0.0.1:{}", free_port());
    let mut up = Up::start_with(&scratch, &meta, &["-o", "timeout=10s"]);
    let is_data = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"data")
    };
    let servers: Vec<u32> =
        fjords_with(&scratch.path().to_string_lossy()).into_iter().filter(is_data).collect();
    assert_eq!(servers.len(), 3);
    let signal = |signal| {
        for pid in servers.iter().filter_map(|pid| Pid::from_raw(*pid as i32)) {
            kill_process(pid, signal).unwrap();
        }
    };
    signal(Signal::STOP);
    fs::write(up.dir.join("f"), vec![7; 3 << 20]).unwrap();
    up.process.signal(Signal::TERM);
    wait_until("the mount to give up", 2 * SOON, || {
        let mounts = fjords_with(&up.dir.to_string_lossy());
        !is_mounted(&up.dir) && mounts.iter().all(|pid| *pid == up.process.pid())
    });
    signal(Signal::CONT);
    assert_eq!(up.process.wait().code(), Some(1));
    let log = up.process.log();
    assert!(log.contains("not everything ended well"), "{log}");
}

#[test]
fn git_and_cargo_work_inside_the_mount() {
    let cluster = Cluster::start("tools", Setup::default());
    let mount = cluster.mount();
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    if repository.join(".git").exists() {
        let clone = format!("git clone -q --no-hardlinks file://{} clone", repository.display());
        sh(mount.path(), &clone);
        sh(&mount.join("clone"), "git fsck --full --strict && git status --porcelain | (! grep .)");
        sh(&mount.join("clone"), "git gc -q && git fsck --full");
    }
    sh(
        mount.path(),
        "cargo new -q --vcs none --name tiny tiny && cd tiny && CARGO_TARGET_DIR=$PWD/target cargo build -q --offline \
         && ./target/debug/tiny | grep -q 'Hello, world' && touch src/main.rs \
         && CARGO_TARGET_DIR=$PWD/target cargo run -q --offline | grep -q 'Hello, world'",
    );
    mount.unmount();
}

#[test]
fn fio_verifies_what_it_wrote() {
    if !have("fio") {
        return;
    }
    let cluster = Cluster::start("fio", Setup::default());
    let mount = cluster.mount();
    for job in [
        "--rw=write --bs=1M --size=96M --end_fsync=1",
        "--rw=write --bs=17k --size=24M --numjobs=2",
        "--rw=randwrite --bs=4k --size=16M",
        "--rw=randwrite --bs=4k --size=8M --direct=1",
        "--rw=randrw --bsrange=1k-64k --bs_unaligned=1 --size=16M --fsync=64",
        "--rw=randwrite --bs=4k --size=8M --ioengine=mmap",
        "--rw=write --bs=64k --size=16M --fallocate=none --verify_backlog=32",
    ] {
        let line = format!(
            "fio --name=v --directory={} --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 {job} --output-format=terse",
            mount.path().display()
        );
        eprintln!("{job}");
        sh(cluster.folder(), &line);
        sh(mount.path(), "rm -f v.*");
    }
    mount.unmount();
}

#[test]
fn a_database_and_archives() {
    let cluster = Cluster::start("database", Setup::default());
    let mount = cluster.mount();
    fs::write(
        cluster.folder().join("db.py"),
        r#"
import sqlite3, sys
for journal in ("delete", "truncate", "persist"):
    db = sqlite3.connect(sys.argv[1])
    db.execute(f"pragma journal_mode={journal}")
    db.execute("create table if not exists t(id integer primary key, v blob)")
    for i in range(20):
        with db:
            db.executemany("insert into t(v) values (?)", [(bytes([i]) * 500,) for _ in range(20)])
    try:
        with db:
            db.execute("update t set v = x'00'")
            raise RuntimeError
    except RuntimeError:
        pass
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert db.execute("select count(*) from t where length(v) = 500").fetchone() == db.execute("select count(*) from t").fetchone()
    db.close()
print(sqlite3.connect(sys.argv[1]).execute("select count(*) from t").fetchone()[0])
"#,
    )
    .unwrap();
    let said = sh(cluster.folder(), &format!("python3 db.py {}", mount.join("test.db").display()));
    assert_eq!(said.stdout.trim(), "1200");
    let seed = fjordfs_tests::rng::seed("archives");
    let source = cluster.dir("source");
    tree::Tree { large: 1, ..tree::Tree::mixed() }.generate(&source, seed);
    let target = mount.path().display();
    if have("tar") {
        sh(
            cluster.folder(),
            &format!(
                "mkdir {target}/tar && tar -C source --format=posix -cf - . | tar -C {target}/tar -xpf -"
            ),
        );
        tree::assert_same(&source, &mount.join("tar"), tree::ALL);
        sh(cluster.folder(), &format!("tar -C {target}/tar --format=posix -cf - . | tar -C source -df -"));
    }
    if have("rsync") {
        sh(cluster.folder(), &format!("rsync -aHS source/ {target}/rsync/"));
        tree::assert_same(&source, &mount.join("rsync"), tree::ALL);
        let again = sh(cluster.folder(), &format!("rsync -aHSi --checksum source/ {target}/rsync/"));
        assert_eq!(again.stdout, "", "rsync found differences in what it had just copied");
    }
    mount.unmount();
}
