//! Extended attributes.

use std::path::Path;

use rand::{Rng, seq::IndexedRandom};
use rustix::{
    fs::{self, XattrFlags},
    io,
};

use super::{
    op::Name,
    world::{Bytes, Outcome},
};
use crate::rng::TestRng;

/// An operation on the extended attributes of a path.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are the system calls of the same name")]
pub enum XattrOp {
    Set { path: Name, name: &'static str, value: Vec<u8>, flags: XattrFlags },
    Get { path: Name, name: &'static str, room: usize },
    List { path: Name },
    Remove { path: Name, name: &'static str },
}

const NAMES: &[&str] = &[
    "user.a",
    "user.b",
    "user.ü ö",
    "trusted.t",
    "security.s",
    "user.",
    "nowhere.x",
    "system.bogus",
    ACCESS,
    DEFAULT,
];

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Every attribute of a file fits the block that ext4 has for them.
const VALUE_MAX: usize = 300;

impl XattrOp {
    pub(super) fn any(rng: &mut TestRng, path: Name) -> XattrOp {
        let name = NAMES.choose(rng).unwrap_or(&NAMES[0]);
        match rng.random_range(0..11) {
            8.. => {
                let name = if rng.random_bool(0.5) { ACCESS } else { DEFAULT };
                XattrOp::Set { path, name, value: access_list(rng), flags: XattrFlags::empty() }
            }
            0..4 => {
                let value = vec![rng.random(); rng.random_range(0..VALUE_MAX)];
                let some = [XattrFlags::empty(), XattrFlags::CREATE, XattrFlags::REPLACE, XattrFlags::all()];
                let flags = if rng.random_bool(0.6) {
                    XattrFlags::empty()
                } else {
                    *some.choose(rng).unwrap_or(&some[0])
                };
                XattrOp::Set { path, name, value, flags }
            }
            4 | 5 => XattrOp::Get { path, name, room: rng.random_range(0..2 * VALUE_MAX) },
            6 => XattrOp::List { path },
            _ => XattrOp::Remove { path, name },
        }
    }

    pub(super) fn apply(&self, root: &Path) -> io::Result<Outcome> {
        let at = |name: Name| root.join(name.path());
        match self {
            XattrOp::Set { path, name, value, flags } => {
                fs::setxattr(at(*path), *name, value, *flags)?;
                Ok(Outcome::Done)
            }
            XattrOp::Get { path, name, room } => {
                let mut value = vec![0; *room];
                let length = fs::getxattr(at(*path), *name, &mut value[..])?;
                if *room == 0 {
                    return Ok(Outcome::Count(length));
                }
                value.truncate(length);
                Ok(Outcome::Bytes(Bytes(value)))
            }
            XattrOp::List { path } => {
                let mut list = vec![0; 64 << 10];
                let length = fs::listxattr(at(*path), &mut list[..])?;
                let names = list[..length].split(|b| *b == 0).filter(|name| !name.is_empty());
                let mut names: Vec<String> = names.map(|n| String::from_utf8_lossy(n).into_owned()).collect();
                names.sort();
                Ok(Outcome::Attributes(names))
            }
            XattrOp::Remove { path, name } => {
                fs::removexattr(at(*path), *name)?;
                Ok(Outcome::Done)
            }
        }
    }
}

/// A valid access control list: with somebody named or without.
fn access_list(rng: &mut TestRng) -> Vec<u8> {
    let named = rng.random_bool(0.7);
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, id, wanted) in [
        (0x01u16, u32::MAX, true),
        (0x02, 1000, named),
        (0x04, u32::MAX, true),
        (0x08, 50, named),
        (0x10, u32::MAX, named),
        (0x20, u32::MAX, true),
    ] {
        if wanted {
            list.extend(tag.to_le_bytes());
            list.extend(rng.random_range(0..8u16).to_le_bytes());
            list.extend(id.to_le_bytes());
        }
    }
    list
}
