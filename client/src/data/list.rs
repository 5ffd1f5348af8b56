//! What a target holds.

use fjordfs_proto::{
    FsError, FsResult, TargetId,
    frame::{self, Opcode},
    pb::data::{ListShardsReply, ListShardsRequest},
};

use super::DataClient;

impl DataClient {
    /// A page of a target's shards of blocks above `after`; `limit` 0 is as many as it gives.
    pub(crate) async fn list_shards(
        &self,
        target: TargetId,
        after: u64,
        limit: u32,
    ) -> FsResult<ListShardsReply> {
        let request = ListShardsRequest { target: target.0, after_block: after, limit, group: None };
        let work = async {
            let connection = self.connection(target).await?;
            connection.request(Opcode::ListShards, &request, Vec::new()).await
        };
        let answer = self.while_up(target, work).await.map_err(FsError::to_users)?;
        Ok(frame::decode_body(Opcode::ListShards, &answer.body)?)
    }
}
