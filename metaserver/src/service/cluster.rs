//! Unary calls of data servers and administrators.

use fjordfs_proto::pb::meta::{
    ChangeTargetReply, ChangeTargetRequest, HandOverReply, HandOverRequest, HeartbeatReply, HeartbeatRequest,
    MetaStatusReply, MetaStatusRequest, RebalanceReply, RebalanceRequest, RegisterReply, RegisterRequest,
    ScrubReply, ScrubRequest, StatusReply, StatusRequest, WantedReply, WantedRequest,
    cluster_server::Cluster,
};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::stopped;
use crate::executor::{Caller, Job, Jobs};

/// The `Cluster` service.
pub(crate) struct ClusterService {
    jobs: Jobs,
}

impl ClusterService {
    pub(crate) fn new(jobs: Jobs) -> ClusterService {
        ClusterService { jobs }
    }

    async fn call<T>(&self, job: impl FnOnce(Caller<T>) -> Job) -> Result<Response<T>, Status> {
        let (caller, answer) = oneshot::channel();
        self.jobs.submit(job(caller));
        Ok(Response::new(answer.await.map_err(|_| stopped())??))
    }
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterReply>, Status> {
        let request = Box::new(request.into_inner());
        self.call(|caller| Job::Register(request, caller)).await
    }

    async fn heartbeat(
        &self,
        request: Request<HeartbeatRequest>,
    ) -> Result<Response<HeartbeatReply>, Status> {
        let request = Box::new(request.into_inner());
        self.call(|caller| Job::Heartbeat(request, caller)).await
    }

    async fn wanted(&self, request: Request<WantedRequest>) -> Result<Response<WantedReply>, Status> {
        let request = Box::new(request.into_inner());
        self.call(|caller| Job::Wanted(request, caller)).await
    }

    async fn change_target(
        &self,
        request: Request<ChangeTargetRequest>,
    ) -> Result<Response<ChangeTargetReply>, Status> {
        let request = Box::new(request.into_inner());
        self.call(|caller| Job::ChangeTarget(request, caller)).await
    }

    async fn scrub(&self, _: Request<ScrubRequest>) -> Result<Response<ScrubReply>, Status> {
        self.call(Job::Scrub).await
    }

    async fn rebalance(
        &self,
        request: Request<RebalanceRequest>,
    ) -> Result<Response<RebalanceReply>, Status> {
        self.call(|caller| Job::Rebalance(request.into_inner(), caller)).await
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.call(Job::Status).await
    }

    async fn hand_over(&self, _: Request<HandOverRequest>) -> Result<Response<HandOverReply>, Status> {
        self.call(Job::HandOver).await?;
        Ok(Response::new(HandOverReply {}))
    }

    async fn meta_status(&self, _: Request<MetaStatusRequest>) -> Result<Response<MetaStatusReply>, Status> {
        self.call(Job::MetaStatus).await
    }
}
