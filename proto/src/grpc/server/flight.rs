//! The tables of a run by Arrow Flight.
//!
//! A reader that takes nothing holds up nobody: rows are read from disk as the connection takes them, and at most
//! [`QUEUED_PIECES`] of [`PIECE_BYTES`] wait for a reader.

use super::blocking;
use crate::grpc::{TransportConfig, encode_error};
use crate::{ServiceError, ServiceResult, TableBatches, TableInfo, TableRequest, TableService};
use arrow_array::{Array, RecordBatch};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_server::{FlightService, FlightServiceServer};
use arrow_flight::{
    Action, ActionType, Criteria, Empty, FlightData, FlightDescriptor, FlightEndpoint, FlightInfo, HandshakeRequest,
    HandshakeResponse, PollInfo, PutResult, SchemaResult, Ticket,
};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use temper_types::ErrorCode;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Rows go out in pieces of about so many bytes; one row is never divided.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces that wait for the connection.
const QUEUED_PIECES: usize = 2;
/// Streams at a time: each has a thread that reads, and a batch in memory.
const MAX_READERS: usize = 32;

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Puts a [`TableService`] on the wire.
#[derive(Clone)]
pub struct FlightServer {
    tables: Arc<dyn TableService>,
    readers: Arc<Semaphore>,
}

impl FlightServer {
    /// The Flight service over `tables`.
    pub fn service(tables: Arc<dyn TableService>, config: &TransportConfig) -> FlightServiceServer<Self> {
        let server = FlightServer { tables, readers: Arc::new(Semaphore::new(MAX_READERS)) };
        limited!(FlightServiceServer::new(server), config)
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn TableService) -> ServiceResult<T> + Send + 'static,
    ) -> Result<T, Status> {
        let tables = Arc::clone(&self.tables);
        blocking(move || call(&*tables)).await
    }

    async fn info(&self, descriptor: &FlightDescriptor) -> Result<(TableRequest, TableInfo), Status> {
        let request = described(descriptor).map_err(encode_error)?;
        self.call(move |tables| Ok((request.clone(), tables.table(&request)?))).await
    }
}

/// What a descriptor asks for: a command in JSON, or a path of table and perhaps step.
fn described(descriptor: &FlightDescriptor) -> ServiceResult<TableRequest> {
    if !descriptor.cmd.is_empty() {
        return TableRequest::from_json(&descriptor.cmd);
    }
    let mut request = match &descriptor.path[..] {
        [dataset] | [dataset, _] => TableRequest::of(dataset),
        other => {
            return Err(refused(format!("a path of {} parts: expected a table, or a table and a step", other.len())));
        }
    };
    if let Some(step) = descriptor.path.get(1) {
        request.step = Some(step.parse().map_err(|_| refused(format!("`{step}` is no step")))?);
    }
    Ok(request)
}

fn refused(message: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(ErrorCode::InvalidArgument, "run", "find a table", message)
}

fn failed(error: impl std::fmt::Display) -> Status {
    encode_error(ServiceError::new(ErrorCode::Internal, "run", "describe a table", error))
}

/// The table as Flight describes it: a ticket a step.
fn flight_info(info: TableInfo, descriptor: FlightDescriptor, beyond_checkpoint: bool) -> Result<FlightInfo, Status> {
    let endpoint = |step: &u64| {
        let request = TableRequest { step: Some(*step), beyond_checkpoint, ..TableRequest::of(&info.dataset) };
        FlightEndpoint::new().with_ticket(Ticket::new(request.to_json()))
    };
    let count = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    Ok(FlightInfo::new()
        .try_with_schema(&info.schema)
        .map_err(failed)?
        .with_descriptor(descriptor)
        .with_endpoints(info.steps.iter().map(endpoint).collect())
        .with_total_records(count(info.num_rows))
        .with_total_bytes(count(info.num_bytes))
        .with_ordered(true))
}

/// A batch in pieces that a message can hold.
fn pieces(batch: &RecordBatch) -> impl Iterator<Item = RecordBatch> + '_ {
    let size = |column: &Arc<dyn Array>| column.to_data().get_slice_memory_size().unwrap_or(0);
    let num_bytes: usize = batch.columns().iter().map(size).sum();
    let num_rows = batch.num_rows();
    let rows = (num_rows * PIECE_BYTES / num_bytes.max(1)).clamp(1, num_rows.max(1));
    (0..num_rows).step_by(rows).map(move |first| batch.slice(first, rows.min(num_rows - first)))
}

type Piece = Result<RecordBatch, FlightError>;

/// Read rows as fast as they are taken, until the end or until nobody listens.
fn pump(batches: TableBatches, sender: &mpsc::Sender<Piece>) {
    for item in batches {
        let sent = match item {
            Ok(Some(batch)) => pieces(&batch).try_for_each(|piece| sender.blocking_send(Ok(piece))),
            Ok(None) if sender.is_closed() => return,
            Ok(None) => Ok(()),
            Err(error) => sender.blocking_send(Err(encode_error(error).into())),
        };
        if sent.is_err() {
            return;
        }
    }
}

/// As [`pump`]; a reader that panics is an error of the stream, and not its end.
fn pump_guarded(batches: TableBatches, sender: &mpsc::Sender<Piece>) {
    if catch_unwind(AssertUnwindSafe(|| pump(batches, sender))).is_err() {
        let error = ServiceError::new(ErrorCode::Internal, "run", "read a table", "the reader panicked");
        // Nobody is told where nobody listens.
        let _ = sender.blocking_send(Err(encode_error(error).into()));
    }
}

fn read_alone<T>() -> Result<Response<T>, Status> {
    let known = "list_flights, get_flight_info, get_schema and do_get";
    Err(Status::unimplemented(format!("tables of a run are only read: this server has {known}")))
}

#[tonic::async_trait]
impl FlightService for FlightServer {
    type HandshakeStream = Messages<HandshakeResponse>;
    type ListFlightsStream = Messages<FlightInfo>;
    type DoGetStream = Messages<FlightData>;
    type DoPutStream = Messages<PutResult>;
    type DoActionStream = Messages<arrow_flight::Result>;
    type ListActionsStream = Messages<ActionType>;
    type DoExchangeStream = Messages<FlightData>;

    async fn list_flights(&self, request: Request<Criteria>) -> Result<Response<Self::ListFlightsStream>, Status> {
        if !request.into_inner().expression.is_empty() {
            return Err(encode_error(refused("criteria are not known: list all tables")));
        }
        let tables = self.call(|tables| tables.tables()).await?;
        let info = |info: TableInfo| {
            let descriptor = FlightDescriptor::new_path(vec![info.dataset.clone()]);
            flight_info(info, descriptor, false)
        };
        let all: Vec<Result<FlightInfo, Status>> = tables.into_iter().map(info).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(all))))
    }

    async fn get_flight_info(&self, request: Request<FlightDescriptor>) -> Result<Response<FlightInfo>, Status> {
        let descriptor = request.into_inner();
        let (request, info) = self.info(&descriptor).await?;
        flight_info(info, descriptor, request.beyond_checkpoint).map(Response::new)
    }

    async fn get_schema(&self, request: Request<FlightDescriptor>) -> Result<Response<SchemaResult>, Status> {
        let (_, info) = self.info(&request.into_inner()).await?;
        let FlightInfo { schema, .. } = FlightInfo::new().try_with_schema(&info.schema).map_err(failed)?;
        Ok(Response::new(SchemaResult { schema }))
    }

    async fn do_get(&self, request: Request<Ticket>) -> Result<Response<Self::DoGetStream>, Status> {
        let request = TableRequest::from_json(&request.into_inner().ticket).map_err(encode_error)?;
        let permit = Arc::clone(&self.readers).try_acquire_owned().map_err(|_| {
            let message = format!("{MAX_READERS} streams are open: wait for one to end");
            encode_error(ServiceError::new(ErrorCode::Unavailable, "run", "read a table", message))
        })?;
        let reader = self.call(move |tables| tables.read(&request)).await?;
        let (sender, receiver) = mpsc::channel(QUEUED_PIECES);
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            pump_guarded(reader.batches, &sender);
        });
        let encoder = FlightDataEncoderBuilder::new().with_schema(reader.schema).with_max_flight_data_size(usize::MAX);
        let in_use = reader.in_use;
        let stream = encoder.build(ReceiverStream::new(receiver)).map(move |message| {
            let _held = &in_use;
            message.map_err(Status::from)
        });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn list_actions(&self, _: Request<Empty>) -> Result<Response<Self::ListActionsStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::empty())))
    }

    async fn handshake(
        &self,
        _: Request<Streaming<HandshakeRequest>>,
    ) -> Result<Response<Self::HandshakeStream>, Status> {
        read_alone()
    }

    async fn poll_flight_info(&self, _: Request<FlightDescriptor>) -> Result<Response<PollInfo>, Status> {
        read_alone()
    }

    async fn do_put(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoPutStream>, Status> {
        read_alone()
    }

    async fn do_exchange(&self, _: Request<Streaming<FlightData>>) -> Result<Response<Self::DoExchangeStream>, Status> {
        read_alone()
    }

    async fn do_action(&self, _: Request<Action>) -> Result<Response<Self::DoActionStream>, Status> {
        read_alone()
    }
}
