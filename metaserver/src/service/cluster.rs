//! Unary calls of data servers and administrators.

use fjordfs_proto::pb::meta::{
    BackupReply, BackupRequest, BlocksReply, BlocksRequest, ChangeTargetReply, ChangeTargetRequest,
    FsckReply, FsckRequest, HandOverReply, HandOverRequest, HeartbeatReply, HeartbeatRequest, MendReply,
    MendRequest, MetaStatusReply, MetaStatusRequest, RebalanceReply, RebalanceRequest, RegisterReply,
    RegisterRequest, ScrubReply, ScrubRequest, StartGcReply, StartGcRequest, StatusReply, StatusRequest,
    UsesReply, UsesRequest, WantedReply, WantedRequest, cluster_server::Cluster,
};
use tokio::sync::oneshot;
use tonic::{Request, Response, Status};

use super::{
    stopped,
    whole::{Out, Pieces, Whole},
};
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

impl ClusterService {
    /// Something that reads the whole store, on a thread of its own where that may be.
    async fn whole<T: Send + 'static>(
        &self,
        work: impl FnOnce(Whole, &Out<T>) -> Result<(), Status> + Send + 'static,
    ) -> Result<Response<Pieces<T>>, Status> {
        let whole = Whole::begin(self.jobs.clone()).await?;
        Ok(Response::new(whole.run(work)?))
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

    async fn start_gc(&self, _: Request<StartGcRequest>) -> Result<Response<StartGcReply>, Status> {
        let message = self.jobs.upkeep().ask().map_err(Status::failed_precondition)?;
        Ok(Response::new(StartGcReply { message }))
    }

    async fn rebalance(
        &self,
        request: Request<RebalanceRequest>,
    ) -> Result<Response<RebalanceReply>, Status> {
        self.call(|caller| Job::Rebalance(request.into_inner(), caller)).await
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        let status = self.call(Job::Status).await?.into_inner();
        Ok(Response::new(StatusReply { gc: self.jobs.upkeep().report(), ..status }))
    }

    type FsckStream = Pieces<FsckReply>;

    async fn fsck(&self, request: Request<FsckRequest>) -> Result<Response<Self::FsckStream>, Status> {
        self.whole(move |whole, out| whole.fsck(request.into_inner().repair, out)).await
    }

    type BlocksStream = Pieces<BlocksReply>;

    async fn blocks(&self, _: Request<BlocksRequest>) -> Result<Response<Self::BlocksStream>, Status> {
        self.whole(Whole::blocks).await
    }

    type UsesStream = Pieces<UsesReply>;

    async fn uses(&self, request: Request<UsesRequest>) -> Result<Response<Self::UsesStream>, Status> {
        let asked = request.into_inner();
        self.whole(move |whole, out| whole.uses(&asked, out)).await
    }

    type BackupStream = Pieces<BackupReply>;

    async fn backup(&self, _: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        self.whole(Whole::backup).await
    }

    async fn mend(&self, request: Request<MendRequest>) -> Result<Response<MendReply>, Status> {
        let request = Box::new(request.into_inner());
        self.call(|caller| Job::Mend(request, caller)).await
    }

    async fn hand_over(&self, _: Request<HandOverRequest>) -> Result<Response<HandOverReply>, Status> {
        self.call(Job::HandOver).await?;
        Ok(Response::new(HandOverReply {}))
    }

    async fn meta_status(&self, _: Request<MetaStatusRequest>) -> Result<Response<MetaStatusReply>, Status> {
        self.call(Job::MetaStatus).await
    }
}
