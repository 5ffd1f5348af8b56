//! The client library, used as a data loader would use it: every thread has many requests under way.

use std::{
    ops::Range,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use fjordfs_client::{BatchOptions, Client, File, Finished, FsResult, InodeId, NewFile, Order, ReadRequest};
use fjordfs_proto::{FsError, error::Errno, pb::meta::FileKind};
use futures_util::{TryStreamExt, stream};
use tokio::runtime::Handle;

use super::{
    plan::scratch_name,
    target::{Dice, FileOp, PIECE, RANDOM_READ, Reads, Target},
    watch::Watch,
};
use crate::{locate::Location, transfer};

/// Reads in a batch for each that is under way, so that batches are rarely drained.
const BATCH_LENGTH: usize = 16;

pub(super) struct Library {
    place: Location,
    /// Absolute, from the root of the filesystem.
    dir: String,
    runtime: Handle,
    in_flight: usize,
    writer: Client,
    /// Has not seen what it reads: replaced by [`Target::forget`].
    reader: Mutex<Client>,
}

impl Library {
    /// Connects, and makes a directory of its own below `place`.
    pub(super) fn new(place: Location, runtime: &Handle, in_flight: usize) -> anyhow::Result<Library> {
        let parent = place.path.to_str().with_context(|| format!("{} is not UTF-8", place.path.display()))?;
        let dir = format!("{}/{}", parent.trim_end_matches('/'), scratch_name());
        let (writer, reader) = runtime.block_on(async {
            let writer = connect(&place).await?;
            let found = writer.stat(parent).await?;
            ensure!(found.kind() == FileKind::Directory, "{parent} is not a directory");
            writer.create_dir_all(&dir).await?;
            anyhow::Ok((writer, connect(&place).await?))
        })?;
        Ok(Library { place, dir, runtime: runtime.clone(), in_flight, writer, reader: Mutex::new(reader) })
    }

    fn reader(&self) -> Client {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.dir)
    }

    /// Everything of one thread that is under way at a time.
    fn batch(&self) -> BatchOptions {
        BatchOptions { order: Order::Completion, in_flight: self.in_flight }
    }
}

async fn connect(place: &Location) -> anyhow::Result<Client> {
    transfer::connect(&place.meta, "bench").await
}

impl Target for Library {
    fn name(&self) -> String {
        format!("library, {}:{}", self.place.meta, self.place.path.display())
    }

    fn free(&self) -> anyhow::Result<u64> {
        Ok(self.runtime.block_on(self.writer.statfs())?.free)
    }

    fn direct(&self) -> bool {
        true
    }

    fn make_dir(&self, name: &str) -> anyhow::Result<()> {
        self.runtime.block_on(self.writer.create_dir_all(&self.path(name)))?;
        Ok(())
    }

    fn write(&self, name: &str, len: u64, piece: &Bytes, watch: &Watch) -> anyhow::Result<()> {
        let write = async {
            let file = self.writer.create_path(&self.path(name)).await?;
            let mut at = 0;
            while at < len && !watch.stopped() {
                let n = (len - at).min(piece.len() as u64);
                file.write_at(at, piece.slice(..n as usize)).await?;
                at += n;
                watch.did(n);
            }
            file.fsync().await?;
            file.close().await
        };
        self.runtime.block_on(write).with_context(|| self.path(name))?;
        watch.check()
    }

    fn read(&self, name: &str, len: u64, watch: &Watch) -> anyhow::Result<()> {
        let client = self.reader();
        let file = self.runtime.block_on(client.open_path(&self.path(name)))?;
        let request = |i| ReadRequest { file: file.clone(), offset: i * PIECE as u64, len: PIECE };
        let requests = (0..len.div_ceil(PIECE as u64)).map(request).collect();
        let mut total = 0;
        for Finished { result, .. } in client.batch(requests, self.batch()) {
            let n: u64 = result.with_context(|| self.path(name))?.iter().map(|part| part.len() as u64).sum();
            total += n;
            watch.did(n);
            watch.check()?;
        }
        ensure!(total == len, "{} has {total} bytes, {len} were written", self.path(name));
        Ok(())
    }

    fn random(&self, name: &str, dice: &mut Dice, until: Instant, watch: &Watch) -> anyhow::Result<Reads> {
        let client = self.reader();
        let file = self.runtime.block_on(client.open_path(&self.path(name)))?;
        let mut reads = Reads::default();
        while Instant::now() < until {
            let requests = (0..BATCH_LENGTH * self.in_flight)
                .map(|_| ReadRequest { file: file.clone(), offset: dice.offset(), len: RANDOM_READ })
                .collect();
            for Finished { result, .. } in client.batch(requests, self.batch()) {
                result.with_context(|| self.path(name))?;
                reads.count += 1;
                watch.check()?;
                if Instant::now() >= until {
                    break;
                }
            }
        }
        Ok(reads)
    }

    fn files(&self, op: &FileOp, dir: &str, files: Range<u64>, watch: &Watch) -> anyhow::Result<()> {
        let client = match op {
            FileOp::Create(_) | FileOp::Delete => self.writer.clone(),
            FileOp::Read(_) | FileOp::Stat => self.reader(),
        };
        let path = self.path(dir);
        let all = async {
            let dir = InodeId(client.stat(&path).await?.ino);
            stream::iter(files.map(anyhow::Ok))
                .try_for_each_concurrent(self.in_flight, |i| {
                    let (client, path) = (&client, &path);
                    async move {
                        watch.check()?;
                        let name = format!("f{i}");
                        once(client, op, dir, name.as_bytes())
                            .await
                            .with_context(|| format!("{path}/{name}"))?;
                        watch.did(1);
                        Ok(())
                    }
                })
                .await
        };
        self.runtime.block_on(all)
    }

    fn forget(&self) -> anyhow::Result<()> {
        let fresh = self.runtime.block_on(connect(&self.place))?;
        let old = std::mem::replace(&mut *self.reader.lock().unwrap_or_else(PoisonError::into_inner), fresh);
        self.runtime.block_on(old.shutdown())?;
        Ok(())
    }

    fn remove(&self) -> anyhow::Result<()> {
        let remove = async {
            remove_tree(&self.writer, &self.dir).await?;
            self.reader().shutdown().await?;
            self.writer.shutdown().await
        };
        self.runtime
            .block_on(remove)
            .with_context(|| format!("cannot remove {}:{}: remove it by hand", self.place.meta, self.dir))
    }
}

/// One operation on one file.
async fn once(client: &Client, op: &FileOp, dir: InodeId, name: &[u8]) -> FsResult<()> {
    match op {
        FileOp::Create(data) => {
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            let new = NewFile { mode: 0o644, umask: 0, uid, gid, exclusive: true };
            let (_, file) = client.create(dir, name, new).await?;
            if !data.is_empty() {
                file.write_at(0, data.clone()).await?;
            }
            file.close().await
        }
        FileOp::Read(len) => {
            let attr = client.lookup(dir, name).await?;
            let (_, file): (_, File) = client.open(InodeId(attr.ino)).await?;
            let parts = file.read_at(0, *len + 1).await?;
            let n: usize = parts.iter().map(Bytes::len).sum();
            if n == *len {
                return Ok(());
            }
            Err(FsError::new(Errno::EIO, format!("{n} bytes, {len} were written")))
        }
        FileOp::Stat => client.lookup(dir, name).await.map(drop),
        FileOp::Delete => client.unlink(dir, name).await,
    }
}

/// Removes a directory with two levels below it at most: what a benchmark makes.
async fn remove_tree(client: &Client, path: &str) -> FsResult<()> {
    let entries = match client.read_dir(path).await {
        Err(e) if e.errno == Errno::ENOENT => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let below = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
        if entry.attr.as_ref().is_some_and(|attr| attr.kind() == FileKind::Directory) {
            Box::pin(remove_tree(client, &below)).await?;
        } else {
            client.remove_file(&below).await?;
        }
    }
    client.remove_dir(path).await
}
