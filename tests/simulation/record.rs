//! What clients were told and what they saw, and whether that is what was promised.
//!
//! Everything is a register: the owner of a file, the content of a file (written whole), the inode under a name. Whoever
//! is told that a write is done may expect that everybody sees it from then on; an order of all operations of a register
//! must explain them ([`History`]). A client that dies, or loses its session, may take along what it had been told and did not
//! sync: such a write may have happened at any time, or never, and what this client alone saw of it does not count.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
};

use fjordfs_tests::history::{
    History, NEVER, Time,
    appends::{self, Progress},
};

use crate::{
    fate,
    run::{trace, violation},
};

/// One client, from its start to its end.
pub(crate) type Actor = u32;

struct Operation {
    actor: Actor,
    value: u64,
    is_write: bool,
    began: Time,
    ended: Time,
    /// A write that no failure may undo.
    synced: bool,
    /// A read of what is lost, by who has lost it.
    void: bool,
}

#[derive(Default)]
struct State {
    registers: BTreeMap<String, Vec<Operation>>,
    /// Records of each writer of the log.
    appends: BTreeMap<u32, Appended>,
    /// Records of the log that a power failure may have taken.
    lost: BTreeSet<appends::Record>,
    last_value: u64,
    operations: u64,
}

struct Appended {
    actor: Actor,
    progress: Progress,
    synced: u32,
}

/// A write that has begun.
#[derive(Clone)]
pub(crate) struct Begun {
    register: String,
    at: usize,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Records(Mutex<State>);

pub(crate) fn now() -> Time {
    fate::elapsed().as_nanos()
}

impl Records {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A value that nobody has used.
    pub(crate) fn new_value(&self) -> u64 {
        let mut state = self.state();
        state.last_value += 1;
        state.last_value
    }

    /// An operation of any kind has ended.
    pub(crate) fn count(&self) {
        self.state().operations += 1;
    }

    pub(crate) fn operations(&self) -> u64 {
        self.state().operations
    }

    pub(crate) fn begin_write(&self, register: &str, actor: Actor, value: u64) -> Begun {
        trace(format_args!("c{actor} writes {value}: {register}"));
        let mut state = self.state();
        let operations = state.registers.entry(register.to_owned()).or_default();
        operations.push(Operation {
            actor,
            value,
            is_write: true,
            began: now(),
            ended: NEVER,
            synced: false,
            void: false,
        });
        Begun { register: register.to_owned(), at: operations.len() - 1 }
    }

    /// The client was told that it is done.
    pub(crate) fn end_write(&self, begun: &Begun) {
        if let Some(write) = self.state().registers.get_mut(&begun.register).and_then(|o| o.get_mut(begun.at))
        {
            write.ended = now();
            trace(format_args!("c{} has written {}: {}", write.actor, write.value, begun.register));
        }
    }

    pub(crate) fn read(&self, register: &str, actor: Actor, value: u64, began: Time) {
        trace(format_args!("c{actor} has read {value} since {:.6}: {register}", began as f64 / 1e9));
        let read =
            Operation { actor, value, is_write: false, began, ended: now(), synced: false, void: false };
        self.state().registers.entry(register.to_owned()).or_default().push(read);
    }

    /// What this client had been told of a register before `since` is safe.
    pub(crate) fn synced(&self, register: &str, actor: Actor, since: Time) {
        for operation in self.state().registers.get_mut(register).into_iter().flatten() {
            operation.synced |= operation.actor == actor && operation.is_write && operation.ended <= since;
        }
    }

    /// What this client was told since then, and did not sync, may be lost.
    pub(crate) fn lose(&self, actor: Actor, since: Time) {
        let mut state = self.state();
        for operations in state.registers.values_mut() {
            let mut lost = BTreeSet::new();
            for write in operations.iter_mut().filter(|o| o.actor == actor && o.is_write && !o.synced) {
                if write.ended >= since {
                    write.ended = NEVER;
                    lost.insert(write.value);
                }
            }
            for read in operations.iter_mut().filter(|o| o.actor == actor && !o.is_write) {
                read.void |= lost.contains(&read.value);
            }
        }
        for appended in state.appends.values_mut().filter(|appended| appended.actor == actor) {
            appended.progress.sure = appended.synced;
        }
    }

    /// Whether nothing of a register was ever synced, so that it need not be readable after a power failure: what replaces safe bytes is
    /// safe before it does.
    pub(crate) fn may_be_unreadable(&self, register: &str) -> bool {
        let state = self.state();
        !state.registers.get(register).into_iter().flatten().any(|o| o.is_write && o.synced)
    }

    // ---- the log ----

    /// A new writer of the log.
    pub(crate) fn new_writer(&self, actor: Actor) -> u32 {
        let mut state = self.state();
        let writer = state.appends.len() as u32 + 1;
        state.appends.insert(writer, Appended { actor, progress: Progress::default(), synced: 0 });
        writer
    }

    fn writer(&self, writer: u32, change: impl FnOnce(&mut Appended)) {
        if let Some(appended) = self.state().appends.get_mut(&writer) {
            change(appended);
        }
    }

    pub(crate) fn begin_append(&self, writer: u32, count: u32) {
        self.writer(writer, |appended| appended.progress.begun = count);
    }

    /// So many records of this writer are there for everybody, and safe if `synced`.
    pub(crate) fn appended(&self, writer: u32, count: u32, synced: bool) {
        trace(format_args!("writer {writer} has appended {count} records, synced {synced}"));
        self.writer(writer, |appended| {
            appended.progress.sure = count;
            if synced {
                appended.synced = count;
            }
        });
    }

    /// The metaserver's host has lost its power: appended records that were not synced may be gone, although their writers go on.
    pub(crate) fn lose_appends(&self) {
        let mut state = self.state();
        let State { appends, lost, .. } = &mut *state;
        for (writer, appended) in appends {
            lost.extend((appended.synced..appended.progress.begun).map(|number| (*writer, number)));
        }
    }

    pub(crate) fn check_log(&self, content: &[u8], power_failed: bool) {
        let state = self.state();
        let progress = |(writer, appended): (&u32, &Appended)| {
            let sure = if power_failed { appended.synced } else { appended.progress.sure };
            (*writer, Progress { sure, ..appended.progress })
        };
        let writers = state.appends.iter().map(progress).collect();
        let found =
            appends::records(content).and_then(|found| appends::check_but(&found, &writers, &state.lost));
        drop(state);
        if let Err(why) = found {
            violation(format!("the log: {why}"));
        }
    }

    // ---- the end ----

    /// Whether all histories have an order.
    pub(crate) fn check(&self) {
        for (register, operations) in &self.state().registers {
            let history = History::default();
            for Operation { value, is_write, began, ended, .. } in operations.iter().filter(|o| !o.void) {
                match is_write {
                    true => history.add_write(*value, (*began, *ended)),
                    false => history.add_read(*value, (*began, *ended)),
                }
            }
            if let Err(why) = history.check() {
                violation(format!("{register}: {why}"));
            }
        }
    }

    /// After the metaserver's host has lost its power: the value of a register is one that was written, and none that something
    /// safe came after.
    pub(crate) fn check_last(&self, register: &str, last: u64) {
        let state = self.state();
        let writes = || state.registers.get(register).into_iter().flatten().filter(|o| o.is_write);
        let ended = match last {
            0 => 0,
            _ => match writes().find(|o| o.value == last) {
                Some(write) => write.ended,
                None => return violation(format!("{register} is {last}, which nobody wrote")),
            },
        };
        if let Some(safe) = writes().find(|o| o.synced && o.began > ended) {
            violation(format!("{register} is {last}, and {} was synced after that", safe.value));
        }
    }
}
