//! A core without threads, for tests: one client, whose requests run one by one.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fjordfs_proto::{
    BlockAddr, BlockId, Extent, FsError, FsResult, InodeId, Layout, PROTOCOL_VERSION, Policy, ROOT_INODE,
    SessionId, error::Errno, pb::meta::*,
};
use request::Op;
use response::Result as Reply;

use crate::{
    Config,
    core::{Answer, Core, Moment, Outcome},
    fsck,
    store::{Idle, MemoryStore, MetaStore},
};

pub(crate) struct World {
    pub(crate) store: Arc<dyn MetaStore>,
    pub(crate) core: Core,
    pub(crate) now: Moment,
    pub(crate) session: SessionId,
    pub(crate) config: Config,
    pub(crate) sequences: HashMap<SessionId, u64>,
}

pub(crate) fn hello(session: u64) -> Hello {
    Hello { protocol_version: PROTOCOL_VERSION, session, client: "test".into(), ..Hello::default() }
}

pub(crate) fn report(uuid: &str, free: u64) -> TargetReport {
    TargetReport {
        uuid: uuid.into(),
        path: format!("/{uuid}"),
        capacity: 1 << 40,
        free,
        ..TargetReport::default()
    }
}

pub(crate) fn registration(name: &str, targets: &[&str]) -> RegisterRequest {
    RegisterRequest {
        protocol_version: PROTOCOL_VERSION,
        address: format!("{name}:1"),
        name: name.into(),
        targets: targets.iter().map(|uuid| report(uuid, 1 << 39)).collect(),
        ..RegisterRequest::default()
    }
}

/// A run in blocks, written with replica:2.
pub(crate) fn run(
    offset: u64,
    length: u64,
    block: u64,
    block_offset: u32,
) -> fjordfs_proto::pb::meta::Extent {
    let layout = Layout::of(Policy::replica(2).unwrap(), 1);
    Extent::blocks(BlockAddr { block: BlockId(block), offset: block_offset }, length, layout).to_pb(offset)
}

pub(crate) fn inline(offset: u64, data: &[u8]) -> fjordfs_proto::pb::meta::Extent {
    Extent::inline(Bytes::copy_from_slice(data)).to_pb(offset)
}

impl World {
    /// A cluster of two servers with a target each, and an attached client.
    pub(crate) fn new() -> World {
        World::on(Arc::new(MemoryStore::default()))
    }

    pub(crate) fn on(store: Arc<dyn MetaStore>) -> World {
        let mut world = World::bare(store);
        for name in ["one", "two"] {
            world.core.register(&registration(name, &[name]), world.now).unwrap();
        }
        world.session = world.attach();
        world
    }

    /// Neither servers nor client.
    pub(crate) fn bare(store: Arc<dyn MetaStore>) -> World {
        let now = Moment { wall: Time { sec: 1000, nsec: 0 }, mono: Instant::now() };
        let config = Config::new("/nowhere");
        let core = Core::open(store.clone(), "cluster", &config, now).unwrap();
        World { store, core, now, session: SessionId(0), config, sequences: HashMap::new() }
    }

    pub(crate) fn attach(&mut self) -> SessionId {
        let welcome = self.core.attach(&hello(0), self.now).unwrap();
        self.core.commit().unwrap();
        SessionId(welcome.session)
    }

    /// Comes back with these handles.
    pub(crate) fn reattach(&mut self, session: SessionId, handles: &[(u64, InodeId)]) {
        let handles =
            handles.iter().map(|(handle, ino)| OpenHandle { handle: *handle, ino: ino.0 }).collect();
        self.core.attach(&Hello { handles, ..hello(session.0) }, self.now).unwrap();
        // It has nothing to send that it would have decided by itself.
        self.core.settled(session);
        self.core.commit().unwrap();
    }

    /// kill -9 and start: what was committed is all there is.
    pub(crate) fn restart(&mut self) {
        self.core = Core::open(self.store.clone(), "cluster", &self.config, self.now).unwrap();
    }

    pub(crate) fn pass(&mut self, time: Duration) {
        self.now.mono += time;
        self.now.wall.sec += time.as_secs() as i64;
    }

    /// Time passes in small steps; this client gives signs of life.
    pub(crate) fn idle(&mut self, time: Duration) {
        for _ in 0..time.as_secs() {
            self.pass(Duration::from_secs(1));
            self.core.hear(self.session, self.now);
            self.tick();
        }
    }

    pub(crate) fn tick(&mut self) {
        self.core.tick(self.now);
        self.core.commit().unwrap();
        while self.core.background(self.now) {
            self.core.commit().unwrap();
        }
        self.core.commit().unwrap();
    }

    pub(crate) fn send(&mut self, session: SessionId, slot: u32, sequence: u64, op: Op) -> FsResult<Reply> {
        let request = Request { id: 9, slot, sequence, op: Some(op), ..Request::default() };
        let Answer { response, .. } = self.answer(session, request);
        self.core.commit()?;
        assert_eq!(response.id, 9);
        match response.result.unwrap() {
            Reply::Error(e) => Err(e.into()),
            reply => Ok(reply),
        }
    }

    /// The answer to a request that nothing stands in the way of.
    pub(crate) fn answer(&mut self, session: SessionId, request: Request) -> Answer {
        match self.core.request(session, request, self.now) {
            Outcome::Answered(answer) => answer,
            Outcome::Postponed(request, recalls) => panic!("{request:?} waits for {recalls:?}"),
            Outcome::Waiting => panic!("it waits for a lock"),
        }
    }

    pub(crate) fn call(&mut self, op: Op) -> FsResult<Reply> {
        self.call_as(self.session, op)
    }

    pub(crate) fn call_as(&mut self, session: SessionId, op: Op) -> FsResult<Reply> {
        let sequence = self.sequences.entry(session).or_default();
        *sequence += 1;
        let sequence = *sequence;
        self.send(session, 0, sequence, op)
    }

    fn attr(&mut self, op: Op) -> FsResult<Attr> {
        match self.call(op)? {
            Reply::Entry(entry) => Ok(entry.attr.unwrap()),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn make(&mut self, parent: InodeId, name: &str, kind: FileKind) -> FsResult<InodeId> {
        let target = if kind == FileKind::Symlink { Bytes::from_static(b"there") } else { Bytes::new() };
        let make = Make {
            parent: parent.0,
            name: name.to_owned().into(),
            kind: kind.into(),
            mode: 0o644,
            target,
            ..Make::default()
        };
        Ok(InodeId(self.attr(Op::Make(make))?.ino))
    }

    pub(crate) fn file(&mut self, name: &str) -> InodeId {
        self.make(ROOT_INODE, name, FileKind::Regular).unwrap()
    }

    pub(crate) fn dir(&mut self, parent: InodeId, name: &str) -> InodeId {
        self.make(parent, name, FileKind::Directory).unwrap()
    }

    pub(crate) fn lookup(&mut self, parent: InodeId, name: &str) -> FsResult<Attr> {
        self.attr(Op::Lookup(Lookup { parent: parent.0, name: name.to_owned().into(), ..Default::default() }))
    }

    pub(crate) fn getattr(&mut self, ino: InodeId) -> FsResult<Attr> {
        self.attr(Op::GetAttr(GetAttr { ino: ino.0 }))
    }

    pub(crate) fn setattr(&mut self, set: SetAttr) -> FsResult<Attr> {
        self.attr(Op::SetAttr(set))
    }

    pub(crate) fn truncate(&mut self, ino: InodeId, size: u64) -> FsResult<Attr> {
        self.setattr(SetAttr { ino: ino.0, size: Some(size), ..SetAttr::default() })
    }

    pub(crate) fn set_xattr(&mut self, ino: InodeId, name: &str, value: &[u8], flags: u32) -> FsResult<Attr> {
        let (name, value) = (name.to_owned().into(), Bytes::copy_from_slice(value));
        self.attr(Op::SetXattr(SetXattr { ino: ino.0, name, value, flags, clear_sgid: false }))
    }

    pub(crate) fn get_xattr(&mut self, ino: InodeId, name: &str) -> FsResult<Bytes> {
        match self.call(Op::GetXattr(GetXattr { ino: ino.0, name: name.to_owned().into() }))? {
            Reply::Xattr(reply) => Ok(reply.value),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn remove_xattr(&mut self, ino: InodeId, name: &str) -> FsResult<Attr> {
        self.attr(Op::RemoveXattr(RemoveXattr { ino: ino.0, name: name.to_owned().into() }))
    }

    pub(crate) fn list_xattrs(&mut self, ino: InodeId) -> Vec<String> {
        match self.call(Op::ListXattrs(ListXattrs { ino: ino.0 })).unwrap() {
            Reply::XattrNames(reply) => {
                reply.names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Clears a range, or extends the file to its end.
    pub(crate) fn allocate(
        &mut self,
        ino: InodeId,
        range: std::ops::Range<u64>,
        clear: bool,
    ) -> FsResult<Attr> {
        let size = if clear { 0 } else { range.end };
        let (offset, length) = (range.start, range.end.saturating_sub(range.start));
        self.attr(Op::Allocate(Allocate { ino: ino.0, offset, length, clear, size, clear_suid: false }))
    }

    /// Shares bytes of one file with another; how many, and the other's attributes.
    pub(crate) fn copy(
        &mut self,
        (source, source_offset): (InodeId, u64),
        (target, target_offset): (InodeId, u64),
        length: u64,
    ) -> FsResult<(u64, Attr)> {
        self.take_copy((source, source_offset), (target, target_offset), length, None)
    }

    /// The same, of bytes that the other has already, as of a version.
    pub(crate) fn take_copy(
        &mut self,
        (source, source_offset): (InodeId, u64),
        (target, target_offset): (InodeId, u64),
        length: u64,
        same_as: Option<u64>,
    ) -> FsResult<(u64, Attr)> {
        let (source, target) = (source.0, target.0);
        let op =
            CopyRange { source, source_offset, target, target_offset, length, clear_suid: false, same_as };
        match self.call(Op::CopyRange(op))? {
            Reply::CopyRange(reply) => Ok((reply.copied, reply.attr.unwrap())),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn link(&mut self, ino: InodeId, parent: InodeId, name: &str) -> FsResult<Attr> {
        self.attr(Op::Link(Link { ino: ino.0, parent: parent.0, name: name.to_owned().into() }))
    }

    pub(crate) fn remove(&mut self, parent: InodeId, name: &str, directory: bool) -> FsResult<()> {
        self.call(Op::Remove(Remove {
            parent: parent.0,
            name: name.to_owned().into(),
            directory,
            time: None,
        }))
        .map(drop)
    }

    pub(crate) fn rename(&mut self, from: (InodeId, &str), to: (InodeId, &str), flags: u32) -> FsResult<()> {
        let rename = Rename {
            parent: from.0.0,
            name: from.1.to_owned().into(),
            new_parent: to.0.0,
            new_name: to.1.to_owned().into(),
            flags,
            time: None,
        };
        self.call(Op::Rename(rename)).map(drop)
    }

    pub(crate) fn open(&mut self, ino: InodeId, handle: u64) -> FsResult<OpenReply> {
        match self.call(Op::Open(Open { ino: ino.0, handle }))? {
            Reply::Open(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn close(&mut self, handle: u64) {
        self.call(Op::Close(Close { handle })).unwrap();
    }

    pub(crate) fn lease(&mut self, count: u32) -> u64 {
        match self.call(Op::LeaseBlocks(LeaseBlocks { count })).unwrap() {
            Reply::LeaseBlocks(reply) => reply.first,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn commit(&mut self, commit: Commit) -> FsResult<Vec<FileCommitReply>> {
        match self.call(Op::Commit(commit))? {
            Reply::Commit(reply) => Ok(reply.files),
            other => panic!("{other:?}"),
        }
    }

    /// Commits extents of one file.
    pub(crate) fn write(
        &mut self,
        ino: InodeId,
        extents: Vec<fjordfs_proto::pb::meta::Extent>,
    ) -> FsResult<Attr> {
        let file = FileCommit { ino: ino.0, extents, ..FileCommit::default() };
        let reply = self.commit(Commit { files: vec![file], ..Commit::default() })?.remove(0);
        match reply.errno {
            0 => Ok(reply.attr.unwrap()),
            errno => Err(FsError::new(Errno::from_code(errno), "file of a commit")),
        }
    }

    pub(crate) fn extents(&mut self, ino: InodeId) -> Vec<(u64, u64)> {
        self.whole_extents(ino).iter().map(|e| (e.offset, e.length)).collect()
    }

    pub(crate) fn whole_extents(&mut self, ino: InodeId) -> Vec<fjordfs_proto::pb::meta::Extent> {
        match self.call(Op::GetExtents(GetExtents { ino: ino.0, offset: 0, limit: 0 })).unwrap() {
            Reply::Extents(reply) => reply.extents,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn read_dir(&mut self, ino: InodeId, cookie: u64, limit: u32) -> FsResult<ReadDirReply> {
        match self.call(Op::ReadDir(ReadDir { ino: ino.0, cookie, limit, attributes: true }))? {
            Reply::ReadDir(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    /// Deletions that the data server of a target is told of now; they are confirmed at once.
    pub(crate) fn deletions(&mut self) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        for server in [1, 2] {
            let mut deleted = Vec::new();
            loop {
                let mine = TargetReport { target: server, ..report("", 1 << 39) };
                let beat =
                    HeartbeatRequest { server, targets: vec![mine], deleted, ..HeartbeatRequest::default() };
                let reply = self.core.heartbeat(&beat, self.now).unwrap();
                self.core.commit().unwrap();
                deleted = reply.deletes;
                all.extend(deleted.iter().flat_map(|d| d.blocks.iter().map(|b| (d.target, *b))));
                if deleted.is_empty() && !reply.more {
                    break;
                }
            }
        }
        all.sort_unstable();
        all
    }

    /// Blocks that both targets were told to delete.
    pub(crate) fn deleted_blocks(&mut self) -> Vec<u64> {
        self.tick();
        let all = self.deletions();
        let one: Vec<u64> = all.iter().filter(|(t, _)| *t == 1).map(|(_, b)| *b).collect();
        let two: Vec<u64> = all.iter().filter(|(t, _)| *t == 2).map(|(_, b)| *b).collect();
        assert_eq!(one, two, "replica:2 on two targets: both hold every block");
        one
    }

    pub(crate) fn check(&self) -> fsck::Report {
        let report = fsck::check(&Idle(&*self.store)).unwrap();
        assert!(report.is_clean(), "{report:#?}");
        report
    }
}

pub(crate) fn errno<T: std::fmt::Debug>(result: FsResult<T>) -> Errno {
    result.unwrap_err().errno
}
