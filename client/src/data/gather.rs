//! Asking targets for the same range of their shards until enough have answered. Hot path.

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, Layout, PAGE_SIZE, TargetId,
    block::first_bad_page,
    error::Errno,
    frame::{self, Opcode},
    layout::ShardPiece,
    pb::data::{LocateShardRequest, Range, ReadShardReply, ReadShardRequest, ReportShardRequest},
};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tracing::{debug, warn};

use super::{
    DataClient,
    connection::{Answer, Connection},
    health::Asked,
    local::Shard,
};

/// A range of one shard of a block, and who has it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    pub(super) block: BlockId,
    pub(super) layout: Layout,
    pub(super) target: TargetId,
    pub(super) piece: ShardPiece,
}

impl DataClient {
    /// The first `need` verified answers of `wants`, which are asked in order: `need` of them at once, and one more
    /// whenever one has failed or is late.
    pub(super) async fn gather(&self, wants: &[Want], need: usize) -> Result<Vec<(u8, Bytes)>, Vec<FsError>> {
        let mut attempts = FuturesUnordered::new();
        let (mut answers, mut failures) = (Vec::with_capacity(need), Vec::new());
        let mut rest = wants.iter();
        let mut last = None;
        while answers.len() < need {
            while answers.len() + attempts.len() < need
                && let Some(want) = rest.next()
            {
                last = Some(want);
                attempts.push(self.attempt(want));
            }
            if answers.len() + attempts.len() < need {
                // Too few. Whether there is no such block at all is told by those that are still being asked.
                let is_absent = failures.iter().all(|e: &FsError| e.errno == Errno::ENOENT);
                if attempts.is_empty() || !is_absent || !answers.is_empty() {
                    if !answers.is_empty() {
                        let what = format!("{} of {need} shards have answered well", answers.len());
                        failures.push(FsError::new(Errno::EIO, what));
                    }
                    return Err(failures);
                }
            }
            let outcome = tokio::select! {
                biased;
                outcome = attempts.next() => outcome,
                () = self.late(last, rest.len() > 0) => match rest.next() {
                    Some(want) => {
                        last = Some(want);
                        attempts.push(self.attempt(want));
                        continue;
                    }
                    // Everyone has been asked, and waited for as long as an operation may take.
                    None => {
                        failures.extend(last.map(|want| self.silent(want)));
                        return Err(failures);
                    }
                },
            };
            match outcome {
                Some(Ok(answer)) => answers.push(answer),
                Some(Err(e)) => failures.push(e),
                None => {}
            }
        }
        Ok(answers)
    }

    /// Returns when others should be asked for what `want` is being asked for; without others, when nobody should
    /// wait any longer.
    pub(super) async fn late(&self, want: Option<&Want>, others: bool) {
        let Some(want) = want.filter(|_| others) else {
            return tokio::time::sleep(self.timeout).await;
        };
        let bound = self.health.bound(want.target, want.piece.length as usize);
        tokio::time::sleep(bound).await;
        if bound < self.hedge_delay && !self.health.may_hedge() {
            tokio::time::sleep(self.hedge_delay - bound).await;
        }
    }

    pub(super) fn silent(&self, want: &Want) -> FsError {
        let what = format!("{}: target {} did not answer within {:?}", want.block, want.target, self.timeout);
        FsError::new(Errno::EIO, what)
    }

    async fn attempt(&self, want: &Want) -> FsResult<(u8, Bytes)> {
        Ok((want.piece.shard, self.read_shard(want).await?))
    }

    /// Reads from one target, verified.
    pub(super) async fn read_shard(&self, want: &Want) -> FsResult<Bytes> {
        let asked = self.health.ask(want.target, want.piece.length as usize);
        let result = async {
            if let Some(bytes) = self.read_here(want).await? {
                return Ok(bytes.slice(..bytes.len().min(want.piece.length as usize)));
            }
            let connection = self.connection(want.target).await?;
            let answer = connection.request(Opcode::ReadShard, &request(want), Vec::new()).await?;
            report_damage(&connection, want, verify(want, &answer.payload, &answer)).await?;
            Ok(answer.payload.slice(..answer.payload.len().min(want.piece.length as usize)))
        };
        tell(asked, result.await)
    }

    /// As [`DataClient::read_shard`], into memory as [`DataClient::read_into`] says.
    pub(super) async fn read_shard_into(&self, want: &Want, memory: &mut [u8]) -> FsResult<usize> {
        let asked = self.health.ask(want.target, want.piece.length as usize);
        let result = async {
            if let Some(bytes) = self.read_here(want).await? {
                let filled = bytes.len().min(memory.len()).min(want.piece.length as usize);
                memory[..filled].copy_from_slice(&bytes[..filled]);
                return Ok(filled);
            }
            let connection = self.connection(want.target).await?;
            let room = memory.len().min(whole_pages(want.piece.length));
            let answer =
                connection.request_into(Opcode::ReadShard, &request(want), &mut memory[..room]).await?;
            let filled = answer.direct + answer.payload.len();
            if filled > memory.len() {
                report_damage(&connection, want, verify(want, &answer.payload, &answer)).await?;
                memory.copy_from_slice(&answer.payload[..memory.len()]);
            } else {
                memory[answer.direct..filled].copy_from_slice(&answer.payload);
                report_damage(&connection, want, verify(want, &memory[..filled], &answer)).await?;
            }
            Ok(filled.min(memory.len()).min(want.piece.length as usize))
        };
        tell(asked, result.await)
    }

    /// Reads from the shard's file, if that is on this host; `None` when the server has to be asked.
    ///
    /// # Errors
    /// The server's, which knows of no such shard.
    async fn read_here(&self, want: &Want) -> FsResult<Option<Bytes>> {
        let Want { block, target, piece, .. } = *want;
        let shard = Shard { target, block, no: piece.shard.into() };
        if !self.local.may_read(target) {
            return Ok(None);
        }
        let locate = async || {
            let connection = self.connection(target).await?;
            if !connection.is_local() {
                return Ok(None);
            }
            let request = LocateShardRequest { target: target.0, block: block.0, shard: shard.no };
            let answer = connection.request(Opcode::LocateShard, &request, Vec::new()).await?;
            frame::decode_body(Opcode::LocateShard, &answer.body).map(Some).map_err(FsError::from)
        };
        let read = self.local.read(shard, piece.offset, whole_pages(piece.length) as u32, locate).await?;
        // One that is shorter than it should be is the server's to explain.
        Ok(read.filter(|bytes| is_complete(want, bytes.len())))
    }
}

fn tell<T>(asked: Asked<'_>, result: FsResult<T>) -> FsResult<T> {
    match &result {
        Ok(_) => asked.answered(),
        Err(e) if e.errno == Errno::ENOENT => asked.absent(),
        Err(_) => asked.failed(),
    }
    result
}

fn request(want: &Want) -> ReadShardRequest {
    let length = whole_pages(want.piece.length) as u32;
    ReadShardRequest {
        target: want.target.0,
        block: want.block.0,
        shard: want.piece.shard.into(),
        ranges: vec![Range { offset: want.piece.offset, length }],
        integrity: true,
    }
}

/// Only whole pages can be verified.
fn whole_pages(length: u32) -> usize {
    (length as usize).next_multiple_of(PAGE_SIZE)
}

/// Copies end where their block does, which only their holders know.
fn is_complete(want: &Want, answered: usize) -> bool {
    want.layout.shard_size().is_none() || answered >= whole_pages(want.piece.length)
}

/// Tells the server of a shard that did not verify, so that it is repaired. The read goes on elsewhere, whatever comes of that.
async fn report_damage(connection: &Connection, want: &Want, verified: FsResult<()>) -> FsResult<()> {
    let Err(e) = verified else { return Ok(()) };
    let (target, block, shard) = (want.target.0, want.block.0, want.piece.shard.into());
    let report = ReportShardRequest { target, block, shard };
    if let Err(e) = connection.request(Opcode::ReportShard, &report, Vec::new()).await {
        debug!(block, target, "damage could not be reported: {e}");
    }
    Err(e)
}

/// `EBADMSG` when a page is not what was stored.
fn verify(want: &Want, data: &[u8], answer: &Answer) -> FsResult<()> {
    let body: ReadShardReply = frame::decode_body(Opcode::ReadShard, &answer.body)?;
    let Want { block, target, piece, .. } = want;
    let asked = whole_pages(piece.length);
    if data.len() > asked {
        return Err(FsError::new(Errno::EPROTO, format!("target {target} sent more than asked for")));
    }
    if !is_complete(want, data.len()) {
        let what = format!("{block} #{} on target {target} is shorter than its layout says", piece.shard);
        return Err(FsError::new(Errno::EIO, what));
    }
    let Some(page) = first_bad_page(data, &body.page_crcs) else { return Ok(()) };
    let at = piece.offset as usize + page * PAGE_SIZE;
    warn!(%target, %block, shard = piece.shard, offset = at, "page does not match its checksum");
    Err(FsError::new(
        Errno::EBADMSG,
        format!("{block} #{} on target {target}: the page at {at} does not match its checksum", piece.shard),
    ))
}
