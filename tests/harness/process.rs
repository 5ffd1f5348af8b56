//! Children: `fjord` daemons that live as long as the test wants, and commands that end within a bound.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{OnceLock, mpsc},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::SOON;

/// The binary under test.
///
/// # Panics
/// When it has not been built.
pub fn fjord_bin() -> PathBuf {
    let path = match std::env::var_os("FJORD_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            // target/<profile>/deps/<test>-<hash>: the binary lies one folder up.
            let me = std::env::current_exe().expect("path of the test binary");
            let profile = me.ancestors().nth(2).expect("test binary lies in target/<profile>/deps");
            profile.join("fjord")
        }
    };
    assert!(path.exists(), "{} is missing: cargo build -p fjordfs-cli, or set FJORD_BIN", path.display());
    path
}

/// A `fjord` command. Ambient settings of the caller do not leak into tests.
pub fn fjord<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(fjord_bin());
    // A panic shows its backtrace, an error its sentence.
    command.args(args).env_remove("FJORD_META").env("RUST_LIB_BACKTRACE", "0").stdin(Stdio::null());
    command
}

/// What a finished command left.
#[derive(Debug)]
pub struct Run {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
}

impl Run {
    /// Exit code; -1 after a signal.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Requires success.
    ///
    /// # Panics
    /// With all output, when the command failed.
    #[track_caller]
    pub fn ok(self) -> Run {
        assert!(self.status.success(), "{self}");
        self
    }

    /// Requires a plain failure (no signal, no panic) whose standard error names all of `words`, in any case.
    ///
    /// # Panics
    /// With all output, when it is not so.
    #[track_caller]
    pub fn fails_saying(self, words: &[&str]) -> Run {
        assert!(!self.status.success(), "should have failed: {self}");
        assert!(self.status.code().is_some_and(|code| code != 101), "died instead of failing: {self}");
        let said = self.stderr.to_lowercase();
        for word in words {
            assert!(said.contains(&word.to_lowercase()), "does not say '{word}': {self}");
        }
        self
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with {}", self.command, self.status)?;
        write!(f, "\n--- stdout\n{}\n--- stderr\n{}", tail(&self.stdout, 60), tail(&self.stderr, 60))
    }
}

/// The last lines of a text.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started, or has not ended after `bound` (it is killed then).
#[track_caller]
pub fn run_within(command: Command, bound: Duration) -> Run {
    let described = describe(&command);
    let output = || tempfile::NamedTempFile::new().expect("temporary file").into_temp_path();
    let (stdout, stderr) = (output(), output());
    let files = Output { stdout: stdout.to_path_buf(), stderr: stderr.to_path_buf() };
    let mut child =
        spawn(command, files, &COMMANDS).unwrap_or_else(|e| panic!("cannot run `{described}`: {e}"));
    let ended = wait_child(&mut child, bound);
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let status = ended.unwrap_or(ExitStatus::from_raw(9));
    let run = Run { command: described, status, stdout: text(&stdout), stderr: text(&stderr) };
    assert!(ended.is_some(), "had not ended after {bound:?}: {run}");
    run
}

/// [`run_within`] a bound that fits everything but bulk work.
#[track_caller]
pub fn run(command: Command) -> Run {
    run_within(command, 2 * SOON)
}

/// Shell command line, run in `dir`; must succeed.
#[track_caller]
pub fn sh(dir: &Path, line: &str) -> Run {
    let mut command = Command::new("bash");
    command.current_dir(dir).args(["-euo", "pipefail", "-c", line]);
    run_within(command, 5 * SOON).ok()
}

/// Whether a program is installed. Tests that use optional tools say so when they leave one out.
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if !found {
        eprintln!("{program} is not installed: that part is left out");
    }
    found
}

/// Process ids of all `fjord` processes with `word` in their arguments.
pub fn fjords_with(word: &str) -> Vec<u32> {
    let about = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<String> =
            line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        words[0].ends_with("fjord") && words.iter().any(|w| w.contains(word))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok()).filter(about).collect()
}

fn text(file: &Path) -> String {
    String::from_utf8_lossy(&fs::read(file).expect("output of a command")).into_owned()
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn wait_child(child: &mut Child, bound: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + bound;
    loop {
        if let Some(status) = child.try_wait().expect("wait for a child") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Files that a child's output is appended to.
struct Output {
    stdout: PathBuf,
    stderr: PathBuf,
}

type Order = (Command, Output, mpsc::Sender<io::Result<Child>>);

/// Starts commands; one that hangs while it becomes another program holds up only others of its kind.
static COMMANDS: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
/// Starts daemons.
static DAEMONS: OnceLock<mpsc::Sender<Order>> = OnceLock::new();

/// Starts a child that the kernel kills when the test process ends, however that ends.
///
/// The kernel ties a child to the *thread* that started it, so all are started by threads that never end. They do not share
/// the test's descriptors: a child would have them until it becomes another program, which closes them, and closing a file
/// that was written to or locked waits for a mount, which may be the child or stand still.
fn spawn(command: Command, output: Output, by: &OnceLock<mpsc::Sender<Order>>) -> io::Result<Child> {
    let starter = by.get_or_init(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            let flags = libc::CLOSE_RANGE_UNSHARE.cast_signed();
            // SAFETY: this thread has a table of its own then, and uses no descriptor of before.
            let closed = unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
            assert_eq!(closed, 0, "{}", io::Error::last_os_error());
            for (command, output, answer) in inbox {
                let _ = answer.send(start(command, &output));
            }
        });
        orders
    });
    let (answer, child) = mpsc::channel();
    starter.send((command, output, answer)).expect("the starter thread never ends");
    child.recv().expect("the starter thread answers")
}

fn start(mut command: Command, output: &Output) -> io::Result<Child> {
    let open = |path: &Path| File::options().create(true).append(true).open(path);
    command.stdin(Stdio::null()).stdout(open(&output.stdout)?).stderr(open(&output.stderr)?);
    // SAFETY: prctl is async-signal-safe and touches nothing but the new process.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn()
}

/// Gives the calling thread a table of descriptors of its own: children that other threads start do not have what this one opens. They
/// would close it on their way to another program, and so wait for a mount that may wait for them.
pub fn own_descriptors() {
    // SAFETY: descriptors of before stay valid in both tables.
    let own = unsafe { libc::unshare(libc::CLONE_FILES) };
    assert_eq!(own, 0, "{}", io::Error::last_os_error());
}

/// A long-lived child with its output in a log file. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    ended: Option<ExitStatus>,
    log: PathBuf,
    log_before: usize,
}

impl Process {
    /// Starts it; output is appended to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(name: &str, command: Command, log: &Path) -> Process {
        let log_before = fs::metadata(log).map_or(0, |m| m.len() as usize);
        let output = Output { stdout: log.to_owned(), stderr: log.to_owned() };
        let child = spawn(command, output, &DAEMONS).unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Process { name: name.to_owned(), child, ended: None, log: log.to_owned(), log_before }
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged. What earlier processes have left in the same file is not shown.
    pub fn log(&self) -> String {
        let raw = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(raw.get(self.log_before..).unwrap_or_default()).into_owned()
    }

    /// What each of its threads waits for, as far as the kernel tells.
    pub fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let about = |task: PathBuf| {
            let read = |what: &str| fs::read_to_string(task.join(what)).unwrap_or_default();
            let stack: Vec<String> = read("stack").lines().take(8).map(str::to_owned).collect();
            format!("{} (call {}): {}\n", read("comm").trim(), read("syscall").trim(), stack.join(" < "))
        };
        tasks.map(|task| about(task.path())).collect()
    }

    /// Whether it still runs.
    pub fn running(&mut self) -> bool {
        self.ended.is_none() && {
            self.ended = self.child.try_wait().expect("wait for a child");
            self.ended.is_none()
        }
    }

    /// Requires that it still runs.
    ///
    /// # Panics
    /// With the log's end, when it does not.
    #[track_caller]
    pub fn assert_running(&mut self) {
        assert!(self.running(), "{} ended by itself: {:?}\n{}", self.name, self.ended, tail(&self.log(), 40));
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill9(&mut self) {
        self.signal(Signal::KILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&mut self, signal: Signal) {
        if self.running() {
            let pid = Pid::from_child(&self.child);
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGTERM; it must end cleanly.
    ///
    /// # Panics
    /// When it does not end in time, or not with code 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{} stopped with {status}\n{}", self.name, tail(&self.log(), 40));
    }

    /// Waits until it ends by itself.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        if self.ended.is_none() {
            self.ended = wait_child(&mut self.child, 3 * SOON);
        }
        self.ended.unwrap_or_else(|| {
            panic!("waited {:?} for the end of {}\n{}", 3 * SOON, self.name, tail(&self.log(), 40))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("--- end of the log of {}\n{}", self.name, tail(&self.log(), 25));
        }
    }
}
