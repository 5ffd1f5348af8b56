//! Names that several make at the same time, in every way in which a name is made only if it is not there.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    path::Path,
};

use fjordfs_tests::{
    history::exclusive::{Exclusive, Found},
    rng::TestRng,
};
use rand::{Rng, seq::SliceRandom};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{Aftermath, Place, Played, Stop, WORKERS, is_of_victim};

const NAMES: usize = 5;

#[derive(Default)]
pub(crate) struct Names([Exclusive; NAMES]);

fn path(at: &Path, name: usize) -> std::path::PathBuf {
    at.join(format!("name-{name}"))
}

/// Makes a name in some way; `false` when it is there.
fn make(at: &Path, name: usize, worker: usize, how: u32) -> io::Result<bool> {
    let (path, own) = (path(at, name), at.join(format!("own-{worker}")));
    let made = match how {
        0 => File::create_new(&path).map(drop),
        1 => symlink(worker.to_string(), &path),
        2 => fs::hard_link(&own, &path),
        3 => fs::create_dir(&path),
        _ => {
            let moved = at.join(format!("own-{worker}-{name}"));
            File::create_new(&moved)?;
            renameat_with(CWD, &moved, CWD, &path, RenameFlags::NOREPLACE).map_err(Into::into)
        }
    };
    match made {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

fn look(at: &Path, name: usize) -> io::Result<Found> {
    match fs::symlink_metadata(path(at, name)) {
        Ok(_) => Ok(Found::There),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Found::Absent),
        Err(e) => Err(e),
    }
}

impl Played for Names {
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop> {
        for worker in 0..WORKERS {
            File::create_new(at.join(&format!("own-{worker}")))?;
        }
        Ok(())
    }

    fn work(&self, at: &Place<'_>, worker: usize, random: &mut TestRng) -> Result<(), Stop> {
        let mut names: Vec<usize> = (0..NAMES).collect();
        names.shuffle(random);
        for name in names {
            if random.random_bool(0.5) {
                self.0[name].look(|| at.alive(look(&at.dir, name)))?;
            }
            let how = random.random_range(0..5);
            let made = self.0[name].make(worker, || at.alive(make(&at.dir, name, worker, how)))?;
            let found = self.0[name].look(|| at.alive(look(&at.dir, name)))?;
            if found == Found::Absent {
                return Err(Stop::Wrong(format!("name {name} is not there; made here: {made}")));
            }
        }
        Ok(())
    }

    fn check(&self, left: &Aftermath) -> Result<(), String> {
        for (name, history) in self.0.iter().enumerate() {
            if left.lossy {
                (0..WORKERS)
                    .filter(|worker| is_of_victim(*worker))
                    .for_each(|worker| history.may_be_lost(worker));
            }
            let found: Vec<Found> = left
                .places
                .iter()
                .map(|at| history.look(|| look(at, name)).map_err(|e| e.to_string()))
                .collect::<Result<_, _>>()?;
            if found.windows(2).any(|pair| pair[0] != pair[1]) {
                return Err(format!("name {name}: {found:?}"));
            }
            history.check().map_err(|e| format!("name {name}: {e}"))?;
        }
        Ok(())
    }
}
