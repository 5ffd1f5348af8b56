//! Telling where a shard is, so that a client on this host reads it without us.
//!
//! It is a hint with a proof: the client gets the checksums of the pages along. A shard that is deleted later becomes a
//! hole, whose zeros do not match, unless the data was zeros; and its place is never used again.

use std::os::unix::ffi::OsStrExt;

use bytes::Bytes;
use fjordfs_proto::{
    BlockId, FsError, FsResult, PAGE_SIZE, TargetId,
    block::pages,
    error::Errno,
    pb::data::{LocateShardReply, LocateShardRequest},
};

use crate::{
    node::Node,
    store::{
        Store,
        files::Files,
        index::Entry,
        record::{parse_table, table_at, table_pages},
    },
};

pub(super) async fn run(node: &Node, request: &LocateShardRequest) -> FsResult<LocateShardReply> {
    let store = node.store(request.target)?;
    let (block, shard) = (BlockId(request.block), super::shard_no(request.shard)?);
    let entry = store.find(block, shard)?;
    let page_crcs = page_crcs(node, TargetId(request.target), store, &entry).await?;
    let file = store.file_of(&entry)?;
    store.still_there(&entry)?;
    Ok(LocateShardReply {
        path: Bytes::copy_from_slice(file.path.as_os_str().as_bytes()),
        device: file.device,
        inode: file.inode,
        offset: entry.span().start + PAGE_SIZE as u64,
        length: entry.length,
        page_crcs,
    })
}

/// The checksums of all pages of a shard.
async fn page_crcs(node: &Node, target: TargetId, store: &Store<Files>, entry: &Entry) -> FsResult<Bytes> {
    if let Some(table) = node.tables.get(target, entry) {
        return Ok(Bytes::from_owner(table));
    }
    let needed = table_pages(entry.length);
    let buffer = node.pool.take(&[needed]).await.and_then(|mut buffers| buffers.pop());
    let buffer = buffer.ok_or_else(|| FsError::new(Errno::ENOMEM, "no buffer for an integrity table"))?;
    let read = store.read_record(entry, table_at(entry.length), buffer, 0..needed * PAGE_SIZE).await?;
    match parse_table(&read, entry.length) {
        Some(table) => {
            node.tables.keep(target, entry, table);
            Ok(Bytes::copy_from_slice(table))
        }
        // What is wrong may be of pages that nobody reads; the client finds out.
        None => Ok(Bytes::copy_from_slice(read.get(..4 * pages(entry.length as usize)).unwrap_or_default())),
    }
}
