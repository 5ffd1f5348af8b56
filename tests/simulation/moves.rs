//! Files that go here and there among a few names, moved by all clients in turn, while all of them look.
//!
//! There is one round after the other, each in a directory of its own. A rename changes two directories and the file, and whoever
//! sees one of them changed must see all of it. Where something decided may be lost with its client, one client makes all moves
//! of a round, so that what is left of it are its first moves.

use std::sync::{Arc, Mutex};

use fjordfs_client::{FsError, FsResult, InodeId, ROOT_INODE};
use fjordfs_proto::error::Errno;
use fjordfs_tests::{
    history::{
        moves::{FIRST, Move, Names, PATHS, Seen, is_below},
        steps::Steps,
    },
    rng::TestRng,
};
use rand::Rng;

use crate::{
    dentries::Name,
    programs::{NEW, Worker, directory},
    record::{Actor, now},
    run::{trace, violation},
};

/// Moves of a round.
const MOVES: u32 = 12;

const EXCHANGE: u32 = 2;

/// Whether what a round saw means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// All of it.
    Exact,
    /// Its last moves may be undone.
    Lossy,
    /// Its mover went on after a loss of which it did not know.
    Void,
}

struct State {
    verdict: Verdict,
    /// The only one who moves, if not all do.
    mover: Option<Actor>,
    /// Nobody moves any more.
    over: bool,
}

struct Turn {
    names: Names,
    left: u32,
}

/// A directory, with another in it, and two files.
struct Round {
    /// Name of the directory: who has not heard of it by name is told nothing by its number.
    name: String,
    /// The names that are not below "d" are in "e", so that the way to all of them never changes.
    apart: bool,
    files: [u64; 2],
    steps: Steps<Names, Seen>,
    turn: tokio::sync::Mutex<Turn>,
    state: Mutex<State>,
}

/// All rounds of a seed.
#[derive(Default)]
pub(crate) struct Rounds {
    all: Mutex<Vec<Arc<Round>>>,
    making: tokio::sync::Mutex<()>,
}

/// Moves and looks.
pub(crate) async fn program(worker: Worker, mut random: TestRng) {
    while worker.goes_on(&mut random).await {
        if let Err(e) = one(&worker, &mut random).await {
            worker.failed("moves", &e);
        }
        worker.notice_loss();
    }
}

async fn one(worker: &Worker, random: &mut TestRng) -> FsResult<()> {
    let Some(round) = worker.rounds.now(worker).await? else { return Ok(()) };
    if random.random_ratio(1, 3) && round.may_move(worker.actor, worker.rules.may_fail) {
        return round.make_move(worker, random).await;
    }
    round.look(worker, random).await
}

/// The last part of a name's path.
fn last(name: usize) -> &'static [u8] {
    PATHS[name].trim_start_matches("d/").as_bytes()
}

impl Rounds {
    fn last(&self) -> Option<Arc<Round>> {
        self.all.lock().unwrap().last().cloned()
    }

    /// The round that is played; a new one when the last is over. While somebody else makes that, the last.
    async fn now(&self, worker: &Worker) -> FsResult<Option<Arc<Round>>> {
        let last = self.last();
        if last.as_ref().is_some_and(|round| !round.state.lock().unwrap().over) {
            return Ok(last);
        }
        let Ok(_making) = self.making.try_lock() else { return Ok(last) };
        let number = self.all.lock().unwrap().len();
        let round = Arc::new(Round::new(worker, number).await?);
        self.all.lock().unwrap().push(round.clone());
        Ok(Some(round))
    }

    /// What a client decided last may be undone. With `void` it may not have known.
    pub(crate) fn lose(&self, actor: Actor, void: bool) {
        for round in &*self.all.lock().unwrap() {
            let mut state = round.state.lock().unwrap();
            if state.mover == Some(actor) {
                state.over = true;
                state.verdict = match (state.verdict, void) {
                    (Verdict::Void, _) | (_, true) => Verdict::Void,
                    (_, false) => Verdict::Lossy,
                };
            }
        }
    }

    /// Looks at everything once more, and says whether the moves explain what was seen.
    pub(crate) async fn check(&self, worker: &Worker) -> FsResult<()> {
        let all = self.all.lock().unwrap().clone();
        for (number, round) in all.iter().enumerate() {
            for name in 0..PATHS.len() {
                round.look_at(worker, name).await?;
            }
            for below in [false, true] {
                round.list(worker, below).await?;
            }
            let verdict = round.state.lock().unwrap().verdict;
            if verdict == Verdict::Void {
                continue;
            }
            if let Err(why) = round.steps.check(verdict == Verdict::Lossy, Names::show) {
                violation(format!("moves in m{number}: {why}"));
            }
        }
        trace(format_args!("{} rounds of moves", all.len()));
        Ok(())
    }
}

impl Round {
    async fn new(worker: &Worker, number: usize) -> FsResult<Round> {
        let client = &worker.client;
        // The number may be used already by one who did not get to its end.
        let name = format!("m{number}-{}", worker.records.new_value());
        let top = directory(client, ROOT_INODE, &name).await?;
        directory(client, top, "d").await?;
        let apart = number % 2 == 1;
        let first = if apart { directory(client, top, "e").await? } else { top };
        let mut files = [0; 2];
        for (file, name) in files.iter_mut().zip(["a", "b"]) {
            let (attr, open) = client.create(first, name.as_bytes(), NEW).await?;
            open.close().await?;
            *file = attr.ino;
        }
        if worker.rules.may_fail {
            client.sync_namespace().await?;
        }
        trace(format_args!("c{} has made {name}", worker.actor));
        Ok(Round {
            name,
            apart,
            files,
            steps: Steps::new(FIRST),
            turn: tokio::sync::Mutex::new(Turn { names: FIRST, left: MOVES }),
            state: Mutex::new(State { verdict: Verdict::Exact, mover: None, over: false }),
        })
    }

    /// The directory of some of the names, by its path.
    async fn walk(&self, worker: &Worker, below: bool) -> FsResult<InodeId> {
        let there = async |parent, name: &[u8]| {
            let missing = || FsError::new(Errno::ENOENT, format!("{name:?} in {parent} does not exist"));
            worker.dentries.lookup((parent, name)).await?.ok_or_else(missing)
        };
        let top = there(ROOT_INODE, self.name.as_bytes()).await?;
        let next = match (below, self.apart) {
            (true, _) => b"d",
            (false, true) => b"e",
            (false, false) => return Ok(top),
        };
        there(top, next).await
    }

    async fn place(&self, worker: &Worker, name: usize) -> FsResult<Name> {
        Ok((self.walk(worker, is_below(name)).await?, last(name)))
    }

    /// Whether it is this client's to move: the first one's, or everybody's.
    fn may_move(&self, actor: Actor, alone: bool) -> bool {
        let mut state = self.state.lock().unwrap();
        !state.over && (!alone || *state.mover.get_or_insert(actor) == actor)
    }

    async fn make_move(&self, worker: &Worker, random: &mut TestRng) -> FsResult<()> {
        let mut turn = self.turn.lock().await;
        // Whatever was lost meanwhile is noticed first.
        worker.notice_loss();
        if self.state.lock().unwrap().over {
            return Ok(());
        }
        let Some((done, next)) = turn.names.choose(random) else { return Ok(()) };
        trace(format_args!("c{} {done:?} in {}", worker.actor, self.name));
        self.steps.begin_step(next, now());
        let result = self.apply(worker, done, turn.names).await;
        if result.is_ok() {
            self.steps.end_step(now());
        }
        trace(format_args!("c{} {done:?} in {} is done", worker.actor, self.name));
        turn.names = next;
        turn.left -= 1;
        if turn.left == 0 || result.is_err() {
            self.state.lock().unwrap().over = true;
        }
        result
    }

    async fn apply(&self, worker: &Worker, done: Move, names: Names) -> FsResult<()> {
        let dentries = &worker.dentries;
        let rename = async |from, to, flags| {
            let (from, to) = (self.place(worker, from).await?, self.place(worker, to).await?);
            dentries.rename(from, to, flags).await
        };
        match done {
            Move::Link(from, to) => {
                let file = names.at[from].map_or(0, |file| self.files[file as usize - 1]);
                dentries.link(InodeId(file), self.place(worker, to).await?).await
            }
            Move::Rename(from, to) => rename(from, to, 0).await,
            Move::Exchange(from, to) => rename(from, to, EXCHANGE).await,
            Move::Remove(name) => dentries.unlink(self.place(worker, name).await?).await,
        }
    }

    async fn look(&self, worker: &Worker, random: &mut TestRng) -> FsResult<()> {
        // Clients look at one of the directories mostly, so that they do not all cache the same.
        let favours_below = (worker.actor + self.files[0] as Actor) % 2 == 1;
        let mut name = random.random_range(0..PATHS.len());
        while is_below(name) != favours_below && random.random_ratio(3, 4) {
            name = random.random_range(0..PATHS.len());
        }
        match random.random_range(0..4) {
            0 => self.list(worker, is_below(name)).await,
            _ => self.look_at(worker, name).await,
        }
    }

    fn file(&self, ino: u64) -> Option<u64> {
        self.files.iter().zip(1..).find(|(file, _)| **file == ino).map(|(_, number)| number)
    }

    async fn look_at(&self, worker: &Worker, name: usize) -> FsResult<()> {
        let began = now();
        let found = worker.dentries.stat(self.place(worker, name).await?).await?;
        let found = found.and_then(|ino| self.file(ino.0));
        self.saw(worker, Seen::Name(name, found), began);
        Ok(())
    }

    async fn list(&self, worker: &Worker, below: bool) -> FsResult<()> {
        let directory = self.walk(worker, below).await?;
        let began = now();
        // One question, so one moment.
        let page = worker.client.readdir(directory, 0, 100, true).await?;
        let found = (0..PATHS.len()).filter(|name| {
            is_below(*name) == below && page.entries.iter().any(|entry| entry.name[..] == *last(*name))
        });
        self.saw(worker, Seen::Listing(below, found.collect()), began);
        Ok(())
    }

    fn saw(&self, worker: &Worker, seen: Seen, began: u128) {
        // What the one who moves sees may be undone together with its moves.
        if worker.rules.may_fail && self.state.lock().unwrap().mover == Some(worker.actor) {
            return;
        }
        trace(format_args!("c{} has seen {seen:?} in {} since {began}", worker.actor, self.name));
        self.steps.add_look(seen, (began, now()));
    }
}
