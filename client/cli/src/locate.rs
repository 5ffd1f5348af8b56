//! Which cluster, and which path in it, an argument means.
//!
//! A path is one of
//! - a path inside a FjordFS mount of this machine: the cluster is the mount's;
//! - `HOST:PORT:/path`: a path in that cluster, no mount needed;
//! - with `--meta HOST:PORT` or FJORD_META, an absolute path that lies in no FjordFS mount: a path in that cluster.

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

use crate::mounts::{self, MountEntry};

/// Where a metaserver is looked for when nothing says otherwise.
pub(crate) const DEFAULT_META: &str = "127.0.0.1:7440";

/// `--meta`, shared by the admin verbs.
#[derive(clap::Args, Clone, Default)]
pub(crate) struct MetaArg {
    /// Address of the metaserver
    #[arg(long, env = "FJORD_META", value_name = "HOST:PORT")]
    pub(crate) meta: Option<String>,
}

/// Of verbs that only show something.
#[derive(clap::Args)]
pub(crate) struct ShowArgs {
    #[command(flatten)]
    pub(crate) meta: MetaArg,
    /// Print JSON; the names of its fields are stable
    #[arg(long)]
    pub(crate) json: bool,
}

/// A path in a cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Location {
    /// `host:port` of the metaserver.
    pub(crate) meta: String,
    /// Absolute, from the root of the filesystem.
    pub(crate) path: PathBuf,
    /// The mount it was found through.
    pub(crate) mountpoint: Option<PathBuf>,
}

/// The cluster that a verb without a path speaks to.
pub(crate) fn cluster(meta: &MetaArg, path: Option<&Path>) -> anyhow::Result<String> {
    if let Some(path) = path {
        return Ok(locate(meta, path)?.meta);
    }
    if let Some(meta) = &meta.meta {
        return Ok(meta.clone());
    }
    let mounts = mounts::read().context("cannot read /proc/self/mountinfo")?;
    Ok(ambient(&mounts, std::env::current_dir().ok().as_deref()))
}

/// The cluster of the current folder's mount, else the only one mounted, else the default.
fn ambient(mounts: &[MountEntry], current: Option<&Path>) -> String {
    if let Some((mount, _)) = current.and_then(|dir| mounts::covering(mounts, dir))
        && mount.is_ours()
    {
        return mount.source.clone();
    }
    let mut sources = mounts.iter().filter(|m| m.is_ours()).map(|m| &m.source);
    match sources.next() {
        Some(first) if sources.all(|other| other == first) => first.clone(),
        _ => DEFAULT_META.to_owned(),
    }
}

/// Where `path` is, as its own last component (a symbolic link there is not followed).
pub(crate) fn locate(meta: &MetaArg, path: &Path) -> anyhow::Result<Location> {
    if let Some((meta, path)) = remote(path) {
        return Ok(Location { meta, path, mountpoint: None });
    }
    let mounts = mounts::read().context("cannot read /proc/self/mountinfo")?;
    let real = resolve_existing(path);
    if let Some(found) = real.as_deref().and_then(|real| within(&mounts, real)) {
        return Ok(found);
    }
    match &meta.meta {
        Some(meta) if path.is_absolute() => {
            Ok(Location { meta: meta.clone(), path: path.to_owned(), mountpoint: None })
        }
        _ => bail!(
            "{} is not in a FjordFS mount: give a path below a mount point, HOST:PORT:/path, or --meta HOST:PORT \
             with an absolute path",
            path.display()
        ),
    }
}

fn within(mounts: &[MountEntry], real: &Path) -> Option<Location> {
    let (mount, below) = mounts::covering(mounts, real)?;
    mount.is_ours().then(|| Location {
        meta: mount.source.clone(),
        path: mount.root.join(below),
        mountpoint: Some(mount.mountpoint.clone()),
    })
}

/// `HOST:PORT:/path`.
fn remote(path: &Path) -> Option<(String, PathBuf)> {
    let bytes = path.as_os_str().as_bytes();
    let cut = bytes.windows(2).position(|w| w == b":/")?;
    let address = std::str::from_utf8(&bytes[..cut]).ok()?;
    let (host, port) = address.rsplit_once(':')?;
    if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
        return None;
    }
    Some((address.to_owned(), PathBuf::from(OsStr::from_bytes(&bytes[cut + 1..]))))
}

/// The path with every symbolic link but a last one followed. What does not exist yet is kept as written below the
/// deepest folder that does.
fn resolve_existing(path: &Path) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    let Some(name) = path.file_name() else { return path.canonicalize().ok() };
    let mut missing = vec![name.to_owned()];
    let mut parent = path.parent()?;
    loop {
        match parent.canonicalize() {
            Ok(real) => return Some(missing.iter().rev().fold(real, |path, name| path.join(name))),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                missing.push(parent.file_name()?.to_owned());
                parent = parent.parent()?;
            }
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(mountpoint: &str, root: &str, fstype: &str, source: &str) -> MountEntry {
        MountEntry {
            device: "0:1".into(),
            root: root.into(),
            mountpoint: mountpoint.into(),
            fstype: fstype.into(),
            source: source.into(),
        }
    }

    #[test]
    fn remote_paths() {
        let of = |text: &str| remote(Path::new(text));
        assert_eq!(of("10.0.0.1:7440:/a/b"), Some(("10.0.0.1:7440".into(), "/a/b".into())));
        assert_eq!(of("[::1]:7440:/"), Some(("[::1]:7440".into(), "/".into())));
        assert_eq!(of("meta.example:1:/x:/y"), Some(("meta.example:1".into(), "/x:/y".into())));
        for local in ["/a/b", "a:/b", "./h:1:/b", "h:99999:/b", ":1:/b", "h:1:b", "c:7440"] {
            assert_eq!(of(local), None, "{local}");
        }
    }

    #[test]
    fn paths_below_a_mount_are_paths_in_the_filesystem() {
        let mounts = [
            mount("/", "/", "ext4", "/dev/vda"),
            mount("/mnt/fjord", "/", "fuse.fjord", "m:1"),
            mount("/srv", "/sets", "fuse.fjord", "m:1"),
            mount("/mnt/fjord/tmp", "/", "tmpfs", "tmpfs"),
        ];
        let of = |path: &str| within(&mounts, Path::new(path)).map(|l| l.path);
        assert_eq!(of("/mnt/fjord/a/b"), Some("/a/b".into()));
        assert_eq!(of("/mnt/fjord"), Some("/".into()));
        assert_eq!(of("/srv/x"), Some("/sets/x".into()));
        assert_eq!(of("/mnt/fjord/tmp/x"), None);
        assert_eq!(of("/home"), None);
    }

    #[test]
    fn the_ambient_cluster() {
        let one = mount("/one", "/", "fuse.fjord", "m:1");
        let two = mount("/two", "/", "fuse.fjord", "m:2");
        assert_eq!(ambient(&[], None), DEFAULT_META);
        assert_eq!(ambient(std::slice::from_ref(&one), None), "m:1");
        assert_eq!(ambient(&[one.clone(), two.clone()], None), DEFAULT_META);
        assert_eq!(ambient(&[one, two], Some(Path::new("/two/x"))), "m:2");
    }

    #[test]
    fn a_path_that_does_not_exist_yet_is_resolved_as_far_as_it_does() {
        let real = std::env::temp_dir().canonicalize().unwrap();
        assert_eq!(
            resolve_existing(&std::env::temp_dir().join("no/such/thing")),
            Some(real.join("no/such/thing"))
        );
    }

    #[test]
    fn a_local_path_without_a_cluster_is_an_error_that_says_what_to_write() {
        let error = locate(&MetaArg::default(), Path::new("/etc/passwd")).unwrap_err().to_string();
        assert!(error.contains("/etc/passwd") && error.contains("--meta"), "{error}");
        let meta = MetaArg { meta: Some("m:1".into()) };
        assert_eq!(locate(&meta, Path::new("/etc/passwd")).unwrap().path, Path::new("/etc/passwd"));
    }
}
