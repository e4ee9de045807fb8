//! The controller, as a worker sees it.

use crate::grpc::v1::worker_service_client::WorkerServiceClient;
use crate::grpc::{Endpoint, v1};
use crate::{Assignment, ServiceResult, WorkerHello, WorkerId, WorkerRegistry};
use tonic::transport::Channel;

/// [`WorkerRegistry`] of a controller in another process.
#[derive(Debug)]
pub struct WorkerRegistryClient {
    endpoint: Endpoint,
    client: WorkerServiceClient<Channel>,
}

impl WorkerRegistryClient {
    /// The controller at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(WorkerServiceClient::new(endpoint.channel()), endpoint.config());
        WorkerRegistryClient { endpoint, client }
    }
}

impl WorkerRegistry for WorkerRegistryClient {
    fn register(&self, hello: WorkerHello) -> ServiceResult<Assignment> {
        let mut client = self.client.clone();
        let message = v1::RegisterRequest::from(hello);
        let call = ("register", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, message, |r| async move { client.register(r).await })?;
        Ok(answer.into_inner().into())
    }

    fn ready(&self, id: &WorkerId) -> ServiceResult<()> {
        let mut client = self.client.clone();
        let message = v1::ReadyRequest { name: id.name.clone(), incarnation: id.incarnation };
        let call = ("ready", self.endpoint.config().call_timeout);
        self.endpoint.call(call, message, |r| async move { client.ready(r).await })?;
        Ok(())
    }

    fn ranks(&self, id: &WorkerId) -> ServiceResult<Vec<String>> {
        let mut client = self.client.clone();
        let message = v1::RanksRequest { name: id.name.clone(), incarnation: id.incarnation };
        let call = ("ranks", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, message, |r| async move { client.ranks(r).await })?;
        Ok(answer.into_inner().collective_addresses)
    }

    fn heartbeat(&self, id: &WorkerId) -> ServiceResult<bool> {
        let mut client = self.client.clone();
        let message = v1::HeartbeatRequest { name: id.name.clone(), incarnation: id.incarnation };
        let call = ("heartbeat", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, message, |r| async move { client.heartbeat(r).await })?;
        Ok(answer.into_inner().stop)
    }
}
