//! POSIX access control lists: what the permission bits say of them, and what is inherited. The kernel of the client
//! enforces them.
//!
//! They are kept as the extended attributes `system.posix_acl_access` and `system.posix_acl_default`, in the form that
//! kernel and programs exchange: a version, then entries sorted by tag.
//!
//! ```text
//! version u32 = 2 | { tag u16 | permissions u16 | user or group u32 } ...      little-endian
//! ```
//!
//! # Invariant
//! The permission bits of an inode and its access list agree: owner, mask (without one, owning group) and others are the
//! three digits of the mode. A list that says no more than the mode is not kept.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fjordfs_proto::{FsError, FsResult, error::Errno};

pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
/// The kernel reads lists of at most a page.
const BYTES_MAX: usize = 4096;

const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

const RWX: u16 = 0o7;
const RWX_ALL: u32 = 0o777;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    tag: u16,
    permissions: u16,
    /// Of named users and groups.
    id: u32,
}

/// A valid list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Acl {
    entries: Vec<Entry>,
}

impl Acl {
    /// From the bytes of an extended attribute; `None` for a list without entries, which means that there is no list.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for another version, `E2BIG` for more than the kernel reads, `EINVAL` for what is not a list.
    pub(crate) fn parse(mut bytes: Bytes) -> FsResult<Option<Acl>> {
        let bad = |what: &str| FsError::new(Errno::EINVAL, format!("access control list: {what}"));
        if bytes.len() > BYTES_MAX {
            return Err(FsError::new(Errno::E2BIG, "an access control list of more than a page"));
        }
        match bytes.try_get_u32_le() {
            Ok(VERSION) => {}
            Ok(other) => {
                return Err(FsError::new(
                    Errno::EOPNOTSUPP,
                    format!("access control list of version {other}"),
                ));
            }
            Err(_) => return Err(bad("it has no version")),
        }
        let mut entries = Vec::new();
        while bytes.has_remaining() {
            if bytes.remaining() < 8 {
                return Err(bad("it ends within an entry"));
            }
            entries.push(Entry {
                tag: bytes.get_u16_le(),
                permissions: bytes.get_u16_le(),
                id: bytes.get_u32_le(),
            });
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let acl = Acl { entries };
        if acl.is_valid() {
            Ok(Some(acl))
        } else {
            Err(bad("its entries are not those of a list, or not in order"))
        }
    }

    /// Owner, named users, group, named groups, mask, others, in this order; a mask when anybody is named.
    fn is_valid(&self) -> bool {
        let count = |tag: u16| self.entries.iter().filter(|entry| entry.tag == tag).count();
        let named = count(USER) + count(GROUP) > 0;
        self.entries.is_sorted_by_key(|entry| entry.tag)
            && self.entries.iter().all(|entry| entry.permissions & !RWX == 0)
            && self
                .entries
                .iter()
                .all(|entry| [USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER].contains(&entry.tag))
            && [USER_OBJ, GROUP_OBJ, OTHER].iter().all(|tag| count(*tag) == 1)
            && (count(MASK) == 1 || (count(MASK) == 0 && !named))
    }

    /// As it is kept.
    pub(crate) fn bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(4 + 8 * self.entries.len());
        bytes.put_u32_le(VERSION);
        for entry in &self.entries {
            bytes.put_u16_le(entry.tag);
            bytes.put_u16_le(entry.permissions);
            bytes.put_u32_le(entry.id);
        }
        bytes.freeze()
    }

    /// Whether it says no more than a mode can say.
    pub(crate) fn is_minimal(&self) -> bool {
        self.entries.len() == 3
    }

    /// The mode with the permissions of the list.
    pub(crate) fn mode(&self, mode: u32) -> u32 {
        let class_bits = CLASSES.map(|class| u32::from(self.entry(class).permissions) << class.shift());
        mode & !RWX_ALL | class_bits.iter().sum::<u32>()
    }

    /// `chmod`: the list gets the permissions of the mode.
    pub(crate) fn chmod(&mut self, mode: u32) {
        for class in CLASSES {
            self.entry_mut(class).permissions = (mode >> class.shift()) as u16 & RWX;
        }
    }

    /// What something made in a directory with this default list gets: at most what its maker asked for.
    pub(crate) fn restrict(&mut self, mode: u32) -> u32 {
        for class in CLASSES {
            self.entry_mut(class).permissions &= (mode >> class.shift()) as u16;
        }
        self.mode(mode)
    }

    fn index(&self, class: Class) -> usize {
        let position = |tag: u16| self.entries.iter().position(|entry| entry.tag == tag);
        let found = match class {
            Class::Owner => position(USER_OBJ),
            Class::Group => position(MASK).or_else(|| position(GROUP_OBJ)),
            Class::Other => position(OTHER),
        };
        found.expect("a valid list has an entry for each class")
    }

    fn entry(&self, class: Class) -> &Entry {
        &self.entries[self.index(class)]
    }

    fn entry_mut(&mut self, class: Class) -> &mut Entry {
        let index = self.index(class);
        &mut self.entries[index]
    }
}

/// The digits of a mode. Of the group's, a mask is what counts.
#[derive(Clone, Copy)]
enum Class {
    Owner,
    Group,
    Other,
}

const CLASSES: [Class; 3] = [Class::Owner, Class::Group, Class::Other];

impl Class {
    fn shift(self) -> u32 {
        match self {
            Class::Owner => 6,
            Class::Group => 3,
            Class::Other => 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A list as programs send it.
    pub(crate) fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let entries = entries.iter().map(|&(tag, permissions, id)| Entry { tag, permissions, id }).collect();
        Acl { entries }.bytes().to_vec()
    }

    pub(crate) const NAMED: &[(u16, u16, u32)] =
        &[(1, 7, 0), (2, 7, 1000), (4, 5, 0), (8, 4, 50), (0x10, 6, 0), (0x20, 1, 0)];

    fn parse(entries: &[(u16, u16, u32)]) -> FsResult<Option<Acl>> {
        Acl::parse(list(entries).into())
    }

    #[test]
    fn a_list_and_its_mode_agree() {
        let mut acl = parse(NAMED).unwrap().unwrap();
        assert_eq!(acl.bytes(), list(NAMED));
        assert!(!acl.is_minimal());
        assert_eq!(acl.mode(0o4000), 0o4761, "the mask stands for the group");
        acl.chmod(0o1750);
        assert_eq!(acl.mode(0), 0o750);
        assert_eq!(acl.entries[2].permissions, 5, "the owning group's own entry stays");
        let mut small = parse(&[(1, 7, 0), (4, 7, 0), (0x20, 7, 0)]).unwrap().unwrap();
        assert!(small.is_minimal());
        assert_eq!(small.restrict(0o2640), 0o2640);
        assert_eq!(small.mode(0), 0o640);
    }

    #[test]
    fn what_is_made_gets_what_both_allow() {
        let mut acl = parse(NAMED).unwrap().unwrap();
        assert_eq!(acl.restrict(0o1666), 0o1660);
        assert_eq!(acl.entries.iter().map(|e| e.permissions).collect::<Vec<_>>(), [6, 7, 5, 4, 6, 0]);
    }

    #[test]
    fn what_is_not_a_list_is_refused() {
        let errno = |bytes: &[u8]| Acl::parse(Bytes::copy_from_slice(bytes)).unwrap_err().errno;
        assert_eq!(errno(b""), Errno::EINVAL);
        assert_eq!(errno(&[2, 0, 0, 0, 1]), Errno::EINVAL);
        assert_eq!(errno(&[1, 0, 0, 0]), Errno::EOPNOTSUPP);
        assert_eq!(errno(&[0; 5000]), Errno::E2BIG);
        assert_eq!(parse(&[]).unwrap(), None);
        for wrong in [
            &[(1, 7, 0), (4, 7, 0)][..],
            &[(1, 8, 0), (4, 7, 0), (0x20, 7, 0)],
            &[(4, 7, 0), (1, 7, 0), (0x20, 7, 0)],
            &[(1, 7, 0), (2, 7, 5), (4, 7, 0), (0x20, 7, 0)],
            &[(1, 7, 0), (1, 7, 0), (4, 7, 0), (0x20, 7, 0)],
            &[(1, 7, 0), (4, 7, 0), (0x10, 7, 0), (0x10, 7, 0), (0x20, 7, 0)],
            &[(1, 7, 0), (4, 7, 0), (0x20, 7, 0), (0x40, 7, 0)],
        ] {
            assert_eq!(errno(&list(wrong)), Errno::EINVAL, "{wrong:?}");
        }
    }
}
