//! Linux' asynchronous I/O (`io_submit`), which the C library has no wrapper for.

use std::{fs::File, io, mem, os::fd::AsRawFd, ptr};

/// `struct iocb` on a little-endian machine.
#[repr(C)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
struct Event {
    data: u64,
    iocb: u64,
    result: i64,
    result2: i64,
}

const PWRITE: u16 = 1;

/// What has been submitted and not waited for; at most one write.
#[derive(Debug)]
pub struct Aio(libc::c_ulong);

impl Aio {
    /// # Errors
    /// When the kernel has none left, or none at all.
    pub fn new() -> io::Result<Aio> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the context outlives the call, which fills it.
        returned(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })?;
        Ok(Aio(context))
    }

    /// Writes all of `data`, which the file system may do behind the submission, and waits for its end.
    ///
    /// # Errors
    /// Those of submitting and of the write; `WriteZero` when it wrote less.
    pub fn write_at(&self, file: &File, data: &[u8], offset: u64) -> io::Result<()> {
        let mut write = Iocb {
            fd: file.as_raw_fd().cast_unsigned(),
            opcode: PWRITE,
            buffer: data.as_ptr() as u64,
            len: data.len() as u64,
            offset: offset.cast_signed(),
            // SAFETY: all of it are numbers.
            ..unsafe { mem::zeroed() }
        };
        let mut list = [&raw mut write];
        // SAFETY: the list and what it points to outlive the call; the data is borrowed until the write has ended below.
        returned(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_mut_ptr()) })?;
        // SAFETY: all of it are numbers.
        let mut event: Event = unsafe { mem::zeroed() };
        loop {
            // SAFETY: there is room for one event; without a time limit.
            let got = returned(unsafe {
                libc::syscall(
                    libc::SYS_io_getevents,
                    self.0,
                    1,
                    1,
                    &raw mut event,
                    ptr::null_mut::<libc::timespec>(),
                )
            });
            match got {
                Ok(_) => break,
                // The kernel still reads the data.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        match u64::try_from(event.result) {
            Ok(len) if len == data.len() as u64 => Ok(()),
            Ok(_) => Err(io::ErrorKind::WriteZero.into()),
            Err(_) => Err(io::Error::from_raw_os_error(i32::try_from(-event.result).unwrap_or(libc::EIO))),
        }
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: nothing is on its way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn returned(value: libc::c_long) -> io::Result<libc::c_long> {
    if value < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}
