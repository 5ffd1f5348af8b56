//! Names that change while others look: a file that goes here and there is always somewhere, and a name that is given to one file
//! after another always leads to one, with all its bytes.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

use fjordfs_tests::{
    history::{
        History,
        moves::{FIRST, Move, Names, PATHS, Seen},
        steps::Steps,
    },
    rng::TestRng,
};
use rand::Rng;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Aftermath, MOUNTS, Place, Played, Stop, VICTIM, is_of_victim};

const STEPS: usize = 12;

/// Two files, one of which is moved, exchanged, and given second names by one worker.
pub(crate) struct HereAndThere {
    steps: Steps<Names, Seen>,
    mover: std::sync::OnceLock<usize>,
}

impl Default for HereAndThere {
    fn default() -> HereAndThere {
        HereAndThere { steps: Steps::new(FIRST), mover: std::sync::OnceLock::new() }
    }
}

impl HereAndThere {
    fn look(
        &self,
        dir: &Path,
        random: &mut TestRng,
        alive: impl Fn(io::Result<Seen>) -> Result<Seen, Stop>,
    ) -> Result<(), Stop> {
        let name = random.random_range(0..PATHS.len());
        match random.random_range(0..4) {
            0 => self.steps.look_around(|| alive(list(dir, name % 2 == 1))),
            1 => self.steps.look(|| alive(by_bytes(dir, name))),
            _ => self.steps.look(|| alive(by_stat(dir, name))),
        }
    }

    fn step(&self, at: &Place<'_>, names: &mut Names, random: &mut TestRng) -> Result<(), Stop> {
        let path = |name: usize| at.join(PATHS[name]);
        let rename = |from: usize, to: usize, flags| {
            renameat_with(CWD, path(from), CWD, path(to), flags).map_err(io::Error::from)
        };
        let Some((done, next)) = names.choose(random) else { return Ok(()) };
        match done {
            Move::Link(from, to) => {
                self.steps.step(next, || at.alive(fs::hard_link(path(from), path(to))))?;
            }
            Move::Rename(from, to) => {
                self.steps.step(next, || at.alive(rename(from, to, RenameFlags::empty())))?;
            }
            Move::Exchange(from, to) => {
                self.steps.step(next, || at.alive(rename(from, to, RenameFlags::EXCHANGE)))?;
            }
            Move::Remove(from) => self.steps.step(next, || at.alive(fs::remove_file(path(from))))?,
        }
        *names = next;
        Ok(())
    }
}

impl Played for HereAndThere {
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop> {
        fs::create_dir(at.join("d"))?;
        fs::write(at.join("a"), "1")?;
        fs::write(at.join("b"), "22")?;
        Ok(())
    }

    fn work(&self, at: &Place<'_>, worker: usize, random: &mut TestRng) -> Result<(), Stop> {
        if *self.mover.get_or_init(|| worker) != worker {
            for _ in 0..2 * STEPS {
                // What the mover's own mount shows before it dies need never come to be.
                if at.mount == VICTIM {
                    by_stat(&at.dir, 0).map(drop).or_else(|e| at.alive(Err(e)))?;
                } else {
                    self.look(&at.dir, random, |seen| at.alive(seen))?;
                }
            }
            return Ok(());
        }
        let mut names = FIRST;
        (0..STEPS).try_for_each(|_| self.step(at, &mut names, random))
    }

    fn check(&self, left: &Aftermath) -> Result<(), String> {
        for dir in &left.places {
            for name in 0..PATHS.len() {
                self.steps.look(|| by_stat(dir, name)).map_err(|e| e.to_string())?;
            }
            for below in [false, true] {
                self.steps.look_around(|| list(dir, below)).map_err(|e| e.to_string())?;
            }
        }
        let victim = self.mover.get().is_some_and(|worker| is_of_victim(*worker));
        self.steps.check(left.lossy && victim, Names::show)
    }
}

fn absent_or<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The files are told apart by their length.
fn by_stat(dir: &Path, name: usize) -> io::Result<Seen> {
    let stat = rustix::fs::stat(dir.join(PATHS[name])).map_err(io::Error::from);
    Ok(Seen::Name(name, absent_or(stat)?.map(|stat| stat.st_size.unsigned_abs())))
}

fn by_bytes(dir: &Path, name: usize) -> io::Result<Seen> {
    Ok(Seen::Name(name, absent_or(fs::read(dir.join(PATHS[name])))?.map(|bytes| bytes.len() as u64)))
}

fn list(dir: &Path, below: bool) -> io::Result<Seen> {
    let folder = if below { dir.join("d") } else { dir.to_owned() };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        let path = format!("{}{}", if below { "d/" } else { "" }, name.to_string_lossy());
        found.extend(PATHS.iter().position(|known| *known == path));
    }
    found.sort_unstable();
    Ok(Seen::Listing(below, found))
}

/// A name that is given to a new file again and again, by several.
#[derive(Default)]
pub(crate) struct Over {
    history: History,
    values: std::sync::atomic::AtomicU64,
}

/// Of a length of its own: inline, a page, some pages.
fn content(value: u64) -> Vec<u8> {
    let words = [3, 700, 9000][(value % 3) as usize];
    value.to_le_bytes().repeat(words)
}

fn value_of(bytes: &[u8]) -> io::Result<u64> {
    let value = bytes.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
    if bytes == content(value) {
        return Ok(value);
    }
    Err(io::Error::other(format!("{} bytes that begin with {value} are not a whole file", bytes.len())))
}

impl Over {
    fn replace(&self, at: &Place<'_>, sync: bool) -> Result<(), Stop> {
        let value = 1 + self.values.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let new = at.join(&format!("new-{value}"));
        let mut file = at.alive(File::create_new(&new))?;
        at.alive(file.write_all(&content(value)))?;
        if sync {
            at.alive(file.sync_all())?;
        }
        drop(file);
        self.history.write(value, || at.alive(fs::rename(&new, at.join("name"))))
    }
}

impl Played for Over {
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop> {
        Ok(fs::write(at.join("name"), content(0))?)
    }

    fn work(&self, at: &Place<'_>, worker: usize, random: &mut TestRng) -> Result<(), Stop> {
        for _ in 0..STEPS {
            // Those whose renames may be lost only look; not into the history, as what they see may be theirs alone.
            let writes = at.mount != VICTIM && worker < MOUNTS && random.random_bool(0.6);
            if writes {
                self.replace(at, random.random_bool(0.2))?;
            } else {
                let path = at.join("name");
                self.history.read(|| at.alive(fs::read(&path).and_then(|bytes| value_of(&bytes))))?;
            }
        }
        Ok(())
    }

    fn check(&self, left: &Aftermath) -> Result<(), String> {
        for dir in &left.places {
            self.history.read(|| value_of(&fs::read(dir.join("name"))?)).map_err(|e| e.to_string())?;
        }
        self.history.check()
    }
}
