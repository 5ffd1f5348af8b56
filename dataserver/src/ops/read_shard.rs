//! Reading ranges of a shard, with or without the checksums of their pages.
//!
//! PERFORMANCE-CRITICAL. The data goes from the device into a buffer and from there to the socket; it is not looked at.
//! Verifying is the client's: it must do so anyway, and another copy is only a request away for it.

use std::ops::Range;

use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE,
    block::pages,
    error::Errno,
    pb::data::{ReadShardReply, ReadShardRequest},
};
use futures_util::future::try_join_all;

use super::Output;
use crate::{
    buffer::PageBuf,
    node::Node,
    store::record::{table_at, table_pages},
};

/// Most ranges in a request: a whole block, page by page.
const RANGES_MAX: usize = 4096;

/// A gap between data and table that is read through rather than around, bytes: a second request to the device costs
/// about as much as transferring this.
const GAP_MAX: usize = 64 << 10;

/// One read from the device.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Fetch {
    /// Bytes of the record, page aligned.
    span: Range<usize>,
    /// Of those, what is sent.
    payload: Range<usize>,
}

/// What is read and what is answered.
#[derive(PartialEq, Eq, Debug)]
struct Plan {
    /// Bytes sent for each range of the request.
    lengths: Vec<u32>,
    /// Pages of data that are sent, as page numbers of the shard.
    pages: Vec<Range<usize>>,
    fetches: Vec<Fetch>,
    /// Where the table is: in which fetch, and at which byte of it the shard's first entry would be (it may lie before).
    table: Option<(usize, isize)>,
}

/// Pure, so that it can be tested without a device.
fn plan(length: u32, ranges: &[Range<u64>], integrity: bool) -> Result<Plan, String> {
    if ranges.len() > RANGES_MAX {
        return Err(format!("{} ranges; at most {RANGES_MAX} are allowed", ranges.len()));
    }
    let shard_len = u64::from(length);
    let mut plan = Plan { lengths: Vec::new(), pages: Vec::new(), fetches: Vec::new(), table: None };
    let mut total = 0;
    for range in ranges {
        if range.start % PAGE_SIZE as u64 != 0 {
            return Err(format!("offset {} is not a multiple of {PAGE_SIZE}", range.start));
        }
        // To whole pages, or to the shard's end.
        let end =
            if range.end >= shard_len { shard_len } else { range.end / PAGE_SIZE as u64 * PAGE_SIZE as u64 };
        let (start, end) = (range.start.min(end) as usize, end as usize);
        plan.lengths.push((end - start) as u32);
        total += end - start;
        if start < end {
            let page_range = start / PAGE_SIZE..pages(end);
            let span = PAGE_SIZE * (1 + page_range.start)..PAGE_SIZE * (1 + page_range.end);
            plan.pages.push(page_range);
            plan.fetches.push(Fetch { span, payload: 0..end - start });
        }
    }
    if total > fjordfs_proto::frame::PAYLOAD_MAX as usize {
        return Err(format!("{total} bytes in all; at most a block may be read at once"));
    }
    if integrity && !plan.pages.is_empty() {
        let table = table_at(length);
        let first = plan.pages.iter().map(|p| p.start).min().unwrap_or(0);
        let last = plan.pages.iter().map(|p| p.end).max().unwrap_or(0);
        let span = table + 4 * first / PAGE_SIZE * PAGE_SIZE..table + (4 * last).next_multiple_of(PAGE_SIZE);
        debug_assert!(span.end <= table + table_pages(length) * PAGE_SIZE);
        plan.table = match &mut plan.fetches[..] {
            [only] if span.start - only.span.end <= GAP_MAX => {
                only.span.end = span.end;
                Some((0, table as isize - only.span.start as isize))
            }
            _ => {
                let at = plan.fetches.len();
                let first_entry = table as isize - span.start as isize;
                plan.fetches.push(Fetch { span, payload: 0..0 });
                Some((at, first_entry))
            }
        };
    }
    Ok(plan)
}

/// Reads the ranges of a request.
pub(crate) async fn run(node: &Node, request: &ReadShardRequest) -> FsResult<Output> {
    let store = node.store(request.target)?;
    let (block, shard) = (BlockId(request.block), super::shard_no(request.shard)?);
    let entry = store.find(block, shard)?;
    let ranges: Vec<Range<u64>> = request
        .ranges
        .iter()
        .map(|r| u64::from(r.offset)..u64::from(r.offset) + u64::from(r.length))
        .collect();
    let invalid = |what| FsError::new(Errno::EINVAL, format!("read of {block} {shard}: {what}"));
    let plan = plan(entry.length, &ranges, request.integrity).map_err(invalid)?;

    let sizes: Vec<usize> = plan.fetches.iter().map(|f| f.span.len() / PAGE_SIZE).collect();
    let Some(buffers) = node.pool.take(&sizes).await else {
        return Err(invalid("it needs more buffers than there are; read less at once".to_owned()));
    };
    let reads = plan
        .fetches
        .iter()
        .zip(buffers)
        .map(|(fetch, buf)| store.read_record(&entry, fetch.span.start, buf, 0..fetch.span.len()));
    let buffers: Vec<PageBuf> = try_join_all(reads).await?;
    store.still_there(&entry)?;

    let mut page_crcs = Vec::new();
    if let Some((fetch, at)) = plan.table {
        for range in &plan.pages {
            let bytes = |page: usize| at.saturating_add(4 * page as isize) as usize;
            page_crcs.extend_from_slice(
                buffers[fetch].get(bytes(range.start)..bytes(range.end)).unwrap_or_default(),
            );
        }
    }
    let reply =
        ReadShardReply { lengths: plan.lengths, page_crcs: page_crcs.into(), shard_length: entry.length };
    let payload = buffers.into_iter().zip(plan.fetches).filter(|(_, f)| !f.payload.is_empty());
    Ok(Output::with_payload(&reply, payload.map(|(buf, f)| (buf, f.payload)).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = PAGE_SIZE;

    fn plan_one(length: u32, range: Range<u64>, integrity: bool) -> Result<Plan, String> {
        plan(length, std::slice::from_ref(&range), integrity)
    }

    #[test]
    fn a_read_near_the_end_takes_the_table_along() {
        let length = 16 << 20;
        let near = plan_one(length, (length as u64 - 8192)..length as u64, true).unwrap();
        let table = table_at(length);
        // Entries of the last two pages are in the fourth page of the table.
        let span = table - 2 * PAGE..table + 4 * PAGE;
        assert_eq!(near.fetches, [Fetch { span, payload: 0..8192 }]);
        assert_eq!(near.table, Some((0, 2 * PAGE as isize)));
        let far = plan_one(length, 4096..8192, true).unwrap();
        assert_eq!(far.fetches[1], Fetch { span: table..table + PAGE, payload: 0..0 });
        assert_eq!(plan_one(length, 4096..8192, false).unwrap().fetches.len(), 1);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        assert!(plan_one(9000, 1..4096, false).is_err());
        assert!(plan(16 << 20, &[0..1 << 24, 0..4096], false).is_err());
        assert!(plan(9000, &vec![0..0; 5000], true).is_err());
    }

    proptest! {
        #[test]
        fn plans_fetch_exactly_what_they_answer(
            length in 1..3_000_000u32,
            ranges in proptest::collection::vec((0..800u64, 0..2_000_000u64), 0..5),
            integrity: bool,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(p, len)| p * PAGE as u64..p * PAGE as u64 + len).collect();
            let plan = plan(length, &ranges, integrity).unwrap();
            let mut fetches = plan.fetches.iter().filter(|f| !f.payload.is_empty());
            let mut page_ranges = plan.pages.iter();
            for (range, got) in ranges.iter().zip(&plan.lengths) {
                let end = range.end.min(length.into());
                let wanted = end.saturating_sub(range.start);
                // Whole pages, or up to the shard's end.
                prop_assert!(u64::from(*got) == wanted || end < length.into() && u64::from(*got) == wanted / PAGE as u64 * PAGE as u64);
                if *got > 0 {
                    let fetch = fetches.next().unwrap();
                    prop_assert_eq!(fetch.span.start, PAGE + range.start as usize);
                    prop_assert_eq!(fetch.payload.len(), *got as usize);
                    let pages = page_ranges.next().unwrap();
                    prop_assert_eq!((pages.start, pages.len()), (range.start as usize / PAGE, fjordfs_proto::block::pages(*got as usize)));
                }
            }
            for fetch in &plan.fetches {
                prop_assert!(fetch.span.start % PAGE == 0 && fetch.span.end % PAGE == 0);
                prop_assert!(fetch.payload.end <= fetch.span.len());
                prop_assert!(fetch.span.end <= table_at(length) + table_pages(length) * PAGE);
            }
            prop_assert_eq!(plan.table.is_some(), integrity && !plan.pages.is_empty());
            if let Some((fetch, at)) = plan.table {
                for pages in &plan.pages {
                    let first = at + 4 * pages.start as isize;
                    prop_assert_eq!(plan.fetches[fetch].span.start as isize + first, (table_at(length) + 4 * pages.start) as isize);
                    prop_assert!(first >= 0 && at + 4 * pages.end as isize <= plan.fetches[fetch].span.len() as isize);
                }
            }
        }
    }
}
