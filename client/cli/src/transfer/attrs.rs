//! Attributes here and there: what a local file and an inode of FjordFS say about the same thing.

use std::{
    fs::{FileType, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
};

use fjordfs_client::{AttrChange, SetTime};
use fjordfs_proto::pb::meta::{Attr, FileKind, Time};

/// Permission bits with suid, sgid and sticky.
const MODE_BITS: u32 = 0o7777;

/// The kind of a local file.
pub(crate) fn kind_of(file_type: FileType) -> FileKind {
    match file_type {
        t if t.is_file() => FileKind::Regular,
        t if t.is_dir() => FileKind::Directory,
        t if t.is_symlink() => FileKind::Symlink,
        t if t.is_fifo() => FileKind::Fifo,
        t if t.is_socket() => FileKind::Socket,
        t if t.is_char_device() => FileKind::CharDevice,
        t if t.is_block_device() => FileKind::BlockDevice,
        _ => FileKind::Unspecified,
    }
}

/// For messages.
pub(crate) fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symbolic link",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
        FileKind::Unspecified => "thing of unknown kind",
    }
}

pub(crate) fn mode_of(local: &Metadata) -> u32 {
    local.mode() & MODE_BITS
}

pub(crate) fn mtime_of(local: &Metadata) -> Time {
    Time { sec: local.mtime(), nsec: local.mtime_nsec() as u32 }
}

/// Whether a copy made earlier is still good: same kind, size and modification time.
pub(crate) fn same_content(local: &Metadata, attr: &Attr) -> bool {
    kind_of(local.file_type()) == attr.kind()
        && local.len() == attr.size
        && attr.mtime.as_ref() == Some(&mtime_of(local))
}

/// The changes that give an inode the attributes of the local file, size left out.
pub(crate) fn change_to(local: &Metadata) -> AttrChange {
    let symlink = local.file_type().is_symlink();
    AttrChange {
        // Linux knows no modes of symbolic links.
        mode: (!symlink).then(|| mode_of(local)),
        uid: Some(local.uid()),
        gid: Some(local.gid()),
        atime: Some(SetTime::To(Time { sec: local.atime(), nsec: local.atime_nsec() as u32 })),
        mtime: Some(SetTime::To(mtime_of(local))),
        ..AttrChange::default()
    }
}

/// Whether owner and permissions agree too.
pub(crate) fn same_rights(local: &Metadata, attr: &Attr) -> bool {
    (local.uid(), local.gid()) == (attr.uid, attr.gid)
        && (local.file_type().is_symlink() || mode_of(local) == attr.mode)
}

/// A device number as it travels (the kernel's `new_encode_dev`: 12 bits major, 20 bits minor).
pub(crate) fn encode_device(rdev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// The reverse of [`encode_device`].
pub(crate) fn decode_device(rdev: u32) -> u64 {
    rustix::fs::makedev((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_round_trip() {
        for (major, minor) in [(0, 0), (1, 3), (259, 7), (4095, 0xf_ffff), (8, 256)] {
            let rdev = rustix::fs::makedev(major, minor);
            assert_eq!(decode_device(encode_device(rdev)), rdev, "{major}:{minor}");
        }
        assert_eq!(encode_device(rustix::fs::makedev(1, 3)), 0x103);
    }

    #[test]
    fn a_copy_is_recognised_by_size_and_time() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"hello").unwrap();
        let local = std::fs::metadata(file.path()).unwrap();
        let mut attr = Attr { size: 5, mtime: Some(mtime_of(&local)), ..Attr::default() };
        attr.set_kind(FileKind::Regular);
        assert!(same_content(&local, &attr));
        assert!(!same_content(&local, &Attr { size: 4, ..attr }));
        attr.mtime.as_mut().unwrap().nsec ^= 1;
        assert!(!same_content(&local, &attr));
    }
}
