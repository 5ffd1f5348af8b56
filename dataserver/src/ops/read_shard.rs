//! Reading ranges of a shard, with or without the checksums of their pages.
//!
//! PERFORMANCE-CRITICAL. The data goes from the device into a buffer and from there to the socket; it is not looked at.
//! Verifying is the client's: it must do so anyway, and another copy is only a request away for it.

use std::ops::Range;

use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, TargetId,
    block::pages,
    error::Errno,
    pb::data::{ReadShardReply, ReadShardRequest},
};
use futures_util::future::try_join_all;

use super::Output;
use crate::{
    buffer::PageBuf,
    node::Node,
    store::record::{parse_table, table_at, table_pages},
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
    /// Where the table is, if it is read: in which fetch, and from which byte of it on.
    table: Option<(usize, usize)>,
}

/// Pure, so that it can be tested without a device. `table`: the table must be read too.
fn plan(length: u32, ranges: &[Range<u64>], table: bool) -> Result<Plan, String> {
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
    if table && !plan.pages.is_empty() {
        let start = table_at(length);
        let end = start + table_pages(length) * PAGE_SIZE;
        plan.table = match &mut plan.fetches[..] {
            [only] if start - only.span.end <= GAP_MAX => {
                only.span.end = end;
                Some((0, start - only.span.start))
            }
            _ => {
                plan.fetches.push(Fetch { span: start..end, payload: 0..0 });
                Some((plan.fetches.len() - 1, 0))
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
    let target = TargetId(request.target);
    let known = if request.integrity { node.tables.get(target, &entry) } else { None };
    let plan = plan(entry.length, &ranges, request.integrity && known.is_none()).map_err(invalid)?;

    let sizes: Vec<usize> = plan.fetches.iter().map(|f| f.span.len() / PAGE_SIZE).collect();
    let Some(buffers) = node.pool.take(&sizes).await else {
        return Err(invalid("it needs more buffers than there are; read less at once".to_owned()));
    };
    let mut reads = plan
        .fetches
        .iter()
        .zip(buffers)
        .map(|(fetch, buf)| store.read_record(&entry, fetch.span.start, buf, 0..fetch.span.len()));
    let buffers: Vec<PageBuf> = match (reads.next(), reads.len()) {
        (Some(only), 0) => vec![only.await?],
        (first, _) => try_join_all(first.into_iter().chain(reads)).await?,
    };
    store.still_there(&entry)?;

    let mut page_crcs = Vec::new();
    if let Some(table) = &known {
        gather(&mut page_crcs, table, &plan.pages);
    } else if let Some((fetch, at)) = plan.table {
        let read = buffers.get(fetch).and_then(|buf| buf.get(at..)).unwrap_or_default();
        match parse_table(read, entry.length) {
            Some(table) => {
                gather(&mut page_crcs, table, &plan.pages);
                node.tables.keep(target, &entry, table);
            }
            // What is wrong may be of other pages; the client finds out.
            None => gather(&mut page_crcs, read, &plan.pages),
        }
    }
    let reply =
        ReadShardReply { lengths: plan.lengths, page_crcs: page_crcs.into(), shard_length: entry.length };
    let payload = buffers.into_iter().zip(plan.fetches).filter(|(_, f)| !f.payload.is_empty());
    Ok(Output::with_payload(&reply, payload.map(|(buf, f)| (buf, f.payload)).collect()))
}

/// The checksums of `pages` from a table.
fn gather(page_crcs: &mut Vec<u8>, table: &[u8], pages: &[Range<usize>]) {
    for range in pages {
        page_crcs.extend_from_slice(table.get(4 * range.start..4 * range.end).unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: usize = PAGE_SIZE;

    #[test]
    fn the_table_is_read_whole_and_only_where_it_is_wanted() {
        let length = 16 << 20;
        let plan = |table| plan(length, std::slice::from_ref(&(4096..8192)), table).unwrap();
        let start = table_at(length);
        let data = Fetch { span: 2 * PAGE..3 * PAGE, payload: 0..PAGE };
        assert_eq!(plan(false).fetches, std::slice::from_ref(&data));
        assert_eq!(plan(true).fetches, [data, Fetch { span: start..start + 5 * PAGE, payload: 0..0 }]);
        assert_eq!(plan(true).table, Some((1, 0)));
    }

    #[test]
    fn a_read_near_the_end_takes_the_table_along() {
        let length = 16 << 20;
        let end = u64::from(length);
        let near = plan(length, std::slice::from_ref(&(end - 8192..end)), true).unwrap();
        let table = table_at(length);
        assert_eq!(near.fetches, [Fetch { span: table - 2 * PAGE..table + 5 * PAGE, payload: 0..8192 }]);
        assert_eq!(near.table, Some((0, 2 * PAGE)));
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        assert!(plan(9000, std::slice::from_ref(&(1..4096)), false).is_err());
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
                let span = &plan.fetches[fetch].span;
                prop_assert_eq!(span.start + at, table_at(length));
                prop_assert_eq!(span.end, table_at(length) + table_pages(length) * PAGE);
            }
        }
    }
}
