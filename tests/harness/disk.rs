//! A disk that can be told to fail: a FUSE filesystem over a folder, for targets and for the metadata.
//!
//! | trouble | what the owner of the files sees |
//! |---|---|
//! | [`Trouble::Errors`] | reads, writes and syncs answer EIO |
//! | [`Trouble::Full`] | writes into new space answer ENOSPC |
//! | [`Trouble::Slow`] | every operation takes that much longer |
//! | [`Trouble::Flips`] | some reads of volumes return a wrong bit |
//! | [`Trouble::Loses`] | some writes to volumes are acknowledged and never happen |
//! | [`Trouble::Tears`] | some writes to volumes are acknowledged and happen up to a sector in the middle |
//! | [`FaultyDisk::cut_power`] | of what was not synced some sectors are as before |
//!
//! Names are kept at once, as by a filesystem with a journal that is synced with every operation; what [`FaultyDisk::cut_power`]
//! takes back is what was written to files since their last sync. It is for when nobody uses the disk: the owner is dead.

mod passthrough;
mod unsynced;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use fuser::{BackgroundSession, MountOption};
use rand::Rng;

use self::{passthrough::Passthrough, unsynced::Unsynced};
use crate::{
    mountpoint::detach,
    rng::{self, TestRng},
};

/// Bytes that a device writes all or not at all.
const SECTOR: usize = 512;

/// What is wrong with a disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Nothing.
    None,
    /// EIO.
    Errors,
    /// ENOSPC.
    Full,
    /// Takes this much longer.
    Slow(Duration),
    /// One read of a volume in four has a wrong bit.
    Flips,
    /// One write to a volume in four does not happen.
    Loses,
    /// One write to a volume in four happens in part.
    Tears,
}

/// What the filesystem and its owner both know.
#[derive(Debug)]
struct State {
    trouble: Trouble,
    rng: TestRng,
    unsynced: Unsynced,
    /// Operations that were made to fail or lie.
    hits: u64,
}

#[derive(Clone, Debug)]
struct Shared(Arc<Mutex<State>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mounted disk. Detached when dropped.
pub struct FaultyDisk {
    dir: PathBuf,
    backing: PathBuf,
    shared: Shared,
    session: Option<BackgroundSession>,
}

impl FaultyDisk {
    /// A disk in `folder`, named so, whose troubles follow from `seed`.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn new(folder: &Path, name: &str, seed: u64) -> FaultyDisk {
        let (dir, backing) = (folder.join(name), folder.join(format!("{name}.backing")));
        for path in [&dir, &backing] {
            fs::create_dir_all(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
        let state = State {
            trouble: Trouble::None,
            rng: rng::stream(seed, 0xd15c),
            unsynced: Unsynced::default(),
            hits: 0,
        };
        let shared = Shared(Arc::new(Mutex::new(state)));
        let options = [MountOption::FSName(name.to_owned()), MountOption::DefaultPermissions];
        let session = fuser::spawn_mount2(Passthrough::new(&backing, shared.clone()), &dir, &options)
            .unwrap_or_else(|e| panic!("mounting {}: {e}", dir.display()));
        FaultyDisk { dir, backing, shared, session: Some(session) }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Where its bytes really are: for damage, and for looking.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// What is wrong with it from now on.
    pub fn set(&self, trouble: Trouble) {
        self.shared.lock().trouble = trouble;
    }

    /// Operations that were made to fail, lag or lie so far.
    pub fn hits(&self) -> u64 {
        self.shared.lock().hits
    }

    /// Takes back what was written since the last syncs: in one case of two all of it, else about half of the sectors. Returns
    /// how many bytes.
    ///
    /// # Panics
    /// When the files below cannot be written.
    pub fn cut_power(&self) -> u64 {
        let mut state = self.shared.lock();
        let State { rng, unsynced, .. } = &mut *state;
        let kept = if rng.random() { 0.0 } else { 0.5 };
        unsynced.take_back(|| rng.random_bool(kept))
    }
}

impl Drop for FaultyDisk {
    fn drop(&mut self) {
        detach(&self.dir);
        // Its thread ends once nobody has a file open any more; waiting for that is not needed.
        drop(self.session.take());
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt, time::Instant};

    use super::*;
    use crate::{Scratch, process::sh};

    fn disk(scratch: &Scratch) -> FaultyDisk {
        FaultyDisk::new(scratch.path(), "disk", 7)
    }

    fn volume(disk: &FaultyDisk) -> File {
        let path = disk.path().join("00000001.vol");
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn without_trouble_it_is_a_filesystem_with_holes() {
        let scratch = Scratch::new("disk-plain");
        let disk = disk(&scratch);
        let line = "mkdir d && echo hello > d/f && mv d/f d/g && grep hello d/g && rm d/g && rmdir d \
            && fallocate -l 1M f && fallocate -p -o 4096 -l 4096 f && truncate -s 8192 f && test $(stat -c %s f) = 8192 \
            && dd if=/dev/urandom of=g bs=1M count=5 conv=fsync status=none && cmp g ../disk.backing/g && df .";
        sh(disk.path(), line);
        assert_eq!(disk.hits(), 0);
    }

    #[test]
    fn it_fails_as_told_and_then_no_more() {
        let scratch = Scratch::new("disk-errors");
        let disk = disk(&scratch);
        let file = volume(&disk);
        file.write_all_at(&[1; 4096], 0).unwrap();
        disk.set(Trouble::Errors);
        let code = |e: std::io::Error| e.raw_os_error();
        assert_eq!(file.write_all_at(&[1; 4096], 4096).map_err(code), Err(Some(libc::EIO)));
        assert_eq!(file.sync_all().map_err(code), Err(Some(libc::EIO)));
        disk.set(Trouble::Full);
        assert_eq!(file.write_all_at(&[1; 4096], 4096).map_err(code), Err(Some(libc::ENOSPC)));
        let began = Instant::now();
        disk.set(Trouble::Slow(Duration::from_millis(80)));
        file.write_all_at(&[1; 4096], 4096).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(80));
        disk.set(Trouble::None);
        file.sync_all().unwrap();
        assert!(disk.hits() >= 4);
    }

    #[test]
    fn it_lies_about_volumes_only() {
        let scratch = Scratch::new("disk-lies");
        let disk = disk(&scratch);
        let file = volume(&disk);
        let other = File::create(disk.path().join("label.json")).unwrap();
        disk.set(Trouble::Loses);
        for page in 0..64 {
            file.write_all_at(&[7; 4096], page * 4096).unwrap();
            other.write_all_at(&[7; 4096], page * 4096).unwrap();
        }
        assert_eq!(fs::read(disk.backing().join("label.json")).unwrap(), [7; 64 * 4096]);
        let kept = fs::read(disk.backing().join("00000001.vol")).unwrap();
        let lost = 64 - kept.chunks(4096).filter(|page| *page == [7; 4096]).count();
        assert!((4..40).contains(&lost), "{lost} of 64 writes were lost");
        disk.set(Trouble::Tears);
        for page in 0..64 {
            file.write_all_at(&[9; 4096], page * 4096).unwrap();
        }
        let kept = fs::read(disk.backing().join("00000001.vol")).unwrap();
        let torn = kept.chunks(4096).filter(|page| page.starts_with(&[9]) && !page.ends_with(&[9])).count();
        assert!(torn > 2, "{torn} of 64 writes were torn");
    }

    #[test]
    fn a_power_cut_takes_back_what_was_not_synced() {
        let scratch = Scratch::new("disk-power");
        let disk = disk(&scratch);
        let file = volume(&disk);
        file.write_all_at(&[1; 1 << 16], 0).unwrap();
        file.sync_data().unwrap();
        file.write_all_at(&[2; 1 << 15], 1 << 14).unwrap();
        file.write_all_at(&[3; 1 << 14], 1 << 16).unwrap();
        let taken = disk.cut_power();
        assert!(taken > 0);
        let kept = fs::read(disk.backing().join("00000001.vol")).unwrap();
        assert!(kept[..1 << 14].iter().all(|b| *b == 1) && kept[3 << 14..1 << 16].iter().all(|b| *b == 1));
        for (n, sector) in kept.chunks(SECTOR).enumerate() {
            assert!(sector.iter().all(|b| *b == sector[0]), "sector {n} is torn");
            let fits = if n * SECTOR < 1 << 16 { [1, 2] } else { [0, 3] };
            assert!(fits.contains(&sector[0]), "sector {n} holds {}", sector[0]);
        }
        // Once is enough: what is there now stays.
        assert_eq!(disk.cut_power(), 0);
    }
}
