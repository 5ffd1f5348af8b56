//! Making one shard of a block from others: copied from who has the same, decoded where that is not good.
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
    block::{page_crcs, pages},
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

    /// Shard `no` of `block` from what the others list of it: copied from who has the same, as far as that is good, and the rest
    /// decoded. A page that is bad at one is good at another, so it is done page by page.
    pub(super) async fn restore(
        &mut self,
        block: BlockId,
        no: ShardNo,
        policy: Policy,
        others: &[Listed],
    ) -> Result<Restored, Unrestored> {
        let Some(length) = others.first().map(|other| other.length) else { return Err(Unrestored::Gone) };
        if length as usize > BLOCK_SIZE_MAX {
            return Err(Unrestored::Lost(format!("shards of {length} bytes are listed")));
        }
        let has_it = |other: &Listed| matches!(policy, Policy::Replica(_)) || other.shard == no;
        let usable = others.iter().filter(|other| other.length == length);
        let (same, different): (Vec<&Listed>, Vec<&Listed>) = usable.partition(|other| has_it(other));
        let (mut pages, mut failures) = (Pages::of(length), Failures::default());
        for other in same {
            if pages.wanting.is_empty() {
                break;
            }
            self.read(block, other, &mut pages, &mut failures).await;
        }
        if !pages.wanting.is_empty() {
            match policy {
                Policy::Replica(_) => return Err(failures.into()),
                Policy::Ec { k, m } => {
                    self.decode(block, no, (k, m), &different, &mut pages, &mut failures).await?
                }
            }
        }
        self.ready(&pages.data, pages.crcs.into()).await
    }

    /// Any K good pages restore the same page of another shard, bit by bit as it was.
    async fn decode(
        &mut self,
        block: BlockId,
        no: ShardNo,
        (k, m): (NonZeroU8, NonZeroU8),
        others: &[&Listed],
        pages: &mut Pages,
        failures: &mut Failures,
    ) -> Result<(), Unrestored> {
        let length = pages.data.len();
        let shard_pages = u16::try_from(length / PAGE_SIZE).ok().and_then(NonZeroU16::new);
        let code = shard_pages.and_then(|shard_pages| Code::of(Layout::Ec { k, m, shard_pages }));
        let (Some(code), true) = (code, length.is_multiple_of(PAGE_SIZE)) else {
            return Err(Unrestored::Lost(format!("shards of {length} bytes are not of ec:{k}+{m}")));
        };
        let k = usize::from(k.get());
        let mut present: BTreeMap<u8, Pages> = BTreeMap::new();
        for other in others {
            if pages.wanting.iter().all(|page| good(&present, *page).count() >= k) {
                break;
            }
            let shard = present.entry(other.shard.0).or_insert_with(|| Pages::of(length as u32));
            self.read(block, other, shard, failures).await;
        }
        present.retain(|_, shard| shard.wanting.len() < pages.data.len() / PAGE_SIZE);
        if present.is_empty() && !failures.messages.is_empty() {
            return Err(std::mem::take(failures).into());
        }
        while let Some(first) = pages.wanting.first().copied() {
            let sources: Vec<u8> = good(&present, first).take(k).collect();
            // As many of the next pages as the same shards have.
            let same = |page: &usize| {
                pages.wanting.contains(page) && good(&present, *page).take(k).eq(sources.iter().copied())
            };
            let end = (first..length / PAGE_SIZE).take_while(same).last().map_or(first + 1, |last| last + 1);
            let range = first * PAGE_SIZE..end * PAGE_SIZE;
            let shards: Vec<(u8, &[u8])> =
                sources.iter().map(|shard| (*shard, &present[shard].data[range.clone()])).collect();
            let restored = code.restore(&shards, no.0).map_err(|e| {
                failures.messages.insert(0, e.to_string());
                Unrestored::Lost(failures.messages.join("; "))
            })?;
            pages.data[range].copy_from_slice(&restored);
            pages.crcs[4 * first..4 * end].copy_from_slice(&page_crcs(&restored));
            pages.wanting.retain(|page| *page >= end);
        }
        Ok(())
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

    /// Reads a whole shard of another target, verifies it, and gives `pages` what is good of it and wanting there.
    async fn read(&mut self, block: BlockId, other: &Listed, pages: &mut Pages, failures: &mut Failures) {
        let mut data = vec![0; other.length as usize];
        let page_crcs = match self.read_all(block, other, &mut data).await {
            Ok(page_crcs) => page_crcs,
            Err(e) => return failures.add(e),
        };
        if let Some(page) = pages.take(data, &page_crcs) {
            let Listed { target, shard, .. } = *other;
            let what = format!("page {page} of {block} on target {target} does not match its checksum");
            failures.add(FsError::new(Errno::EIO, what));
            let report = ReportShardRequest { target: target.0, block: block.0, shard: shard.0.into() };
            if let Err(e) = self.report(target, &report).await {
                tracing::debug!("reporting {block} on {target}: {e}");
            }
        }
    }

    async fn report(&mut self, target: TargetId, report: &ReportShardRequest) -> FsResult<()> {
        let peer = self.peer(target).await?;
        peer.request::<ReportShardReply>(Opcode::ReportShard, report, &mut []).await.map(drop)
    }

    /// A whole shard of another target into `data`, which is as long as it; its integrity entries. Nothing is verified.
    async fn read_all(&mut self, block: BlockId, other: &Listed, data: &mut [u8]) -> FsResult<Bytes> {
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
        Ok(reply.page_crcs)
    }
}

/// A shard, as far as it has been found.
struct Pages {
    data: Vec<u8>,
    /// Integrity entries.
    crcs: Vec<u8>,
    /// Pages of which no good copy has been found yet.
    wanting: BTreeSet<usize>,
}

impl Pages {
    fn of(length: u32) -> Pages {
        let count = pages(length as usize);
        Pages { data: vec![0; length as usize], crcs: vec![0; 4 * count], wanting: (0..count).collect() }
    }

    /// Takes what is good of a copy; the first page that is not.
    fn take(&mut self, data: Vec<u8>, crcs: &[u8]) -> Option<usize> {
        let found = page_crcs(&data);
        let is_good = |page: usize| {
            let entry = 4 * page..4 * page + 4;
            crcs.len() == found.len() && crcs[entry.clone()] == found[entry]
        };
        let bad = (0..pages(data.len())).find(|page| !is_good(*page));
        if bad.is_none() {
            (self.data, self.crcs) = (data, found);
            self.wanting.clear();
            return None;
        }
        for page in self.wanting.iter().copied().filter(|page| is_good(*page)) {
            let bytes = page * PAGE_SIZE..data.len().min((page + 1) * PAGE_SIZE);
            self.data[bytes.clone()].copy_from_slice(&data[bytes]);
            self.crcs[4 * page..4 * page + 4].copy_from_slice(&found[4 * page..4 * page + 4]);
        }
        self.wanting.retain(|page| !is_good(*page));
        bad
    }
}

/// Shards whose page of this number is good.
fn good(present: &BTreeMap<u8, Pages>, page: usize) -> impl Iterator<Item = u8> {
    present.iter().filter(move |(_, shard)| !shard.wanting.contains(&page)).map(|(no, _)| *no)
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
