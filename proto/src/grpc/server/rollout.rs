//! A rollout engine for other processes.

use super::{blocking, empty, refused};
use crate::grpc::convert::{version_from_wire, version_to_wire};
use crate::grpc::v1::rollout_service_server::{RolloutService as Wire, RolloutServiceServer};
use crate::grpc::{TransportConfig, v1};
use crate::{GroupRequest, RolloutService};
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// Puts a [`RolloutService`] on the wire.
#[derive(Clone)]
pub struct RolloutServer {
    service: Arc<dyn RolloutService>,
}

impl RolloutServer {
    /// The generated service over `service`.
    pub fn service(service: Arc<dyn RolloutService>, config: &TransportConfig) -> RolloutServiceServer<Self> {
        limited!(RolloutServiceServer::new(RolloutServer { service }), config)
    }
}

#[tonic::async_trait]
impl Wire for RolloutServer {
    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<Response<v1::Empty>, Status> {
        let groups = request.into_inner().groups.into_iter().map(GroupRequest::try_from);
        let groups = groups.collect::<Result<Vec<_>, _>>().map_err(refused)?;
        let service = Arc::clone(&self.service);
        blocking(move || service.submit(groups)).await?;
        Ok(empty())
    }

    async fn next_group(
        &self,
        request: Request<v1::NextGroupRequest>,
    ) -> Result<Response<v1::NextGroupResponse>, Status> {
        let timeout = Duration::from_micros(request.into_inner().timeout_micros);
        let service = Arc::clone(&self.service);
        let group = blocking(move || service.next_group(timeout)).await?;
        Ok(Response::new(v1::NextGroupResponse { group: group.map(Into::into) }))
    }

    async fn abort_all(&self, _: Request<v1::Empty>) -> Result<Response<v1::AbortAllResponse>, Status> {
        let service = Arc::clone(&self.service);
        let num_groups = blocking(move || service.abort_all()).await? as u64;
        Ok(Response::new(v1::AbortAllResponse { num_groups }))
    }

    async fn set_version(
        &self,
        request: Request<v1::SetVersionRequest>,
    ) -> Result<Response<v1::SetVersionResponse>, Status> {
        let version = version_from_wire(request.into_inner().version).map_err(refused)?;
        let service = Arc::clone(&self.service);
        blocking(move || service.set_version(version)).await?;
        Ok(Response::new(v1::SetVersionResponse { version: Some(version_to_wire(version)) }))
    }

    async fn sleep(&self, _: Request<v1::Empty>) -> Result<Response<v1::SleepResponse>, Status> {
        let service = Arc::clone(&self.service);
        let num_bytes = blocking(move || service.sleep()).await?;
        Ok(Response::new(v1::SleepResponse { num_bytes }))
    }

    async fn stats(&self, _: Request<v1::Empty>) -> Result<Response<v1::RolloutStats>, Status> {
        let service = Arc::clone(&self.service);
        let stats = blocking(move || Ok(service.stats())).await?;
        Ok(Response::new(stats.into()))
    }
}
