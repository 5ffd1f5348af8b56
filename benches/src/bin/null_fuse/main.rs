//! The floor of a mount: a FUSE filesystem that answers everything from plain memory at once, on the transport of one's choice.
//!
//! `null_fuse DIR [OPTIONS]` mounts and serves until it is unmounted. Options are those of `fjord mount -o` that concern the kernel, and
//! `lease=SECONDS`: how long the kernel is told that names and attributes are good, by default as long as a metaserver's lease, so
//! that it asks here for what it asks a FjordFS for. Files and directories can be made, written, read, listed and removed; nothing is
//! kept. What is there from the start: a file of 16 GiB of zeros under every name `f…` in the root.

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use fjordfs_fuse::filesystem::{AttrChange, Filesystem, KnownEntry, NewFile, NewNode, Space};
use fjordfs_fuse::{MountOptions, mount_filesystem};
use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{Attr, DirEntry, ReadDirReply};
use fjordfs_proto::{FsError, FsResult, InodeId};
use parking_lot::Mutex;
use tree::Tree;

mod tree;

/// What metaservers give by default, seconds.
const LEASE: f64 = 5.0;
/// Space that it says it has, bytes.
const CAPACITY: u64 = 1 << 40;

struct Null {
    tree: Mutex<Tree>,
    lease: Duration,
}

fn refused<T>() -> FsResult<T> {
    Err(FsError::new(Errno::EPERM, "nothing that the workload asks for"))
}

impl Filesystem for Null {
    type File = InodeId;
    type Unanswered = ();

    fn name_left(&self, _parent: InodeId, _name: &[u8], _ino: Option<InodeId>) -> Duration {
        self.lease
    }

    fn attr_left(&self, _attr: &Attr) -> Duration {
        self.lease
    }

    async fn lookup(&self, parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        self.tree.lock().lookup(parent, name)
    }

    async fn getattr(&self, ino: InodeId) -> FsResult<Attr> {
        self.tree.lock().attr(ino)
    }

    async fn setattr(&self, ino: InodeId, change: AttrChange) -> FsResult<Attr> {
        self.tree.lock().set_attr(ino, &change)
    }

    async fn readlink(&self, _ino: InodeId) -> FsResult<Vec<u8>> {
        refused()
    }

    async fn make(&self, parent: InodeId, name: &[u8], node: NewNode) -> FsResult<Attr> {
        self.tree.lock().make(parent, name, &node)
    }

    async fn create(&self, parent: InodeId, name: &[u8], file: NewFile) -> FsResult<(Attr, InodeId)> {
        let attr = self.tree.lock().create(parent, name, &file)?;
        Ok((attr, InodeId(attr.ino)))
    }

    async fn link(&self, _ino: InodeId, _parent: InodeId, _name: &[u8]) -> FsResult<Attr> {
        refused()
    }

    async fn unlink(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.tree.lock().remove(parent, name, false)
    }

    async fn rmdir(&self, parent: InodeId, name: &[u8]) -> FsResult<()> {
        self.tree.lock().remove(parent, name, true)
    }

    async fn rename(
        &self,
        _parent: InodeId,
        _name: &[u8],
        _new_parent: InodeId,
        _new_name: &[u8],
        _flags: u32,
    ) -> FsResult<()> {
        refused()
    }

    async fn get_xattr(&self, _ino: InodeId, _name: &[u8]) -> FsResult<Bytes> {
        Err(FsError::new(Errno::ENODATA, "there are none"))
    }

    async fn list_xattrs(&self, _ino: InodeId) -> FsResult<Vec<Bytes>> {
        Ok(Vec::new())
    }

    async fn open(&self, ino: InodeId) -> FsResult<(Attr, InodeId)> {
        Ok((self.tree.lock().attr(ino)?, ino))
    }

    async fn read(&self, file: &InodeId, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        self.tree.lock().read(*file, offset, len)
    }

    async fn write(&self, file: &InodeId, offset: u64, data: Bytes) -> FsResult<()> {
        self.tree.lock().write(*file, offset, &data)
    }

    async fn append(&self, file: &InodeId, data: Bytes) -> FsResult<(u64, ())> {
        Ok((self.tree.lock().append(*file, &data)?, ()))
    }

    async fn flush(&self, _file: &InodeId) -> FsResult<()> {
        Ok(())
    }

    async fn fsync(&self, _file: &InodeId) -> FsResult<()> {
        Ok(())
    }

    async fn release(&self, _file: &InodeId) -> FsResult<()> {
        Ok(())
    }

    fn own_versions(&self, file: &InodeId) -> RangeInclusive<u64> {
        // Nobody else can change anything.
        0..=self.tree.lock().attr(*file).map_or(0, |attr| attr.data_version)
    }

    async fn read_dir(&self, ino: InodeId, cookie: u64, limit: u32, attr: bool) -> FsResult<ReadDirReply> {
        self.tree.lock().list(ino, cookie, limit, attr)
    }

    fn known_entries(&self, _parent: InodeId, entries: &[DirEntry]) -> Vec<Option<KnownEntry>> {
        let tree = self.tree.lock();
        let known = |entry: &DirEntry| {
            let attr = tree.attr(InodeId(entry.ino)).ok()?;
            Some(KnownEntry { attr, name_left: self.lease, attr_left: self.lease })
        };
        entries.iter().map(known).collect()
    }

    async fn statfs(&self) -> FsResult<Space> {
        Ok(Space { capacity: CAPACITY, free: CAPACITY, files: self.tree.lock().len() as u64 })
    }

    async fn sync_namespace(&self) -> FsResult<()> {
        Ok(())
    }

    async fn sync_all(&self) -> FsResult<()> {
        Ok(())
    }
}

/// `lease=` among the options that are none of the mount.
fn lease(own: &[(String, Option<String>)]) -> Result<Duration, String> {
    let seconds = match own.last() {
        Some((_, value)) => value.as_deref().and_then(|v| v.parse().ok()),
        None => Some(LEASE),
    };
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "lease=SECONDS, not negative".into())
}

fn mount(dir: String, options: &str) -> Result<fjordfs_fuse::Mount, String> {
    let mut mount_options = MountOptions::new("null", dir);
    let own = mount_options.apply(options, &["lease"]).map_err(|e| e.to_string())?;
    let null = Null { tree: Mutex::new(Tree::new()), lease: lease(&own)? };
    mount_filesystem(null, &mount_options).map_err(|e| e.to_string())
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(dir) = args.next() else {
        eprintln!("usage: null_fuse DIR [OPTIONS]");
        return ExitCode::from(2);
    };
    match mount(dir, &args.next().unwrap_or_default()) {
        Ok(mut mount) => {
            println!("mounted over {}", mount.transport());
            mount.wait();
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("null_fuse: {e}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_as_a_metaservers_unless_said_otherwise() {
        let given = |value: Option<&str>| lease(&[("lease".into(), value.map(Into::into))]);
        assert_eq!(lease(&[]), Ok(Duration::from_secs(5)));
        assert_eq!(given(Some("0")), Ok(Duration::ZERO));
        assert_eq!(given(Some("0.5")), Ok(Duration::from_millis(500)));
        for wrong in [None, Some(""), Some("-1"), Some("NaN"), Some("long")] {
            assert!(given(wrong).is_err(), "{wrong:?}");
        }
    }
}
