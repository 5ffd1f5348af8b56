//! The floor of a mount: a FUSE filesystem that does nothing, on the transport of one's choice.
//!
//! `null_fuse DIR [OPTIONS]` mounts (options as for `fjord mount -o`) and serves until it is unmounted. The root has a file of
//! 16 GiB of zeros under every name `f…`; reads come from memory, writes are dropped.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::ExitCode;

use bytes::Bytes;
use fjordfs_fuse::filesystem::{AttrChange, Filesystem, NewFile, NewNode, Space};
use fjordfs_fuse::{MountOptions, mount_filesystem};
use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{Attr, FileKind, ReadDirReply};
use fjordfs_proto::{FsError, FsResult, InodeId};

const ROOT: u64 = 1;
const SIZE: u64 = 16 << 30;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

struct Null;

fn attr(ino: InodeId) -> Attr {
    let kind = if ino.0 == ROOT { FileKind::Directory } else { FileKind::Regular };
    Attr {
        ino: ino.0,
        kind: kind as i32,
        mode: 0o755,
        nlink: 1,
        size: SIZE,
        data_version: 1,
        ..Attr::default()
    }
}

fn file_called(name: &[u8]) -> Option<InodeId> {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    name.starts_with(b"f").then(|| InodeId(hasher.finish() >> 1 | 2))
}

fn refused<T>() -> FsResult<T> {
    Err(FsError::new(Errno::EROFS, "does nothing"))
}

impl Filesystem for Null {
    type File = InodeId;
    type Unanswered = ();

    async fn lookup(&self, _parent: InodeId, name: &[u8]) -> FsResult<Attr> {
        file_called(name).map(attr).ok_or_else(|| FsError::new(Errno::ENOENT, "begins not with f"))
    }

    async fn getattr(&self, ino: InodeId) -> FsResult<Attr> {
        Ok(attr(ino))
    }

    async fn setattr(&self, ino: InodeId, _change: AttrChange) -> FsResult<Attr> {
        Ok(attr(ino))
    }

    async fn readlink(&self, _ino: InodeId) -> FsResult<Vec<u8>> {
        refused()
    }

    async fn make(&self, _parent: InodeId, _name: &[u8], _node: NewNode) -> FsResult<Attr> {
        refused()
    }

    async fn create(&self, _parent: InodeId, name: &[u8], _file: NewFile) -> FsResult<(Attr, InodeId)> {
        match file_called(name) {
            Some(ino) => Ok((attr(ino), ino)),
            None => refused(),
        }
    }

    async fn link(&self, _ino: InodeId, _parent: InodeId, _name: &[u8]) -> FsResult<Attr> {
        refused()
    }

    async fn unlink(&self, _parent: InodeId, _name: &[u8]) -> FsResult<()> {
        Ok(())
    }

    async fn rmdir(&self, _parent: InodeId, _name: &[u8]) -> FsResult<()> {
        refused()
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

    async fn open(&self, ino: InodeId) -> FsResult<(Attr, InodeId)> {
        Ok((attr(ino), ino))
    }

    async fn read(&self, _file: &InodeId, offset: u64, len: usize) -> FsResult<Vec<Bytes>> {
        let left = SIZE.saturating_sub(offset).min(len as u64) as usize;
        Ok(vec![Bytes::from_static(&ZEROS[..left.min(ZEROS.len())])])
    }

    async fn write(&self, _file: &InodeId, _offset: u64, _data: Bytes) -> FsResult<()> {
        Ok(())
    }

    async fn append(&self, _file: &InodeId, _data: Bytes) -> FsResult<(u64, ())> {
        Ok((SIZE, ()))
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

    async fn read_dir(
        &self,
        _ino: InodeId,
        _cookie: u64,
        _limit: u32,
        _attr: bool,
    ) -> FsResult<ReadDirReply> {
        Ok(ReadDirReply { entries: Vec::new(), end: true, parent: ROOT })
    }

    async fn statfs(&self) -> FsResult<Space> {
        Ok(Space::default())
    }

    async fn sync_namespace(&self) -> FsResult<()> {
        Ok(())
    }

    async fn sync_all(&self) -> FsResult<()> {
        Ok(())
    }
}

#[allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]
fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(dir) = args.next() else {
        eprintln!("usage: null_fuse DIR [OPTIONS]");
        return ExitCode::from(2);
    };
    let mut options = MountOptions::new("null", dir);
    let applied = options.apply(&args.next().unwrap_or_default(), &[]).map_err(|e| e.to_string());
    match applied.and_then(|_| mount_filesystem(Null, &options).map_err(|e| e.to_string())) {
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
