//! etcd, by its gRPC interface.
//!
//! All keys stand below one prefix, so that a cluster can be shared. Reads are linearizable.

mod members;
mod windows;

use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::{
    Fault, Limits, Link,
    owner::{OWNER, Write},
};
use crate::store::{Order, Pair, StoreResult, url::Place};
use members::Members;
use windows::Widths;

#[allow(unreachable_pub, missing_docs, reason = "generated")]
mod pb {
    tonic::include_proto!("etcdserverpb");
}

use pb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, compare,
    range_request::SortOrder, request_op,
};

/// etcd takes 1.5 MiB.
const TRANSACTION_BYTES: usize = 1 << 20;

pub(super) struct Etcd {
    members: Members,
    prefix: Vec<u8>,
    /// Of one transaction, the owner's record included.
    writes_max: usize,
    widths: Widths,
    place: String,
}

impl Etcd {
    /// Asks a member whether it is of use. One that does not answer may come up later.
    pub(super) async fn open(place: &Place) -> StoreResult<Etcd> {
        let Place::Etcd { hosts, prefix, writes_max, user, access } = place else {
            return Err(super::io_error(&place.to_string(), std::io::Error::other("it is no etcd")));
        };
        let etcd = Etcd {
            members: Members::new(place, hosts, user.as_deref(), access)?,
            prefix: format!("{}/", prefix.trim_matches('/')).into_bytes(),
            writes_max: *writes_max,
            widths: Widths::default(),
            place: place.to_string(),
        };
        let check = async {
            etcd.members.check_version().await?;
            etcd.scan(OWNER.to_vec()..[OWNER, &[0]].concat(), Order::Ascending, 1).await
        };
        match super::worker::timed(check).await {
            Err(Fault::Fatal(e)) => Err(e),
            Ok(_) | Err(Fault::Unavailable(_)) => Ok(etcd),
        }
    }

    fn key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix, key].concat()
    }

    /// The first pairs of a range, and how many there are in it.
    async fn range(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> Result<(Vec<Pair>, u64), Fault> {
        let sort = match order {
            // The order in which it finds them. Asked to sort, it reads the whole range first, whatever the limit
            // (https://github.com/etcd-io/etcd/issues/20745); backwards that cannot be helped.
            Order::Ascending => SortOrder::None,
            Order::Descending => SortOrder::Descend,
        };
        let request = RangeRequest {
            key: self.key(&range.start).into(),
            range_end: self.key(&range.end).into(),
            limit: i64::try_from(limit).unwrap_or(i64::MAX),
            sort_order: sort.into(),
        };
        let call = self.members.call(request, async |mut kv, request| kv.range(request).await);
        let answer = call.await?;
        let pair =
            |kv: pb::KeyValue| (kv.key.get(self.prefix.len()..).unwrap_or_default().to_vec(), kv.value);
        Ok((answer.kvs.into_iter().map(pair).collect(), answer.count.cast_unsigned()))
    }

    fn write(&self, key: &[u8], value: Option<Bytes>) -> RequestOp {
        let key = self.key(key).into();
        let request = match value {
            Some(value) => request_op::Request::RequestPut(PutRequest { key, value }),
            None => request_op::Request::RequestDeleteRange(DeleteRangeRequest { key }),
        };
        RequestOp { request: Some(request) }
    }

    fn transaction(&self, expected: Bytes, next: Bytes, writes: &[Write]) -> TxnRequest {
        let is = if expected.is_empty() {
            (compare::CompareTarget::Version, compare::TargetUnion::Version(0))
        } else {
            (compare::CompareTarget::Value, compare::TargetUnion::Value(expected))
        };
        let condition = Compare {
            result: compare::CompareResult::Equal.into(),
            target: is.0.into(),
            key: self.key(OWNER).into(),
            target_union: Some(is.1),
        };
        let mut success = vec![self.write(OWNER, Some(next))];
        success.extend(writes.iter().map(|(key, value)| self.write(key, value.clone())));
        TxnRequest { compare: vec![condition], success }
    }
}

impl Link for Etcd {
    fn apply(
        self: Arc<Self>,
        expected: Bytes,
        next: Bytes,
        writes: Arc<[Write]>,
    ) -> BoxFuture<'static, Result<bool, Fault>> {
        let request = self.transaction(expected, next, &writes);
        Box::pin(async move {
            let call = self.members.call(request, async |mut kv, request| kv.txn(request).await);
            Ok(call.await?.succeeded)
        })
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        Box::pin(async move {
            if limit == usize::MAX {
                return Ok(self.range(range, order, limit).await?.0);
            }
            let mut found = Vec::new();
            let mut windows = self.widths.windows(range, order);
            while found.len() < limit
                && let Some(window) = windows.next()
            {
                let wanted = limit - found.len();
                let (pairs, count) =
                    self.range(window, order, wanted).await.inspect_err(|_| windows.failed())?;
                windows.held(count, wanted as u64);
                found.extend(pairs);
            }
            Ok(found)
        })
    }

    fn limits(&self) -> Limits {
        Limits { writes: self.writes_max - 1, bytes: TRANSACTION_BYTES }
    }

    fn note(&self, key: Vec<u8>, value: Option<Bytes>) -> BoxFuture<'_, Result<(), Fault>> {
        let request = TxnRequest { compare: Vec::new(), success: vec![self.write(&key, value)] };
        Box::pin(async move {
            let call = self.members.call(request, async |mut kv, request| kv.txn(request).await);
            call.await.map(drop)
        })
    }

    fn health(&self) -> BoxFuture<'_, Vec<String>> {
        Box::pin(self.members.health())
    }

    fn place(&self) -> &str {
        &self.place
    }
}
