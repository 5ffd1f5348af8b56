//! What waits for delegations goes on in the order in which its client sent it.

use bytes::Bytes;
use fjordfs_proto::{
    Extent,
    pb::meta::{
        Commit, FileCommit, FileKind, GetAttr, GivenBack, LeaseInodes, Make, Request, Response,
        ServerMessage, SetAttr, Sync, request::Op, response::Result as Reply,
    },
};

use super::*;
use crate::{Config, store::MemoryStore, testing::hello};

struct Client {
    session: SessionId,
    outbox: Arc<Outbox>,
    sequence: u64,
}

impl Client {
    /// The next message, if there is one.
    async fn message(&self) -> Option<ServerMessage> {
        let next = tokio::time::timeout(Duration::ZERO, self.outbox.next()).await;
        next.ok().flatten().map(|message| message.unwrap())
    }

    async fn answers(&self) -> Vec<Response> {
        let mut answers = Vec::new();
        while let Some(message) = self.message().await {
            answers.extend(message.responses);
        }
        answers
    }

    fn requests(&mut self, ops: impl IntoIterator<Item = Op>, deferred: bool) -> Job {
        let requests = ops.into_iter().map(|op| {
            self.sequence += 1;
            let (id, sequence) = (self.sequence, self.sequence);
            (Request { id, slot: self.sequence as u32, sequence, deferred, op: Some(op) }, None)
        });
        let requests = requests.collect();
        Job::Requests { session: self.session, outbox: self.outbox.clone(), requests }
    }

    fn sign(&self, recalled: Vec<u64>, given_back: Vec<u64>) -> Job {
        Job::Sign {
            session: self.session,
            outbox: self.outbox.clone(),
            beat: 0,
            recalled,
            given_back: Some(GivenBack { inos: given_back, as_of: u64::MAX }),
            demoted: None,
        }
    }
}

/// A client `a`, and another with the delegation on one of two files.
struct World {
    executor: Executor,
    jobs: Jobs,
    a: Client,
    b: Client,
    free: u64,
    delegated: u64,
}

impl World {
    async fn new() -> World {
        let store: Arc<dyn MetaStore> = Arc::new(MemoryStore::default());
        let core = Core::open(store.clone(), "cluster", &Config::new("/nowhere"), moment()).unwrap();
        let syncer = Syncer::start(store.clone(), Duration::from_secs(1)).unwrap();
        let (jobs, mut executor) = Executor::new(core, store, syncer, None, "here".into());
        let mut attach = || {
            let hello = fjordfs_proto::pb::meta::Hello { delegations: true, ..hello(0) };
            let session = SessionId(executor.core.attach(&hello, moment()).unwrap().session);
            let outbox: Arc<Outbox> = Arc::default();
            executor.streams.insert(session, outbox.clone());
            Client { session, outbox, sequence: 0 }
        };
        let (a, mut b) = (attach(), attach());
        executor.execute(b.requests([make("free"), make("delegated")], false), moment());
        executor.finish();
        let made = b.answers().await;
        let [free, delegated] = made[..].iter().map(ino_of).collect::<Vec<_>>()[..] else {
            panic!("{made:?}")
        };
        assert!(made[1].delegated.contains(&delegated), "{made:?}");
        executor.execute(b.sign(Vec::new(), vec![1, free]), moment());
        executor.finish();
        World { executor, jobs, a, b, free, delegated }
    }

    /// A burst of these jobs.
    fn burst(&mut self, jobs: impl IntoIterator<Item = Job>) {
        jobs.into_iter().for_each(|job| self.jobs.submit(job));
        let first = self.executor.jobs.try_recv().ok();
        self.executor.burst(first, moment());
        self.executor.finish();
    }

    /// The job with which `b` obeys its one recall.
    async fn obey(&self) -> Job {
        let recalls = self.b.message().await.unwrap().recalls;
        assert_eq!(recalls.iter().map(|recall| recall.ino).collect::<Vec<_>>(), [self.delegated]);
        self.b.sign(vec![recalls[0].id], Vec::new())
    }

    fn commit(&self) -> Op {
        let extents = vec![Extent::inline(Bytes::from_static(b"written before")).to_pb(0)];
        let file = |ino| FileCommit { ino, extents: extents.clone(), ..FileCommit::default() };
        Op::Commit(Commit { files: vec![file(self.free), file(self.delegated)], ..Commit::default() })
    }

    fn truncate(&self) -> Op {
        Op::SetAttr(SetAttr { ino: self.free, size: Some(0), ..SetAttr::default() })
    }
}

fn make(name: &str) -> Op {
    let kind = FileKind::Regular.into();
    Op::Make(Make { parent: 1, name: name.to_owned().into(), kind, ..Make::default() })
}

fn ino_of(made: &Response) -> u64 {
    match &made.result {
        Some(Reply::Entry(entry)) => entry.attr.unwrap().ino,
        other => panic!("{other:?}"),
    }
}

fn size_of(shown: &Response) -> u64 {
    match &shown.result {
        Some(Reply::Entry(entry)) => entry.attr.unwrap().size,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_truncation_stays_behind_the_commit_that_waits_for_another_file() {
    enum When {
        WithTheCommit,
        WithTheEndOfTheRecall,
        AfterTheCommitIsReady,
    }
    for when in [When::WithTheCommit, When::WithTheEndOfTheRecall, When::AfterTheCommitIsReady] {
        let mut w = World::new().await;
        let (commit, truncate) = (w.commit(), w.truncate());
        match when {
            When::WithTheCommit => {
                let both = w.a.requests([commit, truncate], false);
                w.burst([both]);
                assert!(w.a.message().await.is_none(), "neither is executed");
                let obey = w.obey().await;
                w.burst([obey]);
            }
            When::WithTheEndOfTheRecall => {
                let commit = w.a.requests([commit], false);
                w.burst([commit]);
                let (obey, truncate) = (w.obey().await, w.a.requests([truncate], false));
                w.burst([obey, truncate]);
            }
            When::AfterTheCommitIsReady => {
                let commit = w.a.requests([commit], false);
                w.burst([commit]);
                // The burst is committed behind the first of these.
                w.executor.burst_writes = 1;
                let (obey, more) = (w.obey().await, w.a.requests([make("x"), truncate], false));
                w.burst([obey, more]);
                assert_eq!(w.a.answers().await.len(), 1);
            }
        }
        w.burst([]);
        let answers = w.a.answers().await;
        assert!(matches!(answers[0].result, Some(Reply::Commit(_))), "{answers:?}");
        assert_eq!((answers.len(), size_of(&answers[1])), (2, 0));
        let look = w.a.requests([Op::GetAttr(GetAttr { ino: w.free })], false);
        w.burst([look]);
        assert_eq!(size_of(&w.a.answers().await[0]), 0);
    }
}

#[tokio::test]
async fn what_was_decided_stays_in_order_and_nothing_else_waits() {
    let mut w = World::new().await;
    let mode = |ino| Op::SetAttr(SetAttr { ino, mode: Some(0o600), ..SetAttr::default() });
    let decided = w.a.requests([mode(w.delegated), make("decided")], true);
    let asked = w.a.requests([mode(w.free), Op::GetAttr(GetAttr { ino: w.free })], false);
    w.burst([decided, asked]);
    assert_eq!(w.a.answers().await.iter().map(|answer| answer.id).collect::<Vec<_>>(), [3, 4]);
    let obey = w.obey().await;
    w.burst([obey]);
    w.burst([]);
    let answers = w.a.answers().await;
    assert_eq!(answers.iter().map(|answer| answer.id).collect::<Vec<_>>(), [1, 2], "{answers:?}");
    assert!(answers.iter().all(|answer| matches!(answer.result, Some(Reply::Empty(_)))), "{answers:?}");
}

#[tokio::test]
async fn what_is_written_and_synced_stays_behind_the_making_of_its_file() {
    let mut w = World::new().await;
    let lease = w.a.requests([Op::LeaseInodes(LeaseInodes { count: 1 })], false);
    w.burst([lease]);
    let leased = w.a.answers().await;
    let Some(Reply::LeaseInodes(leased)) = &leased[0].result else { panic!("{leased:?}") };
    let ino = leased.first;
    let Op::Make(made) = make("decided") else { panic!() };
    let mode = Op::SetAttr(SetAttr { ino: w.delegated, mode: Some(0o600), ..SetAttr::default() });
    let extents = vec![Extent::inline(Bytes::from_static(b"written")).to_pb(0)];
    let file = FileCommit { ino, extents, ..FileCommit::default() };
    let commit = Op::Commit(Commit { files: vec![file], ..Commit::default() });
    // The first waits for b, and with it what was decided after it.
    let decided = w.a.requests([mode, Op::Make(Make { ino, ..made })], true);
    let asked = w.a.requests([commit, Op::Sync(Sync {})], false);
    w.burst([decided, asked]);
    assert_eq!(w.a.answers().await, []);
    let obey = w.obey().await;
    w.burst([obey]);
    w.burst([]);
    let look = w.a.requests([Op::GetAttr(GetAttr { ino })], false);
    w.burst([look]);
    let answers = w.a.answers().await;
    let size = answers.iter().find(|answer| matches!(answer.result, Some(Reply::Entry(_)))).map(size_of);
    assert_eq!(size, Some(7), "{answers:?}");
}

#[tokio::test]
async fn a_commit_stays_behind_an_earlier_one_of_its_file() {
    let mut w = World::new().await;
    let extents = vec![Extent::inline(Bytes::from_static(b"later")).to_pb(0)];
    let file = FileCommit { ino: w.free, extents, ..FileCommit::default() };
    let later = Op::Commit(Commit { files: vec![file], ..Commit::default() });
    let both = w.a.requests([w.commit(), w.truncate(), later], false);
    w.burst([both]);
    assert_eq!(w.a.answers().await, []);
    let obey = w.obey().await;
    w.burst([obey]);
    w.burst([]);
    let look = w.a.requests([Op::GetAttr(GetAttr { ino: w.free })], false);
    w.burst([look]);
    let answers = w.a.answers().await;
    assert_eq!((answers.len(), size_of(&answers[3])), (4, 5), "{answers:?}");
}
