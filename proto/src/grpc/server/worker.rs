//! The controller's registry, for its workers.

use super::{blocking, empty, refused};
use crate::grpc::v1;
use crate::grpc::v1::worker_service_server::{WorkerService as Wire, WorkerServiceServer};
use crate::{WorkerHello, WorkerId, WorkerRegistry};
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// Puts a [`WorkerRegistry`] on the wire.
#[derive(Clone)]
pub struct WorkerRegistryServer {
    registry: Arc<dyn WorkerRegistry>,
}

impl WorkerRegistryServer {
    /// The generated service over `registry`.
    pub fn service(registry: Arc<dyn WorkerRegistry>) -> WorkerServiceServer<Self> {
        WorkerServiceServer::new(WorkerRegistryServer { registry })
    }
}

#[tonic::async_trait]
impl Wire for WorkerRegistryServer {
    async fn register(&self, request: Request<v1::RegisterRequest>) -> Result<Response<v1::RegisterResponse>, Status> {
        let hello = WorkerHello::try_from(request.into_inner()).map_err(refused)?;
        let registry = Arc::clone(&self.registry);
        let assignment = blocking(move || registry.register(hello)).await?;
        Ok(Response::new(assignment.into()))
    }

    async fn ready(&self, request: Request<v1::ReadyRequest>) -> Result<Response<v1::Empty>, Status> {
        let request = request.into_inner();
        let id = WorkerId { name: request.name, incarnation: request.incarnation };
        let registry = Arc::clone(&self.registry);
        blocking(move || registry.ready(&id)).await?;
        Ok(empty())
    }

    async fn ranks(&self, request: Request<v1::RanksRequest>) -> Result<Response<v1::RanksResponse>, Status> {
        let request = request.into_inner();
        let id = WorkerId { name: request.name, incarnation: request.incarnation };
        let registry = Arc::clone(&self.registry);
        let collective_addresses = blocking(move || registry.ranks(&id)).await?;
        Ok(Response::new(v1::RanksResponse { collective_addresses }))
    }

    async fn heartbeat(
        &self,
        request: Request<v1::HeartbeatRequest>,
    ) -> Result<Response<v1::HeartbeatResponse>, Status> {
        let request = request.into_inner();
        let id = WorkerId { name: request.name, incarnation: request.incarnation };
        let registry = Arc::clone(&self.registry);
        let stop = blocking(move || registry.heartbeat(&id)).await?;
        Ok(Response::new(v1::HeartbeatResponse { stop }))
    }
}
