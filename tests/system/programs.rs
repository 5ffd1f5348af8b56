//! Programs that people use give the same results in a mount as on a local disk, and databases may be shared by clients.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::{fs, path::Path, process::Command};

use fjordfs_tests::{
    Cluster, Setup, fjord_bin,
    process::{have, run_within, sh},
    rng,
    tree::{self, Tree},
    wait::SOON,
};

/// The interpreter that has numpy, which `tests/run` prepares.
fn python() -> String {
    std::env::var("FJORD_PYTHON").unwrap_or_else(|_| "python3".into())
}

fn run_python(dir: &Path, script: &str, arguments: &[&Path]) -> String {
    let mut command = Command::new(python());
    command.args(["-c", script]).args(arguments).current_dir(dir);
    run_within(command, 5 * SOON).ok().stdout
}

/// Adds to a number and to a list, from several processes, each on one of the given paths to the database.
const SQLITE: &str = "
import multiprocessing, sqlite3, sys
mode, rounds, paths = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
def work(path, who):
    db = sqlite3.connect(path, timeout=120, isolation_level=None)
    for i in range(rounds):
        db.execute('begin immediate')
        (v,) = db.execute('select v from number').fetchone()
        db.execute('update number set v = ?', (v + 1,))
        db.execute('insert into list values (?, ?, ?)', (v, who, i))
        db.execute('rollback' if i % 5 == 4 else 'commit')
db = sqlite3.connect(paths[0])
assert db.execute('pragma journal_mode=' + mode).fetchone() == (mode,)
db.executescript('create table number (v); insert into number values (0); create table list (v primary key, who, i)')
db.close()
workers = [multiprocessing.Process(target=work, args=(path, who)) for who, path in enumerate(paths)]
[w.start() for w in workers]
[w.join() for w in workers]
assert all(w.exitcode == 0 for w in workers)
for path in paths:
    db = sqlite3.connect(path)
    print(db.execute('select v from number').fetchone(), db.execute('pragma integrity_check').fetchone())
    assert [v for (v,) in db.execute('select v from list order by v')] == list(range(len(paths) * rounds * 4 // 5))
";

#[test]
fn sqlite_is_shared_by_clients() {
    let cluster = Cluster::start("sqlite", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let paths = [a.join("db"), b.join("db"), a.join("db"), b.join("db")];
    let paths: Vec<&Path> = [Path::new("delete"), Path::new("10")]
        .into_iter()
        .chain(paths.iter().map(|path| path.as_path()))
        .collect();
    let said = run_python(a.path(), SQLITE, &paths);
    assert_eq!(said, "(32,) ('ok',)\n".repeat(4));
    a.unmount();
    b.unmount();
}

/// A write-ahead log needs memory that all its users share, so they have to be on one machine.
#[test]
fn sqlite_with_a_write_ahead_log_is_shared_by_processes() {
    let cluster = Cluster::start("sqlite-wal", Setup::default());
    let mount = cluster.mount();
    let db = mount.join("db");
    let said = run_python(mount.path(), SQLITE, &[Path::new("wal"), Path::new("20"), &db, &db, &db]);
    assert_eq!(said, "(48,) ('ok',)\n".repeat(3));
    mount.unmount();
}

#[test]
fn trees_are_packed_copied_and_unpacked_unchanged() {
    let seed = rng::seed("programs");
    let cluster = Cluster::start("tar", Setup::default());
    let mount = cluster.mount();
    let original = cluster.dir("original").join("tree");
    Tree { large_size: 4 << 20, ..Tree::mixed() }.generate(&original, seed);
    let from = original.parent().unwrap().display();
    sh(mount.path(), &format!("tar --format=posix -C {from} -cSf - tree | tee archive.tar | tar -xSf -"));
    tree::assert_same(&original, &mount.join("tree"), tree::ALL);
    sh(mount.path(), "mkdir again && tar -xSf archive.tar -C again && tar -df archive.tar");
    tree::assert_same(&original, &mount.join("again/tree"), tree::ALL);
    if have("rsync") {
        // Into the mount, within it with changes, and back out.
        sh(mount.path(), &format!("rsync -aHS {from}/tree/ synced"));
        tree::assert_same(&original, &mount.join("synced"), tree::ALL);
        sh(mount.path(), "find synced -type f | sed -n 1,20p | while read -r f; do echo more >>\"$f\"; done");
        sh(
            mount.path(),
            "rsync -aHSc --delete --inplace again/tree/ synced && rsync -aHS --checksum synced/ twice",
        );
        let back = cluster.dir("back");
        sh(
            mount.path(),
            &format!("rsync -aHS twice/ {} && rsync -aHSnic twice/ {0} | (! grep .)", back.display()),
        );
        tree::assert_same(&original, &back, tree::ALL);
    }
    mount.unmount();
}

/// A package, put together by hand so that nothing is fetched.
const WHEEL: &str = "
import zipfile
files = {f'fjordpackage/m{i}.py': f'value = {i}\\n' for i in range(100)} | {'fjordpackage/__init__.py': ''}
info = 'fjordpackage-1.2.dist-info/'
files[info + 'METADATA'] = 'Metadata-Version: 2.1\\nName: fjordpackage\\nVersion: 1.2\\n'
files[info + 'WHEEL'] = 'Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n'
files[info + 'RECORD'] = ''.join(f'{name},,\\n' for name in [*files, info + 'RECORD'])
with zipfile.ZipFile('fjordpackage-1.2-py3-none-any.whl', 'w') as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
";

#[test]
fn python_packages_are_installed_and_imported() {
    let cluster = Cluster::start("pip", Setup::default());
    let mount = cluster.mount();
    let local = cluster.dir("local");
    let script = "import sys; sys.path.insert(0, 'site')\n\
        import fjordpackage.m7, importlib\n\
        print(sum(importlib.import_module(f'fjordpackage.m{i}').value for i in range(100)), fjordpackage.m7.__file__)";
    let names = "find site ! -name '*.pyc' | sort";
    let story = |dir: &Path| {
        run_python(dir, WHEEL, &[]);
        let install = "-m pip install -q --no-index --disable-pip-version-check --root-user-action ignore";
        sh(dir, &format!("{} {install} --target site ./*.whl", python()));
        (run_python(dir, script, &[]).replace(&dir.display().to_string(), ""), sh(dir, names).stdout)
    };
    let (found, expected) = (story(mount.path()), story(&local));
    assert_eq!(found, expected);
    assert!(found.0.starts_with("4950 ") && found.1.lines().count() > 100, "{found:?}");
    mount.unmount();
}

/// Commits, clones and packs a tree, with everything that could differ held still.
const GIT: &str = r#"
set -e
export HOME=$PWD GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@a GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@a
export GIT_AUTHOR_DATE='2001-01-01T00:00:00Z' GIT_COMMITTER_DATE='2001-01-01T00:00:00Z'
git init -q -b main one
cd one
for d in a b c; do
    mkdir -p "$d/deep/er"
    for i in $(seq 40); do seq $((i * 7)) >"$d/deep/er/file$i"; done
    git add . && git commit -q -m "$d"
done
ln -s a/deep link && chmod +x a/deep/er/file1 && git mv b moved && git rm -rq c && git add . && git commit -q -m changes
cd ..
git clone -q --no-local one two
git clone -q one three
cd two
git checkout -q -b other && seq 1000 >new && git add . && git commit -q -m new && git push -q origin other
git repack -adq && git gc -q --aggressive --prune=now
cd ../one
git merge -q other && git gc -q --prune=now
for repository in . ../two ../three; do
    git -C "$repository" fsck --full --strict --no-dangling 2>&1
    git -C "$repository" status --porcelain
    git -C "$repository" log --format='%H %T' --all
    git -C "$repository" count-objects -v | grep -E '^(count|in-pack|packs|garbage)'
done
git worktree add -q ../four other && git -C ../four ls-files -s && git grep -c 200 main | wc -l
"#;

#[test]
fn git_commits_clones_packs_and_finds_nothing_wrong() {
    let cluster = Cluster::start("git", Setup::default());
    let mount = cluster.mount();
    let local = cluster.dir("local");
    let story = |dir: &Path| sh(dir, GIT).stdout;
    let (found, expected) = (story(mount.path()), story(&local));
    assert_eq!(found, expected);
    assert!(found.lines().count() > 100, "{found}");
    // As the next client finds it.
    let other = cluster.mount();
    let fsck = "for r in one two three; do git -C $r -c safe.directory='*' fsck --full --strict; done";
    sh(other.path(), fsck);
    assert_eq!(sh(other.path(), "git -C one -c safe.directory='*' status --porcelain").stdout, "");
    other.unmount();
    mount.unmount();
}

/// Builds twice, the second time from what is there, and runs its tests.
const CARGO: &str = r#"
set -e
unset CARGO_TARGET_DIR RUSTFLAGS CARGO_BUILD_TARGET_DIR
export CARGO_NET_OFFLINE=true
cargo new -q --lib --vcs none --name inner work/inner
cargo new -q --bin --vcs none --name outer work/outer
cd work/outer
echo 'inner = { path = "../inner" }' >>Cargo.toml
for i in $(seq 20); do
    echo "pub fn f$i(x: u64) -> u64 { x.wrapping_mul($i) }" >"../inner/src/m$i.rs" && echo "pub mod m$i;"
done >../inner/src/lib.rs
echo 'fn main() { println!("{}", inner::m7::f7(6)); } #[test] fn t() { assert_eq!(inner::m2::f2(4), 8); }' >src/main.rs
cargo build -q 2>&1
cargo build -v 2>&1 | grep -oE '^ *(Fresh|Compiling|Dirty) [a-z]+' | sort
./target/debug/outer
touch ../inner/src/m3.rs
cargo build -v 2>&1 | grep -oE '^ *(Fresh|Compiling) [a-z]+' | sort
cargo test -q 2>&1 | grep -oE '[0-9]+ passed'
"#;

#[test]
fn cargo_builds_and_knows_what_is_fresh() {
    let cluster = Cluster::start("cargo", Setup::default());
    let mount = cluster.mount();
    let local = cluster.dir("local");
    let story = |dir: &Path| {
        let mut command = Command::new("bash");
        command.args(["-c", CARGO]).current_dir(dir);
        run_within(command, 5 * SOON).ok().stdout
    };
    let (found, expected) = (story(mount.path()), story(&local));
    assert_eq!(found, expected);
    assert!(found.contains("42\n") && found.contains("Fresh inner") && found.contains("1 passed"), "{found}");
    mount.unmount();
}

#[test]
fn safetensors_are_saved_here_and_loaded_there() {
    let has =
        Command::new(python()).args(["-c", "import safetensors.numpy"]).output().unwrap().status.success();
    if !has {
        eprintln!("{} has no safetensors: left out", python());
        return;
    }
    let cluster = Cluster::start("safetensors", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let local = cluster.dir("local");
    let script = "
import hashlib, numpy as np, sys
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
rng = np.random.default_rng(5)
tensors = {f'layer.{i}.weight': rng.standard_normal((311, 97 + i), dtype=np.float32) for i in range(40)}
save_file(tensors, sys.argv[1], metadata={'format': 'np'})
for path in sys.argv[1:]:
    loaded = load_file(path)
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework='np') as f:
        part = f.get_slice('layer.7.weight')[100:200, 3:50]
        print(len(f.keys()), f.metadata(), part.shape, hashlib.sha256(part.tobytes()).hexdigest())
";
    let here = run_python(a.path(), script, &[&a.join("m.safetensors"), &b.join("m.safetensors")]);
    let there = run_python(&local, script, &[&local.join("m.safetensors"), &local.join("m.safetensors")]);
    assert_eq!(here, there);
    let read = |path: &Path| fs::read(path).unwrap();
    assert!(read(&b.join("m.safetensors")) == read(&local.join("m.safetensors")));
    a.unmount();
    b.unmount();
}

#[test]
fn numpy_maps_arrays() {
    let has_numpy = Command::new(python()).args(["-c", "import numpy"]).output().unwrap().status.success();
    if !has_numpy {
        eprintln!("{} has no numpy: left out", python());
        return;
    }
    let cluster = Cluster::start("numpy", Setup::default());
    let (a, b) = (cluster.mount(), cluster.mount());
    let local = cluster.dir("local");
    let script = "
import numpy as np, sys
def make(path):
    tokens = np.memmap(path, dtype=np.uint16, mode='w+', shape=(1000, 4099))
    tokens[:] = np.arange(tokens.size, dtype=np.uint64).reshape(tokens.shape) * 2654435761 >> 7
    tokens[::7, 5] = 1
    tokens.flush()
    again = np.memmap(path, dtype=np.uint16, mode='r+', offset=8198 * 10, shape=(100, 4099))
    again[3] += again[4]
    del again, tokens
def look(path):
    tokens = np.memmap(path, dtype=np.uint16, mode='r')
    rng = np.random.default_rng(1)
    picked = tokens[rng.integers(0, tokens.size, 20000)]
    print(tokens.size, int(picked.sum(dtype=np.uint64)), int(np.asarray(tokens).sum(dtype=np.uint64)))
make(sys.argv[1])
[look(path) for path in sys.argv[1:]]
";
    let here = run_python(a.path(), script, &[&a.join("t.bin"), &b.join("t.bin")]);
    let there = run_python(&local, script, &[&local.join("t.bin"), &local.join("t.bin")]);
    assert_eq!(here, there);
    assert_eq!(fs::read(b.join("t.bin")).unwrap(), fs::read(local.join("t.bin")).unwrap());
    a.unmount();
    b.unmount();
}

#[test]
fn dbench_finds_nothing_wrong() {
    if !have("dbench") {
        return;
    }
    let cluster = Cluster::start("dbench", Setup::default());
    let mount = cluster.mount();
    let said = sh(mount.path(), "dbench -s -S -t 4 -D . 2").stdout;
    assert!(said.contains("Throughput") && !said.contains("ERROR"), "{said}");
    let run = run_within(
        {
            let mut command = Command::new(fjord_bin());
            command.arg("status").arg(mount.path());
            command
        },
        SOON,
    );
    assert!(run.ok().stdout.contains("healthy"));
    mount.unmount();
}

#[test]
fn a_program_that_runs_cannot_be_emptied() {
    let cluster = Cluster::start("busy", Setup::default());
    let mount = cluster.mount();
    for round in 0..20 {
        let program = mount.path().join(format!("sleep-{round}"));
        std::fs::copy("/bin/sleep", &program).unwrap();
        let mut running = std::process::Command::new(&program).arg("60").spawn().unwrap();
        let refused = rustix::fs::open(
            &program,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::TRUNC,
            rustix::fs::Mode::empty(),
        );
        assert_eq!(refused.err(), Some(rustix::io::Errno::TXTBSY));
        assert_eq!(running.try_wait().unwrap(), None, "it goes on");
        running.kill().unwrap();
        running.wait().unwrap();
        let written = std::fs::metadata(&program).unwrap().len();
        assert_eq!(written, std::fs::metadata("/bin/sleep").unwrap().len());
    }
}
