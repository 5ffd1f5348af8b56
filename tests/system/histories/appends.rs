//! Records that workers on all mounts append to one file, and readers that find what was closed or synced before they opened it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::Path,
    sync::Mutex,
};

use fjordfs_tests::{
    history::appends::{self, Progress, Record},
    rng::TestRng,
};
use rand::Rng;

use super::{Aftermath, MOUNTS, Place, Played, Stop, is_of_victim};

const RECORDS: u32 = 12;
/// The mount that only reads, where there is one.
const READER: usize = 0;

pub(crate) struct Appends {
    has_readers: bool,
    /// What each writer must and may have in the file.
    writers: Mutex<BTreeMap<u32, Progress>>,
    /// What readers have found.
    found: Mutex<Vec<Vec<Record>>>,
    /// What they should not have found: told with what is there at last.
    wrong: Mutex<Vec<String>>,
}

impl Appends {
    pub(crate) fn by_all() -> Appends {
        Appends {
            has_readers: false,
            writers: Mutex::default(),
            found: Mutex::default(),
            wrong: Mutex::default(),
        }
    }

    pub(crate) fn with_readers() -> Appends {
        Appends { has_readers: true, ..Appends::by_all() }
    }

    fn append(&self, at: &Place<'_>, writer: u32, random: &mut TestRng) -> Result<(), Stop> {
        let open = || File::options().append(true).open(at.join("log"));
        let mut file = at.alive(open())?;
        let progress = |f: &dyn Fn(&mut Progress)| f(self.writers.lock().unwrap().entry(writer).or_default());
        let mut number = 0;
        while number < RECORDS {
            let length = match random.random_range(0..8) {
                0..4 => random.random_range(0..200),
                4..7 => random.random_range(0..6000),
                _ => random.random_range(0..70_000),
            };
            progress(&|p| p.begun = number + 1);
            at.alive(file.write_all(&appends::record((writer, number), length)))?;
            number += 1;
            match random.random_range(0..6) {
                0 => {
                    at.alive(file.sync_all())?;
                    progress(&|p| p.sure = number);
                }
                1 => {
                    // Whoever opens it afterwards sees it; a delegation is recalled then.
                    at.alive(close(file))?;
                    if !is_of_victim(writer as usize) {
                        progress(&|p| p.sure = number);
                    }
                    file = at.alive(open())?;
                }
                _ => {}
            }
        }
        at.alive(close(file))?;
        if !is_of_victim(writer as usize) {
            progress(&|p| p.sure = number);
        }
        Ok(())
    }

    fn read(&self, at: &Place<'_>) -> Result<(), Stop> {
        let before = self.writers.lock().unwrap().clone();
        let bytes = at.alive(fs::read(at.join("log")))?;
        let after = self.writers.lock().unwrap().clone();
        let may = |(writer, progress): (&u32, &Progress)| {
            let sure = before.get(writer).map_or(0, |p| p.sure);
            (*writer, Progress { sure, begun: progress.begun })
        };
        let progress = after.iter().map(may).collect();
        let checked = appends::records(&bytes).and_then(|found| {
            let checked = appends::check(&found, &progress).map_err(|e| format!("{e}: {found:?}"));
            checked.map(|()| found)
        });
        match checked {
            Ok(found) => self.found.lock().unwrap().push(found),
            Err(wrong) => self.wrong.lock().unwrap().push(wrong),
        }
        Ok(())
    }
}

fn close(file: File) -> io::Result<()> {
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: the descriptor was the file's and is nobody's now.
    match unsafe { libc::close(fd) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Played for Appends {
    fn prepare(&self, at: &Place<'_>) -> Result<(), Stop> {
        Ok(File::create_new(at.join("log")).map(drop)?)
    }

    fn work(&self, at: &Place<'_>, worker: usize, random: &mut TestRng) -> Result<(), Stop> {
        if self.has_readers && worker % MOUNTS == READER {
            return (0..RECORDS).try_for_each(|_| self.read(at));
        }
        self.append(at, worker as u32, random)
    }

    fn check(&self, left: &Aftermath) -> Result<(), String> {
        let writers = self.writers.lock().unwrap();
        let all = |dir: &Path| -> Result<Vec<Record>, String> {
            let bytes = fs::read(dir.join("log")).map_err(|e| e.to_string())?;
            appends::records(&bytes).map_err(|e| format!("{}: {e}", dir.display()))
        };
        let found: Vec<Result<_, String>> = left.places.iter().map(|dir| all(dir)).collect();
        let wrong: Vec<&String> = found.iter().filter_map(|found| found.as_ref().err()).collect();
        let read = self.wrong.lock().unwrap();
        if !wrong.is_empty() || !read.is_empty() {
            return Err(format!("{wrong:#?}; read meanwhile: {read:#?}; at last: {:?}", found.first()));
        }
        let found: Vec<_> = found.into_iter().flatten().collect();
        for file in &found {
            appends::check(file, &writers)?;
            if *file != found[0] {
                return Err(format!("the mounts differ: {found:?}"));
            }
            for earlier in self.found.lock().unwrap().iter() {
                if !file.starts_with(earlier) {
                    return Err(format!("{earlier:?} was read, {file:?} is there at last"));
                }
            }
        }
        Ok(())
    }
}
