//! What a client leaves to the process that takes its place: a table in shared memory that a supervisor keeps open.
//!
//! For a mount that outlives its process. The table always says what a successor needs to go on with the same session:
//! the session, the open files as the kernel knows them, the locks, and which files had bytes that no server has. It is kept
//! up to date by plain stores, no system call, and what was stored when the process is killed is there.
//!
//! ```text
//! page 0:  magic | version | generation | session | decided | records in use | length and bytes of the cluster's id | untold
//! pages 1, 2: for each slot of the session: request of the kernel (0: none) | sequence | kind of operation
//! records: 64 bytes each: kind (0: none) | seven words
//!   open:  handle | inode | number | 1: its reads leave the access time as it is
//!   lock:  inode | owner | 1: flock, 2: for writing | first byte | last byte | process
//!   dirty: inode
//!   user:  inode | owner of locks | number of an open file that it has locked through
//! ```
//!
//! # Crash consistency
//! Only the dying process writes, and its stores are seen in their order: a record's words come before its kind, so a record is
//! whole or not there. What replaces a record is there before the former one goes: a successor may find both, and
//! treats locks so (the same owner's locks merge).
//!
//! # Invariants
//! - A mutation is listed in its slot before it is sent for a request of the kernel, until that is answered. A successor that gets the
//!   request again sends it as the same mutation, which the metaserver executes once.
//! - A file is listed as dirty before a caller is told that its write is done, and until all of it is committed.
//! - A successor uses handle numbers, slot sequences and numbers of the kernel's handles that begin at its generation's
//!   [`first`](Handover::first_number), so none is used twice.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::atomic::{AtomicU64, Ordering},
};

use fjordfs_proto::{HandleId, InodeId, SessionId, pb::meta::FileLock};
use memmap2::{MmapOptions, MmapRaw};
use parking_lot::Mutex;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

const MAGIC: u64 = u64::from_le_bytes(*b"fjordhov");

/// One sentence per bump. 1: the first.
const VERSION: u64 = 1;

const PAGE: usize = 4096;
const WORDS: usize = 8;
const RECORD: usize = WORDS * size_of::<u64>();

/// Twice as many as a session may have handles; memory is used for those that were ever in use at once.
const RECORDS_MAX: usize = 1 << 21;
const LENGTH: usize = RECORDS_AT + RECORDS_MAX * RECORD;

/// Slots of a session that are listed; a metaserver grants as many.
const SLOTS_MAX: usize = 256;
const SLOT_WORDS: usize = 3;
const SLOTS_AT: usize = PAGE;
const RECORDS_AT: usize = 3 * PAGE;
const _: () = assert!(SLOTS_AT + SLOTS_MAX * SLOT_WORDS * size_of::<u64>() <= RECORDS_AT);

/// Words of page 0.
mod header {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 1;
    pub(super) const GENERATION: usize = 2;
    pub(super) const SESSION: usize = 3;
    pub(super) const DECIDED: usize = 4;
    pub(super) const USED: usize = 5;
    pub(super) const CLUSTER: usize = 6;
    /// Behind the words of the longest id.
    pub(super) const UNTOLD: usize = CLUSTER + 1 + super::CLUSTER_MAX / 8;
}

/// Longest id of a cluster that is kept; it is a UUID.
const CLUSTER_MAX: usize = 256;

/// Kinds of records.
mod kind {
    pub(super) const NONE: u64 = 0;
    pub(super) const OPEN: u64 = 1;
    pub(super) const LOCK: u64 = 2;
    pub(super) const DIRTY: u64 = 3;
    pub(super) const USER: u64 = 4;
}

/// Numbers of one generation: more than are used in a century at a million a second.
const GENERATION_SHIFT: u32 = 45;

type Words = [u64; WORDS - 1];

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    /// The kernel's number of an open file.
    Open(u64),
    /// Inode, flock or not, owner.
    Lock(u64, bool, u64),
    Dirty(u64),
    User(LockUser),
}

/// An open file of the former process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Open {
    pub(crate) number: u64,
    pub(crate) handle: HandleId,
    pub(crate) ino: InodeId,
    /// Reads through it leave the access time as it is.
    pub(crate) keeps_access_time: bool,
}

/// Who has locks, other than those of `flock`, and an open file through which they were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockUser {
    /// What is locked.
    pub ino: InodeId,
    /// The kernel's number of a process or an open file.
    pub owner: u64,
    /// The kernel's number of the open file.
    pub number: u64,
}

/// A mutation that was sent for a request of the kernel which was not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) request: u64,
    pub(crate) slot: u32,
    pub(crate) sequence: u64,
    /// Of the operation: one request may send several.
    pub(crate) kind: u64,
}

/// What the former process has left.
#[derive(Clone, Debug, Default)]
pub(crate) struct Legacy {
    pub(crate) session: SessionId,
    pub(crate) cluster_id: String,
    pub(crate) opens: Vec<Open>,
    pub(crate) locks: Vec<FileLock>,
    pub(crate) users: Vec<LockUser>,
    pub(crate) dirty: Vec<InodeId>,
    pub(crate) asked: Vec<Asked>,
    /// Operations were reported as done that the metaserver may not have, or has not, and nobody was told.
    pub(crate) decided: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Handover {
    memory: MmapRaw,
    generation: u64,
    places: Mutex<Places>,
    /// Requests of the kernel that are being worked on. Held while slots are listed or cleared.
    under_way: Mutex<HashSet<u64>>,
    legacy: Option<Legacy>,
}

/// Which records are whose.
#[derive(Debug, Default)]
struct Places {
    of: HashMap<Key, Vec<usize>>,
    free: Vec<usize>,
    used: usize,
    told_full: bool,
}

impl Handover {
    /// Memory for a table, to be kept by whoever starts the processes.
    ///
    /// # Errors
    /// When the system has none.
    pub fn memory() -> io::Result<OwnedFd> {
        let fd = memfd_create("fjord-handover", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, LENGTH as u64)?;
        // Nobody can make a mapping of it fail later.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    }

    /// Takes over a table, which is empty for the first process.
    ///
    /// # Errors
    /// `InvalidData` when it is another version's, and those of mapping it.
    pub fn take_over(memory: OwnedFd) -> io::Result<Handover> {
        let file = File::from(memory);
        if file.metadata()?.len() != LENGTH as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the handover memory has another size"));
        }
        let memory = MmapOptions::new().len(LENGTH).map_raw(&file)?;
        let (places, under_way) = Default::default();
        let mut handover = Handover { memory, generation: 0, places, under_way, legacy: None };
        let word = |at| handover.word(at).load(Ordering::Acquire);
        match (word(header::MAGIC), word(header::VERSION)) {
            (0, 0) => {}
            (MAGIC, VERSION) => {
                let (places, legacy) = handover.read();
                handover.generation = word(header::GENERATION) + 1;
                handover.legacy = (legacy.session.0 != 0).then_some(legacy);
                handover.places = Mutex::new(places);
            }
            _ => {
                let why = "the former process kept its state in another version's form";
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
        }
        handover.word(header::GENERATION).store(handover.generation, Ordering::Release);
        if handover.legacy().is_some_and(|legacy| legacy.decided) {
            // Until somebody is told, which may be this process's successor's doing.
            handover.set_untold(true);
        }
        handover.word(header::DECIDED).store(0, Ordering::Release);
        handover.word(header::VERSION).store(VERSION, Ordering::Release);
        handover.word(header::MAGIC).store(MAGIC, Ordering::Release);
        Ok(handover)
    }

    /// How many processes came before.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Numbers from here on were not used by any process before.
    pub fn first_number(&self) -> u64 {
        self.generation << GENERATION_SHIFT | 1
    }

    pub(crate) fn legacy(&self) -> Option<&Legacy> {
        self.legacy.as_ref()
    }

    /// The session that a successor is to go on with.
    pub(crate) fn set_session(&self, session: SessionId, cluster_id: &str) {
        if self.cluster_id() == cluster_id {
            // Nothing that a process killed meanwhile could leave half done.
            self.word(header::SESSION).store(session.0, Ordering::Release);
            return;
        }
        // A successor that finds no session begins a new one.
        self.word(header::SESSION).store(0, Ordering::Release);
        let id = cluster_id.as_bytes();
        let fits = id.len() <= CLUSTER_MAX;
        let length = if fits { id.len() } else { 0 };
        self.word(header::CLUSTER).store(length as u64, Ordering::Release);
        for (i, piece) in id[..length].chunks(8).enumerate() {
            let mut bytes = [0; 8];
            bytes[..piece.len()].copy_from_slice(piece);
            self.word(header::CLUSTER + 1 + i).store(u64::from_le_bytes(bytes), Ordering::Release);
        }
        self.word(header::SESSION).store(session.0, Ordering::Release);
    }

    /// So many operations have been decided here that the metaserver has not answered.
    pub(crate) fn set_decided(&self, count: usize) {
        self.word(header::DECIDED).store(count as u64, Ordering::Release);
    }

    /// Operations that were reported as done are lost, and nobody was told so far.
    pub(crate) fn set_untold(&self, is_untold: bool) {
        self.word(header::UNTOLD).store(is_untold.into(), Ordering::Release);
    }

    /// A request of the kernel is about to be worked on.
    pub(crate) fn began(&self, request: u64) {
        self.under_way.lock().insert(request);
    }

    /// A mutation is about to be sent. What was decided here is sent after its request was answered, mostly.
    pub(crate) fn asked(&self, asked: Asked) {
        let Asked { request, slot, sequence, kind } = asked;
        let under_way = self.under_way.lock();
        if (slot as usize) < SLOTS_MAX && under_way.contains(&request) {
            self.slot_word(slot as usize, 0).store(0, Ordering::Release);
            self.slot_word(slot as usize, 1).store(sequence, Ordering::Release);
            self.slot_word(slot as usize, 2).store(kind, Ordering::Release);
            self.slot_word(slot as usize, 0).store(request, Ordering::Release);
        }
    }

    /// A request of the kernel is answered.
    pub(crate) fn answered(&self, request: u64) {
        let mut under_way = self.under_way.lock();
        under_way.remove(&request);
        for word in (0..SLOTS_MAX).map(|slot| self.slot_word(slot, 0)) {
            if word.load(Ordering::Relaxed) == request {
                word.store(0, Ordering::Release);
            }
        }
    }

    /// Whether the former process has sent a mutation for this request.
    pub(crate) fn may_be_done(&self, request: u64) -> bool {
        request != 0 && self.left().any(|asked| asked.request == request)
    }

    /// Whether the mutation is still listed.
    pub(crate) fn is_asked(&self, asked: &Asked) -> bool {
        let Asked { request, slot, sequence, .. } = *asked;
        let word = |word| self.slot_word(slot as usize, word).load(Ordering::Acquire);
        (slot as usize) < SLOTS_MAX && (word(0), word(1)) == (request, sequence)
    }

    /// The former process has left these requests unanswered, and no others.
    pub(crate) fn come_again(&self, requests: &[u64]) {
        let requests: HashSet<u64> = requests.iter().copied().collect();
        for asked in self.left().filter(|asked| !requests.contains(&asked.request)) {
            // The process died between the answer and noting it.
            self.answered(asked.request);
        }
    }

    fn left(&self) -> impl Iterator<Item = &Asked> {
        self.legacy.iter().flat_map(|legacy| &legacy.asked)
    }

    /// The kernel is about to be given a number for an open file.
    pub(crate) fn opened(&self, open: Open) {
        let Open { number, handle, ino, keeps_access_time } = open;
        self.set(
            Key::Open(number),
            kind::OPEN,
            &[[handle.0, ino.0, number, keeps_access_time.into(), 0, 0, 0]],
        );
    }

    /// The kernel does not use the number any more.
    pub(crate) fn closed(&self, number: u64) {
        self.set(Key::Open(number), kind::OPEN, &[]);
    }

    /// A file has bytes that no server has.
    pub(crate) fn dirty(&self, ino: InodeId) {
        self.set(Key::Dirty(ino.0), kind::DIRTY, &[[ino.0, 0, 0, 0, 0, 0, 0]]);
    }

    /// All bytes of a file are with the servers, or given up.
    pub(crate) fn clean(&self, ino: InodeId) {
        self.set(Key::Dirty(ino.0), kind::DIRTY, &[]);
    }

    /// All locks of an owner on an inode.
    pub(crate) fn locked(&self, ino: u64, flock: bool, owner: u64, locks: &[FileLock]) {
        let words: Vec<Words> = locks.iter().map(lock_words).collect();
        self.set(Key::Lock(ino, flock, owner), kind::LOCK, &words);
    }

    /// An owner of locks is about to lock through an open file, or does not use it any more.
    pub(crate) fn locks_through(&self, user: LockUser, is_used: bool) {
        let LockUser { ino, owner, number } = user;
        let words = [ino.0, owner, number, 0, 0, 0, 0];
        self.set(Key::User(user), kind::USER, if is_used { std::slice::from_ref(&words) } else { &[] });
    }

    fn set(&self, key: Key, kind: u64, records: &[Words]) {
        let mut places = self.places.lock();
        let mut now = Vec::with_capacity(records.len());
        for words in records {
            let Some(at) = self.free_place(&mut places) else { break };
            for (word, value) in (1..).zip(words) {
                self.record_word(at, word).store(*value, Ordering::Release);
            }
            self.record_word(at, 0).store(kind, Ordering::Release);
            now.push(at);
        }
        let before = match now.is_empty() {
            true => places.of.remove(&key),
            false => places.of.insert(key, now),
        };
        for at in before.into_iter().flatten() {
            self.record_word(at, 0).store(kind::NONE, Ordering::Release);
            places.free.push(at);
        }
    }

    fn free_place(&self, places: &mut Places) -> Option<usize> {
        if let Some(at) = places.free.pop() {
            return Some(at);
        }
        if places.used == RECORDS_MAX {
            if !std::mem::replace(&mut places.told_full, true) {
                tracing::warn!(
                    "more than {RECORDS_MAX} open files, locks and dirty files: those beyond do not survive this process"
                );
            }
            return None;
        }
        let at = places.used;
        places.used += 1;
        self.word(header::USED).store(places.used as u64, Ordering::Release);
        Some(at)
    }

    /// All that is there. Nothing dirty or locked is taken over into the places: the successor says anew what is so.
    fn read(&self) -> (Places, Legacy) {
        let word = |at| self.word(at).load(Ordering::Acquire);
        let used = (word(header::USED) as usize).min(RECORDS_MAX);
        let mut places = Places { used, ..Places::default() };
        let mut legacy = Legacy {
            session: SessionId(word(header::SESSION)),
            decided: word(header::DECIDED) > 0 || word(header::UNTOLD) > 0,
            cluster_id: self.cluster_id(),
            ..Legacy::default()
        };
        for slot in 0..SLOTS_MAX {
            let [request, sequence, kind] =
                std::array::from_fn(|i| self.slot_word(slot, i).load(Ordering::Acquire));
            if request != 0 {
                legacy.asked.push(Asked { request, slot: slot as u32, sequence, kind });
            }
        }
        for at in 0..used {
            let [kind, a, b, c, d, e, f, _] =
                std::array::from_fn(|i| self.record_word(at, i).load(Ordering::Acquire));
            let key = match kind {
                kind::OPEN => {
                    let keeps_access_time = d != 0;
                    legacy.opens.push(Open {
                        number: c,
                        handle: HandleId(a),
                        ino: InodeId(b),
                        keeps_access_time,
                    });
                    Key::Open(c)
                }
                kind::LOCK => {
                    let (flock, write) = (c & 1 != 0, c & 2 != 0);
                    legacy.locks.push(FileLock {
                        ino: a,
                        owner: b,
                        flock,
                        write,
                        start: d,
                        end: e,
                        pid: f as u32,
                    });
                    Key::Lock(a, flock, b)
                }
                kind::DIRTY => {
                    legacy.dirty.push(InodeId(a));
                    Key::Dirty(a)
                }
                kind::USER => {
                    let user = LockUser { ino: InodeId(a), owner: b, number: c };
                    legacy.users.push(user);
                    Key::User(user)
                }
                _ => {
                    places.free.push(at);
                    continue;
                }
            };
            places.of.entry(key).or_default().push(at);
        }
        (places, legacy)
    }

    fn cluster_id(&self) -> String {
        let length = (self.word(header::CLUSTER).load(Ordering::Acquire) as usize).min(CLUSTER_MAX);
        let words =
            (0..length.div_ceil(8)).map(|i| self.word(header::CLUSTER + 1 + i).load(Ordering::Acquire));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        bytes.truncate(length);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn record_word(&self, record: usize, word: usize) -> &AtomicU64 {
        self.word((RECORDS_AT + record * RECORD) / size_of::<u64>() + word)
    }

    fn slot_word(&self, slot: usize, word: usize) -> &AtomicU64 {
        self.word(SLOTS_AT / size_of::<u64>() + slot * SLOT_WORDS + word)
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < LENGTH / size_of::<u64>(), "word {at} of a handover table");
        // SAFETY: within the mapping, which is page-aligned, lives as long as `self` and whose length is sealed; every access to
        // it, also by another process, is atomic.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(at)) }
    }
}

fn lock_words(lock: &FileLock) -> Words {
    let FileLock { ino, owner, flock, start, end, write, pid } = *lock;
    [ino, owner, u64::from(flock) | u64::from(write) << 1, start, end, pid.into(), 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(ino: u64, start: u64, write: bool) -> FileLock {
        FileLock { ino, owner: 7, flock: false, start, end: start + 9, write, pid: 3 }
    }

    fn open(number: u64, handle: u64, ino: u64) -> Open {
        let (handle, ino) = (HandleId(handle), InodeId(ino));
        Open { number, handle, ino, keeps_access_time: number % 2 == 1 }
    }

    fn take_over(memory: &OwnedFd) -> Handover {
        Handover::take_over(memory.try_clone().unwrap()).unwrap()
    }

    #[test]
    fn a_successor_finds_what_stands() {
        let memory = Handover::memory().unwrap();
        let first = take_over(&memory);
        assert!(first.legacy().is_none());
        assert_eq!((first.generation(), first.first_number()), (0, 1));
        first.set_session(SessionId(5), "0f0e-cluster");
        first.opened(open(1, 11, 100));
        first.opened(open(2, 12, 101));
        first.opened(open(4, 14, 100));
        let user = |owner, number| LockUser { ino: InodeId(100), owner, number };
        first.locks_through(user(7, 1), true);
        first.locks_through(user(7, 4), true);
        first.locks_through(user(8, 4), true);
        first.locks_through(user(8, 4), false);
        first.dirty(InodeId(100));
        first.dirty(InodeId(101));
        first.locked(100, false, 7, &[lock(100, 0, true), lock(100, 20, false)]);
        first.locked(101, false, 7, &[lock(101, 0, true)]);
        first.set_decided(3);
        first.closed(2);
        first.clean(InodeId(101));
        first.locked(100, false, 7, &[lock(100, 20, false)]);
        first.locked(101, false, 7, &[]);

        let second = take_over(&memory);
        let legacy = second.legacy().unwrap();
        assert_eq!((legacy.session, legacy.cluster_id.as_str()), (SessionId(5), "0f0e-cluster"));
        assert_eq!(legacy.opens, [open(1, 11, 100), open(4, 14, 100)]);
        assert_eq!(legacy.users, [user(7, 1), user(7, 4)]);
        assert_eq!(legacy.locks, [lock(100, 20, false)]);
        assert_eq!(legacy.dirty, [InodeId(100)]);
        assert!(legacy.decided && second.generation() == 1 && second.first_number() > 1 << 40);

        // What the second does not touch is still there for the third, and what it has not told.
        second.clean(InodeId(100));
        let third = take_over(&memory);
        let legacy = third.legacy().unwrap();
        assert_eq!((legacy.opens.len(), legacy.locks.len(), legacy.dirty.len()), (2, 1, 0));
        assert!(legacy.decided);
        third.closed(1);
        third.closed(4);
        third.locks_through(user(7, 1), false);
        third.set_untold(false);
        let fourth = take_over(&memory);
        let legacy = fourth.legacy().unwrap();
        assert!(legacy.opens.is_empty() && !legacy.decided);
        assert_eq!(legacy.users, [user(7, 4)]);
    }

    #[test]
    fn what_was_asked_stays_until_it_is_answered() {
        let memory = Handover::memory().unwrap();
        let first = take_over(&memory);
        first.set_session(SessionId(5), "");
        let asked = |request, slot, sequence| Asked { request, slot, sequence, kind: 1 };
        [8, 10, 12, 14].into_iter().for_each(|request| first.began(request));
        first.asked(asked(8, 0, 1));
        first.asked(asked(10, 255, 7));
        first.asked(asked(8, 3, 2));
        first.asked(asked(12, 0, 2));
        first.asked(asked(14, 256, 1));
        first.answered(8);
        // Decided before, and sent only now.
        first.asked(asked(8, 4, 1));
        let second = take_over(&memory);
        assert_eq!(second.legacy().unwrap().asked, [asked(12, 0, 2), asked(10, 255, 7)]);
        assert!(second.may_be_done(10) && !second.may_be_done(8) && !second.may_be_done(0));

        // Its process died between the answer and noting it.
        second.come_again(&[10]);
        assert!(second.is_asked(&asked(10, 255, 7)) && !second.is_asked(&asked(12, 0, 2)));
        assert_eq!(take_over(&memory).legacy().unwrap().asked, [asked(10, 255, 7)]);
    }

    #[test]
    fn places_are_used_again() {
        let memory = Handover::memory().unwrap();
        let handover = take_over(&memory);
        for i in 0..10_000 {
            handover.dirty(InodeId(i));
            handover.clean(InodeId(i));
        }
        assert!(handover.places.lock().used <= 2);
    }

    #[test]
    fn other_versions_and_sizes_are_refused() {
        let memory = Handover::memory().unwrap();
        let handover = take_over(&memory);
        handover.word(header::VERSION).store(VERSION + 1, Ordering::Release);
        let error = Handover::take_over(memory.try_clone().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        let small = memfd_create("small", MemfdFlags::CLOEXEC).unwrap();
        assert!(Handover::take_over(small).is_err());
    }
}
