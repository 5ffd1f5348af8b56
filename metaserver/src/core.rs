//! The owner's state and what can be done to it, one thing after the other. No threads, no clock, no network: the
//! executor drives it, and so do the tests.
//!
//! A **burst** is any number of calls followed by [`Core::commit`]. Each call is undone by itself when it fails; the
//! burst goes to the store as one batch. Nothing a call returned may be shown to anybody before `commit` succeeded.
//!
//! # Invariants
//! Memory never runs ahead of the store: what a burst changed in memory (open handles, sessions, the map) is put back
//! when its batch fails. After that the store takes no more writes until a restart; reads go on.

mod attach;
mod lock;
mod mend;
mod request;
#[cfg(test)]
mod tests;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fjordfs_proto::{
    ClusterMap, Epoch, FsError, FsResult, InodeId, Policy, ROOT_INODE, ServerId, SessionId,
    pb::{
        self,
        meta::{
            ChangeTargetReply, ChangeTargetRequest, HeartbeatReply, HeartbeatRequest, MetaStatusReply,
            RebalanceReply, RebalanceRequest, RegisterReply, RegisterRequest, Request, Response, ScrubReply,
            StatusReply, Time, WantedReply, WantedRequest,
        },
    },
};

use crate::{
    Config,
    healing::Healing,
    keys,
    leases::{Leases, Order, RecallId},
    liveness,
    locks::Locks,
    membership::Membership,
    opens::Opens,
    ops::{self, Start},
    orphans, records,
    refusal::Refusal,
    session::Sessions,
    snapshot::{self, Keeper},
    store::{Fence, MetaStore, Snapshot, StoreError, Ticket},
    store_label,
    txn::Txn,
};

/// Ids skipped at every start: a power failure may have taken the records of ids that clients have seen.
/// More than could be given out between two syncs of the log. Block ids need no such margin: leases are answered
/// after a sync.
const ID_MARGIN: u64 = 1 << 20;

/// Dead blocks expanded in one background step.
const BLOCKS_PER_STEP: u64 = 512;

/// How long orphans are kept after the last session of before a start came back: it may resend a create whose
/// answer it never saw, and did not declare that handle.
const RECOVERY_GRACE: Duration = Duration::from_secs(5);

/// Ticks that are further apart than this mean that this process, or its disk, stood still.
const STALL: Duration = Duration::from_secs(2);

/// Longest time for which clients may use their leases without being heard. After a client dies, a change of something
/// that it may cache waits as long as this; and what it may have decided, when its stream has ended with it.
const LEASE_MAX: Duration = Duration::from_secs(5);

/// Longest time for which a start waits for what clients of before have decided by themselves. One that is silent is
/// waited for no longer than [`LEASE_MAX`].
const GRACE_MAX: Duration = Duration::from_secs(15);

/// A store that does not take the first batch for so long is given up, so that it can be asked again who owns it.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Both clocks, read once per burst.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// For timestamps.
    pub(crate) wall: Time,
    /// For timeouts.
    pub(crate) mono: Instant,
}

/// What others must be told once the burst is committed.
#[derive(Debug)]
pub(crate) enum Event {
    SessionEnded(SessionId, Refusal),
}

/// An answer, and what it waits for.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response,
    /// The log on stable storage.
    pub(crate) sync: bool,
    /// The end of these recalls.
    pub(crate) recalls: Vec<RecallId>,
}

/// What becomes of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    Answered(Answer),
    /// Nothing yet: it is to be tried again at the end of these recalls.
    Postponed(Request, Vec<RecallId>),
    /// Nothing yet: it waits for a lock, and is answered by [`Core::take_lock_answers`].
    Waiting,
}

/// See the module.
pub(crate) struct Core {
    store: Arc<dyn MetaStore>,
    fence: Fence,
    start: Start,
    txn: Txn,
    opens: Opens,
    sessions: Sessions,
    leases: Leases,
    locks: Locks,
    lock_grace: lock::Grace,
    /// Of the last answer that could be cached.
    serial: u64,
    members: Membership,
    /// The members as the store knows them, while a burst has changed them.
    members_before: Option<Membership>,
    healing: Healing,
    /// The map that `healing` goes by.
    healed: Arc<ClusterMap>,
    sessions_added: Vec<SessionId>,
    events: Vec<Event>,
    last: Ticket,
    failed: Option<FsError>,
    low_space: Option<String>,
    session_timeout: Duration,
    lease_time: Duration,
    last_tick: Instant,
    /// When the last missing session came back or timed out.
    complete_since: Option<Instant>,
    /// Delegated to others, so that the operation under way is postponed.
    conflicts: Vec<InodeId>,
    /// When sessions of before the start are not waited for any longer.
    grace_until: Instant,
    /// Orphans beyond this inode are still to be looked at.
    reap: Option<u64>,
    /// Of snapshots that somebody reads.
    keepers: Vec<Keeper>,
}

/// The cluster that a store belongs to; none for a new one.
pub(crate) fn cluster_of(store: &dyn MetaStore) -> Result<Option<String>, FsError> {
    let Some(value) = store.get(&[keys::MAP]).map_err(|e| FsError::from(&e))? else { return Ok(None) };
    let map: pb::common::ClusterMap = records::decode(value, || "cluster map".into())?;
    Ok(Some(map.cluster_id))
}

impl Core {
    /// Takes the store over. A new one gets a root directory.
    pub(crate) fn open(
        store: Arc<dyn MetaStore>,
        cluster_id: &str,
        config: &Config,
        now: Moment,
    ) -> Result<Core, FsError> {
        let fence = store.take_over().map_err(|e| FsError::from(&e))?;
        store_label::check(&*store)?;
        let mut txn = Txn::new(store.clone())?;
        txn.begin();
        if txn.get(keys::FORMAT)? != Some(store_label::format()) {
            txn.put(keys::FORMAT.to_vec(), store_label::format());
        }
        let counters = txn.counters();
        let is_new = counters.next_inode == 0;
        if is_new {
            *counters = records::Counters {
                next_inode: ROOT_INODE.0 + 1,
                next_block: 1,
                next_session: 1,
                next_server: 1,
                next_target: 1,
                ..records::Counters::default()
            };
        } else {
            counters.next_inode += ID_MARGIN;
            counters.next_session += ID_MARGIN;
        }
        counters.fence = fence.0.max(counters.fence.saturating_add(1));
        let start = Start { fence: Fence(counters.fence), first_inode: InodeId(counters.next_inode) };
        // A power failure may have taken back what clients have seen. Those that go on where they were take what they have for newer than
        // what there is, if it does not say otherwise.
        if let Some(boot) = store.boot().filter(|boot| *boot != counters.boot) {
            counters.boot = boot;
            if !is_new {
                (counters.version_floor, counters.aged_below) = (start.first_version(), start.first_inode.0);
            }
        }
        if txn.find_inode(ROOT_INODE)?.is_none() {
            ops::make_root(&mut txn, config.default_policy, now.wall);
        }
        let policy: Policy = config.default_policy;
        let members = Membership::load(&mut txn, cluster_id, policy, config, now.mono)?;
        if members.map().cluster_id != cluster_id {
            let found = &members.map().cluster_id;
            return Err(records::damaged(&format!("it is cluster {found}, its label says {cluster_id}")));
        }
        let sessions = Sessions::load(&mut txn, now.mono)?;
        let mut leases = Leases::default();
        sessions.ids().for_each(|session| leases.add_unknown(session));
        let mut opens = Opens::default();
        opens.set_recovering(true);
        txn.accept();
        // Servers may still work on tickets of before: those are told apart by the time.
        let seed = now.wall.sec.unsigned_abs().wrapping_mul(1_000_000_000) + u64::from(now.wall.nsec);
        let mut core = Core {
            healing: Healing::new(members.map(), seed, now.mono),
            healed: members.map().clone(),
            store,
            fence,
            start,
            txn,
            opens,
            sessions,
            leases,
            locks: Locks::default(),
            lock_grace: lock::Grace::default(),
            serial: 0,
            members,
            members_before: None,
            sessions_added: Vec::new(),
            events: Vec::new(),
            last: Ticket(0),
            failed: None,
            low_space: None,
            session_timeout: config.session_timeout,
            lease_time: LEASE_MAX.min(config.session_timeout / 3),
            last_tick: now.mono,
            complete_since: None,
            conflicts: Vec::new(),
            grace_until: now.mono + GRACE_MAX,
            reap: None,
            keepers: Vec::new(),
        };
        if core.sessions.any_missing() {
            core.lock_grace.begin();
        } else {
            core.end_recovery();
        }
        core.commit()?;
        let safe = match core.store.late() {
            Some(late) => late.settle(START_PATIENCE),
            None => core.store.sync(),
        };
        safe.map_err(|e| FsError::from(&e))?;
        Ok(core)
    }

    pub(crate) fn members(&self) -> &Membership {
        &self.members
    }

    /// Stops accepting mutations, for good.
    pub(crate) fn fail(&mut self, e: FsError) {
        if self.failed.is_none() {
            tracing::error!(error = %e, "metadata store failed: read-only until the metaserver is restarted");
            self.failed = Some(e);
        }
    }

    /// `Some` while the metadata disk is nearly full: only what frees space is accepted.
    pub(crate) fn set_low_space(&mut self, low: Option<String>) {
        match (&self.low_space, &low) {
            (None, Some(why)) => tracing::warn!(why, "refusing operations that need space"),
            (Some(_), None) => tracing::info!("metadata disk has space again"),
            _ => {}
        }
        self.low_space = low;
    }

    /// Why changes are refused, all of them or those that need space; empty when they are not.
    fn trouble(&self) -> String {
        match (&self.failed, &self.low_space) {
            (Some(e), _) => {
                format!(
                    "the metadata store failed, nothing can be changed until the metaserver is restarted: {e}"
                )
            }
            (None, Some(why)) => format!("nothing that needs space can be made: {why}"),
            (None, None) => String::new(),
        }
    }

    // ---- bursts ----

    /// Writes of the burst so far.
    pub(crate) fn writes(&self) -> usize {
        self.txn.writes()
    }

    /// Puts the burst into the store. On an error nothing of it happened, and nothing after it will.
    pub(crate) fn commit(&mut self) -> FsResult<Ticket> {
        let Some(batch) = self.txn.take_batch() else {
            self.settle();
            return Ok(self.last);
        };
        if let Some(e) = self.failed.clone() {
            self.undo_burst();
            return Err(e);
        }
        let store = self.store.clone();
        self.keepers.retain(|keeper| keeper.note(&batch, &*store));
        match self.store.commit(batch, self.fence) {
            Ok(ticket) => {
                self.last = ticket;
                self.settle();
                Ok(ticket)
            }
            Err(e) => {
                let e = FsError::from(&e);
                self.fail(e.clone());
                self.undo_burst();
                Err(e)
            }
        }
    }

    fn settle(&mut self) {
        self.txn.committed();
        self.opens.committed();
        self.members_before = None;
        self.sessions_added.clear();
    }

    fn undo_burst(&mut self) {
        self.txn.abandon();
        self.opens.abandon();
        if let Some(before) = self.members_before.take() {
            self.members = before;
        }
        for id in self.sessions_added.drain(..) {
            self.sessions.remove(id);
        }
        self.events.clear();
    }

    /// What others must be told of the committed burst.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Recalls to be sent once the burst is answered.
    pub(crate) fn take_recalls(&mut self) -> Vec<Order> {
        self.leases.take_orders()
    }

    /// Recalls that have ended: answers that waited for them can go.
    pub(crate) fn take_ended_recalls(&mut self) -> Vec<RecallId> {
        let mut ended = self.leases.take_ended();
        ended.extend(self.end_lock_grace());
        ended
    }

    /// Runs `f` as one operation: an error undoes it.
    fn operation<T, E: From<FsError>>(&mut self, f: impl FnOnce(&mut Core) -> Result<T, E>) -> Result<T, E> {
        self.txn.begin();
        if let Some(e) = &self.failed {
            return Err(e.clone().into());
        }
        let result = f(self);
        match &result {
            Ok(_) => self.txn.accept(),
            Err(_) => self.txn.reject(),
        }
        self.note_engine_error();
        result
    }

    fn note_engine_error(&mut self) {
        match self.txn.take_error() {
            // A read that failed says nothing about writes, but the device is not to be trusted with them.
            Some(e @ (StoreError::Io { .. } | StoreError::Damaged { .. })) => self.fail(FsError::from(&e)),
            Some(e) => tracing::error!(error = %e, "metadata store"),
            None => {}
        }
    }

    // ---- data servers ----

    fn save_members(&mut self) {
        if self.members_before.is_none() {
            self.members_before = Some(self.members.clone());
        }
    }

    pub(crate) fn register(
        &mut self,
        request: &RegisterRequest,
        now: Moment,
    ) -> Result<RegisterReply, Refusal> {
        self.save_members();
        let reply = self.operation(|core| core.members.register(&mut core.txn, request, now.mono))?;
        self.notice_map(now);
        let map = self.members.map().clone();
        self.healing.restarted(&map, ServerId(reply.server), now.mono);
        Ok(reply)
    }

    pub(crate) fn heartbeat(
        &mut self,
        request: &HeartbeatRequest,
        now: Moment,
    ) -> Result<HeartbeatReply, Refusal> {
        self.save_members();
        let mut reply = self.operation(|core| core.members.heartbeat(&mut core.txn, request, now.mono))?;
        self.notice_map(now);
        let map = self.members.map().clone();
        self.healing.placed(ServerId(request.server), Epoch(request.placed_epoch));
        self.healing.paced(ServerId(request.server), request.rebuild);
        self.healing.take_in(&request.checks, &map, now.mono);
        for strays in &request.strays {
            let target = fjordfs_proto::TargetId(strays.target);
            if map.targets.get(&target).is_some_and(|t| t.server == ServerId(request.server)) {
                self.healing.strayed(&map, target, &strays.groups, now.mono);
            }
        }
        reply.checks = self.healing.orders(&map, ServerId(request.server), now.mono);
        reply.scrubs = self.txn.counters().scrubs;
        Ok(reply)
    }

    pub(crate) fn wanted(&mut self, request: &WantedRequest) -> Result<WantedReply, Refusal> {
        self.operation(|core| core.members.wanted(&mut core.txn, request))
    }

    pub(crate) fn change_target(
        &mut self,
        request: &ChangeTargetRequest,
        now: Moment,
    ) -> Result<ChangeTargetReply, Refusal> {
        self.save_members();
        let message = self.operation(|core| core.members.change(&mut core.txn, request))?;
        tracing::info!("{message}");
        self.notice_map(now);
        Ok(ChangeTargetReply { message })
    }

    /// How far rebuild and reconciliation are.
    pub(crate) fn healing(&self, now: Moment) -> fjordfs_proto::pb::meta::Healing {
        self.healing.report(self.members.map(), now.mono)
    }

    /// Begins or ends moving blocks for balance.
    pub(crate) fn rebalance(&mut self, request: &RebalanceRequest) -> Result<RebalanceReply, Refusal> {
        self.save_members();
        self.operation(|core| Ok(core.members.rebalance(&mut core.txn, request)))
    }

    /// Every target shall be scrubbed now.
    pub(crate) fn scrub(&mut self) -> Result<ScrubReply, Refusal> {
        self.operation(|core| {
            core.txn.counters().scrubs += 1;
            let targets = &core.members.map().targets;
            let begins = targets.values().filter(|target| target.readable()).count();
            let of = if begins == 1 { "target" } else { "targets" };
            let mut message =
                format!("scrub of {begins} {of} begins, `fjord scrub status` shows how far it is");
            if begins < targets.len() {
                message += &format!("; not of those that are not up: {}", targets.len() - begins);
            }
            Ok(ScrubReply { message })
        })
    }

    /// Lets `healing` know what has become of the map.
    fn notice_map(&mut self, now: Moment) {
        let map = self.members.map();
        if map.epoch != self.healed.epoch {
            let before = std::mem::replace(&mut self.healed, map.clone());
            self.healing.notice(&before, &self.healed, now.mono);
        }
    }

    pub(crate) fn status(&mut self, now: Moment) -> StatusReply {
        let counters = *self.txn.counters();
        StatusReply {
            map: Some(self.members.map().to_pb()),
            targets: self.members.reports(),
            sessions: self.sessions.reports(&self.opens, &self.leases, &self.locks, now.mono),
            inodes: counters.inodes,
            blocks_to_delete: counters.queued,
            orphans: counters.orphans,
            version: env!("CARGO_PKG_VERSION").into(),
            engine: self.store.name().into(),
            healing: Some(fjordfs_proto::pb::meta::Healing {
                rebalancing: counters.rebalancing,
                ..self.healing(now)
            }),
            gc: None,
            trouble: self.trouble(),
        }
    }

    /// What the owner's state says of the metaserver.
    pub(crate) fn meta_status(&mut self) -> MetaStatusReply {
        MetaStatusReply {
            version: env!("CARGO_PKG_VERSION").into(),
            engine: self.store.name().into(),
            fence: self.fence.0,
            inodes: self.txn.counters().inodes,
            sessions: self.sessions.ids().count() as u64,
            trouble: self.trouble(),
            ..MetaStatusReply::default()
        }
    }

    // ---- time and background work ----

    /// Notices who has been silent for too long.
    pub(crate) fn tick(&mut self, now: Moment) {
        let stalled = now.mono.duration_since(self.last_tick);
        self.last_tick = now.mono;
        if stalled > STALL {
            // Whoever spoke meanwhile was not heard: the silence was ours.
            tracing::warn!(
                seconds = stalled.as_secs(),
                "the metaserver stood still; timeouts are extended by that"
            );
            self.sessions.forgive(stalled);
            self.leases.forgive(stalled);
            self.members.forgive(stalled);
            self.grace_until += stalled;
        }
        for session in self.sessions.expired(self.lease_time, now.mono) {
            match self.sessions.may_return(session, self.lease_time, now.mono) {
                true => self.leases.end_cached(session),
                false => self.leases.end_all(session),
            }
        }
        if self.leases.in_grace() && now.mono >= self.grace_until {
            tracing::warn!(
                "clients of before the start have not sent everything yet; they are not waited for any longer"
            );
            self.leases.end_grace();
        }
        self.leases.calm_down(now.mono);
        self.opens.tick(now.mono);
        if self.failed.is_some() {
            return;
        }
        for session in self.leases.disobedient(self.session_timeout, now.mono) {
            let message = format!(
                "{session} did not let go of what it caches within {} s and is over: mount again",
                self.session_timeout.as_secs()
            );
            tracing::warn!(%session, "session ended: it did not obey a recall");
            self.end_session(session, Refusal::NotFound(message), now);
        }
        for session in self.sessions.expired(self.session_timeout, now.mono) {
            let message = format!(
                "{session} was silent for {} s and is over: its locks and unsaved files are gone, mount again",
                self.session_timeout.as_secs()
            );
            tracing::info!(%session, "session timed out");
            self.end_session(session, Refusal::NotFound(message), now);
        }
        self.save_members();
        self.healing.tick(self.members.map(), now.mono);
        let filled = self.healing.take_filled(now.mono);
        let noticed = self.operation(|core| {
            if !filled.is_empty() {
                core.members.finish_moves(&mut core.txn, &filled);
            }
            core.members.rebalance_step(&mut core.txn);
            Ok::<_, FsError>(core.members.tick(&mut core.txn, now.mono))
        });
        let (down, out) = noticed.unwrap_or_default();
        for server in down {
            tracing::warn!(%server, "data server is down: it missed its heartbeats");
        }
        for target in out {
            tracing::warn!(%target, "target is out: it could not be used for too long, its groups are rebuilt without it");
        }
        self.notice_map(now);
        if self.opens.recovering() && !self.sessions.any_missing() {
            let since = *self.complete_since.get_or_insert(now.mono);
            if now.mono.duration_since(since) >= RECOVERY_GRACE {
                self.end_recovery();
            }
        }
    }

    /// Everybody who may have had files open has said so.
    fn end_recovery(&mut self) {
        self.opens.set_recovering(false);
        self.reap = Some(0);
    }

    /// A bounded piece of background work. Says whether there is more.
    pub(crate) fn background(&mut self, now: Moment) -> bool {
        let vacated = self.leases.take_vacated();
        let result = self.operation(|core| {
            if core.txn.counters().orphans > 0 {
                for ino in vacated {
                    orphans::closed(&mut core.txn, &core.opens, &core.leases, ino)?;
                }
            }
            let mut more = orphans::destroy_step(&mut core.txn)?;
            more |= orphans::let_go_step(&mut core.txn, &mut core.opens, &core.leases)?;
            if liveness::has_dead(&mut core.txn) {
                let untidy = core.members.untidy();
                more |= liveness::expand_step(&mut core.txn, core.members.map(), &untidy, BLOCKS_PER_STEP)?;
            }
            more |= core.members.drop_deletions(&mut core.txn)?;
            if let Some(after) = core.reap {
                core.reap = orphans::reap_step(&mut core.txn, &core.opens, &core.leases, after)?;
                more |= core.reap.is_some();
            }
            Ok::<_, FsError>(more)
        });
        self.leases.changed(None, self.txn.changed(), now.mono);
        match result {
            Ok(more) => more,
            Err(e) => {
                // Damage does not go away by trying again at once; the failure flag stops it for good.
                self.fail(e);
                false
            }
        }
    }
}
