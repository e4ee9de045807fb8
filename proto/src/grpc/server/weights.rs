//! Weights for other processes.

use super::{blocking, refused};
use crate::grpc::channel::encode_error;
use crate::grpc::convert::{version_from_wire, version_to_wire};
use crate::grpc::v1::weight_service_server::{WeightService as Wire, WeightServiceServer};
use crate::grpc::{TransportConfig, v1};
use crate::{ServiceError, WeightRange, WeightService};
use std::sync::Arc;
use temper_types::ErrorCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Elements of one chunk: 1 MiB.
const CHUNK: usize = 1 << 18;
/// Chunks that wait for a slow receiver.
const QUEUE: usize = 4;

/// Puts a [`WeightService`] on the wire.
#[derive(Clone)]
pub struct WeightServer {
    service: Arc<dyn WeightService>,
}

impl WeightServer {
    /// The generated service over `service`.
    pub fn service(service: Arc<dyn WeightService>, config: &TransportConfig) -> WeightServiceServer<Self> {
        limited!(WeightServiceServer::new(WeightServer { service }), config)
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    let mut data = Vec::with_capacity(4 * values.len());
    data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    data
}

#[tonic::async_trait]
impl Wire for WeightServer {
    type PullStream = ReceiverStream<Result<v1::WeightChunk, Status>>;

    async fn manifest(&self, _: Request<v1::Empty>) -> Result<Response<v1::WeightManifest>, Status> {
        let service = Arc::clone(&self.service);
        let manifest = blocking(move || service.manifest()).await?;
        let version = Some(version_to_wire(manifest.version));
        Ok(Response::new(v1::WeightManifest { version, unit_lens: manifest.unit_lens }))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let version = version_from_wire(request.version).map_err(refused)?;
        let range = |r: v1::WeightRange| WeightRange { unit: r.unit, start: r.start, len: r.len };
        let ranges: Vec<WeightRange> = request.ranges.into_iter().map(range).collect();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let service = Arc::clone(&self.service);
        tokio::task::spawn_blocking(move || {
            let mut sink = |values: &[f32]| {
                for part in values.chunks(CHUNK) {
                    let chunk = v1::WeightChunk { data: bytes_of(part) };
                    let gone = |_| ServiceError::new(ErrorCode::Cancelled, "weights", "pull", "the receiver is gone");
                    sender.blocking_send(Ok(chunk)).map_err(gone)?;
                }
                Ok(())
            };
            if let Err(error) = service.pull(version, &ranges, &mut sink) {
                // A receiver that is gone does not read why.
                let _ = sender.blocking_send(Err(encode_error(error)));
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
