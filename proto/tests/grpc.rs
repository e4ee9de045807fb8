//! Every service over a real connection: what goes in comes out, errors keep their name, waits end.

use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, RewardClient, RewardServer, RolloutClient, RolloutServer, ServedRun, ServedServices,
    ServerHandle, TrainerClient, TrainerServer, TransportConfig, WeightClient, WeightServer, serve,
};
use temper_proto::*;
use temper_types::*;

const VERSION: PolicyVersion = PolicyVersion { number: 3, hash: ContentHash([7; 16]) };

/// Remembers what it was asked, and answers with what is asked.
#[derive(Default)]
struct Fake {
    seen: Mutex<Vec<String>>,
}

impl Fake {
    fn saw(&self, what: impl std::fmt::Debug) {
        self.seen.lock().expect("nothing panicked").push(format!("{what:?}"));
    }

    fn last(&self) -> String {
        self.seen.lock().expect("nothing panicked").last().cloned().unwrap_or_default()
    }
}

fn failure(code: ErrorCode) -> ServiceError {
    let key = SampleKey { prompt_id: PromptId(1), group_id: GroupId(2), sample_index: SampleIndex(3), epoch: 4 };
    ServiceError::new(code, "worker-7", "think", "the cause").with_sample(key)
}

fn sample() -> GeneratedSample {
    GeneratedSample {
        sample_index: SampleIndex(1),
        seed: u64::MAX - 5,
        num_begun: 7,
        num_kept: 48,
        token_ids: vec![1, 2, 300_000],
        reused: vec![1, 0, 0],
        log_probs: vec![-0.5, f32::NEG_INFINITY, -1e-30],
        sampled_log_probs: vec![],
        surviving_mass: vec![0.25, 0.5, 1.0],
        policy_versions: vec![(VERSION, 2), (PolicyVersion::default(), 1)],
        finish_reason: FinishReason::StopString,
        num_drafted: 4,
        num_accepted: 3,
        timings: SampleTimings { queue_seconds: 0.5, rollout_seconds: 1.5, reward_seconds: 0.0 },
    }
}

fn group() -> GroupResult {
    GroupResult { group_id: GroupId(9), prompt_id: PromptId(8), worker: "w".to_owned(), samples: vec![sample()] }
}

impl RolloutService for Fake {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.saw(&groups);
        Ok(())
    }
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        match timeout.as_millis() {
            0 => Ok(None),
            1 => Err(failure(ErrorCode::DeadlineExceeded)),
            _ => Ok(Some(group())),
        }
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        Ok(17)
    }
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        if version == VERSION { Ok(()) } else { Err(failure(ErrorCode::VersionMismatch)) }
    }
    fn stats(&self) -> RolloutStats {
        let mut stats = RolloutStats { num_steps: 5, tail_micros: 6, ..RolloutStats::default() };
        stats.speculation.replay[2] = DraftCounts { num_draft_tokens: 9, num_accepted_tokens: 8 };
        stats
    }
}

impl RewardService for Fake {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        self.saw(requests);
        let outcome = |request: &ScoreRequest| match request.response.as_str() {
            "nan" => RewardOutcome::Scored { reward: f64::NAN, components: vec![] },
            "fail" => RewardOutcome::Failed(RewardFailure { scorer: "s".to_owned(), cause: "c".to_owned() }),
            text => {
                let component = RewardComponent { name: "length".to_owned(), value: text.len() as f64 };
                RewardOutcome::Scored { reward: 0.5, components: vec![component] }
            }
        };
        Ok(requests.iter().map(outcome).collect())
    }
}

impl TrainerService for Fake {
    fn begin_stage(&self, spec: StageSpec) -> ServiceResult<()> {
        self.saw(spec);
        Ok(())
    }
    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], temperature: f32) -> ServiceResult<LogProbs> {
        self.saw((role, sequences, temperature));
        let rows: Vec<Vec<f32>> = sequences.iter().map(|s| vec![-1.5; s.response_token_ids.len()]).collect();
        Ok(LogProbs { log_probs: rows.clone(), entropies: rows.clone(), sum_pi_squared: rows })
    }
    fn mix_reference(&self, alpha: f64) -> ServiceResult<()> {
        self.saw(alpha);
        Ok(())
    }
    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        self.saw(&batch);
        if batch.learning_rate.is_nan() {
            return Err(failure(ErrorCode::NonFinite));
        }
        let log_probs = batch.rows.iter().map(|row| vec![0.5; row.sequence.response_token_ids.len()]).collect();
        let metrics = [("kl".to_owned(), f64::INFINITY)].into_iter().collect();
        Ok(UpdateReport { loss: 1.0, grad_norm: 2.0, entropy: 3.0, num_tokens: 4, metrics, log_probs })
    }
    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion> {
        Ok(PolicyVersion { number, ..VERSION })
    }
    fn version(&self) -> PolicyVersion {
        VERSION
    }
    fn save_model(&self, dir: &Path) -> ServiceResult<()> {
        self.saw(dir);
        Ok(())
    }
    fn save_state(&self, dir: &Path) -> ServiceResult<()> {
        self.saw(dir);
        Ok(())
    }
    fn restore(&self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> ServiceResult<()> {
        self.saw((model_dir, state_dir, version));
        Ok(())
    }
}

impl ScalarModelService for Fake {
    fn begin_scalar_model(&self, spec: ScalarModelSpec) -> ServiceResult<()> {
        self.saw(spec);
        Ok(())
    }
    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>> {
        Ok(sequences.iter().map(|s| vec![2.5; s.response_token_ids.len()]).collect())
    }
    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport> {
        Ok(ScalarReport { num_tokens: batch.rows.len() as u64, ..ScalarReport::default() })
    }
    fn update_reward_model(&self, pairs: &[PreferencePair], learning_rate: f64) -> ServiceResult<ScalarReport> {
        self.saw(pairs);
        Ok(ScalarReport { loss: learning_rate, num_tokens: pairs.len() as u64, ..ScalarReport::default() })
    }
    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>> {
        Ok(sequences.iter().map(|s| s.response_token_ids.len() as f32).collect())
    }
    fn save_reward_model(&self, dir: &Path) -> ServiceResult<bool> {
        Ok(dir.ends_with("yes"))
    }
    fn restore_reward_model(&self, dir: &Path) -> ServiceResult<()> {
        self.saw(dir);
        Ok(())
    }
}

impl MirrorService for Fake {
    fn mirror(&self, step: u64) -> ServiceResult<MirrorReport> {
        self.saw(step);
        Ok(MirrorReport { bytes_sent: u64::MAX, wait_seconds: 0.25, transfer_seconds: 1.5 })
    }
    fn held_shards(&self) -> ServiceResult<Vec<HeldShard>> {
        Ok(vec![
            HeldShard { step: 1 << 40, shard: 3, hash: VERSION.hash },
            HeldShard { step: 2, shard: 0, hash: VERSION.hash },
        ])
    }
    fn restore_mirrored(&self, plan: &MirrorPlan) -> ServiceResult<()> {
        self.saw(plan);
        Ok(())
    }
}

impl DistillService for Fake {
    fn begin_distillation(&self, spec: DistillSpec) -> ServiceResult<()> {
        self.saw(spec);
        Ok(())
    }
    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        self.update(batch)
    }
}

/// The only weights of which changes are known.
const BASE: ContentHash = ContentHash([7; 16]);
/// 3 MB of weights, so that a pull takes several chunks.
const UNITS: [u64; 2] = [700_000, 50_001];

fn shared_weights() -> SharedWeights {
    let unit = |start| SharedUnit { start, len: start + 7, offset_bytes: 4096 + start };
    SharedWeights { process_id: 71, descriptor: 5, nonce: [250; 16], units: vec![unit(0), unit(1 << 40)] }
}

impl WeightService for Fake {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        Ok(WeightManifest { version: VERSION, unit_lens: UNITS.to_vec() })
    }
    fn shared(&self, version: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        match version {
            VERSION => Ok(Some(shared_weights())),
            version if version.number == 0 => Ok(None),
            _ => Err(failure(ErrorCode::VersionMismatch)),
        }
    }
    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        if version != VERSION {
            return Err(failure(ErrorCode::VersionMismatch));
        }
        for range in ranges {
            let values: Vec<f32> = (range.start..range.start + range.len).map(|i| i as f32).collect();
            sink(&values)?;
            if range.unit == 9 {
                return Err(failure(ErrorCode::DataLoss));
            }
        }
        Ok(())
    }
    fn changes(
        &self,
        base: ContentHash,
        version: PolicyVersion,
        ranges: &[WeightRange],
        sink: WeightSink<'_>,
    ) -> ServiceResult<bool> {
        if base != BASE {
            return Ok(false);
        }
        self.pull(version, ranges, sink).map(|()| true)
    }
}

struct Wire {
    runtime: GrpcRuntime,
    server: ServerHandle,
    fake: Arc<Fake>,
}

fn wire() -> Wire {
    let (runtime, fake, config) =
        (GrpcRuntime::start().expect("threads"), Arc::new(Fake::default()), TransportConfig::default());
    let services = ServedServices::new()
        .with(RolloutServer::service(fake.clone(), &config))
        .with(RewardServer::service(fake.clone(), &config))
        .with(TrainerServer::service(fake.clone(), &config))
        .with(WeightServer::service(fake.clone(), &config));
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = serve(&runtime, listener, services, config).expect("a server");
    Wire { runtime, server, fake }
}

impl Wire {
    fn endpoint(&self) -> Endpoint {
        let address = self.server.address().to_string();
        Endpoint::connect(&self.runtime, "peer", &address, TransportConfig::default()).expect("a connection")
    }
}

fn sequence(len: usize) -> TokenSequence {
    TokenSequence {
        prompt_token_ids: vec![1, 2],
        response_token_ids: vec![3; len],
        response_mask: (0..len).map(|i| (i % 2) as u8).collect(),
    }
}

fn batch() -> MiniBatch {
    let row = TrainRow {
        sequence: sequence(3),
        old_log_probs: vec![-0.1, -0.2, -0.3],
        rollout_log_probs: vec![],
        ref_log_probs: vec![f32::MIN_POSITIVE / 4.0; 3],
        advantages: vec![0.1, -0.0, 1e-300],
        returns: vec![1.0; 3],
        values: vec![2.0; 3],
        rollout_weights: vec![1.0; 3],
    };
    let global = GlobalCounts { num_tokens: 5, num_sequences: 2, num_rows: 2, loss_scale_factor: 0.5 };
    let rows = vec![row, TrainRow::demonstration(sequence(0))];
    MiniBatch { rows, global, temperature: 0.7, learning_rate: 1e-6 }
}

#[test]
fn generation_goes_over_the_wire_unchanged() {
    let wire = wire();
    let client = RolloutClient::new(wire.endpoint());
    let request = GroupRequest {
        group_id: GroupId(1),
        prompt_id: PromptId(2),
        epoch: 3,
        prompt_token_ids: vec![5, 6],
        seeds: vec![0, u64::MAX],
        sampling: SamplingParams {
            stop: vec!["\u{e9}".to_owned()],
            min_p: 0.1,
            logit_bias: [(3, -1.5), (9, 2.0)].into(),
            allowed_token_ids: vec![4, 9],
            bad_words: vec!["never".to_owned()],
            bad_words_ids: vec![vec![1], vec![2, 3]],
            ..SamplingParams::default()
        },
        priority: -3,
        reuse: Some(Reuse {
            lenience: 1.5,
            responses: vec![
                EarlierResponse { token_ids: vec![7], log_probs: vec![-0.5], policy_versions: vec![(VERSION, 1)] },
                EarlierResponse::default(),
            ],
        }),
        round_tokens: 8,
        begun: vec![BegunResponse { token_ids: vec![9, 1], is_complete: true }, BegunResponse::default()],
        keep_kv: true,
    };
    client.submit(vec![request.clone()]).unwrap();
    assert_eq!(wire.fake.last(), format!("{:?}", vec![request]));
    assert_eq!(client.next_group(Duration::ZERO), Ok(None));
    assert_eq!(client.next_group(Duration::from_millis(1)), Err(failure(ErrorCode::DeadlineExceeded)));
    assert_eq!(client.next_group(Duration::from_secs(1)), Ok(Some(group())));
    assert_eq!(client.abort_all(), Ok(17));
    assert_eq!(client.set_version(VERSION), Ok(()));
    assert_eq!(client.set_version(PolicyVersion::default()), Err(failure(ErrorCode::VersionMismatch)));
    assert_eq!(client.stats(), wire.fake.stats());
}

#[test]
fn a_reward_that_is_no_number_is_no_reward() {
    let wire = wire();
    let client = RewardClient::new(wire.endpoint());
    let request = |response: &str| ScoreRequest {
        key: SampleKey { prompt_id: PromptId(1), group_id: GroupId(2), sample_index: SampleIndex(3), epoch: 4 },
        data_source: "d".to_owned(),
        prompt: PromptContent::Messages(vec![ChatMessage { role: "user".to_owned(), content: "?".to_owned() }]),
        response: response.to_owned(),
        num_response_tokens: 2,
        prompt_token_ids: vec![1],
        response_token_ids: vec![2, 3],
        finish_reason: FinishReason::Length,
        ground_truth: None,
        extra_info: Some("{}".to_owned()),
    };
    let requests = [request("abc"), request("fail"), request("")];
    let outcomes = client.score(&requests).unwrap();
    assert_eq!(wire.fake.last(), format!("{requests:?}"));
    assert_eq!(outcomes, wire.fake.score(&requests).unwrap());
    let error = client.score(&[request("nan")]).unwrap_err();
    assert!(error.message.contains("expected a finite number, got NaN"), "{error}");
}

#[test]
fn training_goes_over_the_wire_unchanged() {
    let wire = wire();
    let client = TrainerClient::new(wire.endpoint());
    let spec = StageSpec {
        name: "grpo".to_owned(),
        objective_json: "{}".to_owned(),
        optimizer: OptimizerConfig { eps: 1e-9, ..OptimizerConfig::default() },
        needs_reference: true,
        max_micro_batch_tokens: 77,
        recompute_activations: true,
    };
    client.begin_stage(spec.clone()).unwrap();
    assert_eq!(wire.fake.last(), format!("{spec:?}"));
    let sequences = [sequence(2), sequence(0)];
    let log_probs = client.log_probs(PolicyRole::Reference, &sequences, 0.5).unwrap();
    assert_eq!(wire.fake.last(), format!("{:?}", (PolicyRole::Reference, &sequences[..], 0.5f32)));
    assert_eq!(log_probs.log_probs, [vec![-1.5, -1.5], vec![]]);
    let report = client.update(batch()).unwrap();
    assert_eq!(wire.fake.last(), format!("{:?}", batch()));
    assert_eq!(report, wire.fake.update(batch()).unwrap());
    assert_eq!(client.update_distilled(batch()).unwrap(), report);
    let bad = client.update(MiniBatch { learning_rate: f64::NAN, ..batch() });
    assert_eq!(bad, Err(failure(ErrorCode::NonFinite)));
    assert_eq!(client.publish(6), Ok(PolicyVersion { number: 6, ..VERSION }));
    assert_eq!(client.version(), VERSION);
    client.restore(Path::new("/a"), Path::new("/b"), VERSION).unwrap();
    assert_eq!(wire.fake.last(), format!("{:?}", ("/a", "/b", VERSION)));
}

#[test]
fn scalar_models_go_over_the_wire_unchanged() {
    let wire = wire();
    let client = TrainerClient::new(wire.endpoint());
    let spec = ScalarModelSpec {
        role: ScalarRole::RewardModel,
        loss_json: "{}".to_owned(),
        optimizer: OptimizerConfig::default(),
        backbone: Backbone::RewardModel,
        seed: u64::MAX,
    };
    client.begin_scalar_model(spec.clone()).unwrap();
    assert_eq!(wire.fake.last(), format!("{spec:?}"));
    assert_eq!(client.values(&[sequence(2), sequence(1)]).unwrap(), [vec![2.5, 2.5], vec![2.5]]);
    assert_eq!(client.scores(&[sequence(2), sequence(1)]).unwrap(), [2.0, 1.0]);
    assert_eq!(client.update_critic(batch()).unwrap().num_tokens, 2);
    let pairs = [PreferencePair { chosen: sequence(1), rejected: sequence(2), margin: 0.25 }];
    assert_eq!(client.update_reward_model(&pairs, 0.125).unwrap().loss, 0.125);
    assert_eq!(wire.fake.last(), format!("{pairs:?}"));
    assert_eq!(client.save_reward_model(Path::new("/x/yes")), Ok(true));
    assert_eq!(client.save_reward_model(Path::new("/x/no")), Ok(false));
}

#[test]
fn mirrored_shards_go_over_the_wire_unchanged() {
    let wire = wire();
    let client = TrainerClient::new(wire.endpoint());
    assert_eq!(client.mirror(1 << 50), wire.fake.mirror(1 << 50));
    assert_eq!(client.held_shards(), wire.fake.held_shards());
    let plan =
        MirrorPlan { step: 9, sources: vec![ShardSource { rank: 1, from: 2 }, ShardSource { rank: 3, from: 0 }] };
    client.restore_mirrored(&plan).unwrap();
    assert_eq!(wire.fake.last(), format!("{plan:?}"));
    let refused = client.rejoin().unwrap_err();
    assert_eq!((refused.code, refused.message.as_str()), (ErrorCode::InvalidArgument, "it keeps no mirrors"));
}

#[test]
fn weights_arrive_in_order_and_a_broken_stream_is_an_error() {
    let wire = wire();
    let client = WeightClient::new(wire.endpoint());
    assert_eq!(client.manifest().unwrap().unit_lens, UNITS);
    let ranges = [WeightRange { unit: 0, start: 3, len: 600_000 }, WeightRange { unit: 1, start: 0, len: UNITS[1] }];
    let mut got = Vec::new();
    client
        .pull(VERSION, &ranges, &mut |values| {
            got.extend_from_slice(values);
            Ok(())
        })
        .unwrap();
    let expected: Vec<f32> = (3..600_003u32).chain(0..UNITS[1] as u32).map(|i| i as f32).collect();
    assert_eq!(got, expected);
    let mut ignore = |_: &[f32]| Ok(());
    assert_eq!(client.pull(PolicyVersion::default(), &ranges, &mut ignore), Err(failure(ErrorCode::VersionMismatch)));
    let broken = [WeightRange { unit: 9, start: 0, len: 10 }];
    assert_eq!(client.pull(VERSION, &broken, &mut ignore), Err(failure(ErrorCode::DataLoss)));
    let mut refuse = |_: &[f32]| Err(failure(ErrorCode::Cancelled));
    assert_eq!(client.pull(VERSION, &ranges, &mut refuse), Err(failure(ErrorCode::Cancelled)));
}

#[test]
fn changes_arrive_to_the_bit_where_the_base_is_known() {
    let wire = wire();
    let client = WeightClient::new(wire.endpoint());
    let ranges = [WeightRange { unit: 0, start: 3, len: 600_000 }, WeightRange { unit: 1, start: 0, len: UNITS[1] }];
    let mut got = Vec::new();
    let mut keep = |values: &[f32]| {
        got.extend_from_slice(values);
        Ok(())
    };
    assert_eq!(client.changes(BASE, VERSION, &ranges, &mut keep), Ok(true));
    let expected: Vec<f32> = (3..600_003u32).chain(0..UNITS[1] as u32).map(|i| i as f32).collect();
    assert_eq!(got, expected);
    let mut none = |_: &[f32]| panic!("nothing is handed on");
    assert_eq!(client.changes(ContentHash([8; 16]), VERSION, &ranges, &mut none), Ok(false));
    let other = PolicyVersion::default();
    assert_eq!(client.changes(BASE, other, &ranges, &mut none), Err(failure(ErrorCode::VersionMismatch)));
    let mut ignore = |_: &[f32]| Ok(());
    let broken = [WeightRange { unit: 9, start: 0, len: 10 }];
    assert_eq!(client.changes(BASE, VERSION, &broken, &mut ignore), Err(failure(ErrorCode::DataLoss)));
    let mut refuse = |_: &[f32]| Err(failure(ErrorCode::Cancelled));
    assert_eq!(client.changes(BASE, VERSION, &ranges, &mut refuse), Err(failure(ErrorCode::Cancelled)));
}

#[test]
fn where_weights_lie_in_memory_is_told_or_that_they_do_not() {
    let wire = wire();
    let client = WeightClient::new(wire.endpoint());
    assert_eq!(client.shared(VERSION), Ok(Some(shared_weights())));
    assert_eq!(client.shared(PolicyVersion { number: 0, ..VERSION }), Ok(None));
    let other = PolicyVersion { number: VERSION.number + 1, ..VERSION };
    assert_eq!(client.shared(other), Err(failure(ErrorCode::VersionMismatch)));
}

#[test]
fn a_batch_larger_than_any_message_passes_row_by_row() {
    let wire = wire();
    let client = TrainerClient::new(wire.endpoint());
    let tokens = 1 << 20;
    let sequences = vec![sequence(tokens); 8];
    let values = client.values(&sequences).unwrap();
    assert_eq!(values.iter().map(Vec::len).sum::<usize>(), 8 * tokens);
}

#[test]
fn a_server_that_is_gone_is_named_within_the_deadline() {
    let wire = wire();
    let client = RolloutClient::new(wire.endpoint());
    assert_eq!(client.abort_all(), Ok(17));
    let address = wire.server.address().to_string();
    drop(wire.server);
    let begin = Instant::now();
    let error = client.abort_all().unwrap_err();
    assert_eq!((error.code, error.service.as_str()), (ErrorCode::Unavailable, "peer"), "{error}");
    let refused = Endpoint::connect(&wire.runtime, "peer", &address, TransportConfig::default()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Unavailable);
    assert!(refused.to_string().contains(&address), "{refused}");
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_later_life_at_the_same_address_refuses_calls_for_an_earlier_one() {
    let (runtime, fake, config) =
        (GrpcRuntime::start().unwrap(), Arc::new(Fake::default()), TransportConfig::default());
    let services = ServedServices::new().with(RolloutServer::service(fake, &config)).of_life(2);
    let server = serve(&runtime, TcpListener::bind("127.0.0.1:0").unwrap(), services, config).unwrap();
    let address = server.address().to_string();
    let call = |life: Option<u64>| {
        let endpoint = Endpoint::connect(&runtime, "peer", &address, config).unwrap();
        RolloutClient::new(life.map_or(endpoint.clone(), |life| endpoint.to_life(life))).abort_all()
    };
    assert_eq!((call(Some(2)), call(None)), (Ok(17), Ok(17)));
    let error = call(Some(1)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("for life 1 of this worker, which is in life 2"), "{error}");
}

#[test]
fn a_later_run_at_the_same_address_refuses_calls_for_an_earlier_one() {
    let (runtime, fake, config) =
        (GrpcRuntime::start().unwrap(), Arc::new(Fake::default()), TransportConfig::default());
    let run = ServedRun { id: "later".to_owned(), dir: "runs/later".to_owned() };
    let services = ServedServices::new().with(RolloutServer::service(fake, &config)).of_run(run);
    let server = serve(&runtime, TcpListener::bind("127.0.0.1:0").unwrap(), services, config).unwrap();
    let endpoint = || Endpoint::connect(&runtime, "run", &server.address().to_string(), config).unwrap();
    let call = |id| RolloutClient::new(endpoint().to_run(id).unwrap()).abort_all();
    assert_eq!((call("later"), RolloutClient::new(endpoint()).abort_all()), (Ok(17), Ok(17)));
    let error = call("earlier").unwrap_err();
    assert_eq!(error.code, ErrorCode::VersionMismatch);
    assert!(error.message.contains("the run in runs/later listens here"), "{error}");
    assert_eq!(endpoint().to_run("no\nid").unwrap_err().code, ErrorCode::InvalidArgument);
}

/// Accepts a connection and never says a word, as a stopped process does.
#[test]
fn a_peer_that_says_nothing_is_given_up_at_the_deadline() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let runtime = GrpcRuntime::start().unwrap();
    let config = TransportConfig {
        connect_timeout: Duration::from_millis(200),
        call_timeout: Duration::from_millis(300),
        keepalive_interval: Duration::from_secs(60),
        ..TransportConfig::default()
    };
    let address = listener.local_addr().unwrap().to_string();
    let begin = Instant::now();
    let code = match Endpoint::connect(&runtime, "mute", &address, config) {
        Ok(endpoint) => RolloutClient::new(endpoint).abort_all().unwrap_err().code,
        Err(error) => error.code,
    };
    assert!(matches!(code, ErrorCode::DeadlineExceeded | ErrorCode::Unavailable));
    assert!(begin.elapsed() < Duration::from_secs(5));
}
