//! Mounting through the setuid helper `fusermount3`, without root.
//!
//! The helper mounts and passes the descriptor of /dev/fuse back over a socket, whose number it finds in `_FUSE_COMMFD`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};

use super::{MountError, SUBTYPE};
use crate::options::MountOptions;

const HELPER: &str = "fusermount3";
const COMM_FD: &str = "_FUSE_COMMFD";

pub(super) fn mount(mountpoint: &Path, options: &MountOptions) -> Result<OwnedFd, MountError> {
    let (ours, helpers) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(|e| MountError::NoHelper(e.into()))?;
    // The only descriptor the helper inherits. For a moment a process that another thread starts would too; it would keep
    // the socket open, which `receive` notices by asking the helper's exit first.
    let inherited = fcntl_getfd(&helpers).and_then(|flags| fcntl_setfd(&helpers, flags - FdFlags::CLOEXEC));
    inherited.map_err(|e| MountError::NoHelper(e.into()))?;
    let output = Command::new(HELPER)
        .arg("-o")
        .arg(option_list(options))
        .arg("--")
        .arg(mountpoint)
        .env(COMM_FD, helpers.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(MountError::NoHelper)?;
    drop(helpers);
    if !output.status.success() {
        return Err(refused(mountpoint, &output));
    }
    let device = receive(&ours).map_err(|e| MountError::Helper {
        path: mountpoint.to_owned(),
        message: format!("it passed no descriptor back: {e}"),
    })?;
    prepare(&device).map_err(|source| MountError::Mount { path: mountpoint.to_owned(), source })?;
    Ok(device)
}

/// Not inherited by children, and never blocking, like the one that `direct` opens.
fn prepare(device: &OwnedFd) -> io::Result<()> {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    fcntl_setfl(device, fcntl_getfl(device)? | OFlags::NONBLOCK)?;
    Ok(fcntl_setfd(device, fcntl_getfd(device)? | FdFlags::CLOEXEC)?)
}

fn option_list(options: &MountOptions) -> String {
    let max_read = options.max_read.map_or(options.request_size_max, |max| max as usize);
    let mut list = vec![
        format!("fsname={}", escape(&options.source)),
        format!("subtype={SUBTYPE}"),
        "default_permissions".to_owned(),
        format!("max_read={}", max_read.min(options.request_size_max)),
    ];
    let flags = [
        (options.read_only, "ro"),
        (options.allow_other, "allow_other"),
        (options.nosuid, "nosuid"),
        (options.nodev, "nodev"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
        (options.sync, "sync"),
    ];
    list.extend(flags.into_iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| flag.to_owned()));
    list.join(",")
}

/// The helper splits at commas that have no backslash before them.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace(',', "\\,")
}

fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8];
    // The helper has exited successfully, so its message is there or will never be.
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(socket.as_fd(), &mut [io::IoSliceMut::new(&mut byte)], &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message
            && let Some(fd) = fds.next()
        {
            return Ok(fd);
        }
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no descriptor in the message"))
}

pub(super) fn unmount(path: &Path, lazy: bool) -> Result<(), MountError> {
    let mut command = Command::new(HELPER);
    command.arg("-u");
    if lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output().map_err(MountError::NoHelper)?;
    if output.status.success() {
        return Ok(());
    }
    if String::from_utf8_lossy(&output.stderr).contains("busy") {
        return Err(MountError::Busy(path.to_owned()));
    }
    Err(refused(path, &output))
}

fn refused(path: &Path, output: &Output) -> MountError {
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("fusermount3:").trim();
    let message = if said.is_empty() { format!("failed with {}", output.status) } else { said.to_owned() };
    MountError::Helper { path: path.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_with_commas_stay_one_option() {
        let mut options = MountOptions::new("a,b\\c", "/mnt");
        options.allow_other = false;
        options.read_only = true;
        assert_eq!(
            option_list(&options),
            "fsname=a\\,b\\\\c,subtype=fjord,default_permissions,max_read=1048576,ro"
        );
    }
}
