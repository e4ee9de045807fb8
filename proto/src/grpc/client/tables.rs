//! The tables of a run in another process.

use crate::grpc::Endpoint;
use crate::{ServiceError, ServiceResult, TableInfo, TableRequest};
use arrow_array::RecordBatch;
use arrow_flight::decode::{DecodedPayload, FlightDataDecoder};
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Criteria, FlightInfo, Ticket};
use arrow_schema::{ArrowError, SchemaRef};
use std::sync::Arc;
use std::time::Duration;
use temper_types::ErrorCode;
use tokio_stream::StreamExt;
use tonic::Status;
use tonic::transport::Channel;

/// Longest time that a table is read or followed.
const READ_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Reads the tables of a run.
#[derive(Debug)]
pub struct TableClient {
    endpoint: Endpoint,
    client: FlightServiceClient<Channel>,
}

/// What comes of a table: its columns, once and first, then rows.
#[derive(Debug)]
pub enum TablePart {
    /// The columns.
    Schema(SchemaRef),
    /// Rows.
    Rows(RecordBatch),
}

impl TableClient {
    /// The run at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(FlightServiceClient::new(endpoint.channel()), endpoint.config());
        TableClient { endpoint, client }
    }

    /// Every table, with what a resume does not take back.
    ///
    /// # Errors
    /// A run that does not answer.
    pub fn tables(&self) -> ServiceResult<Vec<TableInfo>> {
        let mut client = self.client.clone();
        let call = ("list tables", self.endpoint.config().call_timeout);
        let infos = self.endpoint.call(call, Criteria::default(), |request| async move {
            let mut stream = client.list_flights(request).await?.into_inner();
            let mut all = Vec::new();
            while let Some(info) = stream.message().await? {
                all.push(info);
            }
            Ok(all)
        })?;
        infos.into_iter().map(|info| self.table(info)).collect()
    }

    fn table(&self, info: FlightInfo) -> ServiceResult<TableInfo> {
        let unreadable = |e: ArrowError| {
            ServiceError::new(ErrorCode::Internal, self.endpoint.name(), "list tables", format!("a schema: {e}"))
        };
        let tickets = info.endpoint.iter().filter_map(|endpoint| endpoint.ticket.as_ref());
        let requests = tickets.map(|ticket| TableRequest::from_json(&ticket.ticket));
        let steps = requests.filter_map(|request| request.map(|request| request.step).transpose());
        Ok(TableInfo {
            dataset: info.flight_descriptor.iter().flat_map(|d| d.path.first()).cloned().collect(),
            steps: steps.collect::<ServiceResult<_>>()?,
            num_rows: u64::try_from(info.total_records).unwrap_or(0),
            num_bytes: u64::try_from(info.total_bytes).unwrap_or(0),
            schema: Arc::new(info.try_decode_schema().map_err(unreadable)?),
        })
    }

    /// Give the rows that `request` asks for to `each` as they come; an error of `each` ends the reading.
    ///
    /// # Errors
    /// A table or step that is not there, a connection that breaks, or a run that cannot read its files; inside, what
    /// `each` gave.
    pub fn read<E>(
        &self,
        request: &TableRequest,
        mut each: impl FnMut(TablePart) -> Result<(), E>,
    ) -> ServiceResult<Result<(), E>> {
        let mut client = self.client.clone();
        let call = ("read a table", READ_TIMEOUT);
        self.endpoint.call(call, Ticket::new(request.to_json()), |request| async move {
            let messages = client.do_get(request).await?.into_inner();
            let mut decoder = FlightDataDecoder::new(messages.map(|message| message.map_err(FlightError::from)));
            while let Some(decoded) = decoder.next().await {
                let given = match decoded.map_err(Status::from)?.payload {
                    DecodedPayload::Schema(schema) => each(TablePart::Schema(schema)),
                    DecodedPayload::RecordBatch(batch) => each(TablePart::Rows(batch)),
                    DecodedPayload::None => Ok(()),
                };
                if given.is_err() {
                    return Ok(given);
                }
            }
            Ok(Ok(()))
        })
    }
}
