//! Advisory locks as the C library has them.

use std::{fs::File, io, os::fd::AsRawFd};

/// Kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
    /// None.
    Unlock,
}

/// Whose `fcntl` locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The process'.
    Process,
    /// The open file's.
    OpenFile,
}

/// A lock that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InTheWay {
    /// Its kind.
    pub kind: Kind,
    /// First byte.
    pub start: i64,
    /// Bytes; 0 for all there will ever be.
    pub len: i64,
    /// Who has it; -1 for an open file, 0 for somebody on another client.
    pub pid: i32,
}

fn range(kind: Kind, start: i64, len: i64) -> libc::flock {
    let kind = match kind {
        Kind::Read => libc::F_RDLCK,
        Kind::Write => libc::F_WRLCK,
        Kind::Unlock => libc::F_UNLCK,
    };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

fn fcntl(file: &File, command: libc::c_int, lock: &mut libc::flock) -> Result<(), i32> {
    // SAFETY: the descriptor is open, and the command takes a `struct flock`, which outlives the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, lock) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or_default()
}

/// `F_SETLK`, or its sibling for open files.
///
/// # Errors
/// The error number.
pub fn try_lock(file: &File, owner: Owner, kind: Kind, start: i64, len: i64) -> Result<(), i32> {
    let command = if owner == Owner::Process { libc::F_SETLK } else { libc::F_OFD_SETLK };
    fcntl(file, command, &mut range(kind, start, len))
}

/// `F_SETLKW`, or its sibling for open files.
///
/// # Errors
/// The error number.
pub fn lock(file: &File, owner: Owner, kind: Kind, start: i64, len: i64) -> Result<(), i32> {
    let command = if owner == Owner::Process { libc::F_SETLKW } else { libc::F_OFD_SETLKW };
    fcntl(file, command, &mut range(kind, start, len))
}

/// `F_GETLK`, or its sibling for open files.
///
/// # Errors
/// The error number.
pub fn in_the_way(
    file: &File,
    owner: Owner,
    kind: Kind,
    start: i64,
    len: i64,
) -> Result<Option<InTheWay>, i32> {
    let command = if owner == Owner::Process { libc::F_GETLK } else { libc::F_OFD_GETLK };
    let mut lock = range(kind, start, len);
    fcntl(file, command, &mut lock)?;
    let kind = match libc::c_int::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => Kind::Read,
        _ => Kind::Write,
    };
    Ok(Some(InTheWay { kind, start: lock.l_start, len: lock.l_len, pid: lock.l_pid }))
}

/// `flock(2)`; with `wait` false it fails with `EWOULDBLOCK`.
///
/// # Errors
/// The error number.
pub fn flock(file: &File, kind: Kind, wait: bool) -> Result<(), i32> {
    let operation = match kind {
        Kind::Read => libc::LOCK_SH,
        Kind::Write => libc::LOCK_EX,
        Kind::Unlock => libc::LOCK_UN,
    };
    // SAFETY: the descriptor is open; the call touches no memory.
    match unsafe { libc::flock(file.as_raw_fd(), operation | if wait { 0 } else { libc::LOCK_NB }) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}
