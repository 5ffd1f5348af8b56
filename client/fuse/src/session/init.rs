//! The beginning of a session: the kernel asks (INIT), we choose.
//!
//! # What INIT asks for, and what it leaves out
//! | flag | why |
//! |---|---|
//! | `ASYNC_READ`, `ASYNC_DIO`, `PARALLEL_DIROPS` | many requests at once; the filesystem orders nothing by arrival |
//! | `BIG_WRITES`, `MAX_PAGES` | requests of up to 1 MiB |
//! | no `ATOMIC_O_TRUNC` | the kernel truncates after it has looked whether it may: with it, `open(O_TRUNC)` empties a program that is being executed before it fails with ETXTBSY |
//! | `POSIX_ACL`, `DONT_MASK` | the kernel enforces access control lists, and sends the umask along instead of applying it: a directory's default list takes its place |
//! | `SETXATTR_EXT` | the longer form of SETXATTR, which the parser expects |
//! | `HANDLE_KILLPRIV_V2` | suid and sgid are dropped here, on the word of the kernel which caller may not keep them. Without it the kernel asks for `security.capability` before every single write |
//! | `DIRECT_IO_ALLOW_MMAP` | files opened with `O_APPEND` can still be mapped |
//! | `DO_READDIRPLUS`, not `READDIRPLUS_AUTO` | where what a listing brings can be recalled. `ls -l` reads a directory before it looks at any of it, which the kernel's own guess does not foresee; how many entries bring an inode is our choice ([`crate::directory`]) |
//! | not `AUTO_INVAL_DATA` | it asks for attributes before *every* cached read, and drops a file's pages after this mount's own writes. Changes by others are seen without it: at `open`, because pages are kept only while the version of the bytes stands, and while open whenever the kernel learns of another size (a growing log) |
//! | not `EXPLICIT_INVAL_DATA` | it would also switch off the last of these: the last page of a file that another client extends would end in zeros |
//! | not `WRITEBACK_CACHE` | the client library buffers dirty data under its own memory limit and packs it into blocks; a second dirty cache in the kernel would hide appends, sizes and times of other clients, and double the memory |
//! | not `EXPORT_SUPPORT`, `CACHE_SYMLINKS` | lookups of ".." are not served; a symbolic link replaced by another client must be seen |
//! | `OVER_IO_URING` | only when rings are ready to be registered: from the answer on the kernel waits for them |
//! | `POSIX_LOCKS`, `FLOCK_LOCKS` | locks hold among the processes of all clients. The kernel keeps none then, also not to release them at `close`: [`crate::lock_owners`] |

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{SessionError, io_error};
use crate::abi::{self, InitIn, InitOut, Pod, init_flag, opcode};
use crate::buffer::BufferPool;
use crate::reply::Reply;
use crate::transport::Message;
use crate::transport::dev_fuse;

/// The kernel sends INIT at once; this long without one means that something else reads the device.
pub(super) const INIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Requests the kernel sends without a waiting process (readahead, direct asynchronous I/O, releases).
const BACKGROUND_MAX: u16 = 512;
/// From here on the kernel holds back readahead.
const CONGESTION_THRESHOLD: u16 = 384;

/// The kernel's INIT, to be answered.
pub(super) struct Init {
    unique: u64,
    input: InitIn,
}

impl Init {
    /// Reads the first request that can be served; others are answered here.
    pub(super) fn read(device: &OwnedFd, pool: &Arc<BufferPool>) -> Result<Init, SessionError> {
        let deadline = Instant::now() + INIT_TIMEOUT;
        let mut buffer = pool.take();
        loop {
            wait_readable(device, deadline)?;
            let len = match dev_fuse::read_request(device.as_fd(), buffer.request_mut()) {
                Ok(len) => len,
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR | libc::ENOENT) => continue,
                    Some(libc::ENODEV) => return Err(SessionError::Unmounted),
                    _ => return Err(io_error("reading the first FUSE request")(e)),
                },
            };
            let Some(message) = Message::from_bytes(buffer.copy_request(len)) else { continue };
            let unique = message.header.unique;
            if message.header.opcode != opcode::INIT {
                answer(device, unique, &Reply::Error(libc::EIO))?;
                continue;
            }
            let input = InitIn::from_prefix(&message.fixed);
            if input.major > abi::KERNEL_VERSION {
                // A newer kernel offers again what we name.
                let out = InitOut {
                    major: abi::KERNEL_VERSION,
                    minor: abi::KERNEL_MINOR_VERSION,
                    ..InitOut::default()
                };
                answer(device, unique, &Reply::of(&out))?;
                continue;
            }
            if input.major < abi::KERNEL_VERSION || input.minor < abi::KERNEL_MINOR_VERSION_MIN {
                let _the_mount_fails_anyway = answer(device, unique, &Reply::Error(libc::EPROTO));
                return Err(SessionError::KernelTooOld { major: input.major, minor: input.minor });
            }
            return Ok(Init { unique, input });
        }
    }

    /// Whether requests can come over io_uring.
    pub(super) fn offers_uring(&self) -> bool {
        offered(&self.input) & init_flag::OVER_IO_URING != 0
    }

    /// Whether requests that a process has left unanswered can be sent to its successor.
    pub(super) fn can_resend(&self) -> bool {
        offered(&self.input) & init_flag::HAS_RESEND != 0
    }

    /// Minor version of the kernel's protocol.
    pub(super) fn kernel_minor(&self) -> u32 {
        self.input.minor
    }

    /// Begins the session. With `uring`, the kernel holds back requests until rings are registered.
    pub(super) fn answer(&self, device: &OwnedFd, size_max: usize, uring: bool) -> Result<(), SessionError> {
        let out = negotiate(&self.input, size_max, uring);
        answer(device, self.unique, &Reply::of(&out))?;
        tracing::debug!(
            kernel_minor = self.input.minor,
            flags = format_args!("{:#x}", u64::from(out.flags) | u64::from(out.flags2) << 32),
            out.max_write,
            "FUSE session began"
        );
        Ok(())
    }
}

fn answer(device: &OwnedFd, unique: u64, reply: &Reply) -> Result<(), SessionError> {
    dev_fuse::send(device.as_fd(), unique, reply).map_err(io_error("answering the kernel's INIT"))
}

fn offered(input: &InitIn) -> u64 {
    u64::from(input.flags) | u64::from(input.flags2) << 32
}

fn wait_readable(device: &OwnedFd, deadline: Instant) -> Result<(), SessionError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(SessionError::NoInit);
    }
    let mut poll = libc::pollfd { fd: device.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, alive during the call. Interruptions are as good as readiness: the caller reads and comes back.
    unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as libc::c_int + 1) };
    Ok(())
}

/// The answer to INIT.
fn negotiate(init: &InitIn, size_max: usize, uring: bool) -> InitOut {
    let mut wanted = init_flag::ASYNC_READ
        | init_flag::BIG_WRITES
        | init_flag::ASYNC_DIO
        | init_flag::PARALLEL_DIROPS
        | init_flag::MAX_PAGES
        | init_flag::POSIX_ACL
        | init_flag::DONT_MASK
        | init_flag::SETXATTR_EXT
        | init_flag::HANDLE_KILLPRIV_V2
        | init_flag::POSIX_LOCKS
        | init_flag::FLOCK_LOCKS
        | init_flag::INIT_EXT
        | init_flag::DIRECT_IO_ALLOW_MMAP;
    if abi::answers_can_be_recalled(init.minor) {
        wanted |= init_flag::DO_READDIRPLUS;
    }
    if uring {
        wanted |= init_flag::OVER_IO_URING;
    }
    let flags = wanted & offered(init);
    InitOut {
        major: abi::KERNEL_VERSION,
        minor: abi::KERNEL_MINOR_VERSION.min(init.minor),
        max_readahead: init.max_readahead,
        flags: flags as u32, // the low half
        flags2: (flags >> 32) as u32,
        max_background: BACKGROUND_MAX,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: size_max as u32,
        time_gran: 1,
        // The kernel lowers it to fs.fuse.max_pages_limit.
        max_pages: (size_max / abi::page_size()).max(1).min(usize::from(u16::MAX)) as u16,
        ..InitOut::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_is_taken() {
        let all = InitIn {
            major: 7,
            minor: 99,
            max_readahead: 131_072,
            flags: u32::MAX,
            flags2: u32::MAX,
            unused: [0; 11],
        };
        let out = negotiate(&all, 1 << 20, false);
        assert_eq!((out.major, out.minor, out.max_pages, out.max_write), (7, 45, 256, 1 << 20));
        let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
        assert_ne!(flags & init_flag::DIRECT_IO_ALLOW_MMAP, 0);
        for refused in [
            init_flag::WRITEBACK_CACHE,
            init_flag::AUTO_INVAL_DATA,
            init_flag::EXPLICIT_INVAL_DATA,
            init_flag::READDIRPLUS_AUTO,
            init_flag::OVER_IO_URING,
            init_flag::HANDLE_KILLPRIV,
            init_flag::EXPORT_SUPPORT | init_flag::CACHE_SYMLINKS,
        ] {
            assert_eq!(flags & refused, 0, "{refused:#x}");
        }
        let uring = negotiate(&all, 1 << 20, true);
        assert_ne!(u64::from(uring.flags2) << 32 & init_flag::OVER_IO_URING, 0);
        let none = negotiate(&InitIn { flags: 0, flags2: 0, minor: 34, ..all }, 1 << 20, true);
        assert_eq!((none.flags, none.flags2, none.minor), (0, 0, 34));
    }

    #[test]
    fn listings_bring_attributes_only_where_they_can_be_recalled() {
        let all = InitIn { major: 7, minor: 45, flags: u32::MAX, flags2: u32::MAX, ..InitIn::default() };
        for (minor, expected) in [(45, init_flag::DO_READDIRPLUS), (43, 0)] {
            let flags = u64::from(negotiate(&InitIn { minor, ..all }, 1 << 20, false).flags);
            assert_eq!(flags & init_flag::DO_READDIRPLUS, expected, "{minor}");
        }
    }
}
