//! Dumps of the metadata: what other programs see in them, what is refused, and that everything comes back.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use fjordfs_tests::{
    Cluster, Run, Setup, fjord,
    process::{Process, sh},
    tree::{ALL, Tree, assert_same},
    wait::{SOON, wait_for},
};
use rustix::process::Signal;
use serde_json::Value;

/// Of everything something.
const KEPT: Tree = Tree {
    directories: 5,
    small: 40,
    small_max: 40_000,
    large: 1,
    large_size: 5 << 20,
    sparse: 1,
    symlinks: 5,
    hard_links: 5,
};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Lines of the tables that a metaserver does not change by itself.
fn of_files(dump: &str) -> BTreeSet<&str> {
    let is_of_files = |line: &&str| {
        ["inode", "dirent", "extent", "xattr", "live_block"]
            .iter()
            .any(|table| line.starts_with(&format!(r#"{{"table":"{table}","#)))
    };
    dump.lines().filter(is_of_files).collect()
}

#[test]
fn a_dump_is_read_by_others_and_loaded_again() {
    let mut cluster = Cluster::start("dump", Setup::policy("replica:2"));
    let kept = cluster.dir("kept");
    KEPT.generate(&kept, 1);
    let mount = cluster.mount();
    KEPT.generate(&mount.join("kept"), 1);
    fs::write(mount.join("hello"), "world").unwrap();
    rustix::fs::setxattr(mount.join("hello"), "user.note", b"\0\xff", rustix::fs::XattrFlags::empty())
        .unwrap();
    mount.unmount();
    let at = |name: &str| cluster.folder().join(name);
    let [file, backup] = ["dump", "backup"].map(at);
    let told = cluster.fjord(["meta", "dump", text(&file)]).ok().stdout;
    assert!(told.contains("records in"), "{told}");
    // As other programs see it.
    let dump = fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = dump.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let has = |fits: &dyn Fn(&Value) -> bool| lines.iter().any(fits);
    assert!(lines[0]["format"] == "fjord-meta-dump" && lines[0]["counters"]["inodes"].is_string());
    assert!(has(&|line| line["table"] == "dirent" && line["key"]["name"] == "aGVsbG8="), "hello");
    assert!(has(&|line| line["table"] == "xattr" && line["record"]["value"] == "AP8="));
    assert!(has(&|line| line["record"]["kind"] == "FILE_KIND_SYMLINK"));
    assert!(!has(&|line| line["table"] == "other"), "all of it is described");
    let end = &lines.last().unwrap()["end"];
    assert_eq!(end["lines"], lines.len() - 1);
    let sum = sh(cluster.folder(), "head -n -1 dump | sha256sum").ok().stdout;
    assert_eq!(sum.split(' ').next(), end["sha256"].as_str());
    // The same from a backup, for which nobody need run, and on standard output.
    cluster.fjord(["meta", "backup", text(&backup)]).ok();
    let refused = cluster.fjord(["meta", "dump", text(&backup), "--from", text(&backup)]);
    refused.fails_saying(&["is the backup", "another file"]);
    cluster.stop();
    let again = fjordfs_tests::run(fjord(["meta", "dump", "-", "--from", text(&backup)])).ok().stdout;
    assert_eq!(of_files(&again), of_files(&dump));

    let folder = cluster.meta_folder();
    let load = |file: &Path, more: &[&str]| -> Run {
        let args = [&["meta", "load", text(file), "--data", text(&folder)], more].concat();
        fjordfs_tests::run(fjord(args))
    };
    for more in [&[][..], &["--force"]] {
        load(&file, more).fails_saying(&["holds metadata already"]);
    }
    fs::rename(&folder, cluster.dir("old").join("meta")).unwrap();
    // What is damaged, cut off or lacks a line is refused, and leaves nothing.
    let bad = cluster.folder().join("bad");
    let lines: Vec<&str> = dump.lines().collect();
    let number = 1 + lines.iter().position(|line| line.contains(r#""nlink":"#)).unwrap();
    let is_refused = |lines: &[&str], words: &[&str]| {
        fs::write(&bad, lines.join("\n") + "\n").unwrap();
        load(&bad, &[]).fails_saying(words).fails_saying(&[text(&bad), "anew"]);
        assert!(!folder.exists());
    };
    let changed = lines[number - 1].replacen(r#""nlink":"#, r#""nlink":1"#, 1);
    let mut damaged = lines.clone();
    damaged[number - 1] = &changed;
    is_refused(&damaged, &[&format!("line {number} is damaged")]);
    is_refused(&lines[..number], &[&format!("line {} is missing", number + 1), "not complete"]);
    is_refused(&[&lines[..number], &lines[number + 1..]].concat(), &[&format!("line {}", lines.len() - 1)]);
    load(&backup, &[]).fails_saying(&["is not a dump", "fjord meta restore"]);
    assert!(!folder.exists());
    let told = load(&file, &[]).ok().stdout;
    assert!(told.contains("as it was at"), "{told}");
    load(&file, &[]).fails_saying(&["holds metadata already"]);

    cluster.start_all();
    let again = cluster.fjord(["meta", "dump", "-"]).ok().stdout;
    assert_eq!(of_files(&again), of_files(&dump));
    let (a, b) = (cluster.mount(), cluster.mount());
    assert_same(&kept, &a.join("kept"), ALL);
    assert_eq!(fs::read_to_string(a.join("hello")).unwrap(), "world");
    let mut note = [0; 8];
    let length = rustix::fs::getxattr(a.join("hello"), "user.note", &mut note).unwrap();
    assert_eq!(&note[..length], b"\0\xff");
    KEPT.generate(&a.join("new"), 2);
    let there = cluster.dir("there");
    KEPT.generate(&there, 2);
    assert_same(&there, &b.join("new"), ALL);
    a.unmount();
    b.unmount();
    cluster.fjord(["fsck"]).ok();
    cluster.assert_running();
}

#[test]
fn a_dump_that_is_stopped_leaves_nothing() {
    let mut cluster = Cluster::start("dump-stop", Setup { servers: 1, ..Setup::policy("replica:1") });
    let file = cluster.dir("out").join("dump");
    let part = cluster.dir("out").join("dump.part");
    // It waits for a metaserver that does not answer.
    cluster.meta().signal(Signal::STOP);
    for signal in [Signal::INT, Signal::TERM] {
        let command: Command = cluster.command(["meta", "dump", text(&file)]);
        let log = cluster.folder().join("dump.log");
        let mut dump = Process::start("dump", command, &log);
        wait_for("the dump to begin", SOON, || {
            if part.exists() { Ok(()) } else { Err(format!("no {}", part.display())) }
        });
        dump.signal(signal);
        assert_eq!(dump.wait().code(), Some(1));
        assert!(dump.log().contains("stopped before the end"), "{}", dump.log());
        assert_eq!(fs::read_dir(cluster.dir("out")).unwrap().count(), 0);
    }
    cluster.meta().signal(Signal::CONT);
    cluster.fjord(["meta", "dump", text(&file)]).ok();
    assert_eq!(fs::read_dir(cluster.dir("out")).unwrap().count(), 1);
}
