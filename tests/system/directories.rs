//! Directories of very many entries: listed as a stream, in memory that does not grow with them, at offsets that stay.
//!
//! `FJORD_ENTRIES` says how many there are (50,000 unless it does): ten million is what a directory of images may have.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{fs, mem::MaybeUninit, os::fd::OwnedFd, path::Path, thread};

use fjordfs_tests::{Cluster, Setup};
use rustix::fs::{CWD, FileType, Mode, OFlags, RawDir, SeekFrom, mknodat, open, openat, seek, unlinkat};

/// Most that listing may add to the memory of the client's process: its tables are bounded at some 100 MiB.
const LISTING_MAX: u64 = 256 << 20;
/// Most that the metaserver's process may have: what the engine caches, and leases.
const METASERVER_MAX: u64 = 1536 << 20;
const THREADS: usize = 4;

fn resident(pid: u32, which: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(which)).unwrap();
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

fn directory(path: &Path) -> OwnedFd {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

/// Numbers of the entries from where the directory stands, and the offset behind each; ends when `each` says so.
fn list(dir: &OwnedFd, mut each: impl FnMut(usize, u64) -> bool) {
    let mut buffer = vec![MaybeUninit::uninit(); 64 << 10];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        if let Ok(number) = entry.file_name().to_str().unwrap().parse()
            && !each(number, entry.next_entry_cookie())
        {
            return;
        }
    }
}

#[test]
fn very_many_entries_are_streamed_in_bounded_memory_at_offsets_that_stay() {
    let count: usize = std::env::var("FJORD_ENTRIES").ok().and_then(|n| n.parse().ok()).unwrap_or(50_000);
    let mut cluster = Cluster::start("directories", Setup::default());
    let maker = cluster.mount();
    fs::create_dir(maker.join("d")).unwrap();
    thread::scope(|scope| {
        for part in 0..THREADS {
            let maker = &maker;
            scope.spawn(move || {
                let dir = directory(&maker.join("d"));
                for number in (part..count).step_by(THREADS) {
                    mknodat(&dir, format!("{number:08}"), FileType::RegularFile, Mode::RUSR, 0).unwrap();
                }
            });
        }
    });
    let mut mount = cluster.mount_with("memory=256MiB");
    let pid = mount.process().pid();
    let before = resident(pid, "VmRSS");
    let dir = directory(&mount.join("d"));
    // Every entry once, and the offset in the middle.
    let mut seen = vec![false; count];
    let mut middle = None;
    let mut listed = 0;
    list(&dir, |number, offset| {
        assert!(!std::mem::replace(&mut seen[number], true), "{number} is listed twice");
        listed += 1;
        if listed == count / 2 {
            middle = Some(offset);
        }
        true
    });
    assert_eq!(listed, count);
    // What follows an offset is the same after a restart of the metaserver, and while others come and go.
    let after = |dir: &OwnedFd| {
        seek(dir, SeekFrom::Start(middle.unwrap())).unwrap();
        let mut found = Vec::new();
        list(dir, |number, _| {
            found.push(number);
            found.len() < 5000
        });
        found
    };
    let expected = after(&dir);
    cluster.kill_meta();
    cluster.start_meta();
    let names = directory(&maker.join("d"));
    let gone: Vec<usize> = expected.iter().copied().step_by(3).collect();
    for number in &gone {
        unlinkat(&names, format!("{number:08}"), rustix::fs::AtFlags::empty()).unwrap();
        let new = openat(
            CWD,
            maker.join("d").join(format!("new {number}")),
            OFlags::CREATE | OFlags::WRONLY,
            Mode::RUSR,
        );
        drop(new.unwrap());
    }
    let stay: Vec<usize> = expected.iter().copied().filter(|number| !gone.contains(number)).collect();
    let found = after(&directory(&mount.join("d")));
    assert!(found.starts_with(&stay), "what stays is found in the same order");
    let grown = resident(pid, "VmHWM").saturating_sub(before);
    let metaserver = resident(cluster.meta().pid(), "VmHWM");
    eprintln!(
        "{count} entries: the client grew by {} MiB, the metaserver has {} MiB",
        grown >> 20,
        metaserver >> 20
    );
    assert!(grown < LISTING_MAX, "the client grew by {grown} bytes");
    assert!(metaserver < METASERVER_MAX, "the metaserver has {metaserver} bytes");
    drop((dir, names));
    mount.unmount();
    maker.unmount();
}
