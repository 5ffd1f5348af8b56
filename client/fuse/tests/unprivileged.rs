//! Mounting without root, through fusermount3.
//!
//! Needs fusermount3 (package fuse3) and a /dev/fuse that everybody may open, as udev makes it; says so otherwise.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "tests")]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use fjordfs_fuse::{MountError, MountOptions, TransportChoice, mount_filesystem};
use support::{Control, MemFs, Mounted};

const NOBODY: u32 = 65534;
const IS_NOBODY: &str = "FJORD_TEST_IS_NOBODY";

#[test]
fn a_user_mounts_and_unmounts() {
    if std::env::var_os(IS_NOBODY).is_some() {
        return as_nobody();
    }
    if Command::new("fusermount3").arg("-V").output().is_err() {
        return println!("skipped: no fusermount3 here; install fuse3");
    }
    if !fs::metadata("/dev/fuse").is_ok_and(|device| device.mode() & 0o006 == 0o006) {
        return println!("skipped: no /dev/fuse here that everybody may open (chmod 666 /dev/fuse)");
    }
    let home = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_user_mounts_and_unmounts", "--nocapture"])
        .env(IS_NOBODY, "1")
        .env("TMPDIR", home.path())
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn as_nobody() {
    let Some(mut mounted) = Mounted::new(TransportChoice::Auto, "read_ahead_kb=4096") else { return };
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mountinfo.lines().find(|line| line.contains(mounted.dir.path().to_str().unwrap())).unwrap();
    assert!(line.contains(" fuse.fjord memory,with\\040comma ") && line.contains("user_id=65534"), "{line}");
    let data = vec![7; 5 << 20];
    fs::write(mounted.path("file"), &data).unwrap();
    assert!(fs::read(mounted.path("file")).unwrap() == data);
    let held = fs::File::open(mounted.path("file")).unwrap();
    let error = mounted.mount.unmount().unwrap_err();
    assert!(matches!(error, MountError::Busy(_)), "{error}");
    drop(held);

    // Somebody else's directory is refused with what the helper said.
    let error = mount_filesystem(MemFs(Control::new()), &MountOptions::new("x", "/mnt")).unwrap_err();
    assert!(error.to_string().contains("/mnt"), "{error}");
    mounted.end();
}
