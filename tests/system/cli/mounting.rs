//! `fjord mount` and `fjord umount`, also as mount(8) and ordinary users call them.

use std::{
    fs,
    io::{ErrorKind, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use fjordfs_tests::{
    Cluster, Setup, fjord, fjord_bin,
    mountpoint::{detach, is_mounted, wait_unmounted},
    process::{have, sh},
    rng, run,
    wait::{SOON, wait_until},
};

use super::text;

/// `/sbin/mount.fuse.fjord`, for as long as this lives.
struct MountHelper(PathBuf);

impl MountHelper {
    fn install() -> MountHelper {
        let path = PathBuf::from("/sbin/mount.fuse.fjord");
        // What a person has installed is not replaced by the binary under test.
        assert!(!path.exists(), "{} exists already: remove it to run this test", path.display());
        let _ = fs::remove_file(&path);
        symlink(fjord_bin(), &path).unwrap();
        MountHelper(path)
    }
}

impl Drop for MountHelper {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A folder that is unmounted whatever happens.
struct Unmounted(PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// Of a mount that is read-only, nosuid and nodev: it becomes writable and read-only again, and nothing else changes.
fn remounts(cluster: &Cluster, dir: &Path) {
    let options = || sh(cluster.folder(), &format!("findmnt -no VFS-OPTIONS {}", dir.display())).stdout;
    sh(cluster.folder(), &format!("mount -o remount,rw {}", dir.display()));
    let mut file = fs::File::create(dir.join("r")).unwrap();
    file.write_all(b"written").unwrap();
    let ro = format!("mount -o remount,ro {}", dir.display());
    let busy = run(shell(&ro));
    busy.fails_saying(&["in use"]);
    drop(file);
    wait_until("the file to be closed", SOON, || run(shell(&ro)).status.success());
    assert_eq!(fs::write(dir.join("r"), b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
    assert_eq!(fs::read(dir.join("r")).unwrap(), b"written");
    let options = options();
    for word in ["ro", "nosuid", "nodev", "noatime"] {
        assert!(options.trim().split(',').any(|option| option == word), "'{word}' is missing in {options}");
    }
    let elsewhere = cluster.dir("no-mount");
    run(fjord(["mount", "nowhere:1", text(&elsewhere), "-o", "remount,ro"]))
        .fails_saying(&["no FjordFS is mounted on", text(&elsewhere)]);
}

fn shell(line: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    command
}

#[test]
fn a_folder_is_mounted_without_what_is_around_it() {
    let cluster = Cluster::start("folder", Setup::default());
    let whole = cluster.mount();
    fs::create_dir_all(whole.join("teams/vision/deep")).unwrap();
    fs::write(whole.join("teams/secret"), b"secret").unwrap();
    fs::write(whole.join("teams/vision/f"), b"shared").unwrap();
    symlink("/teams/vision", whole.join("link")).unwrap();
    for (source, options) in [("/teams/vision", "nosuid,noatime"), ("/link", "rw")] {
        let dir = Unmounted(cluster.dir("one"));
        let source = format!("{}:{source}", cluster.meta_address());
        run(fjord(["mount", &source, text(&dir.0), "-o", options])).ok();
        assert_eq!(fs::read(dir.0.join("f")).unwrap(), b"shared");
        let up = dir.0.join("deep/../..").canonicalize().unwrap();
        assert_eq!(up, dir.0.parent().unwrap().canonicalize().unwrap(), "above it is what it is mounted in");
        symlink("../secret", dir.0.join("out")).unwrap();
        assert_eq!(fs::read(dir.0.join("out")).unwrap_err().kind(), ErrorKind::NotFound);
        fs::remove_file(dir.0.join("out")).unwrap();
        // Both see what the other does, and the verbs know where it is.
        fs::write(dir.0.join("deep/g"), source.as_bytes()).unwrap();
        assert_eq!(fs::read(whole.join("teams/vision/deep/g")).unwrap(), source.as_bytes());
        let stat = run(fjord(["stat", text(&dir.0.join("f"))])).ok().stdout;
        assert!(stat.starts_with("/teams/vision/f:"), "{stat}");
        let line = format!("findmnt -no FSTYPE,SOURCE,OPTIONS {}", dir.0.display());
        let found = sh(cluster.folder(), &line).stdout;
        assert!(found.starts_with("fuse.fjord") && found.contains("[/teams/vision]"), "{found}");
        assert_eq!(found.contains("nosuid"), options.contains("nosuid"), "{found}");
        run(fjord(["mount", "nowhere:1", text(&dir.0), "-o", "remount,ro"])).ok();
        assert_eq!(fs::write(dir.0.join("f"), b"x").unwrap_err().raw_os_error(), Some(libc::EROFS));
        run(fjord(["mount", "nowhere:1", text(&dir.0), "-o", "remount,rw"])).ok();
        run(fjord(["umount", text(&dir.0)])).ok();
        assert!(!is_mounted(&dir.0));
    }
    let dir = Unmounted(cluster.dir("none"));
    for (folder, word) in [("/teams/missing", "No such file"), ("/teams/secret", "Not a directory")] {
        let source = format!("{}:{folder}", cluster.meta_address());
        run(fjord(["mount", &source, text(&dir.0)])).fails_saying(&[folder, word]);
        assert!(!is_mounted(&dir.0));
    }
    whole.unmount();
}

#[test]
fn mount8_and_fstab() {
    let cluster = Cluster::start("mount8", Setup::default());
    let dir = Unmounted(cluster.dir("by-mount8"));
    let meta = cluster.meta_address();
    let _helper = MountHelper::install();
    let line = format!("mount -t fuse.fjord -o nosuid,nodev,noatime,ro {meta} {}", dir.0.display());
    sh(cluster.folder(), &line);
    assert!(is_mounted(&dir.0));
    let options =
        sh(cluster.folder(), &format!("findmnt -no FSTYPE,SOURCE,OPTIONS {}", dir.0.display())).stdout;
    for word in ["fuse.fjord", meta.as_str(), "nosuid", "nodev", "noatime", "ro"] {
        assert!(options.contains(word), "'{word}' is missing in {options}");
    }
    let error = fs::write(dir.0.join("f"), b"x").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    remounts(&cluster, &dir.0);
    sh(cluster.folder(), &format!("umount {}", dir.0.display()));
    wait_unmounted(&dir.0);
    // An fstab of our own: mount(8) reads source, type and options from it.
    let fstab = cluster.folder().join("fstab");
    fs::write(
        &fstab,
        format!("{meta} {} fuse.fjord rw,noauto,x-systemd.automount,_netdev 0 0\n", dir.0.display()),
    )
    .unwrap();
    sh(cluster.folder(), &format!("mount -T {} {}", fstab.display(), dir.0.display()));
    fs::write(dir.0.join("f"), b"x").unwrap();
    run(fjord(["umount", text(&dir.0)])).ok();
    assert!(!is_mounted(&dir.0));
    // Unmounted by umount(8), everything written must have arrived, too.
    sh(cluster.folder(), &format!("mount -T {} {}", fstab.display(), dir.0.display()));
    assert_eq!(fs::read(dir.0.join("f")).unwrap(), b"x");
    fs::write(dir.0.join("g"), rng::bytes(3, 3 << 20)).unwrap();
    sh(cluster.folder(), &format!("umount {}", dir.0.display()));
    let mount = cluster.mount();
    assert!(fs::read(mount.join("g")).unwrap() == rng::bytes(3, 3 << 20));
    mount.unmount();
}

#[test]
fn a_mount_in_the_background_and_its_end() {
    let cluster = Cluster::start("background", Setup::default());
    let dir = Unmounted(cluster.dir("background"));
    let log = cluster.folder().join("background-mount.log");
    let option = format!("log={}", log.display());
    cluster.fjord(["mount", &cluster.meta_address(), text(&dir.0), "-o", &option]).ok();
    assert!(is_mounted(&dir.0));
    let open = fs::File::create(dir.0.join("f")).unwrap();
    // In use: refused with a reason, not hung, and nothing is torn down.
    cluster.fjord(["umount", text(&dir.0)]).fails_saying(&[text(&dir.0), "in use"]);
    fs::write(dir.0.join("g"), b"still works").unwrap();
    drop(open);
    cluster.fjord(["umount", text(&dir.0)]).ok();
    assert!(!is_mounted(&dir.0));
    let left = fjordfs_tests::process::fjords_with(text(&dir.0));
    assert!(left.is_empty(), "processes {left:?} are left of the mount");
}

#[test]
fn an_ordinary_user_mounts_through_fusermount() {
    if !have("fusermount3") || !have("setpriv") {
        return;
    }
    let cluster = Cluster::start("user", Setup::default());
    let home = cluster.dir("home");
    fs::set_permissions(cluster.folder(), fs::Permissions::from_mode(0o755)).unwrap();
    let bin = cluster.folder().join("fjord");
    // The binary may lie below a folder that only root can enter.
    fs::copy(fjord_bin(), &bin).unwrap();
    std::os::unix::fs::chown(&home, Some(65_534), Some(65_534)).unwrap();
    let mountpoint = home.join("mnt");
    let dir = Unmounted(mountpoint.clone());
    let root_mount = cluster.mount();
    fs::create_dir(root_mount.join("users")).unwrap();
    fs::set_permissions(root_mount.join("users"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::create_dir(root_mount.join("private")).unwrap();
    fs::set_permissions(root_mount.join("private"), fs::Permissions::from_mode(0o700)).unwrap();
    let device = fs::metadata("/dev/fuse").unwrap().permissions();
    if device.mode() & 0o006 != 0o006 {
        eprintln!("/dev/fuse is closed to users on this machine: opened for the length of this test");
    }
    let _open = OpenDevice::new(device);
    let as_user = |line: &str| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--inh-caps=-all",
            "bash",
            "-euc",
            line,
        ]);
        command.env("HOME", &home).current_dir("/");
        run(command)
    };
    let (bin, mnt) = (bin.display(), mountpoint.display());
    as_user(&format!(
        "mkdir {mnt}; {bin} mount {} {mnt} -o log={}",
        cluster.meta_address(),
        home.join("log").display()
    ))
    .ok();
    let said = as_user(&format!(
        "cd {mnt}/users; echo mine >f; stat -c %u:%g f; cat f; ls {mnt}/private || echo refused"
    ))
    .ok();
    assert_eq!(said.stdout.lines().collect::<Vec<_>>(), ["65534:65534", "mine", "refused"], "{said}");
    as_user(&format!("{bin} umount {mnt}")).ok();
    assert!(!is_mounted(&dir.0));
    assert_eq!(fs::read(root_mount.join("users/f")).unwrap(), b"mine\n");
    root_mount.unmount();
}

/// `/dev/fuse` for everyone, as distributions set it, and as it was again afterwards.
struct OpenDevice(fs::Permissions);

impl OpenDevice {
    fn new(before: fs::Permissions) -> OpenDevice {
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        OpenDevice(before)
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
}
