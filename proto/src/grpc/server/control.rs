//! The control of a run, for other processes.

use super::blocking;
use crate::ControlService;
use crate::grpc::v1;
use crate::grpc::v1::control_service_server::{ControlService as Wire, ControlServiceServer};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Longest wait for the step under way where the caller sets no deadline of its own.
const STEP_TIMEOUT: Duration = Duration::from_secs(3600);
/// How often a watcher that is gone is looked for while nothing happens.
const WATCH_TICK: Duration = Duration::from_millis(500);

/// Puts a [`ControlService`] on the wire.
#[derive(Clone)]
pub struct ControlServer {
    control: Arc<dyn ControlService>,
}

impl ControlServer {
    /// The generated service over `control`.
    pub fn service(control: Arc<dyn ControlService>) -> ControlServiceServer<Self> {
        ControlServiceServer::new(ControlServer { control })
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn ControlService) -> crate::ServiceResult<T> + Send + 'static,
    ) -> Result<T, Status> {
        let control = Arc::clone(&self.control);
        blocking(move || call(&*control)).await
    }
}

#[tonic::async_trait]
impl Wire for ControlServer {
    type WatchStream = ReceiverStream<Result<v1::WatchEvent, Status>>;

    async fn status(&self, _: Request<v1::Empty>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.call(|control| Ok(control.status())).await?;
        Ok(Response::new(status.into()))
    }

    async fn watch(&self, _: Request<v1::Empty>) -> Result<Response<Self::WatchStream>, Status> {
        let events = self.call(|control| Ok(control.watch())).await?;
        let (sender, receiver) = mpsc::channel(16);
        tokio::task::spawn_blocking(move || {
            while !sender.is_closed() {
                match events.recv_timeout(WATCH_TICK) {
                    Ok(event) => {
                        let event = v1::WatchEvent { name: event.name, json: event.json };
                        if sender.blocking_send(Ok(event)).is_err() {
                            return;
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn pause(&self, _: Request<v1::Empty>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.call(|control| control.pause(STEP_TIMEOUT)).await?;
        Ok(Response::new(status.into()))
    }

    async fn resume(&self, _: Request<v1::Empty>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.call(|control| Ok(control.resume())).await?;
        Ok(Response::new(status.into()))
    }

    async fn drain(&self, _: Request<v1::Empty>) -> Result<Response<v1::StatusResponse>, Status> {
        let status = self.call(|control| Ok(control.drain())).await?;
        Ok(Response::new(status.into()))
    }

    async fn snapshot(&self, _: Request<v1::Empty>) -> Result<Response<v1::SnapshotResponse>, Status> {
        let snapshot = self.call(|control| control.snapshot(STEP_TIMEOUT)).await?;
        Ok(Response::new(v1::SnapshotResponse { path: snapshot.path, step: snapshot.step }))
    }

    async fn set(&self, request: Request<v1::SetRequest>) -> Result<Response<v1::SetResponse>, Status> {
        let v1::SetRequest { key, value } = request.into_inner();
        let changed = self.call(move |control| control.set(&key, value)).await?;
        Ok(Response::new(v1::SetResponse { previous: changed.previous, from_step: changed.from_step }))
    }

    async fn workers(&self, _: Request<v1::Empty>) -> Result<Response<v1::WorkersResponse>, Status> {
        let workers = self.call(|control| Ok(control.workers())).await?;
        Ok(Response::new(v1::WorkersResponse { workers: workers.into_iter().map(Into::into).collect() }))
    }
}
