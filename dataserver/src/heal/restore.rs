//! Making one shard of a block from others.
//!
//! **Memory.** What is read from others lies beside the pool of buffers until it is complete, and only then a buffer is taken: a
//! read waits for the rate and for another server, and there for a buffer. Copies that held buffers meanwhile could hold all
//! of them, so that users wait as well, and two servers that copy from each other wait for each other. Two checks a target
//! with one block each are little.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::{NonZeroU8, NonZeroU16},
    time::Instant,
};

use bytes::Bytes;
use fjordfs_proto::{
    BLOCK_SIZE_MAX, BlockId, FsError, FsResult, Layout, PAGE_SIZE, Policy, ServerId, ShardNo, TargetId,
    block::{first_bad_page, page_crcs},
    coding::Code,
    error::Errno,
    frame::Opcode,
    pb::data::{
        self, ListShardsReply, ListShardsRequest, ReadShardReply, ReadShardRequest, ReportShardReply,
        ReportShardRequest,
    },
};

use super::{Healing, listing::Listed, pace::Place};
use crate::{buffer::PageBuf, peer::Peer, store::record::record_pages};

/// A shard ready to be put: its bytes lie at byte 4096 of the record.
pub(super) struct Restored {
    pub(super) record: PageBuf,
    pub(super) length: u32,
    pub(super) page_crcs: Bytes,
}

/// Why a shard could not be made.
pub(super) enum Unrestored {
    /// The others do not have the block any more: it was deleted.
    Gone,
    /// Too few of the others gave good bytes.
    Lost(String),
}

/// Connections to the members of a group.
pub(super) struct Sources<'a> {
    healing: &'a Healing,
    /// Server and address of each member that can be read.
    members: BTreeMap<TargetId, (ServerId, String)>,
    peers: BTreeMap<ServerId, Peer>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(healing: &'a Healing, members: BTreeMap<TargetId, (ServerId, String)>) -> Sources<'a> {
        Sources { healing, members, peers: BTreeMap::new() }
    }

    pub(super) fn targets(&self) -> BTreeSet<TargetId> {
        self.members.keys().copied().collect()
    }

    async fn peer(&mut self, target: TargetId) -> FsResult<&mut Peer> {
        let (server, address) = self
            .members
            .get(&target)
            .ok_or_else(|| FsError::new(Errno::EIO, format!("target {target} cannot be read")))?;
        if !self.peers.get(server).is_some_and(Peer::is_usable) {
            let node = &self.healing.node;
            let who = format!("data server {} copying shards", node.server);
            self.peers.insert(*server, Peer::connect(address, &node.cluster_id, &who).await?);
        }
        self.peers.get_mut(server).ok_or_else(|| FsError::new(Errno::EIO, "no connection"))
    }

    /// A page of a member's listing.
    pub(super) async fn list(
        &mut self,
        target: TargetId,
        after: BlockId,
        limit: u32,
        group: data::Group,
    ) -> FsResult<ListShardsReply> {
        let request = ListShardsRequest { target: target.0, after_block: after.0, limit, group: Some(group) };
        Ok(self.peer(target).await?.request(Opcode::ListShards, &request, &mut []).await?.0)
    }

    /// Shard `no` of `block` from what the others list of it.
    pub(super) async fn restore(
        &mut self,
        block: BlockId,
        no: ShardNo,
        policy: Policy,
        others: &[Listed],
    ) -> Result<Restored, Unrestored> {
        match policy {
            Policy::Replica(_) => self.copy(block, others).await,
            Policy::Ec { k, m } => self.decode(block, no, (k, m), others).await,
        }
    }

    /// Every shard is the whole block: any good one will do.
    async fn copy(&mut self, block: BlockId, others: &[Listed]) -> Result<Restored, Unrestored> {
        let mut failures = Failures::default();
        for other in others {
            if other.length as usize > BLOCK_SIZE_MAX {
                let what = format!("target {} lists {} bytes of {block}", other.target, other.length);
                failures.add(FsError::new(Errno::EPROTO, what));
                continue;
            }
            let mut data = vec![0; other.length as usize];
            match self.read(block, other, &mut data).await {
                Ok(page_crcs) => return self.ready(&data, page_crcs).await,
                Err(e) => failures.add(e),
            }
        }
        Err(failures.into())
    }

    /// Any K good shards restore another one, bit by bit as it was.
    async fn decode(
        &mut self,
        block: BlockId,
        no: ShardNo,
        (k, m): (NonZeroU8, NonZeroU8),
        others: &[Listed],
    ) -> Result<Restored, Unrestored> {
        let Some(length) = others.first().map(|other| other.length) else { return Err(Unrestored::Gone) };
        let shard_pages = u16::try_from(length as usize / PAGE_SIZE).ok().and_then(NonZeroU16::new);
        let code = shard_pages.and_then(|shard_pages| Code::of(Layout::Ec { k, m, shard_pages }));
        let (Some(code), true) = (code, (length as usize).is_multiple_of(PAGE_SIZE)) else {
            return Err(Unrestored::Lost(format!("shards of {length} bytes are not of ec:{k}+{m}")));
        };
        let mut failures = Failures::default();
        let mut present: Vec<(u8, Vec<u8>)> = Vec::with_capacity(k.get().into());
        for other in others {
            if present.len() == usize::from(k.get()) {
                break;
            }
            if other.shard == no
                || other.length != length
                || present.iter().any(|(shard, _)| *shard == other.shard.0)
            {
                continue;
            }
            let mut data = vec![0; length as usize];
            match self.read(block, other, &mut data).await {
                Ok(_) => present.push((other.shard.0, data)),
                Err(e) => failures.add(e),
            }
        }
        if present.is_empty() && !failures.messages.is_empty() {
            return Err(failures.into());
        }
        let shards: Vec<(u8, &[u8])> = present.iter().map(|(shard, data)| (*shard, &data[..])).collect();
        let restored = code.restore(&shards, no.0).map_err(|e| {
            failures.messages.insert(0, e.to_string());
            Unrestored::Lost(failures.messages.join("; "))
        })?;
        self.ready(&restored, page_crcs(&restored).into()).await
    }

    /// Takes a buffer for a shard, now that nothing else has to be waited for.
    async fn ready(&self, data: &[u8], page_crcs: Bytes) -> Result<Restored, Unrestored> {
        let length = data.len() as u32;
        let buffers = self.healing.node.pool.take(&[record_pages(length)]).await;
        let mut record = buffers
            .and_then(|mut buffers| buffers.pop())
            .ok_or_else(|| Unrestored::Lost(format!("a shard of {length} bytes is too large")))?;
        record[PAGE_SIZE..PAGE_SIZE + data.len()].copy_from_slice(data);
        Ok(Restored { record, length, page_crcs })
    }

    /// Reads a whole shard of another target into `data`, which is as long as it, and verifies it; its integrity entries.
    async fn read(&mut self, block: BlockId, other: &Listed, data: &mut [u8]) -> FsResult<Bytes> {
        let Listed { target, shard, length, .. } = *other;
        self.healing.node.rebuild_rate.take(length.into()).await;
        let request = ReadShardRequest {
            target: target.0,
            block: block.0,
            shard: shard.0.into(),
            ranges: vec![data::Range { offset: 0, length }],
            integrity: true,
        };
        let from = Place::From(self.members.get(&target).map_or(ServerId(0), |(server, _)| *server));
        let peer = self.peer(target).await?;
        let began = Instant::now();
        let (reply, filled): (ReadShardReply, usize) =
            peer.request(Opcode::ReadShard, &request, data).await?;
        self.healing.node.rebuild_rate.took(from, length, began);
        if filled != length as usize {
            let what = format!("target {target} sent {filled} of {length} bytes of {block}");
            return Err(FsError::new(Errno::EPROTO, what));
        }
        if let Some(page) = first_bad_page(data, &reply.page_crcs) {
            let what = format!("page {page} of {block} on target {target} does not match its checksum");
            let report = ReportShardRequest { target: target.0, block: block.0, shard: shard.0.into() };
            let told: FsResult<(ReportShardReply, usize)> =
                self.peer(target).await?.request(Opcode::ReportShard, &report, &mut []).await;
            if let Err(e) = told {
                tracing::debug!("reporting {block} on {target}: {e}");
            }
            return Err(FsError::new(Errno::EIO, what));
        }
        Ok(reply.page_crcs)
    }
}

/// What those said who did not give a shard.
struct Failures {
    messages: Vec<String>,
    /// All of them, that they do not have it.
    gone: bool,
}

impl Default for Failures {
    fn default() -> Failures {
        Failures { messages: Vec::new(), gone: true }
    }
}

impl Failures {
    fn add(&mut self, e: FsError) {
        self.gone &= e.errno == Errno::ENOENT;
        self.messages.push(e.message);
    }
}

impl From<Failures> for Unrestored {
    fn from(failures: Failures) -> Unrestored {
        if failures.gone { Unrestored::Gone } else { Unrestored::Lost(failures.messages.join("; ")) }
    }
}
