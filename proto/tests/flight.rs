//! Tables by Arrow Flight: a reader that is slow, gone or one too many is no burden to the server.

use arrow_array::{RecordBatch, UInt64Array};
use arrow_flight::error::FlightError;
use arrow_flight::{FlightClient, Ticket};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use temper_proto::grpc::{
    Endpoint, FlightServer, GrpcRuntime, ServedServices, ServerHandle, TableClient, TablePart, TransportConfig, serve,
};
use temper_proto::*;
use temper_types::ErrorCode;

/// Longest wait for anything that a test waits for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Rows of a batch of 64 KiB.
const ROWS: usize = 8192;

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![Field::new("n", DataType::UInt64, false)]))
}

fn batch() -> RecordBatch {
    let column = Arc::new(UInt64Array::from_iter_values(0..ROWS as u64));
    RecordBatch::try_new(schema(), vec![column]).expect("one column")
}

/// Tables without end: `rows` gives rows, `nothing` never does, `panics` panics after its first batch.
struct Endless {
    num_given: Arc<AtomicUsize>,
    ended: Mutex<Sender<()>>,
}

/// Says when it is dropped.
struct Given(Box<dyn FnMut() -> Option<RecordBatch> + Send>, Sender<()>);

impl Drop for Given {
    fn drop(&mut self) {
        // A test that is over does not listen.
        let _ = self.1.send(());
    }
}

impl Iterator for Given {
    type Item = ServiceResult<Option<RecordBatch>>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(Ok((self.0)()))
    }
}

impl TableService for Endless {
    fn tables(&self) -> ServiceResult<Vec<TableInfo>> {
        Ok(Vec::new())
    }
    fn table(&self, request: &TableRequest) -> ServiceResult<TableInfo> {
        Err(ServiceError::new(ErrorCode::InvalidArgument, "run", "read", format!("no {}", request.dataset)))
    }
    fn read(&self, request: &TableRequest) -> ServiceResult<TableReader> {
        let num_given = Arc::clone(&self.num_given);
        let give: Box<dyn FnMut() -> Option<RecordBatch> + Send> = match request.dataset.as_str() {
            "rows" => Box::new(move || {
                num_given.fetch_add(1, Ordering::SeqCst);
                Some(batch())
            }),
            "panics" => Box::new(move || {
                assert_eq!(num_given.fetch_add(1, Ordering::SeqCst), 0, "a bug of a reader");
                Some(batch())
            }),
            _ => Box::new(|| {
                std::thread::yield_now();
                None
            }),
        };
        let ended = self.ended.lock().expect("nothing panicked").clone();
        Ok(TableReader { schema: schema(), batches: Box::new(Given(give, ended)), in_use: Arc::new(()) })
    }
}

/// A server of [`Endless`], a client, what counts the batches, and what hears the end of each reading.
fn served() -> (ServerHandle, TableClient, Arc<AtomicUsize>, Receiver<()>) {
    let (sender, ended) = channel();
    let num_given = Arc::new(AtomicUsize::new(0));
    let tables = Arc::new(Endless { num_given: Arc::clone(&num_given), ended: Mutex::new(sender) });
    let (runtime, config) = (GrpcRuntime::start().expect("threads"), TransportConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let services = ServedServices::new().with(FlightServer::service(tables, &config));
    let server = serve(&runtime, listener, services, config).expect("serves");
    let endpoint = Endpoint::connect(&runtime, "run", &server.address().to_string(), config).expect("connects");
    (server, TableClient::new(endpoint), num_given, ended)
}

#[test]
fn rows_are_read_no_faster_than_they_are_taken() {
    const NUM_BATCHES: usize = 1024;
    // What a connection holds: its window of 8 MiB, the buffers of both ends, the pieces that wait.
    const MAX_AHEAD: usize = 256;
    let (_server, client, num_given, ended) = served();
    let (mut num_taken, mut most_ahead) = (0, 0);
    let outcome = client.read(&TableRequest::of("rows"), |part| {
        num_taken += usize::from(matches!(part, TablePart::Rows(_)));
        most_ahead = most_ahead.max(num_given.load(Ordering::SeqCst).saturating_sub(num_taken));
        if num_taken < NUM_BATCHES { Ok(()) } else { Err("enough") }
    });
    assert_eq!(outcome, Ok(Err("enough")));
    assert!(most_ahead <= MAX_AHEAD, "{most_ahead} batches of 64 KiB waited for the reader");
    ended.recv_timeout(PATIENCE).expect("a reader that is gone ends the reading");
}

#[test]
fn a_reader_that_waits_for_nothing_and_goes_is_noticed() {
    let (_server, client, _, ended) = served();
    let outcome = client.read(&TableRequest::of("nothing"), |part| match part {
        TablePart::Schema(columns) => Err(columns),
        TablePart::Rows(_) => Ok(()),
    });
    assert_eq!(outcome.expect("it is served").expect_err("the columns come first"), schema());
    ended.recv_timeout(PATIENCE).expect("a reader that is gone ends the reading");
}

#[test]
fn a_reading_that_panics_is_an_error_and_not_the_end() {
    let (_server, client, _, _ended) = served();
    let mut num_taken = 0;
    let outcome = client.read(&TableRequest::of("panics"), |part| {
        num_taken += usize::from(matches!(part, TablePart::Rows(_)));
        Ok::<(), ()>(())
    });
    let error = outcome.expect_err("it panicked");
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Internal, "the reader panicked"));
    assert_eq!(num_taken, 1, "what was read before");
}

#[test]
fn a_stream_too_many_is_refused() {
    let (server, _client, _, _ended) = served();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let address = format!("http://{}", server.address());
        let channel = tonic::transport::Channel::from_shared(address).expect("an address").connect().await;
        let mut client = FlightClient::new(channel.expect("it listens"));
        let ticket = || Ticket::new(TableRequest::of("rows").to_json());
        let mut open = Vec::new();
        for _ in 0..32 {
            open.push(client.do_get(ticket()).await.expect("a stream"));
        }
        let Err(FlightError::Tonic(status)) = client.do_get(ticket()).await else { panic!("given") };
        assert!(status.message().contains("32 streams are open"), "{status}");
        drop(open);
    });
}
