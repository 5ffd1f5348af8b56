//! What clients do: each runs these programs side by side, on the same few files as all others.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use fjordfs_client::{
    AttrChange, Client, Errno, File, FileKind, FsError, FsResult, InodeId, NewFile, NewNode, ROOT_INODE,
};
use fjordfs_proto::SessionId;
use fjordfs_tests::{history::appends, rng::TestRng};
use rand::Rng;
use tokio::{task::JoinSet, time::Instant};

use crate::{
    dentries::Dentries,
    moves::{self, Rounds},
    record::{Actor, Records, now},
    run::{Rules, trace, violation},
};

/// Files whose owner is changed and read.
const OWNED: usize = 2;
/// Files that are written whole, by their size: inside the commit, packed with others into a block, alone in one.
const SIZES: [usize; 3] = [200, 9_000, 90_000];

pub(crate) const NEW: NewFile = NewFile { mode: 0o600, umask: 0, uid: 0, gid: 0, exclusive: true };

/// What is there for everybody.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    owned: [InodeId; OWNED],
    written: [InodeId; SIZES.len()],
    log: InodeId,
    /// Directories, for names.
    dirs: [InodeId; 2],
}

/// Makes the places, and makes them safe.
pub(crate) async fn prepare(client: &Client) -> FsResult<Places> {
    let mut files = Vec::new();
    for at in 0..OWNED + SIZES.len() + 1 {
        let (attr, file) = client.create(ROOT_INODE, format!("f{at}").as_bytes(), NEW).await?;
        file.close().await?;
        files.push(InodeId(attr.ino));
    }
    let (mut dirs, mut next) = ([ROOT_INODE; 2], files.into_iter());
    for (at, dir) in dirs.iter_mut().enumerate() {
        *dir = directory(client, ROOT_INODE, &format!("d{at}")).await?;
    }
    let mut file = || next.next().unwrap();
    let places = Places {
        owned: std::array::from_fn(|_| file()),
        written: std::array::from_fn(|_| file()),
        log: file(),
        dirs,
    };
    client.sync_all().await?;
    client.sync_namespace().await?;
    Ok(places)
}

pub(crate) async fn directory(client: &Client, parent: InodeId, name: &str) -> FsResult<InodeId> {
    let node = NewNode {
        kind: FileKind::Directory,
        mode: 0o700,
        umask: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
    };
    Ok(InodeId(client.make(parent, name.as_bytes(), node).await?.ino))
}

/// A client at work.
#[derive(Clone)]
pub(crate) struct Worker {
    pub(crate) client: Client,
    pub(crate) actor: Actor,
    pub(crate) session: SessionId,
    pub(crate) places: Places,
    pub(crate) records: Arc<Records>,
    pub(crate) rounds: Arc<Rounds>,
    pub(crate) dentries: Arc<Dentries>,
    pub(crate) rules: Rules,
    pub(crate) until: Instant,
    /// Longest pause between two operations, milliseconds.
    pub(crate) pause_ms: u64,
}

impl Worker {
    /// Starts its programs, or only those that move files.
    pub(crate) fn start(self, moves_only: bool, random: &mut TestRng, tasks: &mut JoinSet<()>) {
        let mut random = || -> TestRng { rand::SeedableRng::seed_from_u64(random.random()) };
        // After a power failure, what is left of moves by several is not told by their order.
        if !self.rules.power_fails {
            tasks.spawn(moves::program(self.clone(), random()));
            tasks.spawn(moves::program(self.clone(), random()));
        }
        if moves_only {
            return;
        }
        tasks.spawn(owners(self.clone(), random()));
        tasks.spawn(owners(self.clone(), random()));
        tasks.spawn(contents(self.clone(), random()));
        tasks.spawn(current(self.clone(), random()));
        tasks.spawn(names(self.clone(), random()));
        tasks.spawn(names(self.clone(), random()));
        tasks.spawn(log(self, random()));
    }

    pub(crate) async fn goes_on(&self, random: &mut TestRng) -> bool {
        let pause = random.random_range(0..=self.pause_ms);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        self.records.count();
        Instant::now() < self.until
    }

    /// Whether the metaserver has given up on what this client had.
    fn is_lost(&self) -> bool {
        self.client.session() != self.session
    }

    /// An operation has failed. What was written and not synced may be lost with it.
    pub(crate) fn failed(&self, what: &str, e: &FsError) {
        trace(format_args!("c{} {what}: {e}", self.actor));
        if !self.rules.may_fail && !self.is_lost() {
            violation(format!("c{} {what}: nothing that may fail has happened, and yet: {e}", self.actor));
        }
        if !self.is_lost()
            && matches!(e.errno, Errno::EEXIST | Errno::ENOENT | Errno::EINVAL | Errno::EPROTO)
            && !self.rules.power_fails
        {
            violation(format!("c{} {what}: once done, done again or undone: {e}", self.actor));
        }
        self.records.lose(self.actor, 0);
    }
}

pub(crate) fn owner_register(at: usize) -> String {
    format!("owner of f{at}")
}

/// Changes owners, and reads them: each is a register.
async fn owners(worker: Worker, mut random: TestRng) {
    let Worker { client, actor, places, records, .. } = &worker;
    while worker.goes_on(&mut random).await {
        let at = random.random_range(0..OWNED);
        let (ino, register) = (places.owned[at], owner_register(at));
        if random.random_ratio(1, 2) {
            let began = now();
            let attr = match random.random() {
                true => client.getattr(ino).await,
                false => client.lookup(ROOT_INODE, format!("f{at}").as_bytes()).await,
            };
            match attr {
                Ok(attr) => records.read(&register, *actor, attr.uid.into(), began),
                Err(e) => worker.failed("getattr", &e),
            }
            continue;
        }
        let value = records.new_value();
        let begun = records.begin_write(&register, *actor, value);
        let change = AttrChange { uid: Some(value as u32), ..AttrChange::default() };
        match client.setattr(ino, change).await {
            Ok(_) => records.end_write(&begun),
            Err(e) => worker.failed("setattr", &e),
        }
        if random.random_ratio(1, 8) {
            let since = now();
            match client.sync_namespace().await {
                Ok(()) => records.synced(&register, *actor, since),
                Err(e) => worker.failed("sync", &e),
            }
        }
        worker.notice_loss();
    }
}

impl Worker {
    /// A session that is over has taken along what was not synced.
    pub(crate) fn notice_loss(&self) {
        if self.is_lost() {
            if !self.rules.may_fail {
                violation(format!("c{} has lost its session, and nothing has happened", self.actor));
            }
            self.records.lose(self.actor, 0);
            self.rounds.lose(self.actor, true);
        }
    }
}

pub(crate) fn content_register(at: usize) -> String {
    format!("content of {} bytes", SIZES[at])
}

pub(crate) fn content(value: u64, size: usize) -> Bytes {
    value.to_le_bytes().into_iter().cycle().take(size).collect::<Vec<u8>>().into()
}

/// What a file was last written with; 0 while it is empty.
pub(crate) async fn read_content(file: &File, at: usize) -> FsResult<Result<u64, String>> {
    let parts = file.read_at(0, SIZES[at] + 8).await?.concat();
    if parts.is_empty() {
        return Ok(Ok(0));
    }
    let value = parts.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
    if content(value, SIZES[at]) == parts {
        return Ok(Ok(value));
    }
    let mut values: Vec<u64> =
        parts.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default())).collect();
    values.dedup();
    Ok(Err(format!("{} bytes, written by {values:?}", parts.len())))
}

/// Writes files whole, and reads them: what is closed is seen by whoever opens afterwards.
async fn contents(worker: Worker, mut random: TestRng) {
    let Worker { client, actor, places, records, .. } = &worker;
    while worker.goes_on(&mut random).await {
        let at = random.random_range(0..SIZES.len());
        let register = content_register(at);
        let outcome = match random.random_ratio(1, 2) {
            true => {
                let began = now();
                let read = async { read_content(&client.open(places.written[at]).await?.1, at).await };
                match read.await {
                    Ok(Ok(value)) => {
                        records.read(&register, *actor, value, began);
                        Ok(())
                    }
                    Ok(Err(mixed)) => return violation(format!("c{actor} {register}: {mixed}")),
                    Err(e) => Err(e),
                }
            }
            false => {
                let value = records.new_value();
                let begun = records.begin_write(&register, *actor, value);
                let sync = random.random_ratio(1, 4);
                let write = async {
                    let (_, file) = client.open(places.written[at]).await?;
                    file.write_at(0, content(value, SIZES[at])).await?;
                    if sync { file.fsync().await } else { file.close().await }
                };
                let written = write.await;
                if written.is_ok() {
                    records.end_write(&begun);
                    if sync {
                        records.synced(&register, *actor, now());
                    }
                }
                written
            }
        };
        if let Err(e) = outcome {
            worker.failed(&register, &e);
        }
        worker.notice_loss();
    }
}

pub(crate) const CURRENT: &str = "current";

/// Makes files and renames them over the same name: what is under it is a register.
async fn current(worker: Worker, mut random: TestRng) {
    let Worker { client, actor, places, records, .. } = &worker;
    let dir = places.dirs[0];
    while worker.goes_on(&mut random).await {
        if random.random_ratio(1, 2) {
            let began = now();
            match client.lookup(dir, CURRENT.as_bytes()).await {
                Ok(attr) => records.read(CURRENT, *actor, attr.ino, began),
                Err(e) if e.errno == Errno::ENOENT => records.read(CURRENT, *actor, 0, began),
                Err(e) => worker.failed("lookup", &e),
            }
            continue;
        }
        let name = format!("t{}", records.new_value());
        let begun = match client.create(dir, name.as_bytes(), NEW).await {
            Ok((attr, _)) => records.begin_write(CURRENT, *actor, attr.ino),
            Err(e) => {
                worker.failed("create", &e);
                continue;
            }
        };
        match client.rename(dir, name.as_bytes(), dir, CURRENT.as_bytes(), 0).await {
            Ok(()) => records.end_write(&begun),
            Err(e) => worker.failed("rename", &e),
        }
        if random.random_ratio(1, 4) {
            let since = now();
            match client.sync_namespace().await {
                Ok(()) => records.synced(CURRENT, *actor, since),
                Err(e) => worker.failed("sync", &e),
            }
        }
        worker.notice_loss();
    }
}

/// Makes names that nobody else uses, moves and removes them. Whatever is done twice, or not at all, is an error.
async fn names(worker: Worker, mut random: TestRng) {
    while worker.goes_on(&mut random).await {
        let number = worker.records.new_value();
        if let Err(e) = name_life(&worker, number, &mut random).await {
            worker.failed(&format!("life of name {number}"), &e);
        }
        worker.notice_loss();
    }
}

async fn name_life(worker: &Worker, number: u64, random: &mut TestRng) -> FsResult<()> {
    let Worker { client, places, .. } = worker;
    let [one, two] = places.dirs;
    let (a, b, c) = (format!("a{number}"), format!("b{number}"), format!("c{number}"));
    if random.random_ratio(1, 3) {
        let dir = directory(client, one, &a).await?;
        let (attr, _) = client.create(dir, b"inside", NEW).await?;
        worker.pause(random).await;
        expect(worker, "name inside", client.lookup(dir, b"inside").await?.ino, attr.ino);
        client.rename(one, a.as_bytes(), two, b.as_bytes(), 0).await?;
        client.rename(dir, b"inside", one, c.as_bytes(), 0).await?;
        worker.pause(random).await;
        client.rmdir(two, b.as_bytes()).await?;
        return client.unlink(one, c.as_bytes()).await;
    }
    let (attr, file) = client.create(one, a.as_bytes(), NEW).await?;
    let ino = InodeId(attr.ino);
    if random.random() {
        file.write_at(0, content(number, 5000)).await?;
    }
    drop(file);
    worker.pause(random).await;
    client.rename(one, a.as_bytes(), two, b.as_bytes(), 0).await?;
    expect(worker, "moved name", client.lookup(two, b.as_bytes()).await?.ino, attr.ino);
    client.link(ino, one, c.as_bytes()).await?;
    worker.pause(random).await;
    expect(worker, "links", client.getattr(ino).await?.nlink.into(), 2);
    client.unlink(two, b.as_bytes()).await?;
    match client.lookup(two, b.as_bytes()).await {
        Err(e) if e.errno == Errno::ENOENT => {}
        Err(e) => return Err(e),
        Ok(_) if worker.is_lost() || worker.rules.power_fails => {}
        Ok(_) => violation(format!("c{}: a name is there after its removal", worker.actor)),
    }
    worker.pause(random).await;
    client.unlink(one, c.as_bytes()).await
}

fn expect(worker: &Worker, what: &str, found: u64, expected: u64) {
    if found != expected && !worker.is_lost() && !worker.rules.power_fails {
        violation(format!("c{}: {what} is {found}, not {expected}", worker.actor));
    }
}

impl Worker {
    async fn pause(&self, random: &mut TestRng) {
        tokio::time::sleep(Duration::from_millis(random.random_range(0..=self.pause_ms))).await;
    }
}

/// Appends records to a file that all others append to.
async fn log(worker: Worker, mut random: TestRng) {
    let Worker { client, actor, places, records, .. } = &worker;
    let (mut writer, mut count) = (records.new_writer(*actor), 0);
    while worker.goes_on(&mut random).await {
        records.begin_append(writer, count + 1);
        let record = appends::record((writer, count), random.random_range(0..2000));
        let sync = random.random_ratio(1, 4);
        let append = async {
            let (_, file) = client.open(places.log).await?;
            file.append(record.into()).await?;
            if sync { file.fsync().await } else { file.close().await }
        };
        match append.await {
            Ok(()) => {
                count += 1;
                records.appended(writer, count, sync);
            }
            Err(e) => {
                worker.failed("append", &e);
                (writer, count) = (records.new_writer(*actor), 0);
            }
        }
        worker.notice_loss();
        if worker.is_lost() {
            // What comes next is another session's.
            (writer, count) = (records.new_writer(*actor), 0);
        }
    }
}

// ---- at the end ----

/// Reads everything once more, with a client that has cached nothing.
pub(crate) async fn read_all(
    client: &Client,
    places: &Places,
    records: &Records,
    actor: Actor,
    power_failed: bool,
) -> FsResult<Vec<InodeId>> {
    let see = |register: &str, value: u64, began| {
        records.read(register, actor, value, began);
        if power_failed {
            records.check_last(register, value);
        }
    };
    for (at, ino) in places.owned.iter().enumerate() {
        let began = now();
        see(&owner_register(at), client.getattr(*ino).await?.uid.into(), began);
    }
    for (at, ino) in places.written.iter().enumerate() {
        let began = now();
        let content = match read_content(&client.open(*ino).await?.1, at).await {
            Err(_) if power_failed && records.may_be_unreadable(&content_register(at)) => continue,
            content => content?,
        };
        match content {
            Ok(value) => see(&content_register(at), value, began),
            Err(mixed) => violation(format!("{}: {mixed}", content_register(at))),
        }
    }
    let began = now();
    match client.lookup(places.dirs[0], CURRENT.as_bytes()).await {
        Ok(attr) => see(CURRENT, attr.ino, began),
        Err(e) if e.errno == Errno::ENOENT => see(CURRENT, 0, began),
        Err(e) => return Err(e),
    }
    let (attr, file) = client.open(places.log).await?;
    match file.read_at(0, attr.size as usize).await {
        Err(e) if power_failed => trace(format_args!("the log cannot be read any more: {e}")),
        content => records.check_log(&content?.concat(), power_failed),
    }
    Ok(places.written.into_iter().chain([places.log]).collect())
}
