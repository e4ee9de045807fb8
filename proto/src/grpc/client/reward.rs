//! A reward worker in another process.

use crate::grpc::channel::collect;
use crate::grpc::v1::reward_service_client::RewardServiceClient;
use crate::grpc::{Endpoint, v1};
use crate::{RewardService, ScoreRequest, ServiceError, ServiceResult};
use temper_types::{ErrorCode, RewardOutcome};
use tonic::transport::Channel;

/// [`RewardService`] of another process.
#[derive(Debug)]
pub struct RewardClient {
    endpoint: Endpoint,
    client: RewardServiceClient<Channel>,
}

impl RewardClient {
    /// The reward worker at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(RewardServiceClient::new(endpoint.channel()), endpoint.config());
        RewardClient { endpoint, client }
    }
}

impl RewardService for RewardClient {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        const OPERATION: &str = "score";
        let mut client = self.client.clone();
        let messages: Vec<v1::ScoreRequest> = requests.iter().cloned().map(Into::into).collect();
        let call = (OPERATION, self.endpoint.config().compute_timeout);
        let answer = self.endpoint.call(call, tokio_stream::iter(messages), |request| async move {
            collect(client.score(request).await?).await
        })?;
        if answer.len() != requests.len() {
            let message = format!("expected {} outcomes, got {}", requests.len(), answer.len());
            return Err(ServiceError::new(ErrorCode::Internal, self.endpoint.name(), OPERATION, message));
        }
        let outcomes = answer.into_iter().map(RewardOutcome::try_from).collect::<Result<_, _>>();
        outcomes.map_err(self.endpoint.unreadable(OPERATION))
    }
}
