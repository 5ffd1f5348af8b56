//! `fjord up` keeps its processes running, grows, and ends in order, whatever is done to it.
//!
//! Needs root and /dev/fuse.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use fjordfs_tests::{
    Process, Run, Scratch,
    engines::free_port,
    fjord,
    mountpoint::{detach, is_mounted, wait_unmounted},
    process::{fjords_with, run},
    wait::{SOON, wait_for, wait_until},
};
use rustix::process::{Pid, Signal, kill_process};

struct Up {
    process: Process,
    dir: PathBuf,
    meta: String,
}

impl Up {
    fn start(scratch: &Scratch, meta: &str, more: &[&str]) -> Up {
        let dir = scratch.path().join("mnt");
        let mut command = fjord(["up"]);
        command.arg(&dir).args(["--meta-listen", meta, "--data"]).arg(scratch.path().join("data")).args(more);
        let log = scratch.path().join("up.log");
        // What earlier runs said is not what this one says.
        let _ = fs::remove_file(&log);
        let process = Process::start("fjord up", command, &log);
        let mut up = Up { process, dir, meta: meta.into() };
        wait_until("fjord up to be ready", 2 * SOON, || {
            up.process.assert_running();
            up.process.log().contains("Ctrl-C")
        });
        up
    }

    /// Process id of a child whose command line has all these words.
    fn child(&self, words: &[&str]) -> u32 {
        wait_for(&format!("a process {words:?}"), SOON, || {
            let mut found = fjords_with(&self.meta).into_iter().filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line: Vec<_> = line.split(|b| *b == 0).skip(1).collect();
                words.iter().all(|word| line.contains(&word.as_bytes()))
            });
            found.next().ok_or("there is none")
        })
    }

    /// kill -9 of a child; waits until `up` has started it again.
    fn kill_child(&self, words: &[&str]) {
        let old = self.child(words);
        kill(old);
        wait_until(&format!("{words:?} to be started again"), SOON, || self.child(words) != old);
    }

    fn status(&self) -> Run {
        run(fjord(["status", "--meta", &self.meta]))
    }

    fn wait_healthy(&self) {
        wait_for("a healthy cluster", SOON, || {
            let status = self.status();
            if status.code() == 0 { Ok(()) } else { Err(status) }
        });
    }

    fn stop(mut self) {
        self.process.stop();
        wait_unmounted(&self.dir);
        assert!(fjords_with(&self.meta).is_empty(), "processes are left");
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        self.process.kill9();
        detach(&self.dir);
    }
}

fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL).unwrap();
}

fn address() -> String {
    format!("127.0.0.1:{}", free_port())
}

#[test]
fn whatever_dies_is_started_again() {
    let scratch = Scratch::new("up-restarts");
    let up = Up::start(&scratch, &address(), &[]);
    fs::write(up.dir.join("f"), vec![7; 3 << 20]).unwrap();
    up.kill_child(&["data", "data-2"]);
    up.kill_child(&["meta"]);
    fs::write(up.dir.join("g"), b"after").unwrap();
    up.wait_healthy();
    up.kill_child(&["mount"]);
    wait_for("the mount to be back", SOON, || fs::read(up.dir.join("g")));
    assert!(fs::read(up.dir.join("f")).unwrap() == vec![7; 3 << 20]);
    let log = fs::read_to_string(scratch.path().join("up.log")).unwrap();
    assert_eq!(log.matches("starting it again").count(), 3, "{log}");
    up.stop();
}

/// The folder of the second mount is not there yet.
#[test]
fn the_commands_that_it_shows_work_as_they_are() {
    let scratch = Scratch::new("up-shows");
    let up = Up::start(&scratch, &address(), &["--servers", "1"]);
    let second = scratch.path().join("new/second");
    let shown = up.process.log();
    let command = shown.lines().find_map(|line| line.trim().strip_prefix("fjord mount ")).unwrap();
    let words = command.split("  ").next().unwrap().replace("/mnt/second", second.to_str().unwrap());
    let log = format!("log={}", scratch.path().join("second.log").display());
    run(fjord(["mount", "-o", &log].into_iter().chain(words.split(' ')))).ok();
    fs::write(up.dir.join("f"), b"seen by both").unwrap();
    assert_eq!(fs::read(second.join("f")).unwrap(), b"seen by both");
    run(fjord([Path::new("umount"), &second])).ok();
    up.stop();
}

#[test]
fn a_working_directory_that_is_gone_is_named() {
    let scratch = Scratch::new("up-gone");
    let gone = scratch.dir("gone");
    let mut command = fjord(["up"]);
    command.arg(scratch.path().join("mnt")).args(["--meta-listen", &address(), "--data"]);
    command.arg(scratch.path().join("data"));
    let program = command.get_program().to_owned();
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "cd \"$0\" && rmdir \"$0\" && exec \"$@\""])
        .arg(&gone)
        .arg(program)
        .args(command.get_args());
    let said = run(shell).fails_saying(&["working directory", "cd"]);
    assert!(!said.stderr.contains("damaged"), "{said}");
}

#[test]
fn it_grows_and_outlives_its_own_kill() {
    let scratch = Scratch::new("up-grows");
    let meta = address();
    let mut up = Up::start(&scratch, &meta, &["--servers", "2"]);
    fs::write(up.dir.join("f"), b"kept").unwrap();
    up.process.kill9();
    // The children notice and end by themselves; the next run waits for them.
    drop(up);
    let up = Up::start(&scratch, &meta, &["--servers", "3"]);
    assert_eq!(fs::read(up.dir.join("f")).unwrap(), b"kept");
    let shown = up.status().ok().stdout;
    assert!(shown.contains("data-3"), "{shown}");
    up.stop();
    let refused = |more: [&str; 2]| {
        let mut command = fjord(["up"]);
        command.arg(scratch.path().join("mnt")).args(["--meta-listen", &meta, "--data"]);
        command.arg(scratch.path().join("data")).args(more);
        run(command)
    };
    refused(["--servers", "2"]).fails_saying(&["3 data servers"]);
    refused(["--policy", "replica:3"]).fails_saying(&["layout set"]);
}

#[test]
fn a_mount_in_use_is_waited_for_and_then_detached() {
    let scratch = Scratch::new("up-busy");
    let mut up = Up::start(&scratch, &address(), &["--servers", "1"]);
    let open = fs::File::create(up.dir.join("held")).unwrap();
    up.process.signal(Signal::INT);
    let holder = format!("process {}", std::process::id());
    wait_until("it to say who holds the mount", SOON, || {
        let log = up.process.log();
        log.contains("in use by") && log.contains(&holder)
    });
    assert!(is_mounted(&up.dir));
    fs::write(up.dir.join("g"), b"still works").unwrap();
    up.process.signal(Signal::INT);
    let status = up.process.wait();
    assert!(status.success(), "{status}: {}", up.process.log());
    assert!(!up.process.log().contains("killing"), "{}", up.process.log());
    assert!(!is_mounted(&up.dir));
    assert!(fjords_with(&up.meta).is_empty());
    drop(open);
}

#[test]
fn what_keeps_a_server_from_starting_is_shown() {
    let scratch = Scratch::new("up-fails");
    let meta = address();
    let up = Up::start(&scratch, &meta, &["--servers", "1"]);
    up.stop();
    let data = scratch.path().join("data");
    // Another cluster's target in the place of this one's.
    let other = Scratch::new("up-fails-other");
    let second = Up::start(&other, &address(), &["--servers", "1"]);
    second.stop();
    fs::rename(data.join("data-1"), data.join("aside")).unwrap();
    fs::rename(other.path().join("data/data-1"), data.join("data-1")).unwrap();
    let mut command = fjord(["up"]);
    command.arg(scratch.path().join("mnt")).args(["--meta-listen", &meta, "--data"]).arg(&data);
    run(command).fails_saying(&["data-1", "cluster"]);
    assert!(fjords_with(&meta).is_empty(), "the others must not stay behind");
    // Put right, it goes on.
    fs::remove_dir_all(data.join("data-1")).unwrap();
    fs::rename(data.join("aside"), data.join("data-1")).unwrap();
    let up = Up::start(&scratch, &meta, &[]);
    assert!(Path::new(&up.dir).exists());
    up.stop();
}
