//! What only concerns the transport over io_uring: set-up that fails, few entries, ends with requests in flight.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fjordfs_fuse::{Busy, MountOptions, TransportChoice, TransportKind, mount_filesystem};
use support::{Control, MemFs, Mounted};

fn options(transport: TransportChoice) -> MountOptions {
    MountOptions { transport, ..MountOptions::new("memory", "") }
}

/// Everything works, whatever the transport.
fn use_it(mounted: &Mounted) {
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i / 5) as u8).collect();
    fs::create_dir(mounted.path("dir")).unwrap();
    fs::write(mounted.path("dir/file"), &data).unwrap();
    assert!(fs::read(mounted.path("dir/file")).unwrap() == data);
    assert_eq!(fs::read_dir(mounted.path("dir")).unwrap().count(), 1);
    fs::remove_file(mounted.path("dir/file")).unwrap();
    fs::remove_dir(mounted.path("dir")).unwrap();
}

/// Mounts with a fault injected: on /dev/fuse for that reason, or, when io_uring is insisted on, not at all.
fn falls_back(inject: impl Fn(&mut MountOptions), reason: &str) {
    if support::lacking(TransportChoice::IoUring).is_some() {
        return;
    }
    let mut auto = options(TransportChoice::Auto);
    inject(&mut auto);
    let Some(mounted) = Mounted::with(auto) else { return };
    let transport = mounted.mount.transport();
    assert_eq!(transport.kind, TransportKind::DevFuse);
    let why = transport.fallback.clone().unwrap();
    assert!(why.contains(reason), "{why}");
    use_it(&mounted);
    mounted.end();

    let dir = tempfile::tempdir().unwrap();
    let mut must = MountOptions { mountpoint: dir.path().to_owned(), ..options(TransportChoice::IoUring) };
    inject(&mut must);
    let error = mount_filesystem(MemFs(Control::new()), &must).unwrap_err().to_string();
    assert!(error.contains(reason) && error.contains("transport=dev_fuse"), "{error}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "a failed mount was left behind");
}

#[test]
fn io_uring_is_the_default_where_there_is_any() {
    if support::lacking(TransportChoice::IoUring).is_some() {
        return;
    }
    let Some(mounted) = Mounted::new(TransportChoice::Auto, "") else { return };
    assert_eq!(mounted.mount.transport().name(), "io_uring", "{}", mounted.mount.transport());
    assert_eq!(mounted.mount.transport().fallback, None);
    use_it(&mounted);
    mounted.end();
}

#[test]
fn a_kernel_without_it_is_a_reason() {
    falls_back(|options| options.uring.faults.parameter = "/nonexistent/enable_uring".into(), "Linux 6.14");
}

#[test]
fn a_switch_that_is_locked_is_a_reason() {
    falls_back(|options| options.uring.faults.parameter = "/proc/version".into(), "echo Y > /proc/version");
}

#[test]
fn too_little_memory_is_a_reason() {
    falls_back(|options| options.uring.memory_max = 64 << 10, "uring_memory=65536");
}

#[test]
fn a_ring_that_cannot_be_made_is_a_reason() {
    for thread in 0..std::thread::available_parallelism().unwrap().get() {
        falls_back(|options| options.uring.faults.no_ring = Some(thread), "a ring could not be set up");
    }
}

#[test]
fn a_queue_that_the_kernel_refuses_is_a_reason() {
    // Other queues have their entries by then, or get them later.
    for queue in 0..std::thread::available_parallelism().unwrap().get() {
        falls_back(|options| options.uring.faults.bad_queue = Some(queue as u16), "the kernel refused");
    }
}

#[test]
fn a_kernel_that_has_no_memory_for_submissions_for_a_while_costs_no_answer() {
    if support::lacking(TransportChoice::IoUring).is_some() {
        return;
    }
    let mut options = options(TransportChoice::IoUring);
    options.uring.faults.busy = Busy::times(20);
    let busy = options.uring.faults.busy.clone();
    let Some(mounted) = Mounted::with(options) else { return };
    use_it(&mounted);
    assert_eq!(busy.left(), 0, "all of them were met");
    mounted.end();
}

#[test]
fn callers_that_wait_for_the_rings_are_served() {
    if support::lacking(TransportChoice::IoUring).is_some() {
        return;
    }
    for _ in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        let mut options =
            MountOptions { mountpoint: dir.path().to_owned(), ..options(TransportChoice::IoUring) };
        // Many, so that callers come while some are still being registered.
        (options.uring.depth, options.uring.memory_max) = (256, 1 << 40);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let _absent_either_way = fs::metadata(dir.path().join("x"));
                    }
                });
            }
            let mut mount = mount_filesystem(MemFs(Control::new()), &options).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::Relaxed);
            mount.unmounter().unmount(true).unwrap();
            mount.wait();
        });
    }
}

#[test]
fn few_entries_and_threads_serve_many_callers() {
    for list in [
        "uring_depth=1",
        "uring_depth=2,threads=1",
        "uring_payload=4096,uring_depth=3",
        "uring_memory=4M,poll_us=20",
    ] {
        let Some(mounted) = Mounted::new(TransportChoice::IoUring, list) else { return };
        std::thread::scope(|scope| {
            for thread in 0..16u8 {
                let mounted = &mounted;
                scope.spawn(move || {
                    for round in 0..20u8 {
                        let path = mounted.path(&format!("{thread}-{round}"));
                        let data = vec![thread ^ round; 70_000];
                        fs::write(&path, &data).unwrap();
                        mounted.control.overwrite(path.file_name().unwrap().to_str().unwrap(), &data);
                        assert!(fs::read(&path).unwrap() == data, "{list}");
                        fs::remove_file(&path).unwrap();
                    }
                });
            }
        });
        use_it(&mounted);
        mounted.end();
    }
}

#[test]
fn depth_is_reduced_to_fit() {
    let Some(mounted) = Mounted::new(TransportChoice::IoUring, "uring_depth=1000,uring_memory=16M") else {
        return;
    };
    let TransportKind::IoUring { queues, depth, .. } = mounted.mount.transport().kind else { unreachable!() };
    assert!(depth * queues * (1 << 20) <= 16 << 20 && depth >= 1, "{queues} queues of {depth}");
    use_it(&mounted);
    mounted.end();
}

#[test]
fn payload_bounds_requests() {
    let Some(mounted) = Mounted::new(TransportChoice::IoUring, "uring_payload=64K") else { return };
    use_it(&mounted);
    assert_eq!(mounted.control.size_max.load(Ordering::SeqCst), 64 << 10);
    mounted.end();
}

#[test]
fn a_crowd_of_slow_requests_keeps_nobody_from_its_answer() {
    // More than there are entries: they wait in the kernel.
    let Some(mounted) = Mounted::new(TransportChoice::IoUring, "uring_depth=4") else { return };
    fs::write(mounted.path("slow"), vec![7; 64 << 12]).unwrap();
    *mounted.control.slow.lock() = Duration::from_millis(100);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..64u64 {
            let mounted = &mounted;
            scope.spawn(move || {
                let file = File::open(mounted.path("slow")).unwrap();
                let mut byte = [0];
                file.read_exact_at(&mut byte, thread << 12).unwrap();
                assert_eq!(byte, [7]);
            });
        }
    });
    assert!(began.elapsed() < Duration::from_secs(20));
    *mounted.control.slow.lock() = Duration::ZERO;
    mounted.end();
}

#[test]
fn a_lazy_unmount_lets_requests_in_flight_finish() {
    let Some(mut mounted) = Mounted::new(TransportChoice::IoUring, "") else { return };
    fs::write(mounted.path("slow"), "data").unwrap();
    mounted.control.overwrite("slow", b"DATA");
    *mounted.control.slow.lock() = Duration::from_millis(700);
    let path = mounted.path("slow");
    let reader = std::thread::spawn(move || fs::read(path).unwrap());
    std::thread::sleep(Duration::from_millis(200));
    mounted.mount.unmounter().unmount(true).unwrap();
    assert_eq!(reader.join().unwrap(), b"DATA");
    mounted.mount.wait();
}

#[test]
fn a_forced_end_with_every_entry_busy_is_noticed_when_they_are_done() {
    // Writes are not given up, so no entry is the kernel's when the mount ends.
    let Some(mut mounted) = Mounted::new(TransportChoice::IoUring, "uring_depth=1") else { return };
    let path = mounted.path("slow");
    fs::write(&path, "data").unwrap();
    *mounted.control.slow.lock() = Duration::from_secs(1);
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || fs::OpenOptions::new().write(true).open(path)?.write_at(b"DATA", 0))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let mountpoint = std::ffi::CString::new(mounted.dir.path().to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path.
    unsafe { libc::umount2(mountpoint.as_ptr(), libc::MNT_FORCE) };
    let began = Instant::now();
    assert!(writers.into_iter().any(|writer| writer.join().unwrap().is_err()));
    mounted.mount.wait();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    mounted.mount.unmounter().unmount(true).unwrap();
}

#[test]
fn many_mounts_come_and_go() {
    for _ in 0..20 {
        let Some(mounted) = Mounted::new(TransportChoice::IoUring, "uring_depth=2") else { return };
        fs::write(mounted.path("file"), "x").unwrap();
        mounted.end();
    }
}
