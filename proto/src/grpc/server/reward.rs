//! A reward worker for other processes.

use super::{Ready, blocking, read_all, ready, refused};
use crate::grpc::v1::reward_service_server::{RewardService as Wire, RewardServiceServer};
use crate::grpc::{TransportConfig, v1};
use crate::{RewardService, ScoreRequest};
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Puts a [`RewardService`] on the wire.
#[derive(Clone)]
pub struct RewardServer {
    service: Arc<dyn RewardService>,
}

impl RewardServer {
    /// The generated service over `service`.
    pub fn service(service: Arc<dyn RewardService>, config: &TransportConfig) -> RewardServiceServer<Self> {
        limited!(RewardServiceServer::new(RewardServer { service }), config)
    }
}

#[tonic::async_trait]
impl Wire for RewardServer {
    type ScoreStream = Ready<v1::RewardOutcome>;

    async fn score(
        &self,
        request: Request<Streaming<v1::ScoreRequest>>,
    ) -> Result<Response<Self::ScoreStream>, Status> {
        let requests = read_all(request).await?.into_iter().map(ScoreRequest::try_from);
        let requests = requests.collect::<Result<Vec<_>, _>>().map_err(refused)?;
        let service = Arc::clone(&self.service);
        let outcomes = blocking(move || service.score(&requests)).await?;
        Ok(ready(outcomes.into_iter().map(Into::into)))
    }
}
