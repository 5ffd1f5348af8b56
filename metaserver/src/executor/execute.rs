//! Jobs are executed on the core: what they change is in the burst's batch, what they answer is kept until that is committed.

use std::sync::Arc;

use fjordfs_proto::{
    FsResult, SessionId,
    pb::meta::{Hello, MendReply, MetaStatusReply, Request, Welcome},
};

use super::{
    Executor,
    jobs::{Caller, Job},
    line::Postponed,
    tell::{Call, Pending},
};
use crate::{
    core::{Answer, Moment, Outcome},
    refusal::Refusal,
    service::outbox::{Outbox, Permit},
};

impl Executor {
    pub(super) fn execute(&mut self, job: Job, now: Moment) {
        match job {
            Job::Attach { hello, outbox, caller } => self.attach(&hello, outbox, caller, now),
            Job::Sign { session, outbox, beat, recalled, given_back, demoted } => {
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    self.core.let_go(session, &recalled, given_back.as_ref(), demoted.as_ref());
                    if beat != 0 {
                        self.core.settled(session);
                        self.beats.push((outbox, beat));
                    }
                }
            }
            Job::Requests { session, outbox, requests } => {
                // A stream that was replaced may have left requests behind; the client sends them again on the new one.
                if self.is_current(session, &outbox) && self.core.hear(session, now) {
                    for (request, permit) in requests {
                        self.request(session, &outbox, request, permit, now);
                        // Each is whole by itself: a client's message may become several batches.
                        if self.core.writes() >= self.burst_writes {
                            self.finish();
                            if self.lost.is_some() {
                                return;
                            }
                        }
                    }
                }
            }
            Job::Goodbye { session, outbox } => {
                if self.is_current(session, &outbox) {
                    self.core.goodbye(session, now);
                    self.streams.remove(&session);
                    // Behind the answers that still wait for the log.
                    self.call(true, move |_| outbox.close(None));
                }
            }
            Job::Detached { session, outbox } => {
                if self.is_current(session, &outbox) {
                    self.streams.remove(&session);
                    self.core.detach(session, now);
                }
            }
            Job::Register(request, caller) => {
                let result = self.core.register(&request, now);
                self.reply(true, caller, result);
            }
            Job::Heartbeat(request, caller) => {
                let result = self.core.heartbeat(&request, now);
                // Deletions must not run ahead of the log: a power failure here could bring their blocks back to life.
                let sync = result.as_ref().is_ok_and(|r| r.map.is_some() || !r.deletes.is_empty());
                self.reply(sync, caller, result);
            }
            Job::Wanted(request, caller) => {
                let result = self.core.wanted(&request);
                self.reply(false, caller, result);
            }
            Job::ChangeTarget(request, caller) => {
                let result = self.core.change_target(&request, now);
                self.reply(true, caller, result);
            }
            Job::Scrub(caller) => {
                let result = self.core.scrub();
                self.reply(true, caller, result);
            }
            Job::Rebalance(request, caller) => {
                let result = self.core.rebalance(&request);
                self.reply(true, caller, result);
            }
            Job::Status(caller) => {
                let status = self.core.status(now);
                self.reply(false, caller, Ok(status));
            }
            Job::Snapshot(caller) => {
                let snapshot = self.core.snapshot().map_err(Refusal::from);
                self.reply(false, caller, snapshot);
            }
            Job::Repair(fixes, caller) => {
                let result = self.core.repair(&fixes, now);
                self.reply(true, caller, result);
            }
            Job::Mend(request, caller) => {
                let result = self.core.mend(&request, now);
                self.reply(true, caller, result.map(|deletions| MendReply { deletions }));
            }
            Job::MetaStatus(caller) => self.meta_status(caller, now),
            Job::HandOver(caller) => match self.store.late() {
                Some(_) => self.reply(false, caller, Ok(())),
                None => {
                    let alone = Refusal::Precondition(
                        "the metadata is in a folder of this host: nobody else can take it over".into(),
                    );
                    self.reply(false, caller, Err(alone));
                }
            },
            Job::Progress | Job::Stop => {}
        }
    }

    /// Answered at once, also while the store is away: it is asked then, too.
    fn meta_status(&mut self, caller: Caller<MetaStatusReply>, now: Moment) {
        let mut reply = self.core.meta_status();
        reply.store.clone_from(&self.place);
        reply.uptime_ms = now.mono.duration_since(self.since).as_millis() as u64;
        reply.operations = self.operations;
        // A caller that went away needs no answer.
        match self.store.late() {
            None => drop(caller.send(Ok(reply))),
            Some(late) => late.report(Box::new(move |report| {
                drop(caller.send(Ok(MetaStatusReply { shared: Some(report), ..reply })));
            })),
        }
    }

    pub(super) fn request(
        &mut self,
        session: SessionId,
        outbox: &Arc<Outbox>,
        request: Request,
        permit: Permit,
        now: Moment,
    ) {
        // Of one that waits, its share of memory is given back, as with answers that are held.
        let Some(request) = self.postponed.join(session, outbox, request) else { return };
        self.operations += 1;
        match self.core.request(session, request, now) {
            Outcome::Answered(Answer { response, sync, recalls }) => {
                self.answers.push(Pending { outbox: outbox.clone(), response, permit, sync, recalls });
            }
            Outcome::Postponed(request, recalls) => {
                self.postponed.hold(Postponed { session, outbox: outbox.clone(), request }, recalls);
            }
            Outcome::Waiting => {}
        }
        self.answer_locks();
    }

    /// Requests for locks that have waited. At once, so that a stream's answers are in the order of what they tell.
    pub(super) fn answer_locks(&mut self) {
        for (session, response) in self.core.take_lock_answers() {
            // Without a stream nobody is told, and the client will ask again.
            if let Some(outbox) = self.streams.get(&session) {
                let outbox = outbox.clone();
                self.answers.push(Pending {
                    outbox,
                    response,
                    permit: None,
                    sync: false,
                    recalls: Vec::new(),
                });
            }
        }
    }

    pub(super) fn is_current(&self, session: SessionId, outbox: &Arc<Outbox>) -> bool {
        self.streams.get(&session).is_some_and(|current| Arc::ptr_eq(current, outbox))
    }

    fn attach(&mut self, hello: &Hello, outbox: Arc<Outbox>, caller: Caller<Welcome>, now: Moment) {
        let result = self.core.attach(hello, now);
        if let Ok(welcome) = &result {
            tracing::info!(session = welcome.session, client = hello.client, "client attached");
            if let Some(old) = self.streams.insert(SessionId(welcome.session), outbox) {
                old.close(Some(Refusal::Aborted("the session attached again on another stream".into())));
            }
        }
        self.reply(true, caller, result);
    }

    fn call(&mut self, sync: bool, answer: impl FnOnce(FsResult<()>) + Send + 'static) {
        self.calls.push(Call { sync, answer: Box::new(answer) });
    }

    fn reply<T: Send + 'static>(&mut self, sync: bool, caller: Caller<T>, result: Result<T, Refusal>) {
        let sync = sync && result.is_ok();
        self.call(sync, move |committed| {
            // A caller that went away needs no answer.
            let _ = caller.send(match committed {
                Ok(()) => result,
                Err(e) => Err(e.into()),
            });
        });
    }
}
