//! One thread's ring and its entries: set-up, commits, completions.
//!
//! Performance critical. Commits are collected and submitted together; a request that waits in the kernel comes back from the
//! same system call that commits the answer before it.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring_06::squeue::Entry128;
use io_uring_06::{IoUring, cqueue, opcode, types};
use memmap2::MmapMut;

use super::memory::{self, EntryBuffers};
use super::spares::{Place, Spares};
use crate::abi::{Pod, UringCommand, uring};
use crate::options::Busy;

/// /dev/fuse in the ring's table of files, which saves looking it up each time.
const DEVICE: types::Fixed = types::Fixed(0);

/// Set in `user_data` of a REGISTER; the rest is the entry's index.
const REGISTERING: u64 = 1 << 63;

/// One request at a time.
#[derive(Clone, Copy, Debug)]
struct Entry {
    queue: u16,
    buffers: EntryBuffers,
}

/// What the kernel reports.
#[derive(Debug)]
pub(super) enum Completion {
    /// The entry of this index has a request.
    Request(usize),
    /// The mount has ended.
    Ended,
    /// The kernel did not take the answer from the entry of this index, and has forgotten the entry.
    CommitRefused(usize, io::Error),
    /// The kernel did not take the entry of this index.
    RegisterRefused(usize, io::Error),
}

/// A ring and what it serves. Used by one thread only.
pub(super) struct Ring {
    /// Before the memory: the kernel lets go of it first.
    uring: RefCell<IoUring<Entry128, cqueue::Entry>>,
    entries: Vec<Entry>,
    /// What REGISTER points to, for each entry.
    iovecs: Vec<[libc::iovec; 2]>,
    /// Numbered behind the entries.
    spares: Spares,
    unsubmitted: Cell<usize>,
    /// Requests that came while entries were registered.
    early: RefCell<VecDeque<usize>>,
    /// For tests, from when the ring is in service.
    busy: OnceCell<Busy>,
    _memory: MmapMut,
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.uring.borrow().as_raw_fd()
    }
}

/// A ring as this transport needs it.
pub(super) fn build(entries: usize) -> io::Result<IoUring<Entry128, cqueue::Entry>> {
    let entries = u32::try_from(entries.next_power_of_two())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "too many entries for one ring"))?;
    IoUring::builder()
        // No signal interrupts the thread while it computes: what came is taken in at its next system call.
        .setup_coop_taskrun()
        .setup_single_issuer()
        // One refused submission does not hold up those behind it.
        .setup_submit_all()
        .build(entries)
}

impl Ring {
    /// A ring for `queues`, with `depth` entries each. To be used on the calling thread.
    pub(super) fn new(queues: &[u16], depth: usize, size_max: usize) -> io::Result<Ring> {
        let (memory, buffers) = memory::map(queues.len() * depth, size_max)?;
        let iovecs = buffers.iter().map(EntryBuffers::iovecs).collect();
        let entries: Vec<Entry> = queues
            .iter()
            .flat_map(|&queue| std::iter::repeat_n(queue, depth))
            .zip(buffers)
            .map(|(queue, buffers)| Entry { queue, buffers })
            .collect();
        Ok(Ring {
            uring: RefCell::new(build(entries.len())?),
            entries,
            iovecs,
            spares: Spares::new(size_max),
            unsubmitted: Cell::new(0),
            early: RefCell::default(),
            busy: OnceCell::new(),
            _memory: memory,
        })
    }

    /// Gives the kernel all entries. From the moment that it has one of each queue, of all rings, requests come this way.
    ///
    /// # Errors
    /// [`RegisterError::Refused`] when it took none of some queue: then the kernel keeps to /dev/fuse.
    pub(super) fn register(
        &self,
        device: BorrowedFd<'_>,
        bad_queue: Option<u16>,
    ) -> Result<(), RegisterError> {
        self.uring.borrow().submitter().register_files(&[device.as_raw_fd()]).map_err(RegisterError::Ring)?;
        for (index, (entry, iovecs)) in self.entries.iter().zip(&self.iovecs).enumerate() {
            // Fewer iovecs than the kernel insists on, for tests.
            let count = if bad_queue == Some(entry.queue) { 1 } else { 2 };
            self.push(register_entry(entry.queue, iovecs, count), REGISTERING | index as u64)
                .map_err(RegisterError::Ring)?;
        }
        while self.unsubmitted.get() > 0 {
            self.submit().map_err(RegisterError::Ring)?;
        }
        let mut taken = vec![true; self.entries.len()];
        let mut refused = None;
        while let Some(completion) = self.take_completion() {
            match completion {
                // Another thread's entries were the last that the kernel waited for.
                Completion::Request(index) => self.early.borrow_mut().push_back(index),
                Completion::CommitRefused(index, e) | Completion::RegisterRefused(index, e) => {
                    if let Some(taken) = taken.get_mut(index) {
                        *taken = false;
                    }
                    refused = Some(e);
                }
                Completion::Ended => return Err(RegisterError::Ended),
            }
        }
        let Some(source) = refused else { return Ok(()) };
        let has_one =
            |queue: u16| self.entries.iter().zip(&taken).any(|(entry, taken)| entry.queue == queue && *taken);
        match self.entries.iter().find(|entry| !has_one(entry.queue)) {
            Some(entry) => Err(RegisterError::Refused { queue: entry.queue, source }),
            None => {
                let count = taken.iter().filter(|taken| !**taken).count();
                tracing::warn!("the kernel refused {count} of {} ring entries: {source}", taken.len());
                Ok(())
            }
        }
    }

    /// The entry's buffers, for who may touch them.
    pub(super) fn buffers(&self, index: usize) -> Option<EntryBuffers> {
        self.entry(index).map(|(_, buffers)| buffers)
    }

    /// Queue and buffers of an entry.
    fn entry(&self, index: usize) -> Option<(u16, EntryBuffers)> {
        match self.entries.get(index) {
            Some(entry) => Some((entry.queue, entry.buffers)),
            None => self.spares.get(index.checked_sub(self.entries.len())?),
        }
    }

    /// The entry's request may take for ever: its queue gets another entry, at the next `submit`.
    pub(super) fn keep(&self, index: usize) -> io::Result<bool> {
        let (queue, _) = self.entry(index).ok_or(io::ErrorKind::InvalidInput)?;
        match self.spares.keep(queue) {
            Place::New(number) => self.register_again(self.entries.len() + number).map(|()| true),
            Place::Free => Ok(true),
            Place::Nothing => Ok(false),
        }
    }

    /// Such a request is answered.
    pub(super) fn back(&self, index: usize) {
        if let Some((queue, _)) = self.entry(index) {
            self.spares.back(queue);
        }
    }

    /// Gives an entry with its answer back to the kernel, at the next `submit`.
    pub(super) fn commit(&self, index: usize, commit_id: u64) -> io::Result<()> {
        let (queue, _) = self.entry(index).ok_or(io::ErrorKind::InvalidInput)?;
        let command = UringCommand { commit_id, qid: queue, ..UringCommand::default() };
        self.push(self::command(uring::COMMIT_AND_FETCH, &command), index as u64)
    }

    /// Gives an entry that the kernel has forgotten to it anew, at the next `submit`.
    pub(super) fn register_again(&self, index: usize) -> io::Result<()> {
        let (queue, _) = self.entry(index).ok_or(io::ErrorKind::InvalidInput)?;
        let iovecs = match self.iovecs.get(index) {
            Some(iovecs) => Some(&raw const *iovecs),
            None => self.spares.iovecs(index - self.iovecs.len()),
        };
        let iovecs = iovecs.ok_or(io::ErrorKind::InvalidInput)?;
        self.push(register_entry(queue, iovecs, 2), REGISTERING | index as u64)
    }

    fn push(&self, submission: Entry128, user_data: u64) -> io::Result<()> {
        let mut uring = self.uring.borrow_mut();
        let submission = submission.user_data(user_data);
        // SAFETY: the command points to buffers (`_memory`, `spares`) and iovecs that live, unmoved, as long as the ring.
        let mut pushed = unsafe { uring.submission().push(&submission) };
        if pushed.is_err() {
            // There is room for one submission of each entry, and an entry has one at a time; for spares there may be none.
            let submitted = uring.submit()?;
            self.unsubmitted.set(self.unsubmitted.get().saturating_sub(submitted));
            // SAFETY: as above.
            pushed = unsafe { uring.submission().push(&submission) };
        }
        pushed.map_err(|_| io::Error::other("the submission queue is full"))?;
        self.unsubmitted.set(self.unsubmitted.get() + 1);
        Ok(())
    }

    /// Whether there is something to submit.
    pub(super) fn has_unsubmitted(&self) -> bool {
        self.unsubmitted.get() > 0
    }

    /// From now on submissions fail as often as that says.
    pub(super) fn set_busy(&self, busy: Busy) {
        self.busy.get_or_init(|| busy);
    }

    /// Hands over what was pushed. Requests that wait in the kernel are then completed.
    ///
    /// # Errors
    /// What was not handed over stays, for the next call.
    pub(super) fn submit(&self) -> io::Result<()> {
        if self.busy.get().is_some_and(Busy::again) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        match self.uring.borrow().submit() {
            Ok(submitted) => self.unsubmitted.set(self.unsubmitted.get().saturating_sub(submitted)),
            // The caller comes back while there is something to submit.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// What has happened next, if anything has.
    pub(super) fn completion(&self) -> Option<Completion> {
        let early = self.early.borrow_mut().pop_front();
        early.map(Completion::Request).or_else(|| self.take_completion())
    }

    fn take_completion(&self) -> Option<Completion> {
        let completed = self.uring.borrow_mut().completion().next()?;
        let index = (completed.user_data() & !REGISTERING) as usize;
        let was_registering = completed.user_data() & REGISTERING != 0;
        Some(match completed.result() {
            0.. => Completion::Request(index),
            result => match (-result, io::Error::from_raw_os_error(-result)) {
                (libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ECANCELED, _) => {
                    Completion::Ended
                }
                (_, e) if was_registering => Completion::RegisterRefused(index, e),
                (_, e) => Completion::CommitRefused(index, e),
            },
        })
    }
}

/// Why entries could not be registered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    /// The kernel goes on with /dev/fuse: a REGISTER that fails switches io_uring off for the mount.
    #[error("the kernel refused the ring entries of CPU {queue}: {source}")]
    Refused { queue: u16, source: io::Error },
    /// The kernel waits for entries that will not come.
    #[error("the ring does not work: {0}")]
    Ring(io::Error),
    /// Unmounted meanwhile.
    #[error("unmounted before it was in service")]
    Ended,
}

impl RegisterError {
    /// The ring's thread has ended, which it does not do by itself.
    pub(crate) fn gone() -> RegisterError {
        RegisterError::Ring(io::Error::other("its thread is gone"))
    }
}

fn command(code: u32, command: &UringCommand) -> Entry128 {
    let mut bytes = [0; 80];
    bytes[..size_of::<UringCommand>()].copy_from_slice(command.as_bytes());
    opcode::UringCmd80::new(DEVICE, code).cmd(bytes).build()
}

fn register_entry(queue: u16, iovecs: *const [libc::iovec; 2], count: u32) -> Entry128 {
    let command = UringCommand { qid: queue, ..UringCommand::default() };
    let mut entry = self::command(uring::REGISTER, &command);
    // Fields of `struct io_uring_sqe` that `UringCmd80` has no setter for.
    const ADDR: usize = 16;
    const LEN: usize = 24;
    let bytes = (&raw mut entry).cast::<u8>();
    // SAFETY: an `Entry128` is the kernel's 128 byte structure, plain integers; both fields are within it.
    unsafe {
        bytes.add(ADDR).cast::<u64>().write_unaligned(iovecs.addr() as u64);
        bytes.add(LEN).cast::<u32>().write_unaligned(count);
    }
    entry
}
