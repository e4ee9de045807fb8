//! Models with a scalar head: the critic and the reward model. Each has masters, packed weights and moments of its own
//! on a backbone of its own; the memory of passes is the policy's.
//!
//! A critic's value at a response token is read where the policy reads the token's log-prob: at the row before it. A
//! score is read at the last token of a sequence. Heads are computed in f32.

use crate::micro_batch::split;
use crate::non_finite::keep_batch;
use crate::optimizer::{self, Moments, StepSize};
use crate::shared_head::{Columns, SharedHead};
use crate::trainer::{Trainer, global_counts, sequence_len, unpack};
use crate::{Error, scalar_state};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use temper_actor::weights_io::WriteOptions;
use temper_actor::{Head, ModelConfig, OutputGrads, PackedPolicy, ParamStore, Recompute, TrainArena, TrainBatch};
use temper_algos::preference::{RewardModelConfig, reward_model_loss};
use temper_algos::{SharedValueLossConfig, TokenBatch, ValueLossConfig, ValueLossInput, value_loss, widen};
use temper_proto::{
    Backbone, MiniBatch, OptimizerConfig, PreferencePair, ScalarModelSpec, ScalarReport, ScalarRole, TokenSequence,
};
use temper_tensor::{DType, Device};

/// A backbone under a scalar head.
#[derive(Debug)]
pub(crate) struct ScalarModel {
    pub(crate) config: ModelConfig,
    pub(crate) params: ParamStore,
    pub(crate) moments: Option<Moments>,
    packed: PackedPolicy,
    grads: Option<ParamStore>,
}

/// The scalar model of the current stage.
#[derive(Debug, Clone)]
pub(crate) struct ScalarStage {
    pub(crate) role: ScalarRole,
    loss: ScalarLoss,
    optimizer: OptimizerConfig,
    backbone: Backbone,
    seed: u64,
}

#[derive(Debug, Clone)]
enum ScalarLoss {
    Value(ValueLossConfig),
    BradleyTerry(RewardModelConfig),
}

/// Sequences of one micro-batch with the rows whose scalars are wanted.
struct Pass<'a> {
    batch: &'a TrainBatch,
    recompute: Recompute,
    arena: &'a mut TrainArena,
}

impl ScalarModel {
    pub(crate) fn new(device: &Arc<dyn Device>, params: ParamStore, config: ModelConfig, dtype: DType) -> Self {
        let packed = PackedPolicy::new(device, &params, &config, dtype);
        ScalarModel { config, params, moments: None, packed, grads: None }
    }

    /// Optimizer state and gradients are of no use after the stage.
    fn end_stage(&mut self) {
        self.moments = None;
        self.grads = None;
    }

    fn read(&self, batch: &TrainBatch, arena: &mut TrainArena) -> Vec<f32> {
        if batch.num_targets() == 0 { Vec::new() } else { self.packed.values_only(batch, arena) }
    }

    /// Forward, loss and backward of one micro-batch; gradients add up in `grads`.
    fn accumulate(
        &self,
        pass: Pass<'_>,
        grads: &mut ParamStore,
        loss: impl FnOnce(&[f32]) -> Result<Vec<f32>, Error>,
    ) -> Result<(), Error> {
        if pass.batch.num_targets() == 0 {
            return loss(&[]).map(drop);
        }
        let mut tape = self.packed.train_forward(pass.batch, pass.recompute, pass.arena);
        let values = self.packed.values(&mut tape);
        let d_values = loss(&values)?;
        self.packed.backward(&self.params, tape, OutputGrads::Values { d_values: &d_values }, grads);
        Ok(())
    }

    fn take_grads(&mut self, device: &dyn Device) -> ParamStore {
        let mut grads = self.grads.take().unwrap_or_else(|| self.params.zeros_like(device));
        grads.clear(device);
        grads
    }

    /// One step with the gradients that were gathered, or none where they are not finite. Gives their norm.
    fn step(
        &mut self,
        device: &dyn Device,
        (optimizer, learning_rate): (&OptimizerConfig, f64),
        gathered: (ParamStore, Result<(), Error>),
    ) -> Result<f64, Error> {
        let (grads, accumulated) = gathered;
        let result = accumulated.and_then(|()| {
            let grad_norm = optimizer::finite_norm(device, &grads)?;
            let size = StepSize { learning_rate, grad_norm };
            optimizer::step(device, (optimizer, size), (&mut self.params, &grads), &mut self.moments);
            self.packed.repack(&self.params);
            Ok(grad_norm)
        });
        self.grads = Some(grads);
        result
    }
}

/// Sequences side by side; the targets are the rows before the response's tokens.
fn value_batch<'a>(sequences: impl Iterator<Item = &'a TokenSequence>) -> TrainBatch {
    push_rows(sequences, |prompt, response| prompt - 1..prompt + response - 1)
}

/// Sequences side by side; the target of each is its last row.
fn score_batch<'a>(sequences: impl Iterator<Item = &'a TokenSequence>) -> TrainBatch {
    push_rows(sequences, |prompt, response| prompt + response - 1..prompt + response)
}

fn push_rows<'a>(
    sequences: impl Iterator<Item = &'a TokenSequence>,
    targets: impl Fn(usize, usize) -> Range<usize>,
) -> TrainBatch {
    let mut batch = TrainBatch::new();
    let mut ids = Vec::new();
    for sequence in sequences {
        let rows = targets(sequence.prompt_token_ids.len(), sequence.response_token_ids.len());
        if rows.is_empty() {
            continue;
        }
        ids.clear();
        ids.extend(sequence.prompt_token_ids.iter().chain(&sequence.response_token_ids).take(rows.end));
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        batch.push_values(&ids, &positions, rows);
    }
    batch
}

fn pair_len(pair: &PreferencePair) -> usize {
    sequence_len(&pair.chosen) + sequence_len(&pair.rejected)
}

/// Consecutive pairs that pass through the model together: as many as fit, a longer one alone.
fn split_pairs(pairs: &[PreferencePair], max_tokens: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (index, pair) in pairs.iter().enumerate() {
        tokens += pair_len(pair);
        match batches.last_mut() {
            Some(last) if tokens <= max_tokens => last.end = index + 1,
            _ => {
                batches.push(index..index + 1);
                tokens = pair_len(pair);
            }
        }
    }
    batches
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

impl Trainer {
    /// The scalar model of the stage that has begun.
    ///
    /// # Errors
    /// A loss that cannot be read or has a setting out of range.
    pub fn begin_scalar_model(&mut self, spec: ScalarModelSpec) -> Result<(), Error> {
        let wrong = |e: serde_json::Error| Error::invalid("the loss of the scalar model", e.to_string());
        if spec.backbone == Backbone::Shared {
            if spec.role != ScalarRole::Critic {
                return Err(Error::invalid("backbone", "only a critic can share the policy's trunk"));
            }
            let config: SharedValueLossConfig = serde_json::from_str(&spec.loss_json).map_err(wrong)?;
            config.validate()?;
            self.shared_head = Some(SharedHead::new(config, self.config.hidden_size));
            return Ok(());
        }
        let loss = match spec.role {
            ScalarRole::Critic => {
                let config: ValueLossConfig = serde_json::from_str(&spec.loss_json).map_err(wrong)?;
                config.validate()?;
                ScalarLoss::Value(config)
            }
            ScalarRole::RewardModel => {
                self.reward_model = None;
                ScalarLoss::BradleyTerry(serde_json::from_str(&spec.loss_json).map_err(wrong)?)
            }
        };
        let ScalarModelSpec { role, optimizer, backbone, seed, .. } = spec;
        self.scalar = Some(ScalarStage { role, loss, optimizer, backbone, seed });
        Ok(())
    }

    pub(crate) fn end_scalar_stage(&mut self) {
        self.scalar = None;
        self.critic = None;
        self.shared_head = None;
        if let Some(model) = &mut self.reward_model {
            model.end_stage();
        }
    }

    pub(crate) fn scalar_config(&self, role: ScalarRole) -> Result<ModelConfig, Error> {
        let head = match role {
            ScalarRole::Critic => Head::TokenValue,
            ScalarRole::RewardModel => Head::SequenceScore,
        };
        Ok(self.config.with_head(head)?)
    }

    fn scalar_stage(&self, role: ScalarRole, operation: &'static str) -> Result<ScalarStage, Error> {
        let stage = self.scalar.clone().filter(|stage| stage.role == role);
        stage.ok_or_else(|| Error::invalid(operation, format!("this stage has no {}", name(role))))
    }

    /// A model of the current stage, made from its backbone.
    fn make_scalar_model(&self, stage: &ScalarStage) -> Result<ScalarModel, Error> {
        let config = self.scalar_config(stage.role)?;
        let body = match (stage.backbone, &self.reward_model) {
            (Backbone::Policy, _) => &self.params,
            (Backbone::Shared, _) => {
                return Err(Error::invalid("backbone", "a head on the policy's trunk is no model of its own"));
            }
            (Backbone::RewardModel, Some(model)) => &model.params,
            (Backbone::RewardModel, None) => {
                return Err(Error::invalid("backbone", "no earlier stage has trained a reward model"));
            }
        };
        let params = ParamStore::init_on(&*self.device, &config, body, stage.seed);
        Ok(ScalarModel::new(&self.device, params, config, self.dtype))
    }

    fn ensure_critic(&mut self, operation: &'static str) -> Result<ScalarStage, Error> {
        let stage = self.scalar_stage(ScalarRole::Critic, operation)?;
        if self.critic.is_none() {
            self.critic = Some(self.make_scalar_model(&stage)?);
        }
        Ok(stage)
    }

    /// The critic's values of every response token.
    ///
    /// # Errors
    /// A bad sequence, no critic in this stage, or a value that is not finite.
    pub fn values(&mut self, sequences: &[TokenSequence]) -> Result<Vec<Vec<f32>>, Error> {
        self.check_sequences(sequences.iter())?;
        if self.shared_head.is_none() {
            self.ensure_critic("values")?;
        }
        let mut out = Vec::with_capacity(sequences.len());
        for range in split(sequences.iter(), self.limits().0) {
            let part = &sequences[range];
            let values = self.values_of(&value_batch(part.iter()));
            out.extend(unpack(part.iter(), &values));
        }
        match out.iter().enumerate().find_map(|(i, row)| Some((i, *row.iter().find(|v| !v.is_finite())?))) {
            Some((sequence, value)) => Err(Error::NonFiniteOutput { what: "a value", sequence, value }),
            None => Ok(out),
        }
    }

    fn values_of(&mut self, batch: &TrainBatch) -> Vec<f32> {
        match (&self.shared_head, &self.critic) {
            (_, _) if batch.num_targets() == 0 => Vec::new(),
            (Some(head), _) => {
                let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
                head.values(&policy, batch, &mut self.arena)
            }
            (None, Some(critic)) => critic.read(batch, &mut self.arena),
            (None, None) => Vec::new(),
        }
    }

    /// One optimizer step of the critic. On an error no weight has changed.
    ///
    /// # Errors
    /// No critic in this stage, a bad row, or a loss or gradient that is not finite.
    pub fn update_critic(&mut self, batch: &MiniBatch) -> Result<ScalarReport, Error> {
        self.check_sequences(batch.rows.iter().map(|row| &row.sequence))?;
        if self.shared_head.is_some() {
            let problem = "the value head is on the policy's trunk: it learns in the policy's update";
            return Err(Error::invalid("update_critic", problem));
        }
        let stage = self.ensure_critic("update_critic")?;
        let ScalarLoss::Value(config) = &stage.loss else {
            return Err(Error::invalid("update_critic", "the stage's loss is no value loss"));
        };
        let mut critic = self.critic.take().expect("made above");
        let mut sums = CriticSums::default();
        let gathered = self.accumulate_critic(&mut critic, config, batch, &mut sums);
        let stepped = critic.step(&*self.device, (&stage.optimizer, batch.learning_rate), gathered);
        self.critic = Some(critic);
        let grad_norm = stepped.map_err(|error| keep_batch(error, batch, self.non_finite_place()))?;
        Ok(sums.report(grad_norm, batch))
    }

    fn accumulate_critic(
        &mut self,
        critic: &mut ScalarModel,
        config: &ValueLossConfig,
        batch: &MiniBatch,
        sums: &mut CriticSums,
    ) -> (ParamStore, Result<(), Error>) {
        let mut grads = critic.take_grads(&*self.device);
        let (max_tokens, recompute) = self.limits();
        let counts = global_counts(batch);
        let micro_batches = split(batch.rows.iter().map(|row| &row.sequence), max_tokens);
        let result = micro_batches.into_iter().try_for_each(|range| {
            let rows = &batch.rows[range];
            let targets = value_batch(rows.iter().map(|row| &row.sequence));
            let pass = Pass { batch: &targets, recompute, arena: &mut self.arena };
            critic.accumulate(pass, &mut grads, |values| {
                let columns = Columns::gather(rows);
                let predictions = widen(values);
                let input = ValueLossInput {
                    batch: TokenBatch::new(&columns.offsets, &columns.mask)?,
                    predictions: &predictions,
                    old_values: &columns.old_values,
                    returns: &columns.returns,
                };
                let out = value_loss(config, &input, &counts)?;
                sums.loss += out.loss;
                sums.num_clipped += out.num_clipped;
                let active = predictions.iter().zip(&columns.mask).filter(|(_, m)| **m == 1);
                sums.value_sum += active.map(|(v, _)| v).sum::<f64>();
                Ok(narrow(&out.d_predictions))
            })
        });
        (grads, result)
    }

    /// One optimizer step of the reward model on pairs. On an error no weight has changed.
    ///
    /// # Errors
    /// No reward model in this stage, a bad sequence, or a score, loss or gradient that is not finite.
    pub fn update_reward_model(&mut self, pairs: &[PreferencePair], learning_rate: f64) -> Result<ScalarReport, Error> {
        self.check_sequences(pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]))?;
        let stage = self.scalar_stage(ScalarRole::RewardModel, "update_reward_model")?;
        let ScalarLoss::BradleyTerry(config) = &stage.loss else {
            return Err(Error::invalid("update_reward_model", "the stage's loss is none over pairs"));
        };
        let mut model = match self.reward_model.take() {
            Some(model) => model,
            None => self.make_scalar_model(&stage)?,
        };
        let mut report = ScalarReport::default();
        let gathered = self.accumulate_pairs(&mut model, config, pairs, &mut report);
        let stepped = model.step(&*self.device, (&stage.optimizer, learning_rate), gathered);
        self.reward_model = Some(model);
        report.grad_norm = stepped?;
        Ok(report)
    }

    fn accumulate_pairs(
        &mut self,
        model: &mut ScalarModel,
        config: &RewardModelConfig,
        pairs: &[PreferencePair],
        report: &mut ScalarReport,
    ) -> (ParamStore, Result<(), Error>) {
        let mut grads = model.take_grads(&*self.device);
        report.num_tokens = pairs.iter().map(|pair| pair_len(pair) as u64).sum();
        let (max_tokens, recompute) = self.limits();
        let (mut num_correct, mut margin_sum) = (0, 0.0);
        let result = split_pairs(pairs, max_tokens).into_iter().try_for_each(|range| {
            let first = range.start;
            let part = &pairs[range];
            let targets = score_batch(part.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
            let pass = Pass { batch: &targets, recompute, arena: &mut self.arena };
            model.accumulate(pass, &mut grads, |scores| {
                let (chosen, rejected): (Vec<f64>, Vec<f64>) =
                    scores.chunks_exact(2).map(|pair| (f64::from(pair[0]), f64::from(pair[1]))).unzip();
                check_scores(scores, 2 * first)?;
                let margins: Vec<f64> = part.iter().map(|pair| pair.margin).collect();
                let out = reward_model_loss(config, &chosen, &rejected, Some(&margins), pairs.len() as u64)?;
                report.loss += out.loss;
                num_correct += out.num_correct;
                margin_sum += out.margin_sum;
                let d = out.d_chosen.iter().zip(&out.d_rejected).flat_map(|(c, r)| [*c, *r]);
                Ok(narrow(&d.collect::<Vec<f64>>()))
            })
        });
        let num_pairs = pairs.len().max(1) as f64;
        report.metrics.insert("accuracy".to_owned(), num_correct as f64 / num_pairs);
        report.metrics.insert("margin_mean".to_owned(), margin_sum / num_pairs);
        (grads, result)
    }

    /// The reward model's score of every sequence, finite or not.
    ///
    /// # Errors
    /// A bad sequence, or no reward model.
    pub fn scores(&mut self, sequences: &[TokenSequence]) -> Result<Vec<f32>, Error> {
        self.check_sequences(sequences.iter())?;
        if self.reward_model.is_none()
            && let Ok(stage) = self.scalar_stage(ScalarRole::RewardModel, "scores")
        {
            self.reward_model = Some(self.make_scalar_model(&stage)?);
        }
        let missing = || Error::invalid("scores", "no stage has trained a reward model");
        let model = self.reward_model.as_ref().ok_or_else(missing)?;
        let mut out = Vec::with_capacity(sequences.len());
        for range in split(sequences.iter(), self.limits().0) {
            out.extend(model.read(&score_batch(sequences[range].iter()), &mut self.arena));
        }
        Ok(out)
    }

    /// Write the reward model, where there is one, as a Hugging Face directory; tells whether it did.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save_reward_model(&self, dir: &Path) -> Result<bool, Error> {
        let Some(model) = &self.reward_model else { return Ok(false) };
        let options = WriteOptions { side_files_from: Some(&self.side_files_from), ..WriteOptions::default() };
        model.params.save(&*self.device, dir, &model.config, &options)?;
        Ok(true)
    }

    /// Load a reward model that was written by [`Trainer::save_reward_model`].
    ///
    /// # Errors
    /// A damaged file, or one of another model.
    pub fn restore_reward_model(&mut self, dir: &Path) -> Result<(), Error> {
        self.reward_model = Some(scalar_state::load_model(self, ScalarRole::RewardModel, dir)?);
        Ok(())
    }
}

fn name(role: ScalarRole) -> &'static str {
    match role {
        ScalarRole::Critic => "critic",
        ScalarRole::RewardModel => "reward model",
    }
}

fn check_scores(scores: &[f32], first: usize) -> Result<(), Error> {
    match scores.iter().position(|score| !score.is_finite()) {
        Some(at) => Err(Error::NonFiniteOutput { what: "a score", sequence: first + at, value: scores[at] }),
        None => Ok(()),
    }
}

/// What a mini-batch of the critic adds up.
#[derive(Debug, Default)]
struct CriticSums {
    loss: f64,
    num_clipped: usize,
    value_sum: f64,
}

impl CriticSums {
    fn report(&self, grad_norm: f64, batch: &MiniBatch) -> ScalarReport {
        let num_active = batch.global.num_tokens.max(1) as f64;
        let num_tokens = batch.rows.iter().map(|row| sequence_len(&row.sequence) as u64).sum();
        let metrics = [
            ("value_clipfrac".to_owned(), self.num_clipped as f64 / num_active),
            ("value_mean".to_owned(), self.value_sum / num_active),
        ];
        ScalarReport { loss: self.loss, grad_norm, num_tokens, metrics: metrics.into_iter().collect() }
    }
}
