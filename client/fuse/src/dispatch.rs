//! From a request to a call of the filesystem, and from its result to an answer.
//!
//! No logic of the filesystem lives here: only what the kernel needs to be told, and the state that belongs to the kernel's
//! view (handles, the page cache's version, callers waiting). Shared by all workers of a mount.

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use fjordfs_proto::error::Errno;
use fjordfs_proto::pb::meta::{Attr, FileKind};
use fjordfs_proto::{FsError, FsResult, InodeId};
use futures_util::FutureExt;

use crate::abi::{self, opcode};
use crate::directory::{Listing, OpenDirectory, Plus};
use crate::ends::{Ends, ShortAnswer, Told};
use crate::filesystem::{CopiedRange, Filesystem, LeftBehind};
use crate::handles::Handles;
use crate::held::Held;
use crate::interrupt::Interrupts;
use crate::kernel_cache::KernelCache;
use crate::lock_owners::LockOwners;
use crate::notify::Notifier;
use crate::overtaken::Overtaken;
use crate::removed::RemovedDirectories;
use crate::reply::{self, Reply, Validity};
use crate::request::{Caller, Operation, Request};

mod complaints;
mod file;
mod lock;
mod namespace;
mod space;
mod xattr;

use complaints::{Complaints, describe};
use file::OpenFile;

const RENAME_EXCHANGE: u32 = 2;
/// None, RENAME_NOREPLACE, and that.
const RENAME_FLAGS: [u32; 3] = [0, 1, RENAME_EXCHANGE];

/// Everything workers share.
pub(crate) struct Dispatcher<F: Filesystem> {
    fs: F,
    /// What the user wants, at least.
    validity: Validity,
    answers_can_be_recalled: bool,
    /// Largest READ and WRITE, bytes.
    size_max: usize,
    files: Handles<OpenFile<F::File>>,
    directories: Handles<OpenDirectory>,
    removed: RemovedDirectories,
    kernel_cache: KernelCache,
    held: Arc<Held>,
    ends: Arc<Ends>,
    overtaken: Arc<Overtaken>,
    lock_owners: LockOwners,
    pub(crate) interrupts: Interrupts,
    notifier: Notifier,
    complaints: Complaints,
    /// Numbers before it were given out by a former process.
    first_number: u64,
    /// Held while an open file of a former process is looked up.
    resuming: tokio::sync::Mutex<()>,
}

/// An answer, and what must be undone if the kernel did not take it.
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    /// A handle that was given out.
    opened: Option<Opened>,
    /// The inode that it brings the kernel, which is counted ([`crate::held`]).
    brings: Option<Told>,
    /// Those that a listing brings.
    lists: Vec<Told>,
    /// Of an inode that the kernel knows.
    tells: Option<Told>,
    /// It is data that ends with the file: to be dropped when the kernel has taken it in.
    pub(crate) ends: Option<ShortAnswer>,
    /// To be dropped when the kernel has the answer.
    pub(crate) unanswered: Option<Box<dyn Send>>,
    /// Written, but perhaps not what the kernel has in its pages: to be told when it has the answer.
    pub(crate) overtaken: Option<(InodeId, Range<u64>)>,
}

/// A handle that was given out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Opened {
    File(u64),
    Directory(u64),
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Answer {
        let (opened, brings, tells, ends, unanswered) = Default::default();
        Answer { reply, opened, brings, lists: Vec::new(), tells, ends, unanswered, overtaken: None }
    }
}

impl Answer {
    /// The sizes that it tells.
    fn told(&self) -> impl Iterator<Item = Told> {
        self.brings.iter().chain(&self.lists).chain(&self.tells).copied()
    }
}

/// What attributes say of the size.
fn told(attr: &Attr) -> Told {
    Told { ino: InodeId(attr.ino), size: attr.size }
}

impl<F: Filesystem> Dispatcher<F> {
    pub(crate) fn new(
        fs: F,
        validity: Validity,
        size_max: usize,
        kernel_minor: u32,
        notifier: Notifier,
        held: Arc<Held>,
        first_number: u64,
    ) -> Dispatcher<F> {
        Dispatcher {
            fs,
            validity,
            answers_can_be_recalled: abi::answers_can_be_recalled(kernel_minor),
            size_max,
            files: Handles::new(first_number),
            directories: Handles::new(first_number),
            removed: RemovedDirectories::default(),
            kernel_cache: KernelCache::new(),
            held,
            ends: Arc::default(),
            overtaken: Arc::clone(notifier.overtaken()),
            lock_owners: LockOwners::default(),
            interrupts: Interrupts::default(),
            notifier,
            complaints: Complaints::default(),
            first_number,
            resuming: tokio::sync::Mutex::new(()),
        }
    }

    /// Takes over what a former process has left.
    pub(crate) fn take_over(&self) {
        let LeftBehind { opens, lock_users, stale } = self.fs.left_behind();
        for (ino, owner, fh) in lock_users {
            self.locks_through(ino, fh, owner);
        }
        stale.into_iter().for_each(|ino| self.notifier.invalidate_inode(ino));
        for (_, ino) in opens {
            // Where the kernel has zeros is not known.
            drop(self.ends.short_answer(ino, 0));
        }
    }

    pub(crate) fn filesystem(&self) -> &F {
        &self.fs
    }

    /// Serves one request. `payload` is the slot's: data of a READ goes there if it has room.
    pub(crate) async fn serve(&self, request: Request, payload: &mut [u8]) -> Answer {
        let Request { unique, caller, node, operation } = request;
        let what = describe(&operation);
        self.held.asked_about(node);
        match self.route(unique, caller, node, operation, payload).await {
            Ok(answer) => {
                self.let_short_answers_pass(node, &answer).await;
                answer
            }
            Err(e) => self.failed(what, node, &e).into(),
        }
    }

    /// An answer may tell of a new size: those from before it go first.
    async fn let_short_answers_pass(&self, node: InodeId, answer: &Answer) {
        if answer.ends.is_none() {
            for ino in answer.told().map(|told| told.ino).chain([node]) {
                self.ends.taken_in(ino).await;
            }
        }
    }

    /// Sizes among those of an answer that must not be told while the kernel has the pages that it has.
    pub(crate) fn early(&self, answer: &Answer) -> Vec<Told> {
        answer.told().filter(|told| self.ends.zeros_before(*told).is_some()).collect()
    }

    /// Resolves when it has none of them any more, which can take other requests of this mount.
    pub(crate) async fn drop_old_ends(&self, early: Vec<Told>) {
        for told in early {
            if let Some(from) = self.ends.zeros_before(told) {
                self.notifier.drop_pages(told.ino, from..u64::MAX).await;
                self.ends.dropped(told);
            }
        }
    }

    async fn route(
        &self,
        unique: u64,
        caller: Caller,
        node: InodeId,
        operation: Operation,
        payload: &mut [u8],
    ) -> FsResult<Answer> {
        let reply = match operation {
            // Those that give out handles.
            Operation::Open { flags } => return self.open(node, flags).await,
            Operation::Create { name, flags, mode, umask } => {
                let new = file::new_file(caller, mode, umask, flags);
                return self.create(node, &name, new, flags).await;
            }
            Operation::Tmpfile { flags, mode, umask } => {
                let new = file::new_file(caller, mode, umask, flags);
                return self.tmpfile(node, new, flags).await;
            }
            Operation::Opendir => {
                let fh = self.directories.insert(OpenDirectory::new(node));
                let reply = Reply::of(&abi::OpenOut { fh, ..abi::OpenOut::default() });
                return Ok(Answer { opened: Some(Opened::Directory(fh)), ..reply.into() });
            }

            Operation::Lookup { name } => return self.lookup(node, &name, caller.pid).await,
            Operation::Getattr => {
                let attr = self.attr_of(node).await?;
                let reply = Reply::of(&reply::attr_out(&attr, self.validity_of_attr(&attr)));
                return Ok(Answer { tells: Some(told(&attr)), ..reply.into() });
            }
            Operation::Statx => {
                let attr = self.attr_of(node).await?;
                let reply = Reply::of(&reply::statx_out(&attr, self.validity_of_attr(&attr)));
                return Ok(Answer { tells: Some(told(&attr)), ..reply.into() });
            }
            Operation::Setattr(input) => return self.setattr(node, &input).await,
            Operation::Readlink => Reply::Bytes(self.fs.readlink(node).await?.into()),
            Operation::Symlink { name, target } => {
                return self.make(node, &name, namespace::symlink(caller, target)).await;
            }
            Operation::Mknod { name, mode, umask, rdev } => {
                return self.make(node, &name, namespace::special(caller, mode, umask, rdev)?).await;
            }
            Operation::Mkdir { name, mode, umask } => {
                return self.make(node, &name, namespace::directory(caller, mode, umask)).await;
            }
            Operation::Link { ino, name } => {
                let attr = self.fs.link(ino, node, &name).await?;
                return Ok(self.made(node, &name, &attr));
            }
            Operation::Unlink { name } => {
                self.fs.unlink(node, &name).await?;
                Reply::Empty
            }
            Operation::Rmdir { name } => {
                let last = self.directory_at(node, &name).await;
                self.fs.rmdir(node, &name).await?;
                last.into_iter().for_each(|attr| self.removed.removed(attr));
                Reply::Empty
            }
            Operation::Rename { name, new_parent, new_name, flags } => {
                if !RENAME_FLAGS.contains(&flags) {
                    return Err(FsError::new(
                        Errno::EINVAL,
                        format!("rename with flags {flags:#x} is not supported"),
                    ));
                }
                let replaced = match flags & RENAME_EXCHANGE {
                    // Most renames replace a file, or nothing, and to look costs a round trip where the name is not known.
                    0 if !self.directories.is_empty() => self.directory_at(new_parent, &new_name).await,
                    _ => None,
                };
                self.fs.rename(node, &name, new_parent, &new_name, flags).await?;
                replaced.into_iter().for_each(|attr| self.removed.removed(attr));
                Reply::Empty
            }

            Operation::Getxattr { name, size } => self.getxattr(node, &name, size).await?,
            Operation::Setxattr { name, value, flags, setxattr_flags } => {
                self.setxattr(node, &name, value, flags, setxattr_flags).await?
            }
            Operation::Listxattr { size } => self.listxattr(caller, node, size).await?,
            Operation::Removexattr { name } => {
                self.fs.remove_xattr(node, &name).await?;
                Reply::Empty
            }

            Operation::Read { fh, offset, size, fills_pages } => {
                return self.read(fh, offset, size, fills_pages, payload).await;
            }
            Operation::Write { fh, offset, write_flags, flags, data } => {
                return self.write(fh, offset, write_flags, flags, data).await;
            }
            Operation::Fallocate { fh, offset, length, mode } => {
                self.fallocate(caller, fh, offset, length, mode).await?
            }
            Operation::CopyFileRange { fh_in, offset_in, fh_out, offset_out, length, wide } => {
                let length = if wide { length } else { length.min(u32::MAX.into()) };
                let range =
                    CopiedRange { from: offset_in, to: offset_out, length, clear_suid: caller.uid != 0 };
                // Boxed: no other request is half as large, and each has room for any.
                let copied = Box::pin(self.copy_file_range(caller, fh_in, fh_out, range)).await?;
                if wide {
                    Reply::of(&abi::CopyFileRangeOut { bytes_copied: copied })
                } else {
                    Reply::of(&abi::WriteOut { size: copied as u32, padding: 0 })
                }
            }
            Operation::Lseek { fh, offset, whence } => self.lseek(fh, offset, whence).await?,
            Operation::Getlk { fh, lock } => self.getlk(fh, lock).await?,
            Operation::Setlk { fh, lock, wait } => self.setlk(unique, fh, lock, wait).await?,
            Operation::Flush { fh, lock_owner } => self.flush(fh, lock_owner).await?,
            Operation::Fsync { fh } => self.fsync(fh).await?,
            Operation::Release { fh } => {
                if fh < self.first_number {
                    // It may have locks. One that is lost has none.
                    let _lost = self.file(fh).await;
                }
                if let Some(open) = self.files.get(fh) {
                    self.open_was_taken_in(fh, &open);
                    self.unlock_open_file(fh, &open).await;
                }
                self.close(Opened::File(fh)).await;
                Reply::Empty
            }

            Operation::Readdir { fh, offset, size, plus } => {
                return self.readdir(node, fh, offset, size, plus).await;
            }
            Operation::Releasedir { fh } => {
                self.close(Opened::Directory(fh)).await;
                Reply::Empty
            }

            Operation::Statfs => Reply::of(&reply::statfs_out(&self.fs.statfs().await?)),
            Operation::Fsyncdir => {
                self.fs.sync_namespace().await?;
                Reply::Empty
            }
            Operation::Syncfs => {
                self.fs.sync_all().await?;
                Reply::Empty
            }
            Operation::Forget(nodes) => {
                for (ino, answers) in nodes {
                    if self.held.lookups.subtract(ino, answers) {
                        self.kernel_cache.forget(ino);
                        self.ends.forget(ino);
                        self.removed.forget(ino);
                        for (owner, fh) in self.lock_owners.forget(ino) {
                            self.fs.leave_lock_user(ino, owner, fh, false);
                        }
                    }
                }
                Reply::None
            }
            Operation::Interrupt { unique } => {
                self.interrupts.interrupt(unique);
                Reply::None
            }
            Operation::Destroy => Reply::Empty,
            // Answered before the workers start; a second one is not part of the protocol.
            Operation::Init => Reply::Error(libc::EIO),
            Operation::Other(code) => not_served(code),
        };
        Ok(reply.into())
    }

    async fn lookup(&self, parent: InodeId, name: &Bytes, thread: u32) -> FsResult<Answer> {
        let mut lookup = pin!(self.fs.lookup(parent, name));
        let found = match lookup.as_mut().now_or_never() {
            Some(found) => found,
            None => {
                let asked = self.held.asked.ask(parent, name, thread);
                tokio::select! {
                    biased;
                    found = lookup => found,
                    // The kernel walks the path again.
                    () = asked.given_up() => return Ok(Reply::Error(libc::ESTALE).into()),
                }
            }
        };
        match found {
            Ok(attr) => Ok(self.found(parent, name, &attr)),
            Err(e) if self.was_removed(parent, &e) => Err(FsError::new(Errno::ENOENT, e.message)),
            Err(e) if e.errno == Errno::ENOENT => match self.name_left(parent, name, None) {
                Duration::ZERO => Err(e),
                left => Ok(Reply::of(&reply::absent_out(left)).into()),
            },
            Err(e) => Err(e),
        }
    }

    /// Answers with an inode that was there. Counted first: a recall that comes now has to wait for this answer.
    fn found(&self, parent: InodeId, name: &[u8], attr: &Attr) -> Answer {
        let ino = InodeId(attr.ino);
        self.held.lookups.add(ino);
        let attr_left = if self.answers_can_be_recalled { self.fs.attr_left(attr) } else { Duration::ZERO };
        self.entry(parent, name, attr, attr_left)
    }

    /// Answers with an inode that the kernel will take whatever is recalled meanwhile, so that its attributes cannot stay.
    fn made(&self, parent: InodeId, name: &[u8], attr: &Attr) -> Answer {
        self.held.lookups.add(InodeId(attr.ino));
        self.entry(parent, name, attr, Duration::ZERO)
    }

    /// Of an inode that is counted.
    fn entry(&self, parent: InodeId, name: &[u8], attr: &Attr, attr_left: Duration) -> Answer {
        let reply = Reply::of(&reply::entry_out(attr, self.validity_of_entry(parent, name, attr, attr_left)));
        Answer { brings: Some(told(attr)), ..reply.into() }
    }

    fn validity_of_entry(&self, parent: InodeId, name: &[u8], attr: &Attr, attr_left: Duration) -> Validity {
        let entry = self.name_left(parent, name, Some(InodeId(attr.ino)));
        Validity { entry: entry.max(self.validity.entry), attr: attr_left.max(self.validity.attr) }
    }

    fn name_left(&self, parent: InodeId, name: &[u8], ino: Option<InodeId>) -> Duration {
        if self.answers_can_be_recalled { self.fs.name_left(parent, name, ino) } else { Duration::ZERO }
    }

    fn validity_of_attr(&self, attr: &Attr) -> Validity {
        Validity { attr: self.fs.attr_left(attr).max(self.validity.attr), ..self.validity }
    }

    async fn readdir(&self, node: InodeId, fh: u64, offset: u64, size: u32, plus: bool) -> FsResult<Answer> {
        if fh < self.first_number && self.directories.get(fh).is_none() {
            // Offsets say all that a former process may have kept.
            self.directories.insert_as(fh, OpenDirectory::new(node));
        }
        let directory = self.directories.get(fh).ok_or_else(|| unknown_handle(fh))?;
        self.held.unsettled.settle_listing(directory.ino(), fh);
        let plus = plus.then_some(Plus { held: &self.held, handle: fh, least: self.validity });
        let mut listing = Listing::new((size as usize).min(self.size_max), plus);
        match directory.list(&self.fs, offset, &mut listing).await {
            Err(e) if self.was_removed(node, &e) => {}
            listed => listed?,
        }
        let (reply, lists) = listing.into_reply();
        Ok(Answer { lists, ..reply.into() })
    }

    async fn attr_of(&self, node: InodeId) -> FsResult<Attr> {
        match self.fs.getattr(node).await {
            Err(e) if e.errno == Errno::ESTALE => self.removed.last_of(node).ok_or(e),
            result => result,
        }
    }

    /// Whether an error says that a directory is gone which this mount has removed.
    fn was_removed(&self, node: InodeId, e: &FsError) -> bool {
        e.errno == Errno::ESTALE && self.removed.last_of(node).is_some()
    }

    /// The directory of this name, which is perhaps about to be removed. Mostly known here: the kernel has looked it up.
    async fn directory_at(&self, parent: InodeId, name: &Bytes) -> Option<Attr> {
        let found = self.fs.lookup(parent, name).await.ok()?;
        let is_held = || self.held.lookups.count(InodeId(found.ino)) > 0;
        (found.kind() == FileKind::Directory && is_held()).then_some(found)
    }

    /// Undoes what an answer began that the kernel did not take.
    pub(crate) async fn take_back(&self, answer: Answer) {
        for Told { ino, .. } in answer.brings.into_iter().chain(answer.lists) {
            self.held.unsettled.settle_creation(ino);
            self.held.lookups.subtract(ino, 1);
        }
        if let Some(opened) = answer.opened {
            self.close(opened).await;
        }
    }

    /// Takes back a handle: on RELEASE, or when the kernel did not take the answer that gave it out.
    pub(crate) async fn close(&self, opened: Opened) {
        match opened {
            Opened::Directory(fh) => {
                if let Some(directory) = self.directories.remove(fh) {
                    self.held.unsettled.settle_listing(directory.ino(), fh);
                }
            }
            Opened::File(fh) => {
                if let Some(open) = self.files.remove(fh) {
                    self.release(&open).await;
                    if open.writes {
                        self.overtaken.closed(open.ino);
                    }
                }
                self.fs.leave_closed(fh);
            }
        }
    }

    /// Closes every handle that is still open when the mount has ended: an abort does not send RELEASE.
    pub(crate) async fn close_all(&self) {
        self.directories.drain();
        for open in self.files.drain() {
            tokio::select! {
                biased;
                () = self.release(&open) => {}
                () = self.interrupts.mount_is_gone() => {}
            }
        }
    }
}

fn unknown_handle(fh: u64) -> FsError {
    FsError::new(Errno::EBADF, format!("handle {fh} is not open"))
}

/// What requests that are not served get. `ENOSYS` makes the kernel stop asking and take its own way, silently: `access` is decided from the mode.
fn not_served(code: u32) -> Reply {
    match code {
        // The kernel passes this one on as it is, and programs expect it of a file that takes no such ioctl.
        opcode::IOCTL => Reply::Error(libc::ENOTTY),
        _ => Reply::Error(libc::ENOSYS),
    }
}

impl<F: Filesystem> Dispatcher<F> {
    /// Cached pages of an inode do not show the file any more.
    fn pages_are_stale(&self, ino: InodeId) {
        self.kernel_cache.forget(ino);
        self.notifier.invalidate_inode(ino);
    }

    /// The kernel may have filled these pages with what was there before a WRITE that it has the answer to.
    pub(crate) fn drop_overtaken(&self, ino: InodeId, bytes: Range<u64>) {
        self.kernel_cache.forget(ino);
        self.notifier.invalidate_pages(ino, bytes);
    }

    async fn release(&self, open: &OpenFile<F::File>) {
        if let Err(e) = self.fs.release(&open.file).await {
            // `close` returned already; the FLUSH before it reported what it could.
            self.complaints.complain(|suppressed| {
                tracing::warn!(ino = %open.ino, suppressed, "closing failed, data written last may be lost: {e}");
            });
            self.pages_are_stale(open.ino);
        }
    }
}
