//! Extended attributes and access control lists on the mount: what random operations on a local directory's terms do not
//! reach.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
};

use fjordfs_tests::{
    Cluster, Setup,
    process::{Run, sh},
    rng, run,
};
use rustix::{
    fs::{CWD, FileType, Mode, XattrFlags, getxattr, listxattr, lsetxattr, mknodat, removexattr, setxattr},
    io::Errno,
};

fn names(path: &Path) -> Vec<String> {
    let mut list = vec![0; 64 << 10];
    let length = listxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|b| *b == 0).filter(|name| !name.is_empty());
    let mut names: Vec<String> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.sort();
    names
}

fn as_user(dir: &Path, uid: u32, line: &str) -> Run {
    let mut command = Command::new("setpriv");
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
    command.args([&uid, &gid, "--clear-groups", "--inh-caps=-all", "bash", "-c", line]).current_dir(dir);
    run(command)
}

#[test]
fn a_label_that_was_never_set_is_refused_and_one_that_was_is_kept() {
    let cluster = Cluster::start("label", Setup::default());
    let mount = cluster.mount();
    let path = mount.join("f");
    fs::write(&path, b"content").unwrap();
    let mut got = [0; 64];
    assert_eq!(getxattr(&path, "user.never", &mut got[..]), Err(Errno::NODATA));
    setxattr(&path, "security.selinux", b"label", XattrFlags::empty()).unwrap();
    let length = getxattr(&path, "security.selinux", &mut got[..]).unwrap();
    assert_eq!(&got[..length], b"label");
    removexattr(&path, "security.selinux").unwrap();
    assert_eq!(getxattr(&path, "security.selinux", &mut got[..]), Err(Errno::OPNOTSUPP));
    mount.unmount();
}

#[test]
fn extended_attributes_up_to_the_limits() {
    let cluster = Cluster::start("xattrs", Setup::default());
    fs::set_permissions(cluster.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let mount = cluster.mount_with("allow_other");
    let path = mount.join("f");
    fs::write(&path, b"content").unwrap();
    let large: Vec<u8> = (0..65_536u32).map(|i| (i / 7) as u8).collect();
    setxattr(&path, "user.large", &large, XattrFlags::empty()).unwrap();
    let mut got = vec![0; 65_536];
    assert_eq!(getxattr(&path, "user.large", &mut got[..]), Ok(65_536));
    assert!(got == large);
    assert_eq!(getxattr(&path, "user.large", &mut got[..65_535]), Err(Errno::RANGE));
    let too_large = vec![0; 65_537];
    assert_eq!(setxattr(&path, "user.large", &too_large, XattrFlags::empty()), Err(Errno::TOOBIG));
    // As many names as a list can hold, and one more.
    let name = |i: usize| format!("user.{i:0250}");
    let room = (65_536 - "user.large\0".len()) / 256;
    (0..room).for_each(|i| setxattr(&path, name(i), b"v", XattrFlags::CREATE).unwrap());
    assert_eq!(setxattr(&path, name(room), b"v", XattrFlags::CREATE), Err(Errno::NOSPC));
    assert_eq!(names(&path).len(), room + 1);
    // A capability is shown and goes with the first write.
    fs::write(mount.join("ping"), b"program").unwrap();
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    setxattr(mount.join("ping"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    assert_eq!(names(&mount.join("ping")), ["security.capability"]);
    fs::write(mount.join("ping"), b"another").unwrap();
    assert_eq!(names(&mount.join("ping")), [""; 0]);
    // What is only the superuser's is hidden from others.
    setxattr(&path, "trusted.secret", b"x", XattrFlags::empty()).unwrap();
    let listing = as_user(mount.path(), 1234, "getfattr --match=- f").ok();
    assert!(listing.stdout.contains("user.large") && !listing.stdout.contains("secret"), "{listing}");
    as_user(mount.path(), 1234, "setfattr -n user.x -v y f").fails_saying(&["denied"]);
    std::os::unix::fs::symlink("f", mount.join("link")).unwrap();
    assert_eq!(lsetxattr(mount.join("link"), "user.x", b"", XattrFlags::empty()), Err(Errno::PERM));
    lsetxattr(mount.join("link"), "trusted.x", b"", XattrFlags::empty()).unwrap();
    mount.unmount();
    let mount = cluster.mount();
    assert_eq!(names(&mount.join("f")).len(), room + 2);
    mount.unmount();
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An access control list: tag, permissions, id of each entry.
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// User 1000 and group 50 are named, with a mask.
fn named(owner: u16, user: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let nobody = u32::MAX;
    list(&[
        (1, owner, nobody),
        (2, user, 1000),
        (4, group, nobody),
        (8, 4, 50),
        (0x10, mask, nobody),
        (0x20, other, nobody),
    ])
}

/// Everything that lists do in a directory, told in lines.
fn story(dir: &Path) -> Vec<String> {
    let mut told = Vec::new();
    let state = |name: &str| {
        let path = dir.join(name);
        let mode = fs::symlink_metadata(&path).unwrap().mode() & 0o7777;
        let get = |list: &str| {
            let mut value = vec![0; 4096];
            getxattr(&path, list, &mut value[..]).map(|length| value[..length].to_vec())
        };
        format!("{name}: {mode:o} {:?} {:?} {:?}", get(ACCESS), get(DEFAULT), names(&path))
    };
    let set = |name: &str, which: &str, value: &[u8]| {
        let outcome = setxattr(dir.join(name), which, value, XattrFlags::empty());
        format!("{outcome:?} {}", state(name))
    };
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    rustix::process::umask(Mode::from_raw_mode(0o027));
    fs::write(dir.join("f"), b"").unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    told.push(state("f"));
    told.push(state("d"));
    // The list and the mode keep in step.
    told.push(set("f", ACCESS, &named(6, 7, 5, 3, 0)));
    fs::set_permissions(dir.join("f"), fs::Permissions::from_mode(0o4751)).unwrap();
    told.push(state("f"));
    told.push(set("f", ACCESS, &list(&[(1, 6, 0), (4, 2, 0), (0x20, 1, 0)])));
    told.push(set("f", ACCESS, b"nonsense"));
    told.push(set("f", DEFAULT, &named(7, 7, 7, 7, 7)));
    told.push(set("f", ACCESS, &named(7, 7, 7, 7, 7)));
    told.push(format!("{:?}", removexattr(dir.join("f"), ACCESS)));
    told.push(format!("{:?} {}", removexattr(dir.join("f"), ACCESS), state("f")));
    // What a directory passes on; the umask then counts for nothing.
    told.push(set("d", DEFAULT, &named(7, 6, 5, 7, 1)));
    fs::set_permissions(dir.join("d"), fs::Permissions::from_mode(0o2777)).unwrap();
    drop(File::create(dir.join("d/file")).unwrap());
    fs::create_dir(dir.join("d/dir")).unwrap();
    mknodat(CWD, dir.join("d/fifo"), FileType::Fifo, Mode::from_raw_mode(0o666), 0).unwrap();
    std::os::unix::fs::symlink("file", dir.join("d/link")).unwrap();
    drop(File::create(dir.join("d/dir/below")).unwrap());
    for made in ["d/file", "d/dir", "d/fifo", "d/link", "d/dir/below"] {
        told.push(state(made));
    }
    told.push(set("d", DEFAULT, &list(&[(1, 7, 0), (4, 4, 0), (0x20, 4, 0)])));
    drop(File::create(dir.join("d/minimal")).unwrap());
    told.push(state("d/minimal"));
    told.push(format!("{:?}", removexattr(dir.join("d"), DEFAULT)));
    drop(File::create(dir.join("d/plain")).unwrap());
    told.push(state("d/plain"));
    // They are enforced.
    fs::write(dir.join("secret"), b"secret").unwrap();
    told.push(set("secret", ACCESS, &named(6, 4, 0, 6, 0)));
    told.push(format!("{}", as_user(dir, 1000, "cat secret").code()));
    told.push(format!("{}", as_user(dir, 1000, "echo more >>secret").code()));
    told.push(format!("{}", as_user(dir, 50, "cat secret").code()));
    told.push(format!("{}", as_user(dir, 77, "cat secret").code()));
    fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    told.push(format!("{}", as_user(dir, 1000, "cat secret").code()));
    // Whoever is outside the group loses its privilege with the list.
    fs::write(dir.join("sgid"), b"").unwrap();
    std::os::unix::fs::chown(dir.join("sgid"), Some(1000), Some(50)).unwrap();
    fs::set_permissions(dir.join("sgid"), fs::Permissions::from_mode(0o2775)).unwrap();
    let own = "setfattr -n system.posix_acl_access -v 0x02000000010007000000000004000700000000002000050000000000 sgid";
    told.push(format!("{} {}", as_user(dir, 1000, own).code(), state("sgid")));
    told
}

#[test]
fn access_lists_do_what_they_do_locally() {
    let cluster = Cluster::start("acls", Setup::default());
    fs::set_permissions(cluster.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let mount = cluster.mount_with("allow_other");
    let (expected, found) = (story(&cluster.dir("local")), story(mount.path()));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(found, expected);
    }
    assert_eq!(expected.len(), found.len());
    mount.unmount();
}

/// What tools do of themselves within a mount: copy_file_range, and then the copy is looked at and read.
#[test]
fn a_copy_within_the_mount_is_what_it_is_of() {
    let cluster = Cluster::start("copy", Setup::default());
    let (mount, other) = (cluster.mount(), cluster.mount());
    let longer = rng::bytes(1, 300_000);
    for (round, size) in [1, 100, 5000, 70_000, 830_456, (9 << 20) + 5].into_iter().enumerate() {
        let bytes = rng::bytes(size as u64, size);
        let dir = mount.join(format!("dir{round}"));
        fs::create_dir(&dir).unwrap();
        let (source, copy) = (dir.join("source"), dir.join("copy"));
        // Fresh, then known to the servers; to a new name, then to one that is there.
        for settled in [false, true] {
            fs::write(&source, &bytes).unwrap();
            if settled {
                File::open(&source).unwrap().sync_all().unwrap();
            }
            for begin in [None, Some(&longer)] {
                match begin {
                    Some(longer) => fs::write(&copy, longer).unwrap(),
                    None if copy.exists() => fs::remove_file(&copy).unwrap(),
                    None => {}
                }
                let what = format!("{size} bytes, settled: {settled}, new: {}", begin.is_none());
                assert_eq!(fs::copy(&source, &copy).unwrap(), size as u64, "{what}");
                assert_eq!(fs::metadata(&copy).unwrap().len(), size as u64, "{what}");
                assert!(fs::read(&copy).unwrap() == bytes, "{what}");
                let there = other.join(format!("dir{round}/copy"));
                assert!(fs::read(there).unwrap() == bytes, "{what}, on the other mount");
            }
        }
        sh(&dir, "cp source by-cp");
        assert!(fs::read(dir.join("by-cp")).unwrap() == bytes, "cp of {size} bytes");
    }
    mount.unmount();
    other.unmount();
}
