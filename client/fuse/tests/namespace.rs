//! Names, directories, and mounting itself, through real mounts of a filesystem in memory.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fjordfs_fuse::{MountError, MountOptions, TransportChoice, mount_filesystem};
use support::{Control, MemFs, Mounted};

over_each_transport! {
    a_large_directory_is_listed_completely_and_once
    who_looks_at_a_listing_asks_for_nothing_more
    every_kind_of_inode
    renames_with_and_without_flags
    tools_that_ask_for_what_is_not_served_stay_silent
    the_mount_table_shows_type_and_source_and_readahead_is_raised
    read_only_is_read_only
    bad_mount_points_are_refused_with_advice
    busy_is_refused_and_lazy_ends_with_the_last_user
    a_mount_that_somebody_else_ends_is_noticed
    an_abort_with_requests_in_flight_ends_everything
}

fn a_large_directory_is_listed_completely_and_once(transport: TransportChoice) {
    // With attributes in the listing (READDIRPLUS) and without.
    for left in [Duration::ZERO, Duration::from_secs(3600)] {
        let Some(mounted) = Mounted::new(transport, "") else { return };
        *mounted.control.left.lock() = left;
        let expected: BTreeSet<String> =
            (0..20_000).map(|i| format!("file-{i}-{}", "x".repeat(i % 200))).collect();
        for name in &expected {
            File::create(mounted.path(name)).unwrap();
        }
        let mut seen = BTreeSet::new();
        for entry in fs::read_dir(mounted.dir.path()).unwrap() {
            let entry = entry.unwrap();
            assert!(entry.file_type().unwrap().is_file());
            assert!(seen.insert(entry.file_name().into_string().unwrap()), "twice");
        }
        assert!(seen == expected, "{} of {}", seen.len(), expected.len());
        let listing = std::process::Command::new("ls").arg("-la").arg(mounted.dir.path()).output().unwrap();
        assert!(listing.status.success() && listing.stderr.is_empty());
        assert_eq!(listing.stdout.iter().filter(|byte| **byte == b'\n').count(), 20_003);
        // Removing while listing: whatever is there at the end is listed.
        for entry in fs::read_dir(mounted.dir.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        assert_eq!(fs::read_dir(mounted.dir.path()).unwrap().count(), 0);
        mounted.end();
    }
}

fn who_looks_at_a_listing_asks_for_nothing_more(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    *mounted.control.left.lock() = Duration::from_secs(3600);
    let names: Vec<String> = (0..1000).map(|i| format!("file-{i}")).collect();
    names.iter().for_each(|name| mounted.control.make_file(name, name.as_bytes()));
    let asked = || {
        let control = &mounted.control;
        control.lookups.load(Ordering::SeqCst) + control.getattrs.load(Ordering::SeqCst)
    };
    let look = || {
        for name in &names {
            assert_eq!(support::size(&mounted.path(name)), name.len() as u64);
        }
    };
    assert_eq!(fs::read_dir(mounted.dir.path()).unwrap().count(), names.len());
    let before = asked();
    look();
    assert!(asked() <= before + 2, "{} of {}", asked() - before, names.len());

    // What others change after the listing is seen, and costs one question each.
    let inodes: Vec<u64> =
        names.iter().map(|name| mounted.control.find(1, name.as_bytes()).unwrap()).collect();
    mounted.control.overwrite(&names[7], b"longer than before");
    mounted.control.recall(&inodes, false);
    assert_eq!(support::size(&mounted.path(&names[7])), 18);
    let before = asked();
    mounted.control.recall(&[1], true);
    fs::metadata(mounted.path(&names[8])).unwrap();
    assert!(asked() > before);
    mounted.end();
}

fn every_kind_of_inode(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    fs::create_dir(mounted.path("dir")).unwrap();
    assert_eq!(fs::create_dir(mounted.path("dir")).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    std::os::unix::fs::symlink("dir/target", mounted.path("link")).unwrap();
    assert_eq!(fs::read_link(mounted.path("link")).unwrap().to_str(), Some("dir/target"));
    fs::write(mounted.path("dir/target"), "through the link").unwrap();
    assert_eq!(fs::read_to_string(mounted.path("link")).unwrap(), "through the link");
    fs::hard_link(mounted.path("dir/target"), mounted.path("hard")).unwrap();
    assert_eq!(fs::metadata(mounted.path("hard")).unwrap().nlink(), 2);
    let name = |name: &str| std::ffi::CString::new(mounted.path(name).to_str().unwrap()).unwrap();
    // SAFETY: NUL-terminated paths.
    unsafe {
        assert_eq!(libc::mkfifo(name("fifo").as_ptr(), 0o600), 0);
        assert_eq!(libc::mknod(name("null").as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, 3)), 0);
    }
    assert!(fs::metadata(mounted.path("fifo")).unwrap().file_type().is_fifo());
    let null = fs::metadata(mounted.path("null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), libc::makedev(1, 3));
    let mut nothing = [0];
    assert_eq!(File::open(mounted.path("null")).unwrap().read(&mut nothing).unwrap(), 0);
    let socket = std::os::unix::net::UnixListener::bind(mounted.path("socket")).unwrap();
    assert!(fs::metadata(mounted.path("socket")).unwrap().file_type().is_socket());
    drop(socket);
    assert_eq!(fs::remove_dir(mounted.path("dir")).unwrap_err().raw_os_error(), Some(libc::ENOTEMPTY));
    let long = "n".repeat(256);
    assert_eq!(File::create(mounted.path(&long)).unwrap_err().raw_os_error(), Some(libc::ENAMETOOLONG));
    File::create(mounted.path(&long[1..])).unwrap();
    mounted.end();
}

fn renames_with_and_without_flags(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let rename = |old: &str, new: &str, flags: u32| {
        let name = |name: &str| std::ffi::CString::new(mounted.path(name).to_str().unwrap()).unwrap();
        // SAFETY: NUL-terminated paths.
        match unsafe { libc::renameat2(-1, name(old).as_ptr(), -1, name(new).as_ptr(), flags) } {
            0 => 0,
            _ => std::io::Error::last_os_error().raw_os_error().unwrap(),
        }
    };
    fs::write(mounted.path("a"), "a").unwrap();
    fs::write(mounted.path("b"), "b").unwrap();
    assert_eq!(rename("a", "b", libc::RENAME_NOREPLACE), libc::EEXIST);
    assert_eq!(rename("a", "b", libc::RENAME_EXCHANGE), 0);
    assert_eq!(fs::read_to_string(mounted.path("a")).unwrap(), "b");
    assert_eq!(rename("a", "c", libc::RENAME_WHITEOUT), libc::EINVAL);
    assert_eq!(rename("a", "b", 0), 0);
    assert_eq!(fs::read_to_string(mounted.path("b")).unwrap(), "b");
    assert!(!mounted.path("a").exists());
    mounted.end();
}

fn tools_that_ask_for_what_is_not_served_stay_silent(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "") else { return };
    let script = "set -e; cd \"$0\"; mkdir src; echo data > src/file; ln -s file src/link; \
        cp -a src copy; diff -r src copy; tar cf - src | tar xf - -C copy; ls -laR . > /dev/null; \
        df . > /dev/null; truncate -s 1M src/sparse; cp --sparse=always src/sparse src/sparse2; sync -f .; \
        dd if=/dev/zero of=src/dd bs=64k count=3 conv=fsync status=none; mv src moved; rm -r moved copy";
    let output =
        std::process::Command::new("bash").arg("-c").arg(script).arg(mounted.dir.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    mounted.end();
}

fn the_mount_table_shows_type_and_source_and_readahead_is_raised(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "nosuid,read_ahead_kb=2048") else { return };
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let path = mounted.dir.path().to_str().unwrap();
    let line = mountinfo.lines().find(|line| line.contains(path)).unwrap();
    assert!(line.contains(" fuse.fjord memory,with\\040comma "), "{line}");
    assert!(line.contains("nosuid") && line.contains("default_permissions"), "{line}");
    let device = line.split(' ').nth(2).unwrap();
    let read_ahead = fs::read_to_string(format!("/sys/class/bdi/{device}/read_ahead_kb")).unwrap();
    assert_eq!(read_ahead.trim(), "2048");
    mounted.end();
}

fn read_only_is_read_only(transport: TransportChoice) {
    let Some(mounted) = Mounted::new(transport, "ro") else { return };
    assert_eq!(File::create(mounted.path("x")).unwrap_err().raw_os_error(), Some(libc::EROFS));
    mounted.end();
}

fn bad_mount_points_are_refused_with_advice(transport: TransportChoice) {
    let Some(mut mounted) = Mounted::new(transport, "") else { return };
    let again = |nonempty: bool| {
        let mut options = MountOptions::new("x", mounted.dir.path());
        options.nonempty = nonempty;
        mount_filesystem(MemFs(Control::new()), &options)
    };
    let error = again(true).unwrap_err();
    assert!(matches!(error, MountError::AlreadyMounted { .. }), "{error}");
    assert!(error.to_string().contains("memory,with comma"));
    mounted.mount.unmount().unwrap();
    // Not mounted any more: fine to ask again, fine to mount again.
    mounted.mount.unmount().unwrap();
    let options = MountOptions::new("x", mounted.dir.path());
    drop(mount_filesystem(MemFs(Control::new()), &options).unwrap());
    assert!(
        !fs::read_to_string("/proc/self/mountinfo").unwrap().contains(mounted.dir.path().to_str().unwrap())
    );
}

fn busy_is_refused_and_lazy_ends_with_the_last_user(transport: TransportChoice) {
    let Some(mut mounted) = Mounted::new(transport, "") else { return };
    fs::write(mounted.path("file"), "held").unwrap();
    let mut held = File::open(mounted.path("file")).unwrap();
    let error = mounted.mount.unmount().unwrap_err();
    assert!(matches!(error, MountError::Busy(_)), "{error}");
    assert_eq!(fs::read_to_string(mounted.path("file")).unwrap(), "held");
    mounted.mount.unmounter().unmount(true).unwrap();
    assert!(!mounted.path("file").exists());
    let mut text = String::new();
    held.read_to_string(&mut text).unwrap();
    assert_eq!(text, "held");
    drop(held);
    mounted.mount.wait();
}

fn a_mount_that_somebody_else_ends_is_noticed(transport: TransportChoice) {
    let Some(mut mounted) = Mounted::new(transport, "") else { return };
    let path = mounted.dir.path().to_owned();
    let unmounting = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        assert!(std::process::Command::new("umount").arg(path).status().unwrap().success());
    });
    mounted.mount.wait();
    unmounting.join().unwrap();
    mounted.end();
}

fn an_abort_with_requests_in_flight_ends_everything(transport: TransportChoice) {
    let Some(mut mounted) = Mounted::new(transport, "") else { return };
    fs::write(mounted.path("slow"), "data").unwrap();
    mounted.control.overwrite("slow", b"DATA");
    *mounted.control.slow.lock() = Duration::from_secs(2);
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let path = mounted.path("slow");
            std::thread::spawn(move || fs::read(path))
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let minor = fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .lines()
        .find(|line| line.contains(mounted.dir.path().to_str().unwrap()))
        .and_then(|line| line.split(' ').nth(2)?.split(':').nth(1)?.parse::<u32>().ok())
        .unwrap();
    let abort = format!("/sys/fs/fuse/connections/{minor}/abort");
    let control_is_mounted = std::path::Path::new(&abort).exists();
    if control_is_mounted {
        fs::write(&abort, "1").unwrap();
    } else {
        // What `umount -f` does.
        let path = std::ffi::CString::new(mounted.dir.path().to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE) };
    }
    let began = Instant::now();
    for reader in readers {
        assert!(reader.join().unwrap().is_err());
    }
    assert!(began.elapsed() < Duration::from_millis(1500), "readers waited for their answers");
    mounted.mount.wait();
    // What is left is a dead mount, which the next one would be refused on.
    let options = MountOptions::new("x", mounted.dir.path());
    let error = mount_filesystem(MemFs(Arc::clone(&mounted.control)), &options).unwrap_err();
    assert!(matches!(error, MountError::Dead(_)), "{error}");
    mounted.mount.unmounter().unmount(false).unwrap();
    mounted.end();
}
