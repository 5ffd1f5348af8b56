//! A namespace as large as one wishes, made by the operations themselves; what is measured on it is in
//! `benches/many-inodes.sh`.

use std::{path::Path, sync::Arc, time::Instant};

use fjordfs_proto::{InodeId, ROOT_INODE, pb::meta::*};
use request::Op;
use response::Result as Reply;

use crate::{
    core::Outcome,
    label::Folder,
    store::{FjallOptions, FjallStore, MetaStore},
    testing::{World, run},
};

/// Files of a directory among many.
const FILES: u64 = 1000;
/// Files whose bytes share a block, as the client packs them.
const PACKED: u64 = 128;
/// Operations of one batch.
const BURST: u64 = 64;

/// Requests of one client, many to a batch.
struct Filler {
    world: World,
    sequence: u64,
    began: Instant,
}

impl Filler {
    fn ask(&mut self, op: Op) -> Reply {
        self.sequence += 1;
        let request = Request { id: 1, slot: 0, sequence: self.sequence, op: Some(op), ..Request::default() };
        let session = self.world.session;
        let Outcome::Answered(answer) = self.world.core.request(session, request, self.world.now) else {
            panic!("it has to wait")
        };
        if self.sequence.is_multiple_of(BURST) {
            self.world.core.commit().unwrap();
        }
        if self.sequence.is_multiple_of(1_000_000) {
            eprintln!("{} operations, {:?}", self.sequence, self.began.elapsed());
        }
        answer.response.result.unwrap()
    }

    fn make(&mut self, parent: InodeId, name: String, kind: FileKind) -> InodeId {
        let make =
            Make { parent: parent.0, name: name.into(), kind: kind.into(), mode: 0o755, ..Make::default() };
        match self.ask(Op::Make(make)) {
            Reply::Entry(entry) => InodeId(entry.attr.unwrap().ino),
            other => panic!("{other:?}"),
        }
    }

    fn block(&mut self) -> u64 {
        match self.ask(Op::LeaseBlocks(LeaseBlocks { count: 1 })) {
            Reply::LeaseBlocks(reply) => reply.first,
            other => panic!("{other:?}"),
        }
    }

    /// Commits what shares a block.
    fn write(&mut self, files: &mut Vec<FileCommit>) {
        let files = std::mem::take(files);
        match self.ask(Op::Commit(Commit { files, ..Commit::default() })) {
            Reply::Commit(reply) if reply.files.iter().all(|file| file.errno == 0) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn number(variable: &str) -> u64 {
    std::env::var(variable).unwrap().parse().unwrap()
}

#[test]
#[ignore = "makes what FJORD_SCALE_FOLDER, FJORD_SCALE_ONE and FJORD_SCALE_MANY say: benches/many-inodes.sh"]
fn fill() {
    let folder = std::env::var("FJORD_SCALE_FOLDER").unwrap();
    let claimed = Folder::claim_for(Path::new(&folder), "cluster").unwrap();
    let store = Arc::new(FjallStore::open(&claimed.store, FjallOptions::default()).unwrap());
    let mut filler = Filler { world: World::on(store.clone()), sequence: 0, began: Instant::now() };
    let one = filler.make(ROOT_INODE, "one".into(), FileKind::Directory);
    for n in 0..number("FJORD_SCALE_ONE") {
        filler.make(one, format!("sample-{n:09}.jpg"), FileKind::Regular);
    }
    let many = filler.make(ROOT_INODE, "many".into(), FileKind::Directory);
    let (mut dir, mut block, mut written) = (many, 0, Vec::new());
    for n in 0..number("FJORD_SCALE_MANY") {
        if n.is_multiple_of(FILES) {
            dir = filler.make(many, format!("shard-{:06}", n / FILES), FileKind::Directory);
        }
        if n.is_multiple_of(PACKED) {
            filler.write(&mut written);
            block = filler.block();
        }
        let file = filler.make(dir, format!("sample-{n:09}.jpg"), FileKind::Regular);
        let extents = vec![run(0, 4096, block, (n % PACKED * 4096) as u32)];
        written.push(FileCommit { ino: file.0, extents, ..FileCommit::default() });
    }
    filler.write(&mut written);
    filler.world.core.commit().unwrap();
    store.sync().unwrap();
}
