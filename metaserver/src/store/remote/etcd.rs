//! etcd, by its gRPC interface.
//!
//! All keys stand below one prefix, so that a cluster can be shared. Reads are linearizable.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tonic::{
    Code, Response, Status,
    transport::{Channel, Endpoint},
};

use super::{
    Fault, Limits, Link,
    owner::{OWNER, Write},
};
use crate::store::{Order, Pair, StoreError, StoreResult, url::Place};

#[allow(unreachable_pub, missing_docs, reason = "generated")]
mod pb {
    tonic::include_proto!("etcdserverpb");
}

use pb::{
    Compare, DeleteRangeRequest, PutRequest, RangeRequest, RequestOp, TxnRequest, compare,
    kv_client::KvClient, range_request::SortOrder, request_op,
};

/// etcd takes 1.5 MiB.
const TRANSACTION_BYTES: usize = 1 << 20;
/// Below the time-out of the worker, so that it is this member that is left.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// What a page of pairs may take.
const ANSWER_BYTES_MAX: usize = 256 << 20;

pub(super) struct Etcd {
    members: Vec<KvClient<Channel>>,
    /// The member that answered last.
    at: AtomicUsize,
    prefix: Vec<u8>,
    /// Of one transaction, the owner's record included.
    writes_max: usize,
    place: String,
}

impl Etcd {
    /// Connects when it is used.
    pub(super) fn open(
        place: &Place,
        hosts: &[String],
        prefix: &str,
        writes_max: usize,
    ) -> StoreResult<Etcd> {
        let mut members = Vec::new();
        for host in hosts {
            let member = Endpoint::from_shared(format!("http://{host}")).map_err(|e| StoreError::Place {
                text: place.to_string(),
                why: format!("'{host}' is not an address: {e}"),
            })?;
            let channel = member
                .tcp_nodelay(true)
                .connect_timeout(Duration::from_secs(1))
                .http2_keep_alive_interval(Duration::from_secs(1))
                .keep_alive_timeout(Duration::from_secs(1))
                .keep_alive_while_idle(true)
                .timeout(ANSWER_TIMEOUT)
                .connect_lazy();
            members.push(KvClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX));
        }
        let prefix = format!("{}/", prefix.trim_matches('/')).into_bytes();
        Ok(Etcd { members, at: AtomicUsize::new(0), prefix, writes_max, place: place.to_string() })
    }

    fn key(&self, key: &[u8]) -> Vec<u8> {
        [&self.prefix, key].concat()
    }

    /// Calls the member that answered last; when it does not, the next call goes to another.
    async fn call<T>(
        &self,
        call: impl AsyncFnOnce(KvClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Fault> {
        let at = self.at.load(Ordering::Relaxed);
        match call(self.members[at % self.members.len()].clone()).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(status) => {
                let fault = self.fault(&status);
                if matches!(fault, Fault::Unavailable(_)) {
                    // Unless another call has noticed, too.
                    let _ = self.at.compare_exchange(at, at + 1, Ordering::Relaxed, Ordering::Relaxed);
                }
                Err(fault)
            }
        }
    }

    fn fault(&self, status: &Status) -> Fault {
        let text = status.message();
        let fatal = |what: &str| {
            Fault::Fatal(StoreError::Place {
                text: self.place.clone(),
                why: format!("{what} (etcd says: {text})"),
            })
        };
        match status.code() {
            Code::ResourceExhausted if text.contains("space exceeded") => {
                Fault::Fatal(StoreError::NoSpace { folder: self.place.clone().into() })
            }
            Code::InvalidArgument if text.contains("too many operations") => {
                fatal("its members run with a lower --max-txn-ops than the address says")
            }
            Code::InvalidArgument => fatal("it does not take the transaction"),
            Code::Unauthenticated | Code::PermissionDenied => fatal("it wants credentials"),
            Code::Unimplemented => fatal("it is no etcd of version 3.4 or newer"),
            _ => Fault::Unavailable(format!("{:?}: {text}", status.code())),
        }
    }
}

impl Link for Etcd {
    fn apply<'a>(
        &'a self,
        expected: &'a [u8],
        next: &'a [u8],
        writes: &'a [Write],
    ) -> BoxFuture<'a, Result<bool, Fault>> {
        Box::pin(async move {
            let owner = self.key(OWNER);
            let is = if expected.is_empty() {
                (compare::CompareTarget::Version, compare::TargetUnion::Version(0))
            } else {
                (compare::CompareTarget::Value, compare::TargetUnion::Value(expected.to_vec().into()))
            };
            let condition = Compare {
                result: compare::CompareResult::Equal.into(),
                target: is.0.into(),
                key: owner.clone().into(),
                target_union: Some(is.1),
            };
            let mut success = vec![put(owner, next.to_vec())];
            success.extend(writes.iter().map(|(key, value)| match value {
                Some(value) => put(self.key(key), value.clone()),
                None => RequestOp {
                    request: Some(request_op::Request::RequestDeleteRange(DeleteRangeRequest {
                        key: self.key(key).into(),
                    })),
                },
            }));
            let request = TxnRequest { compare: vec![condition], success };
            Ok(self.call(async |mut kv| kv.txn(request).await).await?.succeeded)
        })
    }

    fn scan(
        &self,
        range: Range<Vec<u8>>,
        order: Order,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<Pair>, Fault>> {
        Box::pin(async move {
            let sort = match order {
                Order::Ascending => SortOrder::Ascend,
                Order::Descending => SortOrder::Descend,
            };
            let request = RangeRequest {
                key: self.key(&range.start).into(),
                range_end: self.key(&range.end).into(),
                limit: i64::try_from(limit).unwrap_or(i64::MAX),
                sort_order: sort.into(),
            };
            let pairs = self.call(async |mut kv| kv.range(request).await).await?.kvs.into_iter();
            Ok(pairs
                .map(|kv| (kv.key.get(self.prefix.len()..).unwrap_or_default().to_vec(), kv.value))
                .collect())
        })
    }

    fn limits(&self) -> Limits {
        Limits { writes: self.writes_max - 1, bytes: TRANSACTION_BYTES }
    }

    fn place(&self) -> &str {
        &self.place
    }
}

fn put(key: Vec<u8>, value: impl Into<bytes::Bytes>) -> RequestOp {
    let put = PutRequest { key: key.into(), value: value.into() };
    RequestOp { request: Some(request_op::Request::RequestPut(put)) }
}
