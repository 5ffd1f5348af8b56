//! Extended attributes and access control lists on the mount: what random operations on a local directory's terms do not
//! reach.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{fs, path::Path, process::Command};

use fjordfs_tests::{Cluster, Setup, process::Run, run};
use rustix::{
    fs::{XattrFlags, getxattr, listxattr, lsetxattr, setxattr},
    io::Errno,
};

fn names(path: &Path) -> Vec<String> {
    let mut list = vec![0; 64 << 10];
    let length = listxattr(path, &mut list[..]).unwrap();
    let names = list[..length].split(|b| *b == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8_lossy(name).into_owned()).collect()
}

fn as_user(dir: &Path, uid: u32, line: &str) -> Run {
    let mut command = Command::new("setpriv");
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={uid}"));
    command.args([&uid, &gid, "--clear-groups", "--inh-caps=-all", "bash", "-c", line]).current_dir(dir);
    run(command)
}

#[test]
fn extended_attributes_up_to_the_limits() {
    let cluster = Cluster::start("xattrs", Setup::default());
    fs::set_permissions(cluster.folder(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
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
