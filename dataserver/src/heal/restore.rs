//! Making one shard of a block from others.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, Policy, ServerId, ShardNo, TargetId,
    block::first_bad_page,
    error::Errno,
    frame::Opcode,
    pb::data::{
        self, ListShardsReply, ListShardsRequest, ReadShardReply, ReadShardRequest, ReportShardReply,
        ReportShardRequest,
    },
};

use super::{Healing, listing::Listed};
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
            Policy::Ec { .. } => Err(Unrestored::Lost(format!(
                "{no} of {block} is encoded as {policy}, which this release cannot decode: install a newer one on the data servers"
            ))),
        }
    }

    /// Every shard is the whole block: any good one will do.
    async fn copy(&mut self, block: BlockId, others: &[Listed]) -> Result<Restored, Unrestored> {
        let (mut gone, mut failures) = (true, Vec::new());
        for other in others {
            match self.read(block, other).await {
                Ok(restored) => return Ok(restored),
                Err(e) => {
                    gone &= e.errno == Errno::ENOENT;
                    failures.push(e.message);
                }
            }
        }
        if gone { Err(Unrestored::Gone) } else { Err(Unrestored::Lost(failures.join("; "))) }
    }

    /// Reads and verifies a whole shard of another target.
    async fn read(&mut self, block: BlockId, other: &Listed) -> FsResult<Restored> {
        let Listed { target, shard, length, .. } = *other;
        self.healing.throttle.take(length.into()).await;
        let buffers = self.healing.node.pool.take(&[record_pages(length)]).await;
        let mut record = buffers.and_then(|mut buffers| buffers.pop()).ok_or_else(|| {
            FsError::new(Errno::EPROTO, format!("target {target} lists a shard of {block} that is too large"))
        })?;
        let request = ReadShardRequest {
            target: target.0,
            block: block.0,
            shard: shard.0.into(),
            ranges: vec![data::Range { offset: 0, length }],
            integrity: true,
        };
        let span: Range<usize> = PAGE_SIZE..PAGE_SIZE + length as usize;
        let peer = self.peer(target).await?;
        let (reply, filled): (ReadShardReply, usize) =
            peer.request(Opcode::ReadShard, &request, &mut record[span.clone()]).await?;
        if filled != length as usize {
            let what = format!("target {target} sent {filled} of {length} bytes of {block}");
            return Err(FsError::new(Errno::EPROTO, what));
        }
        if let Some(page) = first_bad_page(&record[span], &reply.page_crcs) {
            let what = format!("page {page} of {block} on target {target} does not match its checksum");
            let report = ReportShardRequest { target: target.0, block: block.0, shard: shard.0.into() };
            let told: FsResult<(ReportShardReply, usize)> =
                self.peer(target).await?.request(Opcode::ReportShard, &report, &mut []).await;
            if let Err(e) = told {
                tracing::debug!("reporting {block} on {target}: {e}");
            }
            return Err(FsError::new(Errno::EIO, what));
        }
        Ok(Restored { record, length, page_crcs: reply.page_crcs })
    }
}
