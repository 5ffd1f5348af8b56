//! The session stream: reads requests while the client's share of memory has room, and sends what its outbox has.

use std::{pin::Pin, sync::Arc, time::Duration};

use fjordfs_proto::{
    SessionId,
    pb::meta::{ClientMessage, Request, ServerMessage, meta_server::Meta, request::Op},
};
use futures_util::{Stream, stream};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tonic::{Status, Streaming};

use super::{
    outbox::{Outbox, Permit},
    stopped,
};
use crate::executor::{Job, Jobs};

/// The first message must come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// A client's share of memory in units of about 4 KiB: 4,096 small requests, or 64 directory pages, at once.
const UNITS: u32 = 4096;
const UNIT_BYTES: usize = 4096;
/// What the answers of reads may take.
const UNITS_DIRECTORY: u32 = 64;
const UNITS_EXTENTS: u32 = 32;

/// The `Meta` service.
pub(crate) struct MetaService {
    jobs: Jobs,
}

impl MetaService {
    pub(crate) fn new(jobs: Jobs) -> MetaService {
        MetaService { jobs }
    }
}

#[tonic::async_trait]
impl Meta for MetaService {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;

    async fn attach(
        &self,
        request: tonic::Request<Streaming<ClientMessage>>,
    ) -> Result<tonic::Response<Self::AttachStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no hello came: the first message must carry it"))??;
        let mut first = first.ok_or_else(|| Status::invalid_argument("the stream ended before its hello"))?;
        let hello = first
            .hello
            .take()
            .ok_or_else(|| Status::invalid_argument("the first message must carry a hello"))?;
        let outbox = Arc::new(Outbox::default());
        let (caller, welcome) = oneshot::channel();
        self.jobs.submit(Job::Attach { hello: Box::new(hello), outbox: outbox.clone(), caller });
        let welcome = welcome.await.map_err(|_| stopped())??;
        let session = SessionId(welcome.session);
        outbox.welcome(welcome);

        let room = Arc::new(Semaphore::new(UNITS as usize));
        let reader = Reader { session, jobs: self.jobs.clone(), outbox: outbox.clone(), room };
        let rest = first;
        tokio::spawn(reader.run(rest, inbound));
        let guard = Guard { session, jobs: self.jobs.clone(), outbox };
        let stream = stream::unfold(guard, |guard| async {
            let next = guard.outbox.next().await?;
            Some((next, guard))
        });
        Ok(tonic::Response::new(Box::pin(stream)))
    }
}

/// Lives as long as the outgoing stream: when the client goes away, tonic drops it.
struct Guard {
    session: SessionId,
    jobs: Jobs,
    outbox: Arc<Outbox>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.outbox.close(None);
        self.jobs.submit(Job::Detached { session: self.session, outbox: self.outbox.clone() });
    }
}

/// The incoming side.
struct Reader {
    session: SessionId,
    jobs: Jobs,
    outbox: Arc<Outbox>,
    room: Arc<Semaphore>,
}

impl Reader {
    async fn run(self, first: ClientMessage, mut inbound: Streaming<ClientMessage>) {
        let mut message = first;
        loop {
            if message.hello.is_some() {
                let why = "only the first message of a stream carries a hello".into();
                return self.outbox.close(Some(crate::refusal::Refusal::Invalid(why)));
            }
            let ClientMessage { requests, goodbye, beat, recalled, given_back, demoted, .. } = message;
            // Before the requests, which may have to wait for room: others wait for recalls.
            let lets_go = !recalled.is_empty() || given_back.is_some() || demoted.is_some();
            if requests.is_empty() || beat != 0 || lets_go {
                let outbox = self.outbox.clone();
                let session = self.session;
                self.jobs.submit(Job::Sign { session, outbox, beat, recalled, given_back, demoted });
            }
            if !self.submit(requests).await {
                return;
            }
            if goodbye {
                let outbox = self.outbox.clone();
                return self.jobs.submit(Job::Goodbye { session: self.session, outbox });
            }
            let next = tokio::select! {
                () = self.outbox.wait_closed() => return,
                next = inbound.message() => next,
            };
            message = match next {
                Ok(Some(message)) => message,
                // The client is gone, or done sending without a goodbye: its session waits for it to come back.
                Ok(None) => return self.outbox.close(None),
                Err(e) => {
                    tracing::debug!(session = %self.session, error = %e, "stream broke");
                    return self.outbox.close(None);
                }
            };
        }
    }

    /// Hands requests on as room allows. False when the stream was closed meanwhile.
    async fn submit(&self, requests: Vec<Request>) -> bool {
        let mut batch: Vec<(Request, Permit)> = Vec::with_capacity(requests.len());
        for request in requests {
            let units = units(&request);
            let permit = match self.room.clone().try_acquire_many_owned(units) {
                Ok(permit) => permit,
                Err(_) => {
                    // What came before must go on first: its answers are what makes room.
                    self.send(std::mem::take(&mut batch));
                    match self.wait(units).await {
                        Some(permit) => permit,
                        None => return false,
                    }
                }
            };
            batch.push((request, Some(permit)));
        }
        if !batch.is_empty() {
            self.send(batch);
        }
        true
    }

    fn send(&self, requests: Vec<(Request, Permit)>) {
        self.jobs.submit(Job::Requests { session: self.session, outbox: self.outbox.clone(), requests });
    }

    async fn wait(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            () = self.outbox.wait_closed() => None,
            permit = self.room.clone().acquire_many_owned(units) => permit.ok(),
        }
    }
}

/// What a request and its answer may take.
fn units(request: &Request) -> u32 {
    let answer = match &request.op {
        Some(Op::ReadDir(_)) => UNITS_DIRECTORY,
        Some(Op::Lookup(lookup)) if lookup.neighbours > 0 => UNITS_DIRECTORY,
        Some(Op::Open(_) | Op::GetExtents(_)) => UNITS_EXTENTS,
        _ => 0,
    };
    let own = 1 + (request.encoded_len() / UNIT_BYTES) as u32;
    (own + answer).min(UNITS)
}

#[cfg(test)]
mod tests {
    use fjordfs_proto::pb::meta::{GetAttr, ReadDir};

    use super::*;

    #[tokio::test]
    async fn a_client_that_does_not_read_is_not_read_from() {
        let (jobs, mut arrived) = Jobs::channel(true);
        let room = Arc::new(Semaphore::new(UNITS as usize));
        let reader = Reader { session: SessionId(1), jobs, outbox: Arc::default(), room: room.clone() };
        let outbox = reader.outbox.clone();
        let list = Request { op: Some(Op::ReadDir(ReadDir::default())), ..Request::default() };
        let look = Request { op: Some(Op::GetAttr(GetAttr::default())), ..Request::default() };
        let requests = [vec![list; 200], vec![look]].concat();
        let submitted = tokio::spawn(async move { reader.submit(requests).await });
        tokio::time::sleep(Duration::from_millis(100)).await;

        let mut waiting = || -> Vec<(Request, Permit)> {
            let batches = std::iter::from_fn(|| arrived.try_recv().ok()).map(|job| match job {
                Job::Requests { requests, .. } => requests,
                _ => panic!("only requests were submitted"),
            });
            batches.flatten().collect()
        };
        let mut held = waiting();
        assert_eq!(
            held.len(),
            (UNITS / (UNITS_DIRECTORY + 1)) as usize,
            "answers nobody took hold the rest back"
        );
        held.truncate(held.len() - 10);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let more = waiting();
        assert_eq!(more.len(), 10, "as many as were sent");

        outbox.close(None);
        assert!(!submitted.await.unwrap(), "closing ends the wait");
    }
}
