//! A mount that goes on after the command has returned: the same program with `-f`, in a session of its own.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};

/// Set for the background process: it leaves the terminal's session.
pub(crate) const DETACH_ENV: &str = "FJORD_DETACHED";

/// What the process prints once the mount is there.
pub(crate) const READY: &str = "mounted on ";

/// Starts `fjord mount -f ARGS` and waits until it is mounted or has failed.
///
/// # Errors
/// What the process said before it ended.
pub(crate) fn start(args: impl IntoIterator<Item = OsString>, log: &Path) -> anyhow::Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let mut log_file = File::options().create(true).append(true).read(true).open(log).with_context(|| {
        format!("cannot write the log {}: choose another with -o log=FILE", log.display())
    })?;
    let begin = log_file.seek(SeekFrom::End(0)).context("cannot read the log")?;
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut child = Command::new(program)
        .args(["mount", "-f"])
        .args(args)
        .env(DETACH_ENV, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log_file.try_clone().context("cannot duplicate the log's descriptor")?)
        .spawn()
        .context("cannot start the mount process")?;
    if became_ready(&mut child) {
        return Ok(());
    }
    let status = child.wait().context("cannot wait for the mount process")?;
    let mut said = String::new();
    log_file.seek(SeekFrom::Start(begin)).context("cannot read the log")?;
    // Lossy: a log line may carry a path that is not UTF-8.
    let mut raw = Vec::new();
    log_file.read_to_end(&mut raw).context("cannot read the log")?;
    said.push_str(&String::from_utf8_lossy(&raw));
    bail!(
        "{}",
        reason(&said)
            .unwrap_or_else(|| format!("the mount process ended with {status}; log: {}", log.display()))
    )
}

fn became_ready(child: &mut Child) -> bool {
    let Some(output) = child.stdout.take() else { return false };
    BufReader::new(output).lines().map_while(Result::ok).any(|line| line.starts_with(READY))
}

/// The error that a `fjord` printed last, or where it panicked, or its last lines.
pub(crate) fn reason(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    if let Some(at) = lines.iter().rposition(|line| line.starts_with("fjord: ")) {
        return Some(lines[at..].join("\n").trim_start_matches("fjord: ").to_owned());
    }
    // What follows is a backtrace.
    if let Some(at) = lines.iter().position(|line| line.contains(" panicked at ")) {
        return Some(lines[at..lines.len().min(at + 2)].join("\n"));
    }
    (!lines.is_empty()).then(|| lines[lines.len().saturating_sub(8)..].join("\n"))
}

/// Where the log of a background mount goes when `-o log=` does not say.
pub(crate) fn default_log(mountpoint: &Path) -> PathBuf {
    let name = mountpoint.to_string_lossy().trim_matches('/').replace('/', "-");
    let name = format!("mount-{}.log", if name.is_empty() { "root" } else { &name });
    if rustix::process::geteuid().is_root() {
        return Path::new("/var/log/fjord").join(name);
    }
    let state = std::env::var_os("XDG_STATE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/state"));
    state.or_else(home).unwrap_or_else(std::env::temp_dir).join("fjord").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_error_line() {
        let log = "INFO connecting\nWARN slow\nfjord: cannot reach m:1\n  caused by x\n";
        assert_eq!(reason(log).unwrap(), "cannot reach m:1\n  caused by x");
        assert_eq!(reason("odd\nnote: y\n").unwrap(), "odd\nnote: y");
        let backtrace: String = (0..20).map(|n| format!("  {n}: some::function\n")).collect();
        let log =
            format!("INFO x\nthread 'main' (7) panicked at a.rs:1:2:\nwhy\nstack backtrace:\n{backtrace}");
        assert_eq!(reason(&log).unwrap(), "thread 'main' (7) panicked at a.rs:1:2:\nwhy");
        assert_eq!(reason(" \n"), None);
    }
}
