//! The trainer itself: masters, gradients, moments, and one update.

use crate::distill::Distiller;
use crate::micro_batch::{Columns, check, split, train_batch};
use crate::non_finite::{Place, keep_batch};
use crate::optimizer::{self, Moments, StepSize};
use crate::reference::Reference;
use crate::scalar_model::{ScalarModel, ScalarStage};
use crate::shared_head::SharedHead;
use crate::{Error, state_io};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use temper_actor::{CheckpointReader, ModelConfig, OutputGrads, PackedPolicy, ParamStore, Recompute, TrainArena};
use temper_algos::{GlobalCounts, LossMetrics, Objective, ObjectiveInput, ObjectiveOutput, Scope, TokenBatch, widen};
use temper_proto::{
    LogProbs, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, UpdateReport,
};
use temper_tensor::{DType, Device};
use temper_types::PolicyVersion;

/// The packed weights of the process: written by the trainer at the end of an update, read by everyone.
pub type SharedPolicy = Arc<RwLock<PackedPolicy>>;

/// What the current stage asks for.
#[derive(Debug)]
pub(crate) struct Stage {
    objective: Objective,
    optimizer: OptimizerConfig,
    pub(crate) max_micro_batch_tokens: usize,
    pub(crate) recompute: Recompute,
}

/// Trains one model on one device.
#[derive(Debug)]
pub struct Trainer {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) config: ModelConfig,
    pub(crate) params: ParamStore,
    pub(crate) side_files_from: PathBuf,
    pub(crate) moments: Option<Moments>,
    pub(crate) reference: Option<Reference>,
    pub(crate) dtype: DType,
    pub(crate) policy: SharedPolicy,
    grads: Option<ParamStore>,
    pub(crate) arena: TrainArena,
    stage: Option<Stage>,
    max_micro_batch_tokens: usize,
    non_finite_dir: Option<PathBuf>,
    /// The scalar model that the current stage trains.
    pub(crate) scalar: Option<ScalarStage>,
    pub(crate) critic: Option<ScalarModel>,
    /// A value head on the policy's own trunk, where the stage has one.
    pub(crate) shared_head: Option<SharedHead>,
    pub(crate) reward_model: Option<ScalarModel>,
    pub(crate) distiller: Option<Distiller>,
}

/// Gradient of one micro-batch's outputs.
struct OutputGradients {
    d_log_probs: Vec<f32>,
    d_entropies: Vec<f32>,
}

impl Trainer {
    /// Load a Hugging Face directory and pack it for `dtype`. Ids that the tokenizer does not have are `masked_ids`.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name and tensor.
    pub fn load(device: Arc<dyn Device>, model_dir: &Path, dtype: DType, masked_ids: Vec<u32>) -> Result<Self, Error> {
        let config = ModelConfig::load(model_dir)?;
        let reader = CheckpointReader::open(model_dir)?;
        reader.validate(&config)?;
        let params = ParamStore::load(&*device, &config, &reader)?;
        let mut policy = PackedPolicy::new(&device, &params, &config, dtype);
        policy.set_masked_ids(masked_ids);
        policy.version = PolicyVersion { number: 0, hash: params.content_hash(&*device) };
        Ok(Trainer {
            device,
            config,
            params,
            side_files_from: model_dir.to_path_buf(),
            moments: None,
            reference: None,
            dtype,
            policy: Arc::new(RwLock::new(policy)),
            grads: None,
            arena: TrainArena::new(),
            stage: None,
            max_micro_batch_tokens: 4096,
            non_finite_dir: None,
            scalar: None,
            critic: None,
            shared_head: None,
            reward_model: None,
            distiller: None,
        })
    }

    /// Save a mini-batch whose loss or gradient is not finite as `step-N.json` in `dir`, made when it is needed.
    pub fn save_non_finite_to(&mut self, dir: PathBuf) {
        self.non_finite_dir = Some(dir);
    }

    /// The packed weights, to share with an engine.
    pub fn policy(&self) -> SharedPolicy {
        Arc::clone(&self.policy)
    }

    /// The version last published.
    pub fn version(&self) -> PolicyVersion {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).version
    }

    /// Begin a stage: objective, fresh optimizer state, and, where it is needed, the current weights as the reference.
    ///
    /// # Errors
    /// An objective that cannot be read or has a setting out of range.
    pub fn begin_stage(&mut self, spec: StageSpec) -> Result<(), Error> {
        let what = || format!("objective of stage `{}`", spec.name);
        let objective: Objective =
            serde_json::from_str(&spec.objective_json).map_err(|e| Error::invalid(what(), e.to_string()))?;
        objective.validate()?;
        self.moments = None;
        self.reference = None;
        self.distiller = None;
        self.end_scalar_stage();
        if spec.needs_reference {
            self.set_reference(self.params.duplicate(&*self.device));
        }
        self.max_micro_batch_tokens = spec.max_micro_batch_tokens;
        self.stage = Some(Stage {
            objective,
            optimizer: spec.optimizer,
            max_micro_batch_tokens: spec.max_micro_batch_tokens,
            recompute: if spec.recompute_activations { Recompute::Layers } else { Recompute::None },
        });
        Ok(())
    }

    /// Log-probs and entropies of every response token.
    ///
    /// # Errors
    /// A bad sequence, or a reference that this stage does not keep.
    pub fn log_probs(
        &mut self,
        role: PolicyRole,
        sequences: &[TokenSequence],
        temperature: f32,
    ) -> Result<LogProbs, Error> {
        self.check_sequences(sequences.iter())?;
        let shared = Arc::clone(&self.policy);
        let current = shared.read().unwrap_or_else(PoisonError::into_inner);
        let policy = match (role, &self.reference) {
            (PolicyRole::Policy, _) => &*current,
            (PolicyRole::Reference, Some(reference)) => &reference.packed,
            (PolicyRole::Reference, None) => {
                return Err(Error::invalid("log_probs", "this stage keeps no reference policy"));
            }
        };
        let mut out = LogProbs::default();
        for range in split(sequences.iter(), self.max_micro_batch_tokens) {
            let part = &sequences[range];
            let stats = policy.score_only(&train_batch(part.iter()), temperature, &mut self.arena);
            out.log_probs.extend(unpack(part.iter(), &stats.log_probs));
            out.entropies.extend(unpack(part.iter(), &stats.entropies));
            out.sum_pi_squared.extend(unpack(part.iter(), &stats.sum_squares));
        }
        Ok(out)
    }

    /// One optimizer step over a mini-batch. On an error no weight has changed.
    ///
    /// # Errors
    /// No stage, a bad row, or a loss or gradient that is not finite; see [`Trainer::save_non_finite_to`].
    pub fn update(&mut self, batch: &MiniBatch) -> Result<UpdateReport, Error> {
        self.update_with(batch, |trainer, stage, grads| trainer.accumulate(stage, batch, grads))
    }

    /// One optimizer step on the gradients that `accumulate` adds up.
    pub(crate) fn update_with(
        &mut self,
        batch: &MiniBatch,
        accumulate: impl FnOnce(&mut Self, &Stage, &mut ParamStore) -> Result<UpdateReport, Error>,
    ) -> Result<UpdateReport, Error> {
        let stage = self.stage.take().ok_or_else(|| Error::invalid("update", "no stage has begun"))?;
        let result = self.update_in(&stage, batch, accumulate);
        self.stage = Some(stage);
        result.map_err(|error| keep_batch(error, batch, self.non_finite_place()))
    }

    /// Where a mini-batch goes that gave numbers that are not finite.
    pub(crate) fn non_finite_place(&self) -> Option<Place<'_>> {
        self.non_finite_dir.as_deref().map(|dir| Place { dir, step: self.version().number + 1 })
    }

    fn update_in(
        &mut self,
        stage: &Stage,
        batch: &MiniBatch,
        accumulate: impl FnOnce(&mut Self, &Stage, &mut ParamStore) -> Result<UpdateReport, Error>,
    ) -> Result<UpdateReport, Error> {
        self.check_sequences(batch.rows.iter().map(|row| &row.sequence))?;
        let mut grads = self.grads.take().unwrap_or_else(|| self.params.zeros_like(&*self.device));
        grads.clear(&*self.device);
        let accumulated = accumulate(self, stage, &mut grads);
        let result = accumulated.and_then(|mut report| {
            let of_head = self.shared_head.as_ref().map_or(Ok(0.0), SharedHead::grad_norm)?;
            report.grad_norm = optimizer::finite_norm(&*self.device, &grads)?.hypot(of_head);
            self.apply(stage, batch.learning_rate, report.grad_norm, &grads)?;
            Ok(report)
        });
        self.grads = Some(grads);
        result
    }

    /// Forward and backward of every micro-batch; gradients add up in `grads`.
    fn accumulate(&mut self, stage: &Stage, batch: &MiniBatch, grads: &mut ParamStore) -> Result<UpdateReport, Error> {
        let num_tokens = batch.rows.iter().map(|row| sequence_len(&row.sequence) as u64).sum();
        let counts = global_counts(batch);
        let whole = match stage.objective.scope() {
            Scope::MiniBatch => Some(self.whole_batch_gradients(stage, batch, &counts)?),
            Scope::Token | Scope::Sequence => None,
        };
        let mut report = UpdateReport { num_tokens, ..UpdateReport::default() };
        let mut metrics = LossMetrics::default();
        if let Some(out) = &whole {
            report.loss = out.loss;
            metrics = out.metrics;
        }
        if let Some(head) = &mut self.shared_head {
            head.start_update();
        }
        let mut first_token = 0;
        let sequences = batch.rows.iter().map(|row| &row.sequence);
        for range in split(sequences, stage.max_micro_batch_tokens) {
            let (first_row, rows) = (range.start, &batch.rows[range]);
            let num_tokens: usize = rows.iter().map(|row| row.sequence.response_token_ids.len()).sum();
            let tokens = first_token..first_token + num_tokens;
            first_token = tokens.end;
            let shared = Arc::clone(&self.policy);
            let policy = shared.read().unwrap_or_else(PoisonError::into_inner);
            let train = train_batch(rows.iter().map(|row| &row.sequence));
            let tape = policy.train_forward(&train, stage.recompute, &mut self.arena);
            let stats = policy.log_probs(&tape, batch.temperature);
            report.log_probs.extend(unpack(rows.iter().map(|row| &row.sequence), &stats.log_probs));
            let gradients = match &whole {
                Some(out) => slice_gradients(out, tokens),
                None => {
                    let says = PolicyStats {
                        log_probs: &stats.log_probs,
                        entropies: &stats.entropies,
                        sum_pi_squared: &stats.sum_squares,
                    };
                    let out = evaluate(&stage.objective, rows, says, &counts)
                        .map_err(|error| error.in_rows_from(first_row))?;
                    report.loss += out.loss;
                    metrics.merge(&out.metrics);
                    let all = 0..num_tokens;
                    slice_gradients(&out, all)
                }
            };
            let outputs = OutputGrads::LogProbs {
                d_log_probs: &gradients.d_log_probs,
                d_entropies: &gradients.d_entropies,
                temperature: batch.temperature,
            };
            match &mut self.shared_head {
                Some(head) => {
                    let d_hidden = head
                        .accumulate(&policy.hidden(&tape), rows, &counts)
                        .map_err(|error| error.in_rows_from(first_row))?;
                    policy.backward_beside(&self.params, tape, (outputs, &d_hidden), grads);
                }
                None => policy.backward(&self.params, tape, outputs, grads),
            }
        }
        name_metrics(&mut report, &metrics);
        report.metrics.extend(whole.into_iter().flat_map(|out| out.reports));
        if let Some(head) = &self.shared_head {
            head.report(&counts, &mut report);
        }
        Ok(report)
    }

    /// The objective over the whole mini-batch at once, from log-probs that keep no activations.
    fn whole_batch_gradients(
        &mut self,
        stage: &Stage,
        batch: &MiniBatch,
        counts: &GlobalCounts,
    ) -> Result<ObjectiveOutput, Error> {
        let sequences: Vec<TokenSequence> = batch.rows.iter().map(|row| row.sequence.clone()).collect();
        let stats = self.log_probs(PolicyRole::Policy, &sequences, batch.temperature)?;
        let (log_probs, entropies) = (stats.log_probs.concat(), stats.entropies.concat());
        let says = PolicyStats {
            log_probs: &log_probs,
            entropies: &entropies,
            sum_pi_squared: &stats.sum_pi_squared.concat(),
        };
        evaluate(&stage.objective, &batch.rows, says, counts)
    }

    /// Clip, step every unit, and swap the packed weights.
    fn apply(&mut self, stage: &Stage, learning_rate: f64, grad_norm: f64, grads: &ParamStore) -> Result<(), Error> {
        let size = StepSize { learning_rate, grad_norm };
        if let Some(head) = &mut self.shared_head {
            head.step(&stage.optimizer, size)?;
        }
        optimizer::step(&*self.device, (&stage.optimizer, size), (&mut self.params, grads), &mut self.moments);
        self.repack();
        Ok(())
    }

    fn repack(&mut self) {
        self.policy.write().unwrap_or_else(PoisonError::into_inner).repack(&self.params);
    }

    /// Hash the weights and name them.
    pub fn publish(&mut self, number: u64) -> PolicyVersion {
        let version = PolicyVersion { number, hash: self.params.content_hash(&*self.device) };
        self.policy.write().unwrap_or_else(PoisonError::into_inner).version = version;
        version
    }

    /// Load weights and state of a checkpoint into the stage that has begun.
    ///
    /// # Errors
    /// A damaged file, or weights that do not hash to `version`.
    pub fn restore(&mut self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> Result<(), Error> {
        let reader = CheckpointReader::open(model_dir)?;
        reader.validate(&self.config)?;
        let params = ParamStore::load(&*self.device, &self.config, &reader)?;
        let got = params.content_hash(&*self.device);
        if got != version.hash {
            return Err(Error::WrongWeights { path: model_dir.to_path_buf(), expected: version.hash, got });
        }
        self.params = params;
        state_io::restore(self, state_dir)?;
        self.repack();
        self.policy.write().unwrap_or_else(PoisonError::into_inner).version = version;
        Ok(())
    }

    /// Memory limits of the current stage.
    pub(crate) fn limits(&self) -> (usize, Recompute) {
        (self.max_micro_batch_tokens, self.stage.as_ref().map_or(Recompute::None, |stage| stage.recompute))
    }

    pub(crate) fn check_sequences<'a>(&self, sequences: impl Iterator<Item = &'a TokenSequence>) -> Result<(), Error> {
        let (vocab, longest) = (self.config.vocab_size, self.config.max_position_embeddings);
        sequences.enumerate().try_for_each(|(index, sequence)| check(index, sequence, vocab, longest))
    }
}

pub(crate) fn sequence_len(sequence: &TokenSequence) -> usize {
    sequence.prompt_token_ids.len() + sequence.response_token_ids.len()
}

/// Numbers of response tokens, one array per sequence.
pub(crate) fn unpack<'a>(sequences: impl Iterator<Item = &'a TokenSequence>, values: &[f32]) -> Vec<Vec<f32>> {
    let mut rest = values;
    let take = |sequence: &TokenSequence| {
        let (own, tail) = rest.split_at(sequence.response_token_ids.len());
        rest = tail;
        own.to_vec()
    };
    sequences.map(take).collect()
}

pub(crate) fn global_counts(batch: &MiniBatch) -> GlobalCounts {
    let g = &batch.global;
    GlobalCounts {
        num_tokens: g.num_tokens,
        num_sequences: g.num_sequences,
        num_rows: g.num_rows,
        loss_scale_factor: g.loss_scale_factor,
    }
}

/// What the policy says of response tokens, end to end.
#[derive(Debug, Clone, Copy)]
struct PolicyStats<'a> {
    log_probs: &'a [f32],
    entropies: &'a [f32],
    sum_pi_squared: &'a [f32],
}

fn evaluate(
    objective: &Objective,
    rows: &[TrainRow],
    says: PolicyStats<'_>,
    counts: &GlobalCounts,
) -> Result<ObjectiveOutput, Error> {
    let (log_probs, entropies) = (widen(says.log_probs), widen(says.entropies));
    let columns = Columns::gather(rows, &log_probs)?;
    let input = ObjectiveInput {
        batch: TokenBatch::new(&columns.offsets, &columns.response_mask)?,
        log_probs: &log_probs,
        entropies: &entropies,
        old_log_probs: &columns.old_log_probs,
        ref_log_probs: Some(&columns.ref_log_probs[..]).filter(|v| !v.is_empty()),
        advantages: &columns.advantages,
        rollout_is_weights: Some(&columns.rollout_weights[..]).filter(|v| !v.is_empty()),
        rollout_log_probs: Some(&columns.rollout_log_probs[..]).filter(|v| !v.is_empty()),
        sum_pi_squared: Some(&widen(says.sum_pi_squared)[..]),
    };
    Ok(objective.evaluate(&input, counts)?)
}

fn slice_gradients(out: &ObjectiveOutput, tokens: Range<usize>) -> OutputGradients {
    let narrow = |values: &[f64]| values.iter().map(|v| *v as f32).collect();
    let d_entropies = if out.d_entropies.is_empty() { &[][..] } else { &out.d_entropies[tokens.clone()] };
    OutputGradients { d_log_probs: narrow(&out.d_log_probs[tokens]), d_entropies: narrow(d_entropies) }
}

fn name_metrics(report: &mut UpdateReport, metrics: &LossMetrics) {
    report.entropy = metrics.entropy();
    report.metrics = metrics.named().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
}
