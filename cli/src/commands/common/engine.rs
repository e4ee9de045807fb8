//! A model directory as something that answers prompts.

use super::compute::{ComputeArgs, open_model};
use super::output::require_empty;
use super::sampling::SamplingArgs;
use crate::draft_model;
use crate::local_text::LocalText;
use crate::usage;
use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use temper_actor::tokenizer::TOKENIZER_FILE;
use temper_actor::{PackedPolicy, ParamStore, PolicyFormat};
use temper_proto::{GeneratedSample, GroupRequest, GroupResult, RolloutService, TextService};
use temper_rollout::{EngineConfig, LocalRolloutService, TokenByteTable};
use temper_types::{
    DType, GroupId, PolicyVersion, PromptContent, PromptRow, Sample, SamplingParams, Step, WeightFormat, derive_seed,
};

/// Samples that are queued in the engine at once; more wait outside of it.
const MAX_QUEUED_SAMPLES: usize = 8192;

/// A model, its tokenizer where it has one, and an engine over it.
pub struct Generator {
    /// The engine.
    pub service: LocalRolloutService,
    /// Tokenizer and chat template; `None` for a model directory without tokenizer.json.
    pub text: Option<LocalText>,
    /// The weights that answer; `None` where they were not hashed.
    pub version: Option<PolicyVersion>,
    /// Number format that computes.
    pub dtype: DType,
    /// Form of the matrices.
    pub weights: WeightFormat,
    /// Bytes of the matrices.
    pub matrix_bytes: usize,
    /// Ids that end a response by default.
    pub end_ids: Vec<u32>,
}

/// Whether weights are hashed when they are loaded, which takes memory for the f32 masters once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// They are: results name the weights.
    Hash,
    /// They are not.
    None,
}

/// Which samples are wanted of every prompt.
pub struct Request {
    /// Samples of each prompt.
    pub num_samples: u32,
    /// Seed of the run.
    pub seed: u64,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Longest wait for the next finished prompt.
    pub timeout: Duration,
}

impl Generator {
    /// Load a model directory, with weights as `engine` says. Ids that the tokenizer does not have are masked.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name.
    pub fn load(model_dir: &Path, compute: &ComputeArgs, naming: Naming, engine: &EngineConfig) -> Result<Self> {
        let (config, reader) = open_model(model_dir)?;
        if config.head != temper_actor::Head::CausalLm {
            let dir = model_dir.display();
            return Err(usage(format!("{dir} has a value or reward head: expected a causal language model")));
        }
        let text = model_dir.join(TOKENIZER_FILE).is_file().then(|| LocalText::load(model_dir)).transpose()?;
        let (device, dtype) = compute.resolve();
        let format = PolicyFormat { dtype, weights: engine.weights };
        let mut policy = match naming {
            Naming::None => PackedPolicy::load(&device, &config, &reader, format)?,
            Naming::Hash => {
                let masters = ParamStore::load(&*device, &config, &reader)?;
                let mut policy = PackedPolicy::new(&device, &masters, &config, format);
                policy.version = PolicyVersion { number: 0, hash: masters.content_hash(&*device) };
                policy
            }
        };
        let version = (naming == Naming::Hash).then_some(policy.version);
        let mut bytes = vec![Vec::new(); config.vocab_size];
        if let Some(text) = &text {
            policy.set_masked_ids(text.tokenizer().missing_ids(config.vocab_size));
            for (id, bytes) in bytes.iter_mut().enumerate() {
                *bytes = text.tokenizer().token_bytes(id as u32).map(<[u8]>::to_vec).unwrap_or_default();
            }
        }
        let end_ids = text.as_ref().map_or_else(|| config.eos_token_ids.clone(), LocalText::stop_token_ids);
        let matrix_bytes = policy.matrix_bytes();
        let policy = Arc::new(RwLock::new(policy));
        let table = Arc::new(TokenByteTable(bytes));
        let service = LocalRolloutService::new(Arc::clone(&device), policy, engine.clone(), table)?;
        let service = draft_model::attach(service, (&device, dtype), text.as_ref(), engine)?;
        Ok(Generator { service, text, version, dtype, weights: engine.weights, matrix_bytes, end_ids })
    }

    /// Sampling parameters from flags.
    ///
    /// # Errors
    /// Those of [`SamplingArgs::resolve`]; stop strings or bad words without a tokenizer.
    pub fn sampling(&self, args: &SamplingArgs, model_dir: &Path, max_new_tokens: u32) -> Result<SamplingParams> {
        let mut sampling = args.resolve(model_dir, max_new_tokens, &self.end_ids)?;
        let Some(text) = &self.text else {
            let flags = [("--stop", &sampling.stop), ("--bad-word", &sampling.bad_words)];
            let Some((flag, _)) = flags.iter().find(|(_, texts)| !texts.is_empty()) else { return Ok(sampling) };
            let dir = model_dir.display();
            return Err(usage(format!("{flag}: {dir} has no {TOKENIZER_FILE}, so that its tokens have no text")));
        };
        sampling
            .resolve_bad_words(|word| text.encode_text(word))
            .map_err(|error| usage(format!("--bad-word: {error}")))?;
        Ok(sampling)
    }

    /// Ids of a prompt.
    ///
    /// # Errors
    /// A prompt that the tokenizer or the chat template refuses, or text without a tokenizer.
    pub fn encode(&self, prompt: &PromptContent) -> Result<Vec<u32>> {
        match (&self.text, prompt) {
            (Some(text), prompt) => Ok(text.tokenizer().encode_prompt(prompt)?),
            (None, PromptContent::TokenIds(ids)) => Ok(ids.clone()),
            (None, _) => bail!("the model has no {TOKENIZER_FILE}: expected prompts with \"prompt_token_ids\""),
        }
    }

    /// Text of a response, the stop token left out; empty without a tokenizer.
    pub fn response(&self, sample: &GeneratedSample) -> String {
        let ids = sample.finish_reason.text_ids(&sample.token_ids);
        self.text.as_ref().map_or_else(String::new, |text| text.decode(ids))
    }

    /// Answer every prompt; `each` gets prompt, request and result in the prompts' order.
    ///
    /// # Errors
    /// The prompt that cannot be encoded or does not fit, by row, before any is answered; no prompt finished in time;
    /// those of `each`.
    pub fn run(
        &self,
        rows: &[PromptRow],
        request: &Request,
        mut each: impl FnMut(&PromptRow, &GroupRequest, GroupResult) -> Result<()>,
    ) -> Result<()> {
        let mut groups = Vec::with_capacity(rows.len());
        for (index, row) in rows.iter().enumerate() {
            let group = self.group(index, row, request);
            let group = group.and_then(|group| Ok(self.service.check(&group).map(|()| group)?));
            groups.push(group.with_context(|| format!("prompt {index}"))?);
        }
        let mut groups = groups.into_iter().enumerate();
        let mut requests: BTreeMap<usize, GroupRequest> = BTreeMap::new();
        let mut finished: BTreeMap<usize, GroupResult> = BTreeMap::new();
        let (mut next_out, mut num_open) = (0, 0);
        while next_out < rows.len() {
            let room = (MAX_QUEUED_SAMPLES / request.num_samples as usize).max(1);
            while num_open < room
                && let Some((index, group)) = groups.next()
            {
                self.service.submit(vec![group.clone()])?;
                requests.insert(index, group);
                num_open += 1;
            }
            let result =
                self.service.next_group(request.timeout)?.context("a prompt was submitted and never came back")?;
            num_open -= 1;
            finished.insert(result.group_id.0 as usize, result);
            while let Some(result) = finished.remove(&next_out) {
                let group = requests.remove(&next_out).context("a prompt came back twice")?;
                each(&rows[next_out], &group, result)?;
                next_out += 1;
            }
        }
        Ok(())
    }

    fn group(&self, index: usize, row: &PromptRow, request: &Request) -> Result<GroupRequest> {
        Ok(GroupRequest {
            group_id: GroupId(index as u64),
            prompt_id: row.prompt_id,
            epoch: 0,
            prompt_token_ids: self.encode(&row.prompt)?,
            seeds: (0..request.num_samples).map(|i| derive_seed(request.seed, row.prompt_id.0, i, 0)).collect(),
            sampling: request.sampling.clone(),
            ..GroupRequest::default()
        })
    }

    /// A generated response as a row of the trajectory dataset.
    pub fn to_sample(&self, row: &PromptRow, group: &GroupRequest, worker: &str, sample: GeneratedSample) -> Sample {
        Sample {
            step: Step(0),
            prompt_id: row.prompt_id,
            group_id: group.group_id,
            sample_index: sample.sample_index,
            epoch: group.epoch,
            seed: sample.seed,
            data_source: row.data_source.clone(),
            prompt: row.prompt.clone(),
            response: self.response(&sample),
            prompt_token_ids: group.prompt_token_ids.clone(),
            response_mask: vec![1; sample.token_ids.len()],
            response_token_ids: sample.token_ids,
            response_reused: sample.reused,
            rollout_log_probs: sample.log_probs,
            sampled_log_probs: sample.sampled_log_probs,
            surviving_mass: sample.surviving_mass,
            old_log_probs: Vec::new(),
            ref_log_probs: Vec::new(),
            values: Vec::new(),
            advantages: Vec::new(),
            returns: Vec::new(),
            outcome: None,
            ground_truth: row.ground_truth.clone(),
            extra_info: row.extra_info.clone(),
            finish_reason: sample.finish_reason,
            policy_versions: sample.policy_versions,
            staleness: 0,
            num_drafted: sample.num_drafted,
            num_accepted: sample.num_accepted,
            worker: worker.to_owned(),
            timings: sample.timings,
        }
    }
}

/// Write samples that weights of this form drew as a dataset that `datasets.load_from_disk` reads.
///
/// # Errors
/// A directory that holds something already (exit code 2), or cannot be written.
pub fn write_dataset(dir: &Path, run: &str, (samples, weights): (&[Sample], WeightFormat)) -> Result<()> {
    require_empty(dir)?;
    let mut writer = temper_data::trajectories::DatasetWriter::open(dir, run)?;
    if let Some(note) = weights.dataset_note() {
        writer.describe(note)?;
    }
    Ok(writer.write_step(Step(0), samples)?)
}

/// Text prompts as one user message each, for the chat template; other prompts stay.
pub fn as_chat(rows: &mut [PromptRow]) {
    for row in rows {
        if let PromptContent::Text(text) = &row.prompt {
            let message = temper_types::ChatMessage { role: "user".to_owned(), content: text.clone() };
            row.prompt = PromptContent::Messages(vec![message]);
        }
    }
}
