//! The loop around engine and trainer: text, scores, and messages between processes.

use super::{Bench, median_seconds};
use crate::reward_models::RewardModels;
use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::net::TcpListener;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use temper_controller::load_dataset;
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, RewardClient, RewardServer, RolloutClient, RolloutServer, ServedServices, TransportConfig,
    serve,
};
use temper_proto::{
    GeneratedSample, GroupRequest, GroupResult, RewardService, RolloutService, RolloutStats, ScalarModelService,
    ScoreRequest, ServiceResult, TextService,
};
use temper_trainer::LocalTrainerService;
use temper_types::{
    FinishReason, GroupId, PolicyVersion, PromptId, PromptRow, SampleIndex, SampleKey, SampleTimings, SamplingParams,
};

/// Samples that are scored and sent at once.
const SAMPLES: usize = 64;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Seconds of a sample's text and score: in this process, and where scores are had from another.
pub(super) fn sample_seconds(bench: &Bench<'_>, trainer: &Arc<LocalTrainerService>) -> Result<(f64, f64)> {
    let recipe = &bench.planned.recipe;
    let trainer: Arc<dyn ScalarModelService> = Arc::clone(trainer) as _;
    let models = RewardModels { trainer, device: &bench.device, policy_dir: bench.model_dir, dtype: bench.dtype };
    let service = Arc::new(models.reward_service(recipe)?);
    let (runtime, config) = (GrpcRuntime::start().context("starting the transport")?, TransportConfig::default());
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let services = ServedServices::new().with(RewardServer::service(Arc::clone(&service) as _, &config));
    let server = serve(&runtime, listener, services, config).context("serving")?;
    let client = RewardClient::new(Endpoint::connect(&runtime, "reward", &server.address().to_string(), config)?);
    let here = score_seconds(bench, service.as_ref(), SAMPLES)?;
    let there = score_seconds(bench, &client, bench.planned.work.samples)?;
    Ok((here, there))
}

/// Seconds of a sample where so many are scored in a call.
fn score_seconds(bench: &Bench<'_>, service: &dyn RewardService, per_call: usize) -> Result<f64> {
    let recipe = &bench.planned.recipe;
    let policy = bench.planned.policy()?;
    let key = format!("data.{}", policy.data);
    let dataset = recipe.data.get(&policy.data).with_context(|| format!("{key}: no such dataset"))?;
    let rows = load_dataset(&key, dataset, &*bench.text)?.rows;
    let samples: Vec<(&PromptRow, Vec<u32>)> =
        rows.iter().cycle().take(SAMPLES).zip(0..).map(|(row, i)| (row, bench.ids(bench.lengths.1, i))).collect();
    let seconds = median_seconds(|| {
        let mut requests = Vec::new();
        for (index, (row, ids)) in samples.iter().enumerate() {
            requests.push(request(bench, row, (index, ids))?);
        }
        for call in requests.chunks(per_call) {
            // A score that fails takes its time as well.
            let _outcomes = service.score(call)?;
        }
        Ok(())
    })?;
    Ok(seconds / SAMPLES as f64)
}

fn request(bench: &Bench<'_>, row: &PromptRow, (index, ids): (usize, &[u32])) -> Result<ScoreRequest> {
    let prompt_token_ids = bench.text.encode_prompt(&row.prompt)?;
    Ok(ScoreRequest {
        key: SampleKey {
            prompt_id: row.prompt_id,
            group_id: GroupId(0),
            sample_index: SampleIndex(index as u32),
            epoch: 0,
        },
        data_source: row.data_source.clone(),
        prompt: row.prompt.clone(),
        response: bench.text.decode(ids),
        num_response_tokens: ids.len(),
        prompt_token_ids,
        response_token_ids: ids.to_vec(),
        finish_reason: FinishReason::Length,
        ground_truth: row.ground_truth.clone(),
        extra_info: row.extra_info.clone(),
    })
}

/// Seconds that a sample takes from one process to another and back: an engine that answers at once, over gRPC.
pub(super) fn message_seconds(bench: &Bench<'_>) -> Result<f64> {
    let runtime = GrpcRuntime::start().context("starting the transport")?;
    let config = TransportConfig::default();
    let response = bench.ids(bench.lengths.1, 0);
    let answers: Arc<dyn RolloutService> = Arc::new(Answers { response, queued: Mutex::default() });
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let services = ServedServices::new().with(RolloutServer::service(answers, &config));
    let server = serve(&runtime, listener, services, config).context("serving")?;
    let endpoint = Endpoint::connect(&runtime, "engine", &server.address().to_string(), config)?;
    let client = RolloutClient::new(endpoint);
    let per_group = bench.planned.work.samples;
    let groups = SAMPLES.div_ceil(per_group);
    let group = |id: u64| GroupRequest {
        group_id: GroupId(id),
        prompt_id: PromptId(id),
        epoch: 0,
        prompt_token_ids: bench.ids(bench.lengths.0, id),
        seeds: (0..per_group as u64).collect(),
        sampling: SamplingParams::default(),
        ..GroupRequest::default()
    };
    let seconds = median_seconds(|| {
        client.submit((0..groups as u64).map(group).collect())?;
        for _ in 0..groups {
            client.next_group(TIMEOUT)?.context("an answer never came back")?;
        }
        Ok(())
    })?;
    Ok(seconds / (groups * per_group) as f64)
}

/// Answers every sample with the same response.
struct Answers {
    response: Vec<u32>,
    queued: Mutex<VecDeque<GroupRequest>>,
}

impl Answers {
    fn sample(&self, (index, seed): (usize, u64)) -> GeneratedSample {
        GeneratedSample {
            sample_index: SampleIndex(index as u32),
            seed,
            num_begun: 0,
            num_kept: 0,
            token_ids: self.response.clone(),
            reused: Vec::new(),
            log_probs: vec![-1.0; self.response.len()],
            sampled_log_probs: Vec::new(),
            surviving_mass: Vec::new(),
            policy_versions: vec![(PolicyVersion::default(), self.response.len() as u32)],
            finish_reason: FinishReason::Length,
            num_drafted: 0,
            num_accepted: 0,
            timings: SampleTimings::default(),
        }
    }
}

impl RolloutService for Answers {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner).extend(groups);
        Ok(())
    }

    fn next_group(&self, _: Duration) -> ServiceResult<Option<GroupResult>> {
        let next = self.queued.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        Ok(next.map(|group| GroupResult {
            group_id: group.group_id,
            prompt_id: group.prompt_id,
            worker: "engine".to_owned(),
            samples: group.seeds.into_iter().enumerate().map(|pair| self.sample(pair)).collect(),
        }))
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        Ok(std::mem::take(&mut *self.queued.lock().unwrap_or_else(PoisonError::into_inner)).len())
    }

    fn set_version(&self, _: PolicyVersion) -> ServiceResult<()> {
        Ok(())
    }

    fn stats(&self) -> RolloutStats {
        RolloutStats::default()
    }
}
