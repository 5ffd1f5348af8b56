//! Workers that take turns by a lock, or by a file that only one can make, and count in a file that stays open.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
    thread,
    time::Duration,
};

use fjordfs_tests::{
    history::{Clock, turns::Turns},
    locks::{self, Kind, Owner},
    rng::TestRng,
};
use rand::Rng;

use super::{Aftermath, Place, Played, Stop};

const TURNS: usize = 5;
/// Tries to make a lock file: one whose owner has died stays.
const TRIES_MAX: usize = 400;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    Flock,
    OpenFile,
    /// A file that is made exclusively, and removed.
    Name,
}

pub(crate) struct Counter {
    lock: Lock,
    clock: Clock,
    turns: Turns,
}

impl Counter {
    pub(crate) fn new(lock: Lock) -> Counter {
        Counter { lock, clock: Clock::default(), turns: Turns::default() }
    }

    /// Waits for the turn; `false` when it does not come.
    fn take(&self, at: &Place<'_>, file: &File) -> Result<bool, Stop> {
        let errno = io::Error::from_raw_os_error;
        match self.lock {
            Lock::Flock => at.alive(locks::flock(file, Kind::Write, true).map_err(errno))?,
            Lock::OpenFile => {
                at.alive(locks::lock(file, Owner::OpenFile, Kind::Write, 0, 8).map_err(errno))?
            }
            Lock::Name => {
                for _ in 0..TRIES_MAX {
                    match File::create_new(at.join("lock")) {
                        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                        made => return at.alive(made).map(|_| true),
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn give_up(&self, at: &Place<'_>, file: &File) -> Result<(), Stop> {
        let errno = io::Error::from_raw_os_error;
        match self.lock {
            Lock::Flock => at.alive(locks::flock(file, Kind::Unlock, true).map_err(errno)),
            Lock::OpenFile => {
                at.alive(locks::try_lock(file, Owner::OpenFile, Kind::Unlock, 0, 8).map_err(errno))
            }
            Lock::Name => at.alive(fs::remove_file(at.join("lock"))),
        }
    }

    fn turn(&self, at: &Place<'_>, file: &File, random: &mut TestRng) -> Result<bool, Stop> {
        // Without a lock of the filesystem, what others wrote is seen by those who open the file afterwards.
        let by_name = self.lock == Lock::Name;
        if !self.take(at, file)? {
            return Ok(false);
        }
        let own = if by_name { Some(at.alive(open(&at.dir))?) } else { None };
        let file = own.as_ref().unwrap_or(file);
        let mut bytes = [0; 8];
        at.alive(file.read_exact_at(&mut bytes, 0))?;
        let (read, began) = (u64::from_le_bytes(bytes), self.clock.now());
        if random.random_bool(0.2) {
            thread::sleep(Duration::from_millis(1));
        }
        let done = at.alive(file.write_all_at(&(read + 1).to_le_bytes(), 0));
        let ended = self.clock.now();
        let done = done.and_then(|()| {
            if by_name {
                at.alive(file.sync_data())?;
            }
            self.give_up(at, file)
        });
        self.turns.note(read, began, done.is_ok().then_some(ended));
        done.map(|()| true)
    }
}

fn open(dir: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(dir.join("count"))
}

impl Played for Counter {
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop> {
        Ok(fs::write(at.join("count"), 0u64.to_le_bytes())?)
    }

    fn work(&self, at: &Place<'_>, _: usize, random: &mut TestRng) -> Result<(), Stop> {
        let file = at.alive(open(&at.dir))?;
        for _ in 0..TURNS {
            if !self.turn(at, &file, random)? {
                break;
            }
        }
        Ok(())
    }

    fn check(&self, left: &Aftermath) -> Result<(), String> {
        for dir in &left.places {
            let bytes = fs::read(dir.join("count")).map_err(|e| e.to_string())?;
            let last = bytes.try_into().map_err(|bytes| format!("not a whole number: {bytes:?}"))?;
            self.turns.check(u64::from_le_bytes(last))?;
        }
        Ok(())
    }
}
