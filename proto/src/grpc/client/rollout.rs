//! A rollout engine in another process.

use crate::grpc::convert::{version_from_wire, version_to_wire};
use crate::grpc::v1::rollout_service_client::RolloutServiceClient;
use crate::grpc::{Endpoint, v1};
use crate::{GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceError, ServiceResult};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use temper_types::{ErrorCode, PolicyVersion};
use tonic::transport::Channel;

/// What a call may take beyond the wait that it asks for.
const GRACE: Duration = Duration::from_secs(30);
/// What counters are waited for: nothing depends on them.
const STATS_TIMEOUT: Duration = Duration::from_secs(2);

/// [`RolloutService`] of another process.
#[derive(Debug)]
pub struct RolloutClient {
    endpoint: Endpoint,
    client: RolloutServiceClient<Channel>,
    /// Counters that were read last; they stand in while the engine does not answer.
    last_stats: Mutex<RolloutStats>,
}

impl RolloutClient {
    /// The engine at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(RolloutServiceClient::new(endpoint.channel()), endpoint.config());
        RolloutClient { endpoint, client, last_stats: Mutex::default() }
    }

    fn call_timeout(&self) -> Duration {
        self.endpoint.config().call_timeout
    }
}

impl RolloutService for RolloutClient {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        let mut client = self.client.clone();
        let message = v1::SubmitRequest { groups: groups.into_iter().map(Into::into).collect() };
        self.endpoint
            .call(("submit", self.call_timeout()), message, |request| async move { client.submit(request).await })?;
        Ok(())
    }

    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        const OPERATION: &str = "next_group";
        let mut client = self.client.clone();
        let timeout_micros = u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX);
        let message = v1::NextGroupRequest { timeout_micros };
        let answer = self.endpoint.call((OPERATION, timeout.saturating_add(GRACE)), message, |request| async move {
            client.next_group(request).await
        })?;
        let group = answer.into_inner().group.map(GroupResult::try_from).transpose();
        group.map_err(self.endpoint.unreadable(OPERATION))
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        let mut client = self.client.clone();
        let call = ("abort_all", self.call_timeout());
        let answer =
            self.endpoint.call(call, v1::Empty {}, |request| async move { client.abort_all(request).await })?;
        Ok(answer.into_inner().num_groups as usize)
    }

    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        const OPERATION: &str = "set_version";
        let mut client = self.client.clone();
        let message = v1::SetVersionRequest { version: Some(version_to_wire(version)) };
        let call = (OPERATION, self.endpoint.config().compute_timeout);
        let answer = self.endpoint.call(call, message, |request| async move { client.set_version(request).await })?;
        let held = version_from_wire(answer.into_inner().version).map_err(self.endpoint.unreadable(OPERATION))?;
        if held == version {
            return Ok(());
        }
        let message = format!("expected weights of version {version}, the engine attests {held}");
        Err(ServiceError::new(ErrorCode::VersionMismatch, self.endpoint.name(), OPERATION, message))
    }

    fn sleep(&self) -> ServiceResult<u64> {
        let mut client = self.client.clone();
        let call = ("sleep", self.call_timeout());
        let answer = self.endpoint.call(call, v1::Empty {}, |request| async move { client.sleep(request).await })?;
        Ok(answer.into_inner().num_bytes)
    }

    /// The counters that were read last, where the engine does not answer at once.
    fn stats(&self) -> RolloutStats {
        let mut client = self.client.clone();
        let call = ("stats", self.call_timeout().min(STATS_TIMEOUT));
        let answer = self.endpoint.call(call, v1::Empty {}, |request| async move { client.stats(request).await });
        let mut last = self.last_stats.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(answer) = answer {
            *last = answer.into_inner().into();
        }
        *last
    }
}
