//! A run in another process.

use crate::grpc::v1::control_service_client::ControlServiceClient;
use crate::grpc::{Endpoint, v1};
use crate::{Changed, RunEvent, RunStatus, ServiceResult, Snapshot, WorkerStatus};
use std::time::Duration;
use tonic::transport::Channel;

/// Longest time that events are followed.
const WATCH_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Controls a run.
#[derive(Debug)]
pub struct ControlClient {
    endpoint: Endpoint,
    client: ControlServiceClient<Channel>,
}

/// The calls that take nothing and give the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// Where the run stands.
    Status,
    /// Wait before the next step.
    Pause,
    /// Go on.
    Resume,
    /// End after the step under way.
    Drain,
}

impl ControlClient {
    /// The run at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(ControlServiceClient::new(endpoint.channel()), endpoint.config());
        ControlClient { endpoint, client }
    }

    /// Call a verb.
    ///
    /// # Errors
    /// A run that does not answer.
    pub fn call(&self, verb: Verb) -> ServiceResult<RunStatus> {
        let mut client = self.client.clone();
        let config = self.endpoint.config();
        let (operation, deadline) = match verb {
            Verb::Status => ("status", config.call_timeout),
            Verb::Pause => ("pause", config.compute_timeout),
            Verb::Resume => ("resume", config.call_timeout),
            Verb::Drain => ("drain", config.call_timeout),
        };
        let answer = self.endpoint.call((operation, deadline), v1::Empty {}, |request| async move {
            match verb {
                Verb::Status => client.status(request).await,
                Verb::Pause => client.pause(request).await,
                Verb::Resume => client.resume(request).await,
                Verb::Drain => client.drain(request).await,
            }
        })?;
        answer.into_inner().try_into().map_err(self.endpoint.unreadable(operation))
    }

    /// Write a checkpoint after the step under way.
    ///
    /// # Errors
    /// A run that does not answer, or has ended.
    pub fn snapshot(&self) -> ServiceResult<Snapshot> {
        let mut client = self.client.clone();
        let call = ("snapshot", self.endpoint.config().compute_timeout);
        let answer = self.endpoint.call(call, v1::Empty {}, |r| async move { client.snapshot(r).await })?.into_inner();
        Ok(Snapshot { path: answer.path, step: answer.step })
    }

    /// Change a setting from the next step on.
    ///
    /// # Errors
    /// A key that cannot be changed, or a value out of range.
    pub fn set(&self, key: &str, value: f64) -> ServiceResult<Changed> {
        let mut client = self.client.clone();
        let message = v1::SetRequest { key: key.to_owned(), value };
        let call = ("set", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, message, |r| async move { client.set(r).await })?.into_inner();
        Ok(Changed { previous: answer.previous, from_step: answer.from_step })
    }

    /// The workers of the run.
    ///
    /// # Errors
    /// A run that does not answer.
    pub fn workers(&self) -> ServiceResult<Vec<WorkerStatus>> {
        let mut client = self.client.clone();
        let call = ("workers", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, v1::Empty {}, |r| async move { client.workers(r).await })?;
        Ok(answer.into_inner().workers.into_iter().map(Into::into).collect())
    }

    /// Follow events until the run ends, or `each` gives false.
    ///
    /// # Errors
    /// A connection that breaks.
    pub fn watch(&self, mut each: impl FnMut(RunEvent) -> bool) -> ServiceResult<()> {
        let mut client = self.client.clone();
        self.endpoint.call(("watch", WATCH_TIMEOUT), v1::Empty {}, |request| async move {
            let mut stream = client.watch(request).await?.into_inner();
            while let Some(event) = stream.message().await? {
                if !each(RunEvent { name: event.name, json: event.json }) {
                    break;
                }
            }
            Ok(())
        })
    }
}
