//! Models with a scalar head: the critic and the reward model. Each has masters, packed weights and moments of its own
//! on a backbone of its own; the memory of passes is the policy's.
//!
//! A critic's value at a response token is read where the policy reads the token's log-prob: at the row before it. A
//! score is read at the last token of a sequence. Heads are computed in f32.

use crate::division::spread;
use crate::exchange::{add_up, lone_sequences, own_pairs, own_rows, own_sequences};
use crate::non_finite::keep_batch;
use crate::optimizer::StepSize;
use crate::sequence::{check_exchange, micro_batch_tokens};
use crate::shared_head::{Columns, SharedHead};
use crate::store::Store;
use crate::trainer::{SharedPolicy, Trainer, global_counts, sequence_len, unpack};
use crate::weights::{Pass, Weights, master_ranks, pack, repack};
use crate::{Error, Ranks, scalar_state};
use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use temper_actor::weights_io::WriteOptions;
use temper_actor::{Head, ModelConfig, OutputGrads, ParamStore, TrainArena, TrainBatch};
use temper_algos::preference::{RewardModelConfig, reward_model_loss};
use temper_algos::{
    GlobalCounts, SharedValueLossConfig, TokenBatch, ValueLossConfig, ValueLossInput, value_loss, widen,
};
use temper_proto::{
    Backbone, MiniBatch, OptimizerConfig, PreferencePair, ScalarModelSpec, ScalarReport, ScalarRole, TokenSequence,
    TrainRow,
};
use temper_tensor::{DType, Device};

/// A backbone under a scalar head.
#[derive(Debug)]
pub(crate) struct ScalarModel {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Weights,
    packed: SharedPolicy,
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

impl ScalarModel {
    /// A model with these masters, packed once per process.
    pub(crate) fn new(
        on: (&Arc<dyn Device>, Option<&Ranks>),
        masters: Store,
        config: ModelConfig,
        dtype: DType,
    ) -> Result<Self, Error> {
        let packed = pack(on, &masters, (&config, dtype), &[])?;
        Ok(ScalarModel { config, weights: Weights::new(masters), packed })
    }

    fn read(&self, batch: &TrainBatch, arena: &mut TrainArena) -> Vec<f32> {
        let packed = self.packed.read().unwrap_or_else(PoisonError::into_inner);
        if batch.num_targets() == 0 { Vec::new() } else { packed.values_only(batch, arena) }
    }

    /// Forward, loss and backward of one micro-batch; gradients add up in `grads`.
    fn pass(
        &self,
        (trainer, batch): (&mut Trainer, &TrainBatch),
        grads: &mut Store,
        loss: impl FnOnce(&[f32]) -> Result<Vec<f32>, Error>,
    ) -> Result<(), Error> {
        if batch.num_targets() == 0 {
            loss(&[])?;
            return trainer.idle_pass(&self.packed, &self.weights, grads);
        }
        let recompute = trainer.limits().1;
        let packed = self.packed.read().unwrap_or_else(PoisonError::into_inner);
        let mut tape = packed.train_forward(batch, recompute, &mut trainer.arena);
        let values = packed.values(&mut tape);
        check_exchange(trainer.ranks.as_ref())?;
        let d_values = loss(&values)?;
        let on = (&*trainer.device, trainer.ranks.as_ref());
        let mut pass = Pass::new(on, &self.weights.masters, grads);
        packed.backward_units(tape, OutputGrads::Values { d_values: &d_values }, &mut pass);
        pass.finish()
    }

    /// One step with the gradients that were gathered, or none where they are not finite. Gives their norm.
    fn step(
        &mut self,
        (dev, ranks): (&dyn Device, Option<&Ranks>),
        (optimizer, learning_rate): (&OptimizerConfig, f64),
        grads: &Store,
    ) -> Result<f64, Error> {
        let grad_norm = Weights::grad_norm(dev, ranks, grads)?;
        self.weights.step((dev, ranks), (optimizer, StepSize { learning_rate, grad_norm }), grads)?;
        repack(dev, ranks, &self.weights.masters, &self.packed)?;
        Ok(grad_norm)
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
            model.weights.end_stage();
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
            (Backbone::Policy, _) => &self.weights.masters,
            (Backbone::Shared, _) => {
                return Err(Error::invalid("backbone", "a head on the policy's trunk is no model of its own"));
            }
            (Backbone::RewardModel, Some(model)) => &model.weights.masters,
            (Backbone::RewardModel, None) => {
                return Err(Error::invalid("backbone", "no earlier stage has trained a reward model"));
            }
        };
        let (device, ranks) = (&*self.device, self.ranks.as_ref());
        let made = body.with_whole(device, ranks, |body| Ok(ParamStore::init_on(device, &config, body, stage.seed)))?;
        let masters = match master_ranks(ranks) {
            None => Store::Whole(made),
            keeps => Store::of(device, made, keeps)?,
        };
        ScalarModel::new((&self.device, ranks), masters, config, self.dtype)
    }

    fn ensure_critic(&mut self, operation: &'static str) -> Result<ScalarStage, Error> {
        let stage = self.scalar_stage(ScalarRole::Critic, operation)?;
        if self.critic.is_none() {
            self.critic = Some(self.make_scalar_model(&stage)?);
        }
        Ok(stage)
    }

    /// The critic's values of every response token; one of several ranks answers for its own rows.
    ///
    /// # Errors
    /// A bad sequence, no critic in this stage, or a value that is not finite.
    pub fn values(&mut self, sequences: &[TokenSequence]) -> Result<Vec<Vec<f32>>, Error> {
        self.check_sequences(sequences.iter())?;
        if self.shared_head.is_none() {
            self.ensure_critic("values")?;
        }
        let own = own_sequences(self.ranks.as_ref(), sequences, self.limits().0);
        let mut out = Vec::with_capacity(sequences.len());
        for range in &own.micro_batches {
            let part = &own.items[range.clone()];
            let values = self.values_of(&value_batch(part.iter()));
            check_exchange(self.ranks.as_ref())?;
            out.extend(unpack(part.iter(), &values));
        }
        let out = spread(&own.indices, out, sequences.len());
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
        let before = self.ranks.as_ref().map(Ranks::counts);
        let mut critic = self.critic.take().expect("made above");
        let mut grads = critic.weights.take_grads(&*self.device, self.ranks.as_ref());
        let gathered = self.accumulate_critic(&critic, config, batch, &mut grads);
        let stepped = gathered.and_then(|sums| {
            let on = (&*self.device, self.ranks.as_ref());
            Ok((critic.step(on, (&stage.optimizer, batch.learning_rate), &grads)?, sums))
        });
        critic.weights.keep_grads(grads);
        self.critic = Some(critic);
        let (grad_norm, sums) = stepped.map_err(|error| keep_batch(error, batch, self.non_finite_place()))?;
        let mut report = sums.report(grad_norm, batch);
        report.metrics.extend(self.communication(before.as_ref()));
        Ok(report)
    }

    fn accumulate_critic(
        &mut self,
        critic: &ScalarModel,
        config: &ValueLossConfig,
        batch: &MiniBatch,
        grads: &mut Store,
    ) -> Result<CriticSums, Error> {
        let own = own_rows(self.ranks.as_ref(), &batch.rows, self.limits().0);
        let counts = global_counts(batch);
        let mut sums = CriticSums::default();
        let failed = {
            let grads = RefCell::new(grads);
            self.each_round(
                &own,
                |trainer, range| {
                    let rows = &own.items[range];
                    let targets = value_batch(rows.iter().map(|row| &row.sequence));
                    critic.pass((trainer, &targets), &mut grads.borrow_mut(), |values| {
                        sums.add(config, (rows, values), &counts)
                    })
                },
                |trainer| trainer.idle_pass(&critic.packed, &critic.weights, &mut grads.borrow_mut()),
            )?
        };
        let lists = self.settle(failed.map(|()| vec![sums.loss, sums.num_clipped, sums.value_sum]))?;
        let total = add_up(&lists);
        Ok(CriticSums { loss: total[0], num_clipped: total[1], value_sum: total[2] })
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
        let before = self.ranks.as_ref().map(Ranks::counts);
        let mut grads = model.weights.take_grads(&*self.device, self.ranks.as_ref());
        let gathered = self.accumulate_pairs(&model, config, pairs, &mut grads);
        let stepped = gathered.and_then(|mut report| {
            let on = (&*self.device, self.ranks.as_ref());
            report.grad_norm = model.step(on, (&stage.optimizer, learning_rate), &grads)?;
            Ok(report)
        });
        model.weights.keep_grads(grads);
        self.reward_model = Some(model);
        let mut report = stepped?;
        report.metrics.extend(self.communication(before.as_ref()));
        Ok(report)
    }

    fn accumulate_pairs(
        &mut self,
        model: &ScalarModel,
        config: &RewardModelConfig,
        pairs: &[PreferencePair],
        grads: &mut Store,
    ) -> Result<ScalarReport, Error> {
        let max_tokens = micro_batch_tokens(self.ranks.as_ref(), self.limits().0);
        let own = own_pairs(self.ranks.as_ref(), pairs, |part| split_pairs(part, max_tokens));
        let num_pairs = pairs.len();
        let mut sums = [0.0; 3];
        let failed = {
            let grads = RefCell::new(grads);
            self.each_round(
                &own,
                |trainer, range| {
                    let (part, places) = (&own.items[range.clone()], &own.indices[range]);
                    let targets = score_batch(part.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]));
                    model.pass((trainer, &targets), &mut grads.borrow_mut(), |scores| {
                        check_scores(scores, places)?;
                        pair_loss(config, (part, scores), num_pairs as u64, &mut sums)
                    })
                },
                |trainer| trainer.idle_pass(&model.packed, &model.weights, &mut grads.borrow_mut()),
            )?
        };
        let total = add_up(&self.settle(failed.map(|()| sums.to_vec()))?);
        let mut report = ScalarReport { loss: total[0], ..ScalarReport::default() };
        report.num_tokens = pairs.iter().map(|pair| pair_len(pair) as u64).sum();
        let num_pairs = num_pairs.max(1) as f64;
        report.metrics.insert("accuracy".to_owned(), total[1] / num_pairs);
        report.metrics.insert("margin_mean".to_owned(), total[2] / num_pairs);
        Ok(report)
    }

    /// The reward model's score of every sequence, finite or not; one of several ranks answers for its own, and runs
    /// them alone: whoever scores may call at any time.
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
        let own = lone_sequences(self.ranks.as_ref(), sequences, self.limits().0);
        let arena = self.lone_arena.as_mut().unwrap_or(&mut self.arena);
        let mut out = Vec::with_capacity(sequences.len());
        for range in &own.micro_batches {
            out.extend(model.read(&score_batch(own.items[range.clone()].iter()), arena));
        }
        Ok(spread(&own.indices, out, sequences.len()))
    }

    /// Write the reward model, where there is one, as a Hugging Face directory; tells whether there is. The first rank
    /// writes.
    ///
    /// # Errors
    /// A file that cannot be written, or a lost rank.
    pub fn save_reward_model(&self, dir: &Path) -> Result<bool, Error> {
        let Some(model) = &self.reward_model else { return Ok(false) };
        let options = WriteOptions { side_files_from: Some(&self.side_files_from), ..WriteOptions::default() };
        let saved = model.weights.masters.on_first(&*self.device, self.ranks.as_ref(), |store| {
            Ok(store.save(&*self.device, dir, &model.config, &options)?)
        });
        self.or_give_up(saved.map(drop)).map(|()| true)
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

/// Two scores a pair, whose pairs stand at `places` of the call.
fn check_scores(scores: &[f32], places: &[usize]) -> Result<(), Error> {
    match scores.iter().position(|score| !score.is_finite()) {
        Some(at) => {
            let sequence = 2 * places.get(at / 2).copied().unwrap_or(0) + at % 2;
            Err(Error::NonFiniteOutput { what: "a score", sequence, value: scores[at] })
        }
        None => Ok(()),
    }
}

/// The loss of some pairs and its gradient; loss, correct pairs and margins add up in `sums`.
fn pair_loss(
    config: &RewardModelConfig,
    (pairs, scores): (&[PreferencePair], &[f32]),
    num_pairs: u64,
    sums: &mut [f64; 3],
) -> Result<Vec<f32>, Error> {
    let (chosen, rejected): (Vec<f64>, Vec<f64>) =
        scores.chunks_exact(2).map(|pair| (f64::from(pair[0]), f64::from(pair[1]))).unzip();
    let margins: Vec<f64> = pairs.iter().map(|pair| pair.margin).collect();
    let out = reward_model_loss(config, &chosen, &rejected, Some(&margins), num_pairs)?;
    sums[0] += out.loss;
    sums[1] += out.num_correct as f64;
    sums[2] += out.margin_sum;
    let d = out.d_chosen.iter().zip(&out.d_rejected).flat_map(|(c, r)| [*c, *r]);
    Ok(narrow(&d.collect::<Vec<f64>>()))
}

/// What a mini-batch of the critic adds up.
#[derive(Debug, Default)]
struct CriticSums {
    loss: f64,
    num_clipped: f64,
    value_sum: f64,
}

impl CriticSums {
    /// The loss of some rows and its gradient.
    fn add(
        &mut self,
        config: &ValueLossConfig,
        (rows, values): (&[TrainRow], &[f32]),
        counts: &GlobalCounts,
    ) -> Result<Vec<f32>, Error> {
        let columns = Columns::gather(rows);
        let predictions = widen(values);
        let input = ValueLossInput {
            batch: TokenBatch::new(&columns.offsets, &columns.mask)?,
            predictions: &predictions,
            old_values: &columns.old_values,
            returns: &columns.returns,
        };
        counts.expect_part(&input.batch)?;
        let out = value_loss(config, &input, counts)?;
        self.loss += out.loss;
        self.num_clipped += out.num_clipped as f64;
        let active = predictions.iter().zip(&columns.mask).filter(|(_, m)| **m == 1);
        self.value_sum += active.map(|(v, _)| v).sum::<f64>();
        Ok(narrow(&out.d_predictions))
    }

    fn report(&self, grad_norm: f64, batch: &MiniBatch) -> ScalarReport {
        let num_active = batch.global.num_tokens.max(1) as f64;
        let num_tokens = batch.rows.iter().map(|row| sequence_len(&row.sequence) as u64).sum();
        let metrics = [
            ("value_clipfrac".to_owned(), self.num_clipped / num_active),
            ("value_mean".to_owned(), self.value_sum / num_active),
        ];
        ScalarReport { loss: self.loss, grad_norm, num_tokens, metrics: metrics.into_iter().collect() }
    }
}
