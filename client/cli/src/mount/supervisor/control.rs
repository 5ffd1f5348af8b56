//! `fjord mount --upgrade`: how the supervisor of a mount is reached. A socket in the abstract namespace, so that nothing is left behind, named
//! by the mount's device number, which no two mounts of a machine share.

use std::{
    ffi::OsStr,
    io::{self, Read, Write},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::mounts;

/// What is answered when it is done; anything else is the reason why not.
const DONE: &str = "done";

/// The longest path.
const PATH_MAX: u64 = 4096;

/// How long a request may take to arrive.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);

fn address(device: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("fjord-mount-{device}"))
}

/// Whether a process of this user may tell one of that user what to do.
fn may_command(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Where requests come in.
#[derive(Debug)]
pub(super) struct Control(tokio::net::UnixListener);

/// Somebody who waits for an upgrade.
#[derive(Debug)]
pub(super) struct Requester {
    stream: tokio::net::UnixStream,
    /// The program that is to serve from now on.
    pub(super) program: PathBuf,
}

impl Control {
    /// Inside a runtime.
    pub(super) fn listen(device: &str) -> io::Result<Control> {
        let listener = UnixListener::bind_addr(&address(device)?)?;
        listener.set_nonblocking(true)?;
        Ok(Control(tokio::net::UnixListener::from_std(listener)?))
    }

    /// The next request of somebody who may ask.
    pub(super) async fn next(&self) -> Requester {
        loop {
            match self.request().await {
                Ok(request) => return request,
                Err(e) => {
                    tracing::warn!("a request for an upgrade: {e:#}");
                    // Not too often, whatever it is.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    async fn request(&self) -> anyhow::Result<Requester> {
        let (mut stream, _) = self.0.accept().await?;
        let uid = stream.peer_cred()?.uid();
        if !may_command(uid) {
            stream.write_all(b"only root and the user who mounted it may upgrade it").await?;
            bail!("user {uid} may not ask for it");
        }
        let mut path = Vec::new();
        let mut read = (&mut stream).take(PATH_MAX);
        tokio::time::timeout(REQUEST_PATIENCE, read.read_to_end(&mut path))
            .await
            .context("it did not arrive")??;
        Ok(Requester { stream, program: PathBuf::from(OsStr::from_bytes(&path)) })
    }
}

impl Requester {
    pub(super) async fn answer(mut self, outcome: Result<(), String>) {
        let text = match outcome {
            Ok(()) => DONE.to_owned(),
            Err(why) => why,
        };
        if let Err(e) = self.stream.write_all(text.as_bytes()).await {
            tracing::debug!("whoever asked for the upgrade has gone: {e}");
        }
    }
}

/// Has this program take the place of the one that serves a mount.
pub(crate) fn upgrade(dir: &Path) -> anyhow::Result<ExitCode> {
    let table = mounts::read().context("cannot read /proc/self/mountinfo")?;
    let Some(mount) = mounts::at(&table, dir).filter(|mount| mount.is_ours()) else {
        bail!("no FjordFS is mounted on {0}: fjord mount HOST:PORT {0}", dir.display());
    };
    let mut stream = UnixStream::connect_addr(&address(&mount.device)?).with_context(|| {
        format!(
            "the mount on {} has no supervisor (it was mounted over io_uring, with supervise=off, or by `fjord up`): \
             unmount it and mount it again",
            dir.display()
        )
    })?;
    let peer =
        rustix::net::sockopt::socket_peercred(&stream).context("cannot see who supervises the mount")?;
    ensure!(
        may_command(peer.uid.as_raw()),
        "who supervises the mount on {} is neither root nor this user",
        dir.display()
    );
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    // One that refuses us answers before it has read anything.
    let asked = stream
        .write_all(program.as_os_str().as_bytes())
        .and_then(|()| stream.shutdown(std::net::Shutdown::Write));
    match asked {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe && e.kind() != io::ErrorKind::NotConnected => {
            return Err(e).context("cannot ask the supervisor");
        }
        _ => {}
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // The end is a reset when it has not read all.
        Err(e) if answer.is_empty() => return Err(e).context("the supervisor did not answer"),
        _ => {}
    }
    let answer = String::from_utf8_lossy(&answer);
    ensure!(answer == DONE, "{} was not upgraded: {answer}", dir.display());
    Ok(ExitCode::SUCCESS)
}
