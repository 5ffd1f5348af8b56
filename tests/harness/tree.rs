//! Deterministic random trees, and their comparison.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use rand::Rng;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use crate::rng::{TestRng, bytes, stream};

/// What a random tree contains.
#[derive(Clone, Debug)]
pub struct Tree {
    /// Directories, nested at random.
    pub directories: usize,
    /// Files of 0 to `small_max` bytes.
    pub small: usize,
    /// Largest small file.
    pub small_max: usize,
    /// Files of `large_size`/2 to `large_size` bytes.
    pub large: usize,
    /// Largest large file.
    pub large_size: usize,
    /// Files with holes.
    pub sparse: usize,
    /// Symbolic links, some dangling.
    pub symlinks: usize,
    /// Further names of existing files.
    pub hard_links: usize,
}

impl Tree {
    /// A bit of everything, in seconds even in a debug build.
    pub fn mixed() -> Tree {
        Tree {
            directories: 30,
            small: 400,
            small_max: 40_000,
            large: 4,
            large_size: 24 << 20,
            sparse: 4,
            symlinks: 30,
            hard_links: 20,
        }
    }

    /// Writes the tree below `root`, which is created.
    ///
    /// # Panics
    /// When the disk does.
    pub fn generate(&self, root: &Path, seed: u64) {
        let mut rng = stream(seed, 1);
        fs::create_dir_all(root).expect("root of a tree");
        let mut dirs = vec![root.to_owned()];
        for i in 0..self.directories {
            let dir = pick(&mut rng, &dirs).join(format!("d{i}"));
            fs::create_dir(&dir).expect("directory");
            dirs.push(dir);
        }
        let mut files = Vec::new();
        for i in 0..self.small + self.large + self.sparse {
            let path = pick(&mut rng, &dirs).join(name(&mut rng, i));
            if i < self.small {
                // Half of them tiny: those take the inline path of the metadata.
                let max = if rng.random_bool(0.5) { self.small_max.min(6000) } else { self.small_max };
                let len = rng.random_range(0..=max);
                fs::write(&path, bytes(rng.random(), len)).expect("small file");
            } else if i < self.small + self.large {
                let len = rng.random_range(self.large_size / 2..=self.large_size);
                fs::write(&path, bytes(rng.random(), len)).expect("large file");
            } else {
                sparse_file(&path, &mut rng);
            }
            dress(&path, &mut rng);
            files.push(path);
        }
        for i in 0..self.symlinks {
            let dir = pick(&mut rng, &dirs);
            let target =
                if rng.random_bool(0.8) { pick(&mut rng, &files) } else { root.join("no/such/file") };
            symlink(relative(root, &dir, &target), dir.join(format!("symlink{i}"))).expect("symlink");
        }
        for i in 0..self.hard_links {
            let link = pick(&mut rng, &dirs).join(format!("link{i}"));
            fs::hard_link(pick(&mut rng, &files), link).expect("hard link");
        }
        for dir in dirs.iter().rev() {
            set_mtime(dir, &mut rng);
        }
    }
}

/// How a link in `dir` names `target`; both lie below `root`.
fn relative(root: &Path, dir: &Path, target: &Path) -> PathBuf {
    let below = |path: &Path| path.strip_prefix(root).expect("below the root").to_owned();
    below(dir).iter().map(|_| Path::new("..")).chain([below(target).as_path()]).collect()
}

fn pick(rng: &mut TestRng, from: &[PathBuf]) -> PathBuf {
    from[rng.random_range(0..from.len())].clone()
}

fn name(rng: &mut TestRng, i: usize) -> String {
    match rng.random_range(0..10) {
        0 => format!("with space and ü {i}"),
        1 => format!("{}{i}", "long".repeat(50)),
        _ => format!("f{i}.dat"),
    }
}

fn sparse_file(path: &Path, rng: &mut TestRng) {
    let file = File::create(path).expect("sparse file");
    file.set_len(rng.random_range(1 << 20..64 << 20)).expect("length");
    for _ in 0..3 {
        let data = bytes(rng.random(), rng.random_range(1..100_000));
        file.write_all_at(&data, rng.random_range(0..40 << 20)).expect("data in a sparse file");
    }
}

fn dress(path: &Path, rng: &mut TestRng) {
    let mode = [0o644, 0o600, 0o755, 0o444, 0o640][rng.random_range(0..5)];
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    set_mtime(path, rng);
}

fn set_mtime(path: &Path, rng: &mut TestRng) {
    let time = Timespec {
        tv_sec: rng.random_range(1_000_000_000..1_700_000_000),
        tv_nsec: rng.random_range(0..1_000_000_000),
    };
    utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::empty())
        .expect("times");
}

/// What two equal trees have in common, for each path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    mtime: (i64, i64),
    links: u64,
    /// First path, in order, that names the same file.
    same_as: PathBuf,
    content: Content,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Content {
    Directory,
    Checksum(u64),
    Link(PathBuf),
    Special,
}

/// Everything below `root`, keyed by relative path.
///
/// # Errors
/// The first path that could not be read, and why.
pub fn scan(root: &Path) -> Result<BTreeMap<PathBuf, Entry>, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let full = root.join(&dir);
        for item in fs::read_dir(&full).map_err(|e| format!("{}: {e}", full.display()))? {
            let path = dir.join(item.map_err(|e| format!("{}: {e}", full.display()))?.file_name());
            let entry =
                examine(&root.join(&path)).map_err(|e| format!("{}: {e}", root.join(&path).display()))?;
            if entry.0.content == Content::Directory {
                todo.push(path.clone());
            }
            found.insert(path, entry);
        }
    }
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let named = |(path, (mut entry, ino)): (PathBuf, (Entry, u64))| {
        entry.same_as = first.entry(ino).or_insert_with(|| path.clone()).clone();
        (path, entry)
    };
    Ok(found.into_iter().map(named).collect())
}

fn examine(path: &Path) -> std::io::Result<(Entry, u64)> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let content = if kind.is_dir() {
        Content::Directory
    } else if kind.is_symlink() {
        Content::Link(fs::read_link(path)?)
    } else if kind.is_file() {
        Content::Checksum(checksum(path)?)
    } else {
        Content::Special
    };
    let directory = kind.is_dir();
    let entry = Entry {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        size: if directory { 0 } else { meta.size() },
        // A link's own times are not kept by every tool that copies.
        mtime: if kind.is_symlink() { (0, 0) } else { (meta.mtime(), meta.mtime_nsec()) },
        links: if directory { 0 } else { meta.nlink() },
        same_as: PathBuf::new(),
        content,
    };
    Ok((entry, meta.ino()))
}

/// Checksum of a file's bytes.
///
/// # Errors
/// Those of open and read.
pub fn checksum(path: &Path) -> std::io::Result<u64> {
    let mut file = File::open(path)?;
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.digest()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// What is compared besides names, kinds, modes, sizes and bytes.
#[derive(Clone, Copy, Debug)]
pub struct Compare {
    /// Modification times.
    pub times: bool,
    /// Which names are the same file.
    pub hard_links: bool,
}

/// Everything.
pub const ALL: Compare = Compare { times: true, hard_links: true };

/// Requires that two trees are the same.
///
/// # Panics
/// With the first differences.
#[track_caller]
pub fn assert_same(left: &Path, right: &Path, compare: Compare) {
    let (l, r) =
        (scan(left).unwrap_or_else(|e| panic!("{e}")), scan(right).unwrap_or_else(|e| panic!("{e}")));
    let differences = differences(&l, &r, compare);
    assert!(
        differences.is_empty(),
        "{} and {} differ in {} places:\n{}",
        left.display(),
        right.display(),
        differences.len(),
        differences.iter().take(20).map(|d| d.to_string()).collect::<Vec<_>>().join("\n")
    );
    assert!(!l.is_empty(), "{} is empty: comparing it shows nothing", left.display());
}

/// A path in which two trees differ.
#[derive(Debug)]
pub struct Difference(PathBuf, Option<Entry>, Option<Entry>);

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.1, &self.2) {
            (Some(_), None) => write!(f, "  only left:  {}", self.0.display()),
            (None, Some(_)) => write!(f, "  only right: {}", self.0.display()),
            (l, r) => write!(f, "  {}:\n    {l:?}\n    {r:?}", self.0.display()),
        }
    }
}

/// Where two scans differ.
pub fn differences(
    left: &BTreeMap<PathBuf, Entry>,
    right: &BTreeMap<PathBuf, Entry>,
    compare: Compare,
) -> Vec<Difference> {
    let seen = |entry: Option<&Entry>| {
        entry.cloned().map(|mut e| {
            if !compare.times {
                e.mtime = (0, 0);
            }
            if !compare.hard_links {
                (e.links, e.same_as) = (0, PathBuf::new());
            }
            e
        })
    };
    let mut paths: Vec<&PathBuf> = left.keys().chain(right.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
        .into_iter()
        .map(|path| Difference(path.clone(), seen(left.get(path)), seen(right.get(path))))
        .filter(|d| d.1 != d.2)
        .collect()
}

/// Number of entries below a folder, found without reading files.
pub fn count(root: &Path) -> usize {
    let mut todo = vec![root.to_owned()];
    let mut count = 0;
    while let Some(dir) = todo.pop() {
        for item in fs::read_dir(dir).into_iter().flatten().flatten() {
            count += 1;
            if item.file_type().is_ok_and(|t| t.is_dir()) {
                todo.push(item.path());
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn a_seed_makes_one_tree_and_every_change_is_seen() {
        let scratch = Scratch::new("tree");
        let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
        let tree = Tree { large: 0, sparse: 1, ..Tree::mixed() };
        tree.generate(&a, 7);
        let original = scan(&a).unwrap();
        assert!(original.len() > 400);
        type Change = (&'static str, fn(&Path));
        let changes: [Change; 7] = [
            ("a byte", |f| {
                let mtime = fs::metadata(f).unwrap().modified().unwrap();
                let file = File::options().write(true).open(f).unwrap();
                file.write_all_at(b"!", 0).unwrap();
                file.set_modified(mtime).unwrap();
            }),
            ("the length", |f| File::options().append(true).open(f).unwrap().set_len(1 << 20).unwrap()),
            ("the mode", |f| fs::set_permissions(f, fs::Permissions::from_mode(0o111)).unwrap()),
            ("the time", |f| {
                File::open(f).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            }),
            ("the owner", |f| std::os::unix::fs::chown(f, Some(1), None).unwrap()),
            ("a name", |f| fs::rename(f, f.with_extension("renamed")).unwrap()),
            ("a link", |f| fs::hard_link(f, f.with_extension("linked")).unwrap()),
        ];
        for (what, change) in changes {
            let _ = fs::remove_dir_all(&b);
            tree.generate(&b, 7);
            assert!(
                differences(&original, &scan(&b).unwrap(), ALL).is_empty(),
                "the same seed, another tree"
            );
            let file =
                crate::fault::files(&b).into_iter().find(|f| f.metadata().unwrap().len() > 100).unwrap();
            change(&file);
            assert!(!differences(&original, &scan(&b).unwrap(), ALL).is_empty(), "{what} goes unnoticed");
        }
    }
}
