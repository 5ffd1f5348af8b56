//! Files through a real mount of a filesystem in memory.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fjordfs_fuse::TransportChoice;
use support::{Mounted, size};

over_each_transport! {
    a_large_file_comes_back_in_large_requests
    many_threads_read_and_write_their_own_files
    a_slow_request_holds_up_no_other
    mappings_read_and_write
    direct_io_goes_around_the_cache_and_appends_in_order
    appends_go_to_the_end_wherever_that_is
    pages_are_kept_while_the_version_stands
    a_growing_file_is_followed_without_opening_it_again
    a_reader_of_a_growing_file_sees_no_zeros_at_its_old_end
    a_new_size_is_told_only_when_the_old_end_is_dropped
    a_file_whose_pages_are_held_holds_up_no_other
    a_reader_beside_an_append_keeps_no_zeros_at_the_old_end
    leased_names_and_attributes_are_not_asked_for_until_they_are_recalled
    a_recall_waits_for_no_request_of_its_directory
    invalidations_reach_the_kernel
    a_write_is_read_back_although_pages_were_dropped_meanwhile
    truncation_and_permission_bits
    suid_goes_when_another_user_writes_or_truncates
    failures_are_reported_and_a_panic_is_one_failure
    who_waits_can_be_killed_at_once
    signals_with_a_handler_disturb_nobody
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

fn a_large_file_comes_back_in_large_requests(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let data = pattern(64 << 20, 7);
    let path = mounted.path("large");
    let mut file = File::create(&path).unwrap();
    for chunk in data.chunks(3 << 20) {
        file.write_all(chunk).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    assert!(mounted.control.fsyncs.load(Ordering::SeqCst) >= 1);
    assert!(mounted.control.flushes.load(Ordering::SeqCst) >= 1);
    assert!(fs::read(&path).unwrap() == data);
    assert_eq!(mounted.control.size_max.load(Ordering::SeqCst), 1 << 20);
    assert_eq!(fs::metadata(&path).unwrap().len(), 64 << 20);
    mounted.end();
}

fn many_threads_read_and_write_their_own_files(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "threads=4") else { return };
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let mounted = &mounted;
            scope.spawn(move || {
                for round in 0..20 {
                    let path = mounted.path(&format!("t{thread}-{round}"));
                    let data = pattern(50_000 + 1000 * round, thread + 1);
                    fs::write(&path, &data).unwrap();
                    assert!(fs::read(&path).unwrap() == data);
                    fs::rename(&path, mounted.path(&format!("done{thread}-{round}"))).unwrap();
                }
            });
        }
    });
    assert_eq!(fs::read_dir(mounted.dir.path()).unwrap().count(), 160);
    mounted.end();
}

fn a_slow_request_holds_up_no_other(transport: TransportChoice) {
    // One worker thread: all requests are tasks on it.
    let Some(mounted) = Mounted::new(transport, "threads=1") else { return };
    fs::write(mounted.path("quick"), "q").unwrap();
    fs::write(mounted.path("slow"), "s").unwrap();
    // Not cached, so that the read is a request.
    mounted.control.overwrite("slow", b"t");
    *mounted.control.slow.lock() = Duration::from_secs(3);
    let path = mounted.path("slow");
    let slow = std::thread::spawn(move || fs::read(path).unwrap());
    std::thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    assert_eq!(fs::read(mounted.path("quick")).unwrap(), b"q");
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(slow.join().unwrap(), b"t");
    mounted.end();
}

fn mappings_read_and_write(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("mapped");
    let data = pattern(1 << 20, 3);
    fs::write(&path, &data).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // SAFETY: nobody truncates the file while it is mapped.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    assert!(map[..] == data[..]);
    map[5000..5005].copy_from_slice(b"hello");
    map.flush().unwrap();
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 5000).unwrap();
    assert_eq!(&bytes, b"hello");
    drop((map, file));
    let ino = fs::metadata(&path).unwrap().ino();
    assert_eq!(&mounted.control.inodes.lock()[&ino].data[5000..5005], b"hello");
    mounted.end();
}

/// Memory for O_DIRECT.
fn aligned(len: usize) -> memmap2::MmapMut {
    memmap2::MmapMut::map_anon(len).unwrap()
}

fn direct_io_goes_around_the_cache_and_appends_in_order(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("direct");
    let mut memory = aligned(4 << 20);
    memory.copy_from_slice(&pattern(4 << 20, 9));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    file.write_all_at(&memory, 0).unwrap();
    let mut back = aligned(4 << 20);
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back[..] == memory[..]);
    drop(file);
    let mut file = OpenOptions::new().append(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    file.write_all(&memory).unwrap();
    drop(file);
    let all = fs::read(&path).unwrap();
    assert_eq!(all.len(), 8 << 20);
    assert!(all[..4 << 20] == memory[..] && all[4 << 20..] == memory[..]);
    mounted.end();
}

fn appends_go_to_the_end_wherever_that_is(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("log");
    let mut file = OpenOptions::new().read(true).append(true).create(true).open(&path).unwrap();
    file.write_all(b"one").unwrap();
    // Another client appends.
    mounted.control.overwrite("log", b"oneTWO");
    file.write_all(b"three").unwrap();
    // The announcement that cached pages are stale goes another way than the answer.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let read = fs::read(&path).unwrap();
        if read == b"oneTWOthree" {
            break;
        }
        assert!(Instant::now() < deadline, "{:?}", String::from_utf8_lossy(&read));
    }
    let mut held = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut held).unwrap();
    assert_eq!(held, "oneTWOthree");
    drop(file);
    mounted.end();
}

fn pages_are_kept_while_the_version_stands(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("cached");
    fs::write(&path, vec![b'a'; 100_000]).unwrap();
    let reads = || mounted.control.reads.load(Ordering::SeqCst);
    assert_eq!(fs::read(&path).unwrap(), vec![b'a'; 100_000]);
    let before = reads();
    assert_eq!(fs::read(&path).unwrap(), vec![b'a'; 100_000]);
    assert_eq!(reads(), before, "the second open kept the pages");
    // Same size, as the hardest case.
    mounted.control.overwrite("cached", &vec![b'b'; 100_000]);
    assert_eq!(fs::read(&path).unwrap(), vec![b'b'; 100_000]);
    mounted.end();
}

fn a_growing_file_is_followed_without_opening_it_again(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    fs::write(mounted.path("log"), b"first ").unwrap();
    let mut reader = File::open(mounted.path("log")).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    mounted.control.overwrite("log", b"first second");
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "first second");
    drop(reader);
    mounted.end();
}

fn a_reader_of_a_growing_file_sees_no_zeros_at_its_old_end(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    *mounted.control.slow.lock() = Duration::from_millis(30);
    for round in 0..20 {
        let name = format!("slow{round}");
        mounted.control.make_file(&name, &[7; 5000]);
        let path = mounted.path(&name);
        let file = File::open(&path).unwrap();
        let found = std::thread::scope(|scope| {
            let mut buffer = [1; 8000];
            let reader = scope.spawn(move || file.read_at(&mut buffer, 0).map(|len| buffer[..len].to_vec()));
            // The bytes of the old end are on their way when the kernel hears of the new one.
            std::thread::sleep(Duration::from_millis(10));
            mounted.control.overwrite(&name, &[7; 8000]);
            assert_eq!(size(&path), 8000);
            reader.join().unwrap().unwrap()
        });
        assert!(found.len() >= 5000 && found.iter().all(|byte| *byte == 7), "round {round}");
        assert!(fs::read(&path).unwrap() == [7; 8000]);
    }
    mounted.end();
}

/// How a file of 5000 bytes is read from its second page on.
fn second_page(file: &File) -> Vec<u8> {
    let mut buffer = [1; 3904];
    let len = file.read_at(&mut buffer, 4096).unwrap();
    buffer[..len].to_vec()
}

fn a_new_size_is_told_only_when_the_old_end_is_dropped(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let reads = || mounted.control.reads.load(Ordering::SeqCst);
    let getattrs = || mounted.control.getattrs.load(Ordering::SeqCst);
    mounted.control.make_file("slow", &[7; 5000]);
    let path = mounted.path("slow");
    let file = File::open(&path).unwrap();
    assert_eq!(second_page(&file), [7; 904]);
    *mounted.control.slow.lock() = Duration::from_millis(300);
    std::thread::scope(|scope| {
        let (read, asked) = (reads(), getattrs());
        let first = scope.spawn(|| file.read_at(&mut [1; 100], 0));
        while reads() == read {
            std::thread::sleep(Duration::from_millis(1));
        }
        mounted.control.overwrite("slow", &[7; 8000]);
        // Once it has the answer, the kernel waits for the first page before it drops the second.
        let looking = scope.spawn(|| size(&path));
        while getattrs() == asked {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(30));
        let second = second_page(&file);
        assert!(second.len() >= 904 && second.iter().all(|byte| *byte == 7), "{} bytes", second.len());
        assert_eq!((first.join().unwrap().unwrap(), looking.join().unwrap()), (100, 8000));
    });
    assert!(fs::read(&path).unwrap() == [7; 8000]);
    drop(file);
    mounted.end();
}

/// An invalidation waits for the pages that a slow READ has locked; who appends to another file waits for its own.
fn a_file_whose_pages_are_held_holds_up_no_other(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    mounted.control.make_file("slow", &[7; 5000]);
    mounted.control.make_file("log", &[7; 10]);
    let (slow, log) = (mounted.path("slow"), mounted.path("log"));
    assert_eq!(fs::read(&log).unwrap(), [7; 10]);
    let slow = File::open(slow).unwrap();
    let reads = mounted.control.reads.load(Ordering::SeqCst);
    *mounted.control.slow.lock() = Duration::from_secs(20);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| slow.read_at(&mut [1; 100], 0).unwrap());
        while mounted.control.reads.load(Ordering::SeqCst) == reads {
            std::thread::sleep(Duration::from_millis(1));
        }
        let notifier = mounted.control.notifier.lock().clone().unwrap();
        notifier.invalidate_inode(fjordfs_proto::InodeId(slow.metadata().unwrap().ino()));
        OpenOptions::new().append(true).open(&log).unwrap().write_all(&[7; 10]).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().len(), 20);
        assert!(!reading.is_finished(), "the append waited for another file's READ");
        assert_eq!(reading.join().unwrap(), 100);
    });
    drop(slow);
    mounted.end();
}

fn a_reader_beside_an_append_keeps_no_zeros_at_the_old_end(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    mounted.control.make_file("slow", &[7; 5000]);
    let path = mounted.path("slow");
    let file = File::open(&path).unwrap();
    *mounted.control.slow.lock() = Duration::from_millis(300);
    std::thread::scope(|scope| {
        let appending = scope.spawn(|| {
            let mut log = OpenOptions::new().append(true).open(&path).unwrap();
            log.write_all(&[7; 3000]).unwrap();
        });
        // What it is about to write to is not cached any more.
        while mounted.control.appends.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        *mounted.control.slow.lock() = Duration::ZERO;
        let old = second_page(&file);
        assert!(old.iter().all(|byte| *byte == 7));
        appending.join().unwrap();
    });
    assert!(second_page(&file) == [7; 3904]);
    drop(file);
    mounted.end();
}

fn leased_names_and_attributes_are_not_asked_for_until_they_are_recalled(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    *mounted.control.left.lock() = Duration::from_secs(3600);
    let (path, absent) = (mounted.path("file"), mounted.path("absent"));
    fs::write(&path, b"old").unwrap();
    let ino = fs::metadata(&path).unwrap().ino();
    assert!(fs::metadata(&absent).is_err());
    // An answer to CREATE brings attributes too.
    let empty = mounted.path("empty");
    drop(File::create(&empty).unwrap());
    let getattrs = mounted.control.getattrs.load(Ordering::SeqCst);
    assert_eq!(support::size(&empty), 0);
    assert!(mounted.control.getattrs.load(Ordering::SeqCst) <= getattrs + 1, "of its directory at most");
    let asked =
        || (mounted.control.lookups.load(Ordering::SeqCst), mounted.control.getattrs.load(Ordering::SeqCst));
    let before = asked();
    for _ in 0..50 {
        assert_eq!(fs::metadata(&path).unwrap().len(), 3);
        assert!(fs::metadata(&absent).is_err());
    }
    assert_eq!(asked(), before);

    mounted.control.overwrite("file", b"newer");
    mounted.control.recall(&[ino], false);
    assert_eq!(fs::metadata(&path).unwrap().len(), 5);
    assert_eq!(asked(), (before.0, before.1 + 1), "the name stands");
    mounted.control.recall(&[], true);
    fs::metadata(&path).unwrap();
    assert!(fs::metadata(&absent).is_err());
    assert_eq!(asked().0, before.0 + 2);
    mounted.end();
}

fn a_recall_waits_for_no_request_of_its_directory(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    *mounted.control.left.lock() = Duration::from_secs(3600);
    let path = mounted.path("file");
    fs::write(&path, b"x").unwrap();
    let ino = fs::metadata(&path).unwrap().ino();
    *mounted.control.slow.lock() = Duration::from_secs(10);
    let lookups = mounted.control.lookups.load(Ordering::SeqCst);
    let slow = mounted.path("slowname");
    let looking = std::thread::spawn(move || drop(fs::metadata(slow)));
    while mounted.control.lookups.load(Ordering::SeqCst) == lookups {
        std::thread::sleep(Duration::from_millis(1));
    }
    mounted.control.recall(&[1, ino], true);
    assert!(!looking.is_finished(), "the lookup holds the directory's lock all the while");
    looking.join().unwrap();
    mounted.end();
}

fn invalidations_reach_the_kernel(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "attr_timeout=3600,entry_timeout=3600") else { return };
    let path = mounted.path("file");
    fs::write(&path, b"old").unwrap();
    let file = File::open(&path).unwrap();
    let ino = file.metadata().unwrap().ino();
    mounted.control.overwrite("file", b"newer");
    assert_eq!(fs::metadata(&path).unwrap().len(), 3, "the kernel was allowed to believe this");
    let notifier = mounted.control.notifier.lock().clone().unwrap();
    notifier.invalidate_inode(fjordfs_proto::InodeId(ino));
    let deadline = Instant::now() + Duration::from_secs(5);
    while fs::metadata(&path).unwrap().len() != 5 {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(fs::read(&path).unwrap(), b"newer");
    let lookups = mounted.control.lookups.load(Ordering::SeqCst);
    fs::metadata(&path).unwrap();
    assert_eq!(mounted.control.lookups.load(Ordering::SeqCst), lookups);
    notifier.invalidate_entry(fjordfs_proto::InodeId(1), b"file");
    while mounted.control.lookups.load(Ordering::SeqCst) == lookups {
        fs::metadata(&path).unwrap();
        assert!(Instant::now() < deadline);
    }
    drop(file);
    mounted.end();
}

/// Pages that a write has filled are dropped before its WRITE is served, and a read fills them with what was there before.
fn a_write_is_read_back_although_pages_were_dropped_meanwhile(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    mounted.control.make_file("slow", &[1; 3 * 4096]);
    let path = mounted.path("slow");
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let ino = fjordfs_proto::InodeId(file.metadata().unwrap().ino());
    let read = || {
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 4096).unwrap();
        page
    };
    assert_eq!(read(), [1; 4096]);
    let notifier = mounted.control.notifier.lock().clone().unwrap();
    *mounted.control.slow.lock() = Duration::from_secs(1);
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| file.write_all_at(&[2; 4096], 4096).unwrap());
        std::thread::sleep(Duration::from_millis(200));
        *mounted.control.slow.lock() = Duration::ZERO;
        // It returns when the kernel has done it.
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(notifier.drop_pages(ino, 0..u64::MAX));
        assert!(!writing.is_finished(), "the pages were not dropped meanwhile");
        read();
        writing.join().unwrap();
    });
    // The kernel hears of it a moment later.
    let deadline = Instant::now() + Duration::from_secs(5);
    while read() != [2; 4096] {
        assert!(Instant::now() < deadline, "what was there before stays");
    }
    drop(file);
    mounted.end();
}

fn truncation_and_permission_bits(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("file");
    fs::write(&path, b"0123456789").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode(), libc::S_IFREG | 0o4755);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123");
    file.set_len(6).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"0123\0\0");
    drop(file);
    // Truncated at open; root keeps suid.
    drop(File::create(&path).unwrap());
    assert_eq!(
        (fs::metadata(&path).unwrap().len(), fs::metadata(&path).unwrap().mode() & 0o7777),
        (0, 0o4755)
    );
    std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o7777),
        (12, 34, 0o755),
        "chown drops suid"
    );
    let when = std::time::SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    let times = fs::FileTimes::new().set_modified(when).set_accessed(when);
    OpenOptions::new().write(true).open(&path).unwrap().set_times(times).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.modified().unwrap(), metadata.accessed().unwrap()), (when, when));
    assert!(metadata.created().is_ok(), "statx has the birth time");
    mounted.end();
}

fn suid_goes_when_another_user_writes_or_truncates(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    fs::set_permissions(mounted.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (name, truncate) in [("written", false), ("truncated", true)] {
        let path = mounted.path(name);
        fs::write(&path, b"program").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(if truncate { "true > \"$0\"" } else { "echo x >> \"$0\"" }).arg(&path);
        let status = std::os::unix::process::CommandExt::uid(&mut command, 65534).status().unwrap();
        assert!(status.success());
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777, "{name}");
    }
    mounted.end();
}

fn failures_are_reported_and_a_panic_is_one_failure(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.path("file");
    fs::write(&path, b"data").unwrap();
    mounted.control.overwrite("file", b"DATA");
    mounted.control.panic_on_read.store(true, Ordering::SeqCst);
    assert_eq!(fs::read(&path).unwrap_err().raw_os_error(), Some(libc::EIO));
    mounted.control.panic_on_read.store(false, Ordering::SeqCst);
    assert_eq!(fs::read(&path).unwrap(), b"DATA");
    mounted.control.fail_flush.store(true, Ordering::SeqCst);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: the descriptor is ours.
    assert_eq!(unsafe { libc::close(fd) }, -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::ENOSPC));
    mounted.control.fail_flush.store(false, Ordering::SeqCst);
    mounted.end();
}

/// Runs a program that waits for the filesystem, and signals it while it does.
fn signalled(
    program: &str,
    arguments: &[&str],
    path: &std::path::Path,
    signal: i32,
) -> (std::process::ExitStatus, Duration) {
    let mut child = std::process::Command::new(program)
        .args(arguments)
        .arg(path)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let began = Instant::now();
    // SAFETY: a signal to our own child.
    unsafe { libc::kill(child.id() as i32, signal) };
    (child.wait().unwrap(), began.elapsed())
}

fn who_waits_can_be_killed_at_once(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    fs::write(mounted.path("slow"), b"data").unwrap();
    mounted.control.overwrite("slow", b"DATA");
    *mounted.control.slow.lock() = Duration::from_secs(20);
    // A read waits for a page, a stat for its answer, which ends with an INTERRUPT; both by a signal without a handler.
    for (program, name) in [("cat", "slow"), ("stat", "slowname")] {
        for signal in [libc::SIGKILL, libc::SIGTERM] {
            let (status, took) = signalled(program, &[], &mounted.path(name), signal);
            assert!(!status.success() && took < Duration::from_secs(5), "{program} took {took:?}");
        }
    }
    *mounted.control.slow.lock() = Duration::ZERO;
    mounted.end();
}

fn signals_with_a_handler_disturb_nobody(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    fs::write(mounted.path("slowname"), b"data").unwrap();
    *mounted.control.slow.lock() = Duration::from_secs(2);
    let script = ["-c", "trap : USR1; [[ -e $0 ]]"];
    let (status, took) = signalled("bash", &script, &mounted.path("slowname"), libc::SIGUSR1);
    assert!(status.success(), "stat of an existing file failed because of a signal");
    assert!(took > Duration::from_millis(500));
    *mounted.control.slow.lock() = Duration::ZERO;
    mounted.end();
}
