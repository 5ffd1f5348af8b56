//! Where files have bytes: fallocate, and lseek for data and holes.

use std::os::fd::OwnedFd;

use rand::{Rng, seq::IndexedRandom};
use rustix::{
    fs::{self, FallocateFlags, FileType, SeekFrom},
    io::{self, Errno},
};

use super::{op, world::Outcome};
use crate::rng::TestRng;

/// An operation on a descriptor.
#[derive(Clone, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "they are the system calls of the same name")]
pub enum SpaceOp {
    Fallocate { flags: FallocateFlags, at: u64, len: u64 },
    SeekData { at: u64 },
    SeekHole { at: u64 },
}

impl SpaceOp {
    pub(super) fn any(rng: &mut TestRng) -> SpaceOp {
        match rng.random_range(0..8) {
            0..5 => {
                let some = [
                    FallocateFlags::empty(),
                    FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    FallocateFlags::PUNCH_HOLE,
                    FallocateFlags::ZERO_RANGE,
                    FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
                ];
                let flags = *some.choose(rng).unwrap_or(&some[0]);
                SpaceOp::Fallocate { flags, at: op::offset(rng), len: op::length(rng) as u64 }
            }
            5 | 6 => SpaceOp::SeekData { at: op::offset(rng) },
            _ => SpaceOp::SeekHole { at: op::offset(rng) },
        }
    }

    pub(super) fn apply(&self, fd: &OwnedFd) -> io::Result<Outcome> {
        match *self {
            SpaceOp::Fallocate { flags, at, len } => {
                fs::fallocate(fd, flags, at, len)?;
                Ok(Outcome::Done)
            }
            SpaceOp::SeekData { at } => seek(fd, SeekFrom::Data(at), at),
            SpaceOp::SeekHole { at } => seek(fd, SeekFrom::Hole(at), at),
        }
    }
}

/// Copies all of it, as programs do.
pub(super) fn copy(from: &OwnedFd, to: &OwnedFd, at: (u64, u64), len: usize) -> io::Result<Outcome> {
    let (mut off_in, mut off_out) = at;
    let mut done = 0;
    while done < len {
        match fs::copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), len - done)? {
            0 => break,
            copied => done += copied,
        }
    }
    Ok(Outcome::Count(done))
}

/// Where data and holes are is a matter of granularity; that what is skipped as a hole reads as zeros is not, nor which
/// errors there are.
fn seek(fd: &OwnedFd, to: SeekFrom, at: u64) -> io::Result<Outcome> {
    if !FileType::from_raw_mode(fs::fstat(fd)?.st_mode).is_file() {
        // Offsets in a directory are cookies.
        return Ok(Outcome::Skipped);
    }
    let position = fs::seek(fd, SeekFrom::Current(0))?;
    let found = fs::seek(fd, to);
    fs::seek(fd, SeekFrom::Start(position))?;
    let size = fs::fstat(fd)?.st_size as u64;
    match (to, found) {
        (SeekFrom::Hole(_), Ok(hole)) => {
            Ok(if (at..=size).contains(&hole) { Outcome::Done } else { Outcome::Count(hole as usize) })
        }
        (_, Ok(data)) => zeros(fd, at, data.min(size)),
        (SeekFrom::Data(_), Err(Errno::NXIO)) if at < size => zeros(fd, at, size),
        (_, Err(e)) => Err(e),
    }
}

/// Done when the range reads as zeros, or cannot be read through this descriptor.
fn zeros(fd: &OwnedFd, from: u64, to: u64) -> io::Result<Outcome> {
    let mut bytes = vec![0; (to - from) as usize];
    match io::pread(fd, &mut bytes[..], from) {
        Ok(got) => match bytes[..got].iter().position(|byte| *byte != 0) {
            Some(at) => Ok(Outcome::Count(at)),
            None => Ok(Outcome::Done),
        },
        Err(_) => Ok(Outcome::Done),
    }
}
