//! Weights for other processes.

use super::{blocking, refused};
use crate::grpc::channel::encode_error;
use crate::grpc::convert::{hash_from_wire, version_from_wire, version_to_wire};
use crate::grpc::planes;
use crate::grpc::v1::weight_service_server::{WeightService as Wire, WeightServiceServer};
use crate::grpc::{TransportConfig, v1};
use crate::{ServiceError, ServiceResult, WeightRange, WeightService};
use std::sync::Arc;
use temper_types::ErrorCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Bytes of one chunk.
const CHUNK_BYTES: usize = 1 << 20;
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

/// Messages on their way to a receiver.
struct Outgoing<M> {
    operation: &'static str,
    sender: mpsc::Sender<Result<M, Status>>,
}

impl<M> Outgoing<M> {
    fn send(&self, message: M) -> ServiceResult<()> {
        let gone = |_| ServiceError::new(ErrorCode::Cancelled, "weights", self.operation, "the receiver is gone");
        self.sender.blocking_send(Ok(message)).map_err(gone)
    }

    /// Say why it ended, where that was no end.
    fn end(&self, ended: ServiceResult<()>) {
        if let Err(error) = ended {
            // A receiver that is gone does not read why.
            let _ = self.sender.blocking_send(Err(encode_error(error)));
        }
    }
}

/// Puts pieces of any size together to chunks.
struct Chunks {
    data: Vec<u8>,
    out: Outgoing<v1::WeightChunk>,
}

impl Chunks {
    fn new(sender: mpsc::Sender<Result<v1::WeightChunk, Status>>) -> Self {
        Chunks { data: Vec::with_capacity(CHUNK_BYTES), out: Outgoing { operation: "pull", sender } }
    }

    fn add(&mut self, mut values: &[f32]) -> ServiceResult<()> {
        while !values.is_empty() {
            let room = (CHUNK_BYTES - self.data.len()) / size_of::<f32>();
            let (now, rest) = values.split_at(room.min(values.len()));
            let start = self.data.len();
            self.data.resize(start + size_of_val(now), 0);
            let (words, _) = self.data[start..].as_chunks_mut::<4>();
            words.iter_mut().zip(now).for_each(|(word, value)| *word = value.to_le_bytes());
            values = rest;
            if self.data.len() == CHUNK_BYTES {
                self.send()?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> ServiceResult<()> {
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(CHUNK_BYTES));
        self.out.send(v1::WeightChunk { data })
    }

    /// Send what is left, or why it ended.
    fn finish(mut self, pulled: ServiceResult<()>) {
        let ended = pulled.and_then(|()| if self.data.is_empty() { Ok(()) } else { self.send() });
        self.out.end(ended);
    }
}

/// Puts changes of any number of elements together to messages.
struct Changes {
    values: Vec<f32>,
    out: Outgoing<v1::WeightChanges>,
}

impl Changes {
    fn new(sender: mpsc::Sender<Result<v1::WeightChanges, Status>>) -> Self {
        let out = Outgoing { operation: "changes", sender };
        Changes { values: Vec::with_capacity(planes::MAX_ELEMENTS), out }
    }

    fn add(&mut self, mut values: &[f32]) -> ServiceResult<()> {
        while !values.is_empty() {
            let (now, rest) = values.split_at((planes::MAX_ELEMENTS - self.values.len()).min(values.len()));
            self.values.extend_from_slice(now);
            values = rest;
            if self.values.len() == planes::MAX_ELEMENTS {
                self.send()?;
            }
        }
        Ok(())
    }

    fn send(&mut self) -> ServiceResult<()> {
        let failed = |e| ServiceError::new(ErrorCode::Internal, "weights", "changes", e);
        let planes = planes::encode(&self.values).map_err(failed)?;
        let num_elements = self.values.len() as u32;
        self.values.clear();
        self.out.send(v1::WeightChanges { num_elements, planes })
    }

    /// Send what is left, or why it ended.
    fn finish(mut self, handed_on: ServiceResult<bool>) {
        let ended = handed_on.and_then(|_| if self.values.is_empty() { Ok(()) } else { self.send() });
        self.out.end(ended);
    }
}

fn ranges(ranges: Vec<v1::WeightRange>) -> Vec<WeightRange> {
    let range = |r: v1::WeightRange| WeightRange { unit: r.unit, start: r.start, len: r.len };
    ranges.into_iter().map(range).collect()
}

#[tonic::async_trait]
impl Wire for WeightServer {
    type PullStream = ReceiverStream<Result<v1::WeightChunk, Status>>;
    type ChangesStream = ReceiverStream<Result<v1::WeightChanges, Status>>;

    async fn manifest(&self, _: Request<v1::Empty>) -> Result<Response<v1::WeightManifest>, Status> {
        let service = Arc::clone(&self.service);
        let manifest = blocking(move || service.manifest()).await?;
        let version = Some(version_to_wire(manifest.version));
        Ok(Response::new(v1::WeightManifest { version, unit_lens: manifest.unit_lens }))
    }

    async fn shared(
        &self,
        request: Request<v1::SharedWeightsRequest>,
    ) -> Result<Response<v1::SharedWeightsResponse>, Status> {
        let version = version_from_wire(request.into_inner().version).map_err(refused)?;
        let service = Arc::clone(&self.service);
        let weights = blocking(move || service.shared(version)).await?;
        Ok(Response::new(v1::SharedWeightsResponse { weights: weights.map(Into::into) }))
    }

    async fn pull(&self, request: Request<v1::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let version = version_from_wire(request.version).map_err(refused)?;
        let ranges = ranges(request.ranges);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let service = Arc::clone(&self.service);
        tokio::task::spawn_blocking(move || {
            let mut chunks = Chunks::new(sender);
            let pulled = service.pull(version, &ranges, &mut |values| chunks.add(values));
            chunks.finish(pulled);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn changes(&self, request: Request<v1::ChangesRequest>) -> Result<Response<Self::ChangesStream>, Status> {
        let request = request.into_inner();
        let version = version_from_wire(request.version).map_err(refused)?;
        let base = hash_from_wire(&request.base, "base").map_err(refused)?;
        let ranges = ranges(request.ranges);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let service = Arc::clone(&self.service);
        tokio::task::spawn_blocking(move || {
            let mut changes = Changes::new(sender);
            let handed_on = service.changes(base, version, &ranges, &mut |values| changes.add(values));
            changes.finish(handed_on);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
