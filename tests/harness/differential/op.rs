//! Operations, and random sequences of them.

use rand::{Rng, seq::IndexedRandom};
use rustix::fs::{OFlags, RenameFlags};

use super::{space::SpaceOp, xattr::XattrOp};
use crate::rng::TestRng;

/// One operation. Paths are indices into [`PATHS`], `slot` names one of [`SLOTS`] file descriptors.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are the system calls of the same name")]
pub enum Op {
    Open { slot: usize, path: Name, flags: OFlags, mode: u32 },
    Tmpfile { slot: usize, path: Name, mode: u32, flags: OFlags },
    LinkDescriptor { slot: usize, to: Name },
    Close { slot: usize },
    Write { slot: usize, len: usize, fill: u8 },
    Pwrite { slot: usize, at: u64, len: usize, fill: u8 },
    Read { slot: usize, len: usize },
    Pread { slot: usize, at: u64, len: usize },
    MmapWrite { slot: usize, at: u64, len: usize, fill: u8 },
    Fsync { slot: usize },
    Ftruncate { slot: usize, size: u64 },
    Fstat { slot: usize },
    Fchmod { slot: usize, mode: u32 },
    Truncate { path: Name, size: u64 },
    Unlink { path: Name },
    Rmdir { path: Name },
    Mkdir { path: Name, mode: u32 },
    Rename { from: Name, to: Name, flags: RenameFlags },
    Link { from: Name, to: Name },
    Symlink { target: Name, path: Name },
    Readlink { path: Name },
    Lstat { path: Name },
    Stat { path: Name },
    List { path: Name },
    Chmod { path: Name, mode: u32 },
    Chown { path: Name, uid: u32, gid: u32 },
    Utimens { path: Name, sec: i64, nsec: i64 },
    Xattr(XattrOp),
    Space { slot: usize, op: SpaceOp },
    CopyRange { from: usize, to: usize, at: (u64, u64), len: usize },
}

/// A path of the small world in which operations meet each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name(usize);

impl Name {
    /// The relative path.
    pub fn path(self) -> String {
        let path = PATHS[self.0];
        match path {
            "LONGEST" => "n".repeat(255),
            "TOO LONG" => "n".repeat(256),
            path => path.into(),
        }
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", PATHS[self.0])
    }
}

/// Few enough that random operations often hit the same file; with directories in, below and beside each other.
pub const PATHS: &[&str] = &[
    "a", "b", "c", "ü ö", "d", "e", "d/a", "d/b", "d/e", "d/e/a", "d/e/f", "e/a", "e/d", "e/d/a", "a/x", ".",
    "d/..", "d/.", "LONGEST", "TOO LONG",
];

/// The ordinary ones, which random choices prefer.
const PLAIN: usize = 14;

/// File descriptors that a sequence can hold.
pub const SLOTS: usize = 6;

/// A random sequence.
pub fn sequence(rng: &mut TestRng, len: usize) -> Vec<Op> {
    // A world in which there is something to trip over.
    let start = [
        Op::Mkdir { path: Name(4), mode: 0o755 },
        Op::Mkdir { path: Name(5), mode: 0o2775 },
        Op::Open { slot: 0, path: Name(0), flags: OFlags::CREATE | OFlags::RDWR, mode: 0o644 },
        Op::Open { slot: 1, path: Name(0), flags: OFlags::RDWR, mode: 0 },
    ];
    start.into_iter().chain((0..len).map(|_| any(rng))).collect()
}

fn any(rng: &mut TestRng) -> Op {
    let slot = rng.random_range(0..SLOTS);
    let path = name(rng);
    match rng.random_range(0..124) {
        0..14 => Op::Open { slot, path, flags: flags(rng), mode: mode(rng) },
        14..18 => Op::Close { slot },
        18..27 => Op::Write { slot, len: length(rng), fill: rng.random() },
        27..38 => Op::Pwrite { slot, at: offset(rng), len: length(rng), fill: rng.random() },
        38..42 => Op::Read { slot, len: length(rng) },
        42..48 => Op::Pread { slot, at: offset(rng), len: length(rng) },
        48..51 => Op::MmapWrite { slot, at: offset(rng), len: length(rng).min(70_000), fill: rng.random() },
        51..53 => Op::Fsync { slot },
        53..57 => Op::Ftruncate { slot, size: offset(rng) },
        57..60 => Op::Fstat { slot },
        60..61 => Op::Fchmod { slot, mode: mode(rng) },
        61..64 => Op::Truncate { path, size: offset(rng) },
        64..69 => Op::Unlink { path },
        69..71 => Op::Rmdir { path },
        71..75 => Op::Mkdir { path, mode: mode(rng) },
        75..82 => Op::Rename { from: path, to: name(rng), flags: rename_flags(rng) },
        82..85 => Op::Link { from: path, to: name(rng) },
        85..87 => Op::Symlink { target: name(rng), path },
        87..88 => Op::Readlink { path },
        88..91 => Op::Lstat { path },
        91..92 => Op::Stat { path },
        92..94 => Op::List { path },
        94..96 => Op::Chmod { path, mode: mode(rng) },
        96..98 => Op::Chown { path, uid: rng.random_range(0..3), gid: rng.random_range(0..3) },
        98..106 => Op::Xattr(XattrOp::any(rng, path)),
        106..109 => {
            let flags = if rng.random_bool(0.2) { OFlags::EXCL } else { OFlags::empty() };
            Op::Tmpfile { slot, path, mode: mode(rng), flags }
        }
        118..123 => {
            let (to, at) = (rng.random_range(0..SLOTS), (offset(rng), offset(rng)));
            Op::CopyRange { from: slot, to, at, len: length(rng) }
        }
        110..118 => Op::Space { slot, op: SpaceOp::any(rng) },
        109 => Op::LinkDescriptor { slot, to: path },
        _ => Op::Utimens {
            path,
            sec: rng.random_range(0..1_000_000_000),
            nsec: rng.random_range(0..1_000_000_000),
        },
    }
}

fn name(rng: &mut TestRng) -> Name {
    let all = rng.random_bool(0.07);
    Name(rng.random_range(0..if all { PATHS.len() } else { PLAIN }))
}

fn flags(rng: &mut TestRng) -> OFlags {
    let mut flags = match rng.random_range(0..8) {
        0 => OFlags::RDONLY,
        1 => OFlags::WRONLY,
        _ => OFlags::RDWR,
    };
    for (flag, chance) in [
        (OFlags::CREATE, 0.7),
        (OFlags::TRUNC, 0.15),
        (OFlags::EXCL, 0.1),
        (OFlags::APPEND, 0.2),
        (OFlags::NOFOLLOW, 0.1),
        (OFlags::DIRECTORY, 0.03),
    ] {
        if rng.random_bool(chance) {
            flags |= flag;
        }
    }
    // O_CREAT with O_DIRECTORY is refused or not depending on the kernel's age, before any filesystem is asked.
    if flags.contains(OFlags::DIRECTORY) {
        flags.remove(OFlags::CREATE);
    }
    flags
}

fn mode(rng: &mut TestRng) -> u32 {
    *[0o644, 0o600, 0o755, 0o777, 0o4755, 0o2755, 0o2644, 0o1777, 0, 0o444].choose(rng).unwrap_or(&0o644)
}

fn rename_flags(rng: &mut TestRng) -> RenameFlags {
    match rng.random_range(0..10) {
        0 => RenameFlags::EXCHANGE,
        1 => RenameFlags::NOREPLACE,
        _ => RenameFlags::empty(),
    }
}

/// Around the sizes where something changes: inline bytes, pages, requests, blocks.
fn boundary(rng: &mut TestRng) -> u64 {
    let edge: u64 =
        *[0, 1, 4096, 8192, 65_536, 131_072, 1 << 20, 2 << 20, 16 << 20].choose(rng).unwrap_or(&0);
    (edge + rng.random_range(0..4)).saturating_sub(rng.random_range(0..3))
}

pub(super) fn offset(rng: &mut TestRng) -> u64 {
    match rng.random_range(0..10) {
        0..4 => rng.random_range(0..20_000),
        4..6 => rng.random_range(0..3 << 20),
        _ => boundary(rng),
    }
}

pub(super) fn length(rng: &mut TestRng) -> usize {
    match rng.random_range(0..20) {
        0..8 => rng.random_range(0..300),
        8..13 => rng.random_range(0..20_000),
        13..16 => rng.random_range(0..300_000),
        16 => rng.random_range(0..3 << 20),
        _ => boundary(rng).min(2 << 20) as usize,
    }
}
