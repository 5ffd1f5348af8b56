//! A session that one process has begun and another goes on with. Both are in this process: the first just stops reading.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use fjordfs_fuse::{MountOptions, TransportChoice, mount_kept, resume_filesystem};
use support::{Control, MemFs};

const CALLERS: usize = 24;
const CALLER: &str = "caller";

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// What the first has read comes again, and is known. What nobody has read comes once.
#[test]
fn every_request_is_served_once_by_the_successor() {
    if support::lacking(TransportChoice::DevFuse).is_some() {
        return;
    }
    let control = Control::new();
    *control.left.lock() = Duration::from_secs(3600);
    let dir = tempfile::tempdir().unwrap();
    let mut options = MountOptions::new("memory", "");
    options.transport = TransportChoice::DevFuse;
    options.mountpoint = dir.path().to_owned();
    options.threads = 8;
    let mut kept = None;
    let first = mount_kept(MemFs(Arc::clone(&control)), &options, &mut |devices, agreed| {
        let devices = devices.iter().map(|device| device.try_clone()).collect::<Result<Vec<_>, _>>()?;
        kept = Some((devices, agreed));
        Ok(())
    })
    .unwrap();
    // A folder for each, since the kernel changes one folder's names one after another; and it knows that the names are not there.
    let names =
        |kind: &str| -> Vec<_> { (0..CALLERS).map(|i| dir.path().join(format!("{kind}{i}/late"))).collect() };
    let (read, unread) = (names("read"), names("unread"));
    for name in read.iter().chain(&unread) {
        fs::create_dir(name.parent().unwrap()).unwrap();
        assert!(!name.exists());
    }
    control.served.lock().clear();
    *control.slow.lock() = Duration::from_secs(3600);
    let make = |name: &std::path::PathBuf| {
        let name = name.clone();
        thread::Builder::new().name(CALLER.to_owned()).spawn(move || fs::create_dir(name)).unwrap()
    };
    let mut callers: Vec<_> = read.iter().map(make).collect();
    wait_for("all to be read", || control.served.lock().len() == CALLERS);
    assert!(!first.departure().leave(Duration::ZERO));
    callers.extend(unread.iter().map(make));
    wait_for("all to wait", || waiting() == 2 * CALLERS);

    let mut left = std::mem::take(&mut *control.served.lock());
    *control.slow.lock() = Duration::from_millis(20);
    let (devices, agreed) = kept.take().unwrap();
    let mut second =
        resume_filesystem(MemFs(Arc::clone(&control)), &options, devices, agreed, 1 << 40).unwrap();
    for caller in callers {
        caller.join().unwrap().unwrap();
    }
    let mut served = control.served.lock().clone();
    served.sort_unstable();
    served.dedup();
    assert_eq!((served.len(), control.served.lock().len()), (2 * CALLERS, 2 * CALLERS), "none twice");
    let mut again = control.again.lock().clone();
    again.sort_unstable();
    left.sort_unstable();
    assert_eq!(again, left);

    // Its threads have requests that nobody waits for any more.
    std::mem::forget(first);
    second.unmount().unwrap();
}

/// Callers that the kernel has asleep.
fn waiting() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once('(')?.1.split_once(')')?;
        Some(name == CALLER && rest.trim_start().starts_with(['S', 'D']))
    });
    tasks.filter(|is_waiting| *is_waiting).count()
}
