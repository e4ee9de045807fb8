//! A run's tables as a client of Arrow Flight sees them: `arrow_flight::FlightClient`, and pyarrow where it is there.

use super::*;
use arrow_array::RecordBatch;
use arrow_flight::error::FlightError;
use arrow_flight::{FlightClient, FlightDescriptor, FlightInfo, Ticket};
use arrow_select::concat::concat_batches;
use std::net::TcpListener;
use std::process::Command;
use temper_data::trajectories::{self, Dataset as OnDisk, DatasetWriter};
use temper_proto::grpc::{FlightServer, GrpcRuntime, ServedServices, ServerHandle, TransportConfig, serve};
use temper_telemetry::{MetricsLog, MetricsRow};
use temper_types::{
    ContentHash, FinishReason, GroupId, PolicyVersion, PromptContent, PromptId, RewardOutcome, Sample, SampleIndex,
    SampleTimings, Step,
};
use tokio::runtime::Runtime;
use tokio_stream::StreamExt;

/// Rows of a step: with 500 tokens each, more than one message.
const ROWS: u32 = 200;
/// Exit code by which the example says that it has nothing to fetch with.
const SKIPPED: i32 = 77;

fn sample(step: u64, index: u32) -> Sample {
    let floats = |first: f32| (0..500).map(|i| first + i as f32).collect::<Vec<f32>>();
    Sample {
        step: Step(step),
        prompt_id: PromptId(1),
        group_id: GroupId(2),
        sample_index: SampleIndex(index),
        epoch: 0,
        seed: u64::MAX,
        data_source: "temper/sort_digits".to_owned(),
        prompt: PromptContent::Text("sort 21=".to_owned()),
        response: format!("{index}"),
        prompt_token_ids: vec![1, 2, 3],
        response_token_ids: (0..500).collect(),
        response_mask: vec![1; 500],
        response_reused: Vec::new(),
        rollout_log_probs: floats(-0.5),
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        old_log_probs: floats(-0.25),
        ref_log_probs: Vec::new(),
        values: Vec::new(),
        advantages: floats(f32::NAN),
        returns: Vec::new(),
        outcome: Some(RewardOutcome::Scored { reward: f64::from(index), components: Vec::new() }),
        ground_truth: Some("12".to_owned()),
        extra_info: None,
        finish_reason: FinishReason::Stop,
        policy_versions: vec![(PolicyVersion { number: 7, hash: ContentHash([1; 16]) }, 500)],
        staleness: 0,
        num_drafted: 0,
        num_accepted: 0,
        worker: "engine-0".to_owned(),
        timings: SampleTimings::default(),
    }
}

/// The directory of a run, and its tables on a socket.
struct Run {
    dir: tempfile::TempDir,
    tables: Arc<RunTables>,
    runtime: Runtime,
    server: ServerHandle,
}

impl Run {
    /// A run that has made `steps`.
    fn with(steps: std::ops::RangeInclusive<u64>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tables = Arc::new(RunTables::new(dir.path()));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let config = TransportConfig::default();
        let services = ServedServices::new().with(FlightServer::service(tables.clone(), &config));
        let server = serve(&GrpcRuntime::start().expect("threads"), listener, services, config).expect("serves");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let run = Run { dir, tables, runtime, server };
        steps.for_each(|step| run.step(step));
        run
    }

    /// The run makes a step.
    fn step(&self, step: u64) {
        let samples: Vec<Sample> = (0..ROWS).map(|index| sample(step, index)).collect();
        let mut writer = DatasetWriter::open(&self.dir.path().join("rollouts"), "run").expect("writable");
        writer.write_step(Step(step), &samples).expect("writable");
        let mut row = MetricsRow::new(step, "grpo");
        row.set("reward_mean", step as f64).set("loss", f64::NAN);
        MetricsLog::open(&self.dir.path().join("metrics.jsonl"))
            .and_then(|mut log| log.append(&row))
            .expect("writable");
    }

    /// The run has a checkpoint of `step`.
    fn checkpoint(&self, step: u64) {
        std::fs::create_dir_all(self.dir.path().join(format!("checkpoints/step-{step}"))).expect("writable");
    }

    fn client(&self) -> FlightClient {
        let address = format!("http://{}", self.server.address());
        let target = tonic::transport::Channel::from_shared(address).expect("an address");
        FlightClient::new(self.runtime.block_on(target.connect()).expect("it listens"))
    }

    fn info(&self, descriptor: FlightDescriptor) -> Result<FlightInfo, FlightError> {
        let mut client = self.client();
        self.runtime.block_on(client.get_flight_info(descriptor))
    }

    /// All that a ticket gives.
    fn get(&self, ticket: impl Into<Ticket>) -> Result<Vec<RecordBatch>, FlightError> {
        let mut client = self.client();
        self.runtime.block_on(async { client.do_get(ticket.into()).await?.collect().await })
    }

    fn get_json(&self, ticket: &str) -> Result<Vec<RecordBatch>, FlightError> {
        self.get(Ticket::new(ticket.to_owned()))
    }

    /// The shard of `step` as it stands on disk.
    fn shard(&self, step: u64) -> RecordBatch {
        let dataset = OnDisk::open(&self.dir.path().join("rollouts")).expect("a dataset");
        let index = dataset.shards().iter().position(|name| *name == format!("step-{step:06}.arrow"));
        let batches = dataset.batches().nth(index.expect("the step")).expect("a shard").expect("reads");
        one(&batches)
    }

    fn steps(&self, batches: &[RecordBatch]) -> Vec<u64> {
        let samples = batches.iter().flat_map(|batch| trajectories::from_batch(batch).expect("samples"));
        let mut steps: Vec<u64> = samples.map(|sample| sample.step.0).collect();
        steps.dedup();
        steps
    }
}

fn one(batches: &[RecordBatch]) -> RecordBatch {
    concat_batches(&trajectories::schema(), batches).expect("one schema")
}

#[test]
fn what_arrives_is_what_the_files_hold() {
    let run = Run::with(5..=7);
    run.checkpoint(7);
    let info = run.info(FlightDescriptor::new_path(vec!["rollouts".to_owned()])).expect("a table");
    let num_bytes: u64 = (5..=7)
        .map(|step| run.dir.path().join(format!("rollouts/step-{step:06}.arrow")))
        .map(|path| std::fs::metadata(path).expect("a shard").len())
        .sum();
    assert_eq!((info.total_records, info.total_bytes), (3 * i64::from(ROWS), num_bytes as i64));
    assert_eq!(info.clone().try_decode_schema().expect("a schema"), *trajectories::schema());
    assert_eq!(info.endpoint.len(), 3);
    for (endpoint, step) in info.endpoint.iter().zip(5..) {
        let batches = run.get(endpoint.ticket.clone().expect("a ticket")).expect("rows");
        assert!(batches.len() > 1, "a step is more than a message holds");
        assert_eq!(batches[0].schema(), trajectories::schema());
        assert_eq!(one(&batches), run.shard(step), "step {step}");
    }
    let two = run.get_json(r#"{"dataset":"rollouts","from_step":6}"#).expect("rows");
    assert_eq!(one(&two), one(&[run.shard(6), run.shard(7)]));
    let step = FlightDescriptor::new_path(vec!["rollouts".to_owned(), "6".to_owned()]);
    assert_eq!(run.info(step).expect("a step").total_records, i64::from(ROWS));
}

#[test]
fn every_table_is_listed_and_metrics_are_rows_of_names() {
    let run = Run::with(1..=2);
    let mut client = run.client();
    let listed = async { client.list_flights("").await?.collect::<Result<Vec<FlightInfo>, FlightError>>().await };
    let infos = run.runtime.block_on(listed).expect("tables");
    let names: Vec<&str> =
        infos.iter().map(|info| &*info.flight_descriptor.as_ref().expect("a name").path[0]).collect();
    assert_eq!(names, ["rollouts", "metrics"]);
    assert!(infos.iter().all(|info| info.total_records == 0 && info.endpoint.is_empty()), "nothing is committed yet");
    run.checkpoint(2);
    let batches = run.get_json(r#"{"dataset":"metrics","to_step":1}"#).expect("rows");
    let columns: Vec<String> = batches[0].columns().iter().map(|column| format!("{column:?}")).collect();
    assert_eq!(batches[0].num_rows(), 2, "step 1 has two figures");
    assert!(columns[2].contains("reward_mean") && columns[2].contains("loss"), "{columns:?}");
    assert!(columns[3].contains("1.0") && columns[3].contains("NaN"), "{columns:?}");
}

#[test]
fn what_a_resume_takes_back_is_given_only_to_whoever_asks() {
    let run = Run::with(1..=4);
    run.checkpoint(2);
    let committed = run.get_json(r#"{"dataset":"rollouts"}"#).expect("rows");
    assert_eq!(run.steps(&committed), [1, 2]);
    let all = run.get_json(r#"{"dataset":"rollouts","beyond_checkpoint":true}"#).expect("rows");
    assert_eq!(run.steps(&all), [1, 2, 3, 4]);
    let error = run.get_json(r#"{"dataset":"rollouts","step":3}"#).expect_err("no checkpoint").to_string();
    assert!(error.contains("`beyond_checkpoint` gives it"), "{error}");
}

#[test]
fn what_is_not_there_is_refused_with_what_is() {
    let run = Run::with(5..=6);
    run.checkpoint(6);
    for (ticket, complaint) in [
        (r#"{"dataset":"rollout"}"#, "no dataset `rollout` (`rollouts`?): a run has rollouts and metrics"),
        (r#"{"dataset":"rollouts","step":4}"#, "rollouts has no step 4: there are 2 steps from 5 to 6"),
        (r#"{"dataset":"rollouts","from_step":7}"#, "rollouts has no step 7: there are 2 steps from 5 to 6"),
        (r#"{"dataset":"metrics","step":9}"#, "metrics has no step 9: there are 2 steps"),
        (r#"{"dataset":"rollouts","steps":4}"#, "unknown field `steps`"),
        ("step-000005.arrow", "expected JSON such as"),
    ] {
        let Err(FlightError::Tonic(status)) = run.get_json(ticket) else { panic!("{ticket}: given") };
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{ticket}");
        assert!(status.message().contains(complaint), "{ticket}: {status}");
    }
    let error = run.info(FlightDescriptor::new_path(Vec::new())).expect_err("no path").to_string();
    assert!(error.contains("expected a table, or a table and a step"), "{error}");
    std::fs::write(run.dir.path().join("rollouts/step-000005.arrow"), b"no Arrow at all").expect("writable");
    let Err(FlightError::Tonic(status)) = run.get_json(r#"{"dataset":"rollouts"}"#) else { panic!("given") };
    assert_eq!(status.code(), tonic::Code::DataLoss);
    assert!(status.message().contains("step-000005.arrow"), "{status}");
}

#[test]
fn a_follower_is_given_new_steps_and_the_end() {
    let run = Run::with(1..=1);
    run.checkpoint(1);
    let mut client = run.client();
    let ticket = Ticket::new(r#"{"dataset":"rollouts","follow":true}"#);
    let mut rows = run.runtime.block_on(client.do_get(ticket)).expect("a stream");
    let mut next = |num_rows: usize| {
        let mut batches = Vec::new();
        while batches.iter().map(RecordBatch::num_rows).sum::<usize>() < num_rows {
            batches.push(run.runtime.block_on(rows.next()).expect("not the end").expect("rows"));
        }
        one(&batches)
    };
    assert_eq!(next(ROWS as usize), run.shard(1));
    run.step(2);
    run.checkpoint(2);
    assert_eq!(next(ROWS as usize), run.shard(2), "a step that came later");
    run.step(3);
    run.checkpoint(3);
    let tables = Arc::clone(&run.tables);
    let end = std::thread::spawn(move || tables.end());
    assert_eq!(next(ROWS as usize), run.shard(3), "what was committed before the end");
    assert!(run.runtime.block_on(rows.next()).is_none(), "the stream ends with the run");
    end.join().expect("the run ends");
}

#[test]
fn pyarrow_reads_what_the_server_gives() {
    let run = Run::with(1..=2);
    run.checkpoint(2);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/examples/flight_client.py");
    let output = Command::new("python3").arg(script).arg(run.server.address().to_string()).output();
    let output = match output {
        Ok(output) if output.status.code() == Some(SKIPPED) => return eprintln!("skipped: python3 has no pyarrow"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return eprintln!("skipped: no python3"),
        output => output.expect("python3 starts"),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mean = f64::from(ROWS - 1) / 2.0;
    for line in [format!("rollouts: 2 steps, {} rows", 2 * ROWS), format!("step 2: {ROWS} rows, mean reward {mean:.3}")]
    {
        assert!(said.contains(&line), "{line} is not in: {said}");
    }
}
