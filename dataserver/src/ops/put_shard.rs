//! Storing a shard.
//!
//! PERFORMANCE-CRITICAL. The checksums are verified here, once, before anything is written: what is stored is what the
//! client meant.

use std::sync::Arc;

use fjordfs_proto::{
    BLOCK_SIZE_MAX, BlockId, Epoch, FsError, FsResult, PAGE_SIZE, Policy, TargetId,
    block::{first_bad_page, pages},
    error::Errno,
    pb::data::{PutShardReply, PutShardRequest},
};

use crate::{blocking, buffer::PageBuf, lent::Lender, node::Node, store::NewShard};

/// Most pieces of a shard in a client's memory: what one system call takes (UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// Whether a request makes sense, before its payload is received.
pub(crate) fn check(request: &PutShardRequest, payload_len: u32) -> FsResult<NewShard> {
    let PutShardRequest { block, shard, length, .. } = *request;
    let invalid =
        |what: String| Err(FsError::new(Errno::EINVAL, format!("put of b{block} #{shard}: {what}")));
    if length == 0 || length as usize > BLOCK_SIZE_MAX {
        return invalid(format!("{length} bytes; a shard has 1 to {BLOCK_SIZE_MAX}"));
    }
    let lent: u64 = request.memory.iter().map(|piece| u64::from(piece.length)).sum();
    if (lent + u64::from(payload_len), lent.min(payload_len.into())) != (length.into(), 0) {
        return invalid(format!("{length} bytes are announced, {payload_len} were sent and {lent} are lent"));
    }
    if request.memory.len() > PIECES_MAX {
        return invalid(format!(
            "{} pieces of memory, at most {PIECES_MAX} are allowed",
            request.memory.len()
        ));
    }
    if request.page_crcs.len() != 4 * pages(length as usize) {
        return invalid(format!(
            "{} checksum bytes for {} pages",
            request.page_crcs.len(),
            pages(length as usize)
        ));
    }
    let Some(policy) = Policy::from_code(request.policy) else {
        return invalid(format!("unknown policy code {}", request.policy));
    };
    let no = super::shard_no(shard)?;
    if usize::from(no.0) >= policy.width() {
        return invalid(format!("{policy} has {} shards", policy.width()));
    }
    Ok(NewShard { block: BlockId(block), shard: no, policy: policy.code(), length })
}

fn width(policy: u32) -> FsResult<usize> {
    let policy = Policy::from_code(policy)
        .ok_or_else(|| FsError::new(Errno::EINVAL, format!("unknown policy code {policy}")))?;
    Ok(policy.width())
}

/// Fills the payload of `record` from the memory of who puts.
pub(crate) async fn fill(
    lender: Option<Arc<Lender>>,
    request: &PutShardRequest,
    mut record: PageBuf,
) -> FsResult<PageBuf> {
    let unreadable = |why: String| {
        let what = format!("put of b{} #{}: memory of the client: {why}", request.block, request.shard);
        FsError::new(Errno::EFAULT, what)
    };
    let lender = lender.ok_or_else(|| unreadable("this server does not read it".to_owned()))?;
    let (pieces, length) = (request.memory.clone(), request.length as usize);
    let reading = blocking::run(move || {
        lender.read(&pieces, &mut record[PAGE_SIZE..PAGE_SIZE + length])?;
        Ok(record)
    });
    reading.await.flatten().map_err(|e| unreadable(e.to_string()))
}

/// Verifies and stores; the payload lies at byte 4096 of `record`.
pub(crate) async fn run(
    node: &Node,
    request: &PutShardRequest,
    new: NewShard,
    record: PageBuf,
) -> FsResult<PutShardReply> {
    let store = node.store(request.target)?;
    let place = (new.block, new.shard, width(request.policy)?);
    let _admitted = node.placing.admit(TargetId(request.target), place, Epoch(request.epoch))?;
    let data = &record[PAGE_SIZE..PAGE_SIZE + new.length as usize];
    if let Some(page) = first_bad_page(data, &request.page_crcs) {
        if request.memory.is_empty() {
            store.bad_page();
        }
        let what = format!(
            "put of {} {}: page {page} does not match its checksum; it was damaged on the way, send it again",
            new.block, new.shard
        );
        return Err(FsError::new(Errno::EBADMSG, what));
    }
    store.put(new, record, &request.page_crcs).await?;
    Ok(PutShardReply {})
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::pb::data::MemoryPiece;

    use super::*;

    #[test]
    fn requests_that_contradict_themselves_are_refused() {
        let good = PutShardRequest {
            target: 1,
            block: 2,
            shard: 1,
            policy: 2,
            length: 4097,
            page_crcs: vec![0; 8].into(),
            epoch: 0,
            memory: vec![],
        };
        assert!(check(&good, 4097).is_ok());
        assert!(check(&good, 4096).is_err());
        let lent = |lengths: &[u32]| PutShardRequest {
            memory: lengths.iter().map(|&length| MemoryPiece { address: 1, length }).collect(),
            ..good.clone()
        };
        assert!(check(&lent(&[4096, 1]), 0).is_ok());
        assert!(check(&lent(&[4096, 1]), 4097).is_err());
        assert!(check(&lent(&[4096]), 1).is_err());
        assert!(check(&lent(&[4096]), 0).is_err());
        assert!(check(&lent(&[u32::MAX; 3]), 0).is_err());
        assert!(check(&lent(&[1; 4097]), 0).is_err());
        let bad = [
            PutShardRequest { length: 0, page_crcs: Default::default(), ..good.clone() },
            PutShardRequest { length: u32::MAX, ..good.clone() },
            PutShardRequest { page_crcs: vec![0; 7].into(), ..good.clone() },
            PutShardRequest { policy: 0, ..good.clone() },
            PutShardRequest { shard: 2, ..good.clone() },
            PutShardRequest { shard: 257, ..good },
        ];
        for request in bad {
            assert_eq!(check(&request, request.length).unwrap_err().errno, Errno::EINVAL, "{request:?}");
        }
    }
}
