//! Rules that a local filesystem follows without anybody thinking of them: the same story is told to a local directory and to
//! the mount, line by line.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File, Permissions},
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::Path,
    process::Command,
};

use fjordfs_tests::{Cluster, Setup, process::Run, rng, run};
use rustix::{
    fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, SeekFrom, StatxFlags, fallocate, seek, statx},
    io::Errno,
};

fn as_user(dir: &Path, uid: u32, groups: &str, line: &str) -> Run {
    let mut command = Command::new("setpriv");
    let groups = if groups.is_empty() { "--clear-groups".into() } else { format!("--groups={groups}") };
    let ids = [format!("--reuid={uid}"), format!("--regid={uid}"), groups, "--inh-caps=-all".into()];
    command.args(ids).args(["bash", "-c", line]).current_dir(dir);
    run(command)
}

/// Runs both, compares line by line.
fn same_story(name: &str, story: fn(&Path) -> Vec<String>) {
    let cluster = Cluster::start(name, Setup::default());
    fs::set_permissions(cluster.folder(), Permissions::from_mode(0o755)).unwrap();
    let mount = cluster.mount_with("allow_other");
    let local = cluster.dir("local");
    for dir in [&local, mount.path()] {
        fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    }
    let (expected, found) = (story(&local), story(mount.path()));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(found, expected);
    }
    assert_eq!(expected.len(), found.len());
    mount.unmount();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn sgid_that_privileges_nobody_stays_when_somebody_outside_the_group_writes() {
    let cluster = Cluster::start("sgid", Setup::default());
    fs::set_permissions(cluster.folder(), Permissions::from_mode(0o755)).unwrap();
    let mount = cluster.mount_with("allow_other");
    let file = mount.join("f");
    for (before, after) in [(0o2666, 0o2666), (0o2676, 0o676), (0o6666, 0o2666)] {
        fs::write(&file, b"program").unwrap();
        chown(&file, Some(0), Some(50)).unwrap();
        fs::set_permissions(&file, Permissions::from_mode(before)).unwrap();
        assert_eq!(as_user(mount.path(), 1000, "", "echo more >>f").code(), 0);
        assert_eq!(mode(&file), after, "{before:o}");
    }
    mount.unmount();
}

#[test]
fn who_loses_suid_and_sgid_and_when() {
    same_story("suid", |dir| {
        let mut told = Vec::new();
        let file = dir.join("f");
        fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap();
        // Not sgid without group execute, which privileges nobody: ext4 looks at the writer's groups, of which a FUSE filesystem
        // hears nothing.
        for bits in [0o6777, 0o4777, 0o2777] {
            for (line, uid) in [
                ("echo more >>f", 1000),
                ("echo less >f", 1000),
                ("truncate -s 3 f", 1000),
                ("fallocate -l 100 f", 1000),
                ("dd if=/dev/zero of=f bs=4096 count=1 oflag=direct conv=notrunc status=none", 1000),
                ("cat </dev/null >>f", 1000),
                ("echo more >>f", 0),
                ("truncate -s 3 f", 0),
                ("chown 1000 f", 0),
                ("chgrp 1000 f", 0),
                ("chown :1000 f", 1000),
                ("chmod u+w f", 1000),
            ] {
                let _ = fs::remove_file(&file);
                fs::write(&file, b"program").unwrap();
                chown(&file, Some(1000), Some(50)).unwrap();
                fs::set_permissions(&file, Permissions::from_mode(bits)).unwrap();
                let code = as_user(dir, uid, "", line).code();
                told.push(format!("{bits:o} {uid} {line}: {code} {:o}", mode(&file)));
            }
        }
        told
    });
}

#[test]
fn groups_and_sticky_directories() {
    same_story("groups", |dir| {
        let mut told = Vec::new();
        let shared = dir.join("shared");
        fs::create_dir(&shared).unwrap();
        chown(&shared, Some(0), Some(50)).unwrap();
        fs::set_permissions(&shared, Permissions::from_mode(0o3777)).unwrap();
        // Made below a setgid directory by a member of its group and by somebody else.
        for (who, groups) in [(1000, ""), (1001, "50")] {
            let line = format!(
                "umask 0; touch t{who}; mkdir d{who}; mkfifo p{who}; ln -s x l{who}; mkdir -m 2755 s{who}; install -m 2755 /dev/null i{who}; touch g{who}; chmod 2755 g{who}"
            );
            told.push(format!("{}", as_user(&shared, who, groups, &line).code()));
            for kind in ["t", "d", "p", "l", "s", "i", "g"] {
                let meta = fs::symlink_metadata(shared.join(format!("{kind}{who}"))).unwrap();
                told.push(format!("{kind}{who} {:o} {}:{}", meta.mode(), meta.uid(), meta.gid()));
            }
        }
        // Others' files in a sticky directory.
        for line in [
            "rm -f t1001",
            "mv t1001 x",
            "rmdir d1001",
            "mv t1000 t1001",
            "ln t1001 hard",
            "chmod 600 t1001",
            "touch -d 2001-01-01 t1001",
            "touch t1001",
            "mv t1000 mine && rm mine",
        ] {
            told.push(format!("{line}: {}", as_user(&shared, 1000, "", line).code()));
        }
        // What supplementary groups open.
        fs::write(dir.join("group"), b"x").unwrap();
        chown(dir.join("group"), Some(0), Some(50)).unwrap();
        fs::set_permissions(dir.join("group"), Permissions::from_mode(0o640)).unwrap();
        told.push(format!("{}", as_user(dir, 1000, "", "cat group").code()));
        told.push(format!("{}", as_user(dir, 1000, "50,60", "cat group").code()));
        told
    });
}

#[test]
fn limits_of_size_and_synchronous_writes() {
    same_story("limits", |dir| {
        let mut told = Vec::new();
        let path = dir.join("f");
        let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
        let mut errno = |what: &str, outcome: std::io::Result<()>| {
            told.push(format!("{what}: {:?}", outcome.err().and_then(|e| e.raw_os_error())));
        };
        errno("negative", rustix::fs::ftruncate(&file, u64::MAX).map_err(Into::into));
        errno("fallocate", fallocate(&file, FallocateFlags::empty(), 0, 0).map_err(Into::into));
        errno("seek", seek(&file, SeekFrom::Data(0)).map(drop).map_err(Into::into));
        errno("seek", seek(&file, SeekFrom::Hole(1)).map(drop).map_err(Into::into));
        // The process's own limit.
        let line = "ulimit -f 8; trap '' XFSZ; head -c 20000 /dev/zero >limited 2>/dev/null; echo $?; stat -c %s limited; truncate -s 1M limited 2>/dev/null; echo $?";
        told.push(as_user(dir, 0, "", line).stdout);
        for flag in [OFlags::SYNC, OFlags::DSYNC] {
            let flag = flag.bits().cast_signed();
            let mut synced = File::options().append(true).custom_flags(flag).open(&path).unwrap();
            synced.write_all(b"synchronous").unwrap();
            told.push(format!("{}", fs::metadata(&path).unwrap().len()));
        }
        told
    });
}

#[test]
fn birth_times_are_told_and_stay() {
    let cluster = Cluster::start("birth", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    fs::write(&path, b"x").unwrap();
    let birth = |path: &Path| {
        let all = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let found = statx(CWD, path, AtFlags::empty(), all).unwrap();
        assert!(found.stx_mask & StatxFlags::BTIME.bits() != 0, "no birth time");
        (found.stx_btime.tv_sec, found.stx_btime.tv_nsec)
    };
    let born = birth(&path);
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(&path, b"changed").unwrap();
    fs::rename(&path, mount.join("g")).unwrap();
    assert_eq!(birth(&mount.join("g")), born);
    assert!(birth(mount.path()) < born);
    mount.unmount();
}

#[test]
fn a_file_has_as_many_names_as_anybody_wants() {
    const NAMES: usize = 1500;
    let cluster = Cluster::start("names", Setup::default());
    let mount = cluster.mount();
    fs::write(mount.join("f"), b"x").unwrap();
    (0..NAMES).for_each(|i| fs::hard_link(mount.join("f"), mount.join(format!("n{i}"))).unwrap());
    assert_eq!(fs::metadata(mount.join("n7")).unwrap().nlink(), NAMES as u64 + 1);
    mount.unmount();
}

#[test]
fn what_is_written_synchronously_survives_the_client() {
    let cluster = Cluster::start("dsync", Setup::default());
    let mount = cluster.mount();
    let data = rng::bytes(1, 300_000);
    let open = |name: &str, flag: OFlags| {
        let flag = flag.bits().cast_signed();
        File::options().create_new(true).write(true).custom_flags(flag).open(mount.join(name)).unwrap()
    };
    let files = [open("sync", OFlags::SYNC), open("dsync", OFlags::DSYNC)];
    files.iter().for_each(|file| file.write_all_at(&data, 5).unwrap());
    mount.kill9();
    drop(files);
    let mount = cluster.mount();
    for name in ["sync", "dsync"] {
        assert!(fs::read(mount.join(name)).unwrap()[5..] == data[..], "{name}");
    }
    mount.unmount();
}

#[test]
fn holes_and_copies_free_and_share_space() {
    let cluster = Cluster::start("sharing", Setup::default());
    let mount = cluster.mount();
    let blocks = |name: &str| fs::metadata(mount.join(name)).unwrap().blocks() * 512;
    let mut data = rng::bytes(1, 40 << 20);
    let file = File::options().create_new(true).read(true).write(true).open(mount.join("f")).unwrap();
    file.write_all_at(&data, 0).unwrap();
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 1_000_001, 30_000_000).unwrap();
    data[1_000_001..31_000_001].fill(0);
    assert!(blocks("f") < 13 << 20, "{} bytes are allocated", blocks("f"));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(1_000_001));
    assert_eq!(seek(&file, SeekFrom::Data(1_000_001)), Ok(31_000_001));
    assert_eq!(seek(&file, SeekFrom::Data(40 << 20)), Err(Errno::NXIO));
    let shards = || {
        // Reported with a heartbeat.
        std::thread::sleep(std::time::Duration::from_secs(2));
        cluster.status().shards()
    };
    file.sync_all().unwrap();
    let before = shards();
    // A copy is a matter of metadata, and outlives what it was copied from.
    let copy = File::create_new(mount.join("copy")).unwrap();
    let (mut from, mut to, mut left) = (0, 0, data.len());
    while left > 0 {
        left -= rustix::fs::copy_file_range(&file, Some(&mut from), &copy, Some(&mut to), left).unwrap();
    }
    copy.sync_all().unwrap();
    assert_eq!(shards(), before);
    drop((file, copy));
    fs::remove_file(mount.join("f")).unwrap();
    mount.unmount();
    let mount = cluster.mount();
    assert!(fs::read(mount.join("copy")).unwrap() == data);
    assert_eq!(mode(&mount.join("copy")) & 0o777, 0o666 & !umask());
    mount.unmount();
}

fn umask() -> u32 {
    let umask = rustix::process::umask(Mode::empty());
    rustix::process::umask(umask);
    umask.as_raw_mode()
}

#[test]
fn what_was_written_through_a_mapping_is_data_for_seek() {
    same_story("seek-mapped", |dir| {
        let path = dir.join("f");
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        // SAFETY: nobody truncates the file while the map lives.
        let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
        let reader = File::open(&path).unwrap();
        let empty = seek(&reader, SeekFrom::Data(0)) == Err(Errno::NXIO);
        assert_eq!(map[500_000], 0);
        map[500_000..500_005].copy_from_slice(b"hello");
        let data = seek(&reader, SeekFrom::Data(0)).unwrap();
        let copy = dir.join("copy");
        assert!(Command::new("cp").args([&path, &copy]).status().unwrap().success());
        vec![
            format!("empty at first: {empty}"),
            format!("data is found before it: {}", (1..=500_000).contains(&data)),
            format!("a copy has it: {}", fs::read(&copy).unwrap() == fs::read(&path).unwrap()),
        ]
    });
}

#[test]
fn an_append_takes_the_capabilities_of_a_file() {
    same_story("capability", |dir| {
        let path = dir.join("f");
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let has = || rustix::fs::getxattr(&path, "security.capability", &mut [0u8; 64][..]).is_ok();
        fs::write(&path, "program").unwrap();
        let mut lines = Vec::new();
        for append in [false, true] {
            rustix::fs::setxattr(&path, "security.capability", &capability, rustix::fs::XattrFlags::empty())
                .unwrap();
            lines.push(format!("set: {}", has()));
            File::options().write(true).append(append).open(&path).unwrap().write_all(b"more").unwrap();
            lines.push(format!("written, appending {append}: {}", has()));
        }
        let mut log = File::options().append(true).open(&path).unwrap();
        for _ in 0..2 {
            log.write_all(b"more").unwrap();
            let capabilities = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(&path, "security.capability", &capability, capabilities).unwrap();
        }
        log.write_all(b"more").unwrap();
        lines.push(format!("set while it was open: {}", has()));
        lines
    });
}

#[test]
fn a_current_directory_that_was_removed_is_empty_and_has_attributes() {
    same_story("removed-directory", |dir| {
        let line = "mkdir d && cd d && rmdir ../d && stat -c '%F %A' . && ls -A; stat x; echo x >x; echo end";
        let mut command = Command::new("bash");
        command.args(["-c", line]).current_dir(dir);
        let run = run(command);
        vec![run.stdout.clone(), run.stderr.clone()]
    });
}
