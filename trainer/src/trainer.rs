//! The trainer itself: masters, gradients, moments, and one update.

use crate::distill::Distiller;
use crate::division::{divide, spread};
use crate::exchange::{Own, add_up, merge_metrics, metric_numbers, own_rows, own_sequences};
use crate::loss::{BlockLoss, PolicyStats, evaluate, pick_gradients, slice_gradients};
use crate::micro_batch::{check, train_batch};
use crate::mirror::Mirror;
use crate::non_finite::{Place, keep_batch};
use crate::optimizer::StepSize;
use crate::reference::Reference;
use crate::scalar_model::{ScalarModel, ScalarStage};
use crate::sequence::{RowGroups, arena, check_exchange};
use crate::shared_head::SharedHead;
use crate::store::Store;
use crate::weights::{Pass, Weights, content_hash, load_store, master_ranks, pack, repack};
use crate::{Error, Memory, Ranks, state_io};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use temper_actor::weights_io::WriteOptions;
use temper_actor::{ModelConfig, OutputGrads, PackedPolicy, Recompute, TrainArena};
use temper_algos::{GlobalCounts, LossMetrics, Objective, ObjectiveOutput, Scope};
use temper_collective::{Counts, Operation};
use temper_proto::{
    LogProbs, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, UpdateReport,
};
use temper_tensor::{DType, Device};
use temper_types::PolicyVersion;

/// The packed weights of the process: written by the trainer at the end of an update, read by everyone.
pub type SharedPolicy = Arc<RwLock<PackedPolicy>>;

/// Metric of an update: bytes of values that all ranks together sent each other.
pub(crate) const COMMUNICATION_BYTES: &str = "communication_bytes";
/// Metric of an update: seconds that the rank which spent the most time in collectives spent there, waits included.
pub(crate) const COMMUNICATION_SECONDS: &str = "communication_seconds";

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
    pub(crate) weights: Weights,
    /// The others, where this trainer is one of several ranks.
    pub(crate) ranks: Option<Ranks>,
    pub(crate) side_files_from: PathBuf,
    pub(crate) reference: Option<Reference>,
    pub(crate) dtype: DType,
    pub(crate) policy: SharedPolicy,
    pub(crate) arena: TrainArena,
    /// Memory of passes that this rank runs alone although it shares rows in others.
    pub(crate) lone_arena: Option<TrainArena>,
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
    /// Copies of the state after a step, where they are kept.
    pub(crate) mirror: Option<Mirror>,
}

/// What the micro-batches of the policy add up.
#[derive(Debug, Default)]
struct PolicySums {
    loss: f64,
    metrics: LossMetrics,
    log_probs: Vec<Vec<f32>>,
}

impl PolicySums {
    /// Add the rows of a micro-batch with its own share of the loss.
    fn add(&mut self, rows: &[TrainRow], log_probs: &[f32], out: &ObjectiveOutput) {
        self.log_probs.extend(unpack(rows.iter().map(|row| &row.sequence), log_probs));
        self.loss += out.loss;
        self.metrics.merge(&out.metrics);
    }
}

impl Trainer {
    /// Load a Hugging Face directory and pack it for `dtype`. Ids that the tokenizer does not have are `masked_ids`.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name and tensor.
    pub fn load(device: Arc<dyn Device>, model_dir: &Path, dtype: DType, masked_ids: Vec<u32>) -> Result<Self, Error> {
        Self::load_rank(device, (model_dir, dtype), masked_ids, None)
    }

    /// As [`Trainer::load`], as one of several ranks: all of them load together.
    ///
    /// # Errors
    /// As [`Trainer::load`]; a lost rank.
    pub fn load_rank(
        device: Arc<dyn Device>,
        (model_dir, dtype): (&Path, DType),
        masked_ids: Vec<u32>,
        ranks: Option<Ranks>,
    ) -> Result<Self, Error> {
        let config = ModelConfig::load(model_dir)?;
        if let Some(ranks) = &ranks {
            ranks.check_heads(&config, &model_dir.display().to_string())?;
        }
        let (masters, hash) = load_store(&*device, &config, model_dir, master_ranks(ranks.as_ref()))?;
        let policy = pack((&device, ranks.as_ref()), &masters, (&config, dtype), &masked_ids)?;
        policy.write().unwrap_or_else(PoisonError::into_inner).version = PolicyVersion { number: 0, hash };
        Ok(Trainer {
            device,
            config,
            weights: Weights::new(masters),
            arena: arena(ranks.as_ref()),
            lone_arena: ranks.as_ref().filter(|ranks| ranks.sequence_parallel() > 1).map(|_| TrainArena::new()),
            ranks,
            side_files_from: model_dir.to_path_buf(),
            reference: None,
            dtype,
            policy,
            stage: None,
            max_micro_batch_tokens: 4096,
            non_finite_dir: None,
            scalar: None,
            critic: None,
            shared_head: None,
            reward_model: None,
            distiller: None,
            mirror: None,
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
    /// An objective that cannot be read or has a setting out of range; a lost rank.
    pub fn begin_stage(&mut self, spec: StageSpec) -> Result<(), Error> {
        let what = || format!("objective of stage `{}`", spec.name);
        let objective: Objective =
            serde_json::from_str(&spec.objective_json).map_err(|e| Error::invalid(what(), e.to_string()))?;
        objective.validate()?;
        self.weights.moments = None;
        self.reference = None;
        self.distiller = None;
        self.end_scalar_stage();
        if spec.needs_reference {
            self.set_reference(self.weights.masters.duplicate(&*self.device))?;
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

    /// Log-probs and entropies of every response token. One of several ranks answers for its own rows, and gives no
    /// numbers for the others.
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
        let packed = match (role, &self.reference) {
            (PolicyRole::Policy, _) => Arc::clone(&self.policy),
            (PolicyRole::Reference, Some(reference)) => Arc::clone(&reference.packed),
            (PolicyRole::Reference, None) => {
                return Err(Error::invalid("log_probs", "this stage keeps no reference policy"));
            }
        };
        let policy = packed.read().unwrap_or_else(PoisonError::into_inner);
        let mut out = LogProbs::default();
        let own = own_sequences(self.ranks.as_ref(), sequences, self.max_micro_batch_tokens);
        for range in &own.micro_batches {
            let part = &own.items[range.clone()];
            let stats = policy.score_only(&train_batch(part.iter()), temperature, &mut self.arena);
            check_exchange(self.ranks.as_ref())?;
            out.log_probs.extend(unpack(part.iter(), &stats.log_probs));
            out.entropies.extend(unpack(part.iter(), &stats.entropies));
            out.sum_pi_squared.extend(unpack(part.iter(), &stats.sum_squares));
        }
        let spread = |column| spread(&own.indices, column, sequences.len());
        Ok(LogProbs {
            log_probs: spread(out.log_probs),
            entropies: spread(out.entropies),
            sum_pi_squared: spread(out.sum_pi_squared),
        })
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
        accumulate: impl FnOnce(&mut Self, &Stage, &mut Store) -> Result<UpdateReport, Error>,
    ) -> Result<UpdateReport, Error> {
        let stage = self.stage.take().ok_or_else(|| Error::invalid("update", "no stage has begun"))?;
        let result = self.update_in(&stage, batch, accumulate);
        self.stage = Some(stage);
        result.map_err(|error| keep_batch(error, batch, self.non_finite_place()))
    }

    /// Where a mini-batch goes that gave numbers that are not finite.
    pub(crate) fn non_finite_place(&self) -> Option<Place<'_>> {
        let rank = self.ranks.as_ref().map_or(0, Ranks::rank);
        self.non_finite_dir.as_deref().map(|dir| Place { dir, step: self.version().number + 1, rank })
    }

    fn update_in(
        &mut self,
        stage: &Stage,
        batch: &MiniBatch,
        accumulate: impl FnOnce(&mut Self, &Stage, &mut Store) -> Result<UpdateReport, Error>,
    ) -> Result<UpdateReport, Error> {
        self.check_sequences(batch.rows.iter().map(|row| &row.sequence))?;
        let before = self.ranks.as_ref().map(Ranks::counts);
        let mut grads = self.weights.take_grads(&*self.device, self.ranks.as_ref());
        let accumulated = accumulate(self, stage, &mut grads);
        let result = accumulated.and_then(|mut report| {
            let on = (&*self.device, self.ranks.as_ref());
            let of_head = self.shared_head.as_ref().map_or(Ok(0.0), SharedHead::grad_norm)?;
            report.grad_norm = Weights::grad_norm(on.0, on.1, &grads)?.hypot(of_head);
            let size = StepSize { learning_rate: batch.learning_rate, grad_norm: report.grad_norm };
            if let Some(head) = &mut self.shared_head {
                head.step(&stage.optimizer, size)?;
            }
            self.weights.step(on, (&stage.optimizer, size), &grads)?;
            repack(on.0, on.1, &self.weights.masters, &self.policy)?;
            report.metrics.extend(self.communication(before.as_ref()));
            Ok(report)
        });
        self.weights.keep_grads(grads);
        result
    }

    /// What this rank has sent since `before`, and how long that took; nothing where there are no other ranks.
    pub(crate) fn communication(&self, before: Option<&Counts>) -> Vec<(String, f64)> {
        let (Some(ranks), Some(before)) = (&self.ranks, before) else { return Vec::new() };
        let since = ranks.counts().since(before);
        // Mirrors are on their way meanwhile, and are counted apart.
        let (total, beside) = (since.total(), since.of(Operation::Mirror));
        let (bytes, elapsed) = (total.bytes_sent - beside.bytes_sent, total.elapsed - beside.elapsed);
        let numbers = [(COMMUNICATION_BYTES, bytes as f64), (COMMUNICATION_SECONDS, elapsed.as_secs_f64())];
        numbers.map(|(name, value)| (name.to_owned(), value)).to_vec()
    }

    /// Forward and backward of every micro-batch; gradients add up in `grads`.
    fn accumulate(&mut self, stage: &Stage, batch: &MiniBatch, grads: &mut Store) -> Result<UpdateReport, Error> {
        let num_tokens = batch.rows.iter().map(|row| sequence_len(&row.sequence) as u64).sum();
        let mut report = UpdateReport { num_tokens, ..UpdateReport::default() };
        let whole = match stage.objective.scope() {
            Scope::MiniBatch => Some(self.whole_batch_gradients(stage, batch)?),
            Scope::Token | Scope::Sequence => None,
        };
        let own = own_rows(self.ranks.as_ref(), &batch.rows, stage.max_micro_batch_tokens);
        let mut sums = PolicySums::default();
        if let Some(head) = &mut self.shared_head {
            head.start_update();
        }
        let failed = {
            let grads = std::cell::RefCell::new(&mut *grads);
            self.each_round(
                &own,
                |trainer, range| {
                    let mut grads = grads.borrow_mut();
                    trainer.policy_pass(stage, (batch, &own, range), whole.as_ref(), (&mut sums, &mut **grads))
                },
                |trainer| trainer.idle_pass(&trainer.policy, &trainer.weights, &mut grads.borrow_mut()),
            )?
        };
        let of_policy = [&[sums.loss], &metric_numbers(&sums.metrics)[..]].concat();
        let of_head = self.shared_head.as_ref().map_or_else(Vec::new, SharedHead::numbers);
        let lists = self.settle(failed.map(|()| [&of_policy[..], &of_head].concat()))?;
        let total = add_up(&lists);
        if let Some(head) = &mut self.shared_head {
            head.take_in(&total[of_policy.len()..]);
        }
        report.log_probs = spread(&own.indices, sums.log_probs, batch.rows.len());
        let metrics = match &whole {
            Some(out) => {
                report.loss = out.loss;
                out.metrics
            }
            None => {
                report.loss = total[0];
                merge_metrics(lists.iter().map(|list| &list[1..]))
            }
        };
        name_metrics(&mut report, &metrics);
        report.metrics.extend(whole.into_iter().flat_map(|out| out.reports));
        if let Some(head) = &self.shared_head {
            head.report(&global_counts(batch), &mut report);
        }
        Ok(report)
    }

    /// Forward, loss and backward of one micro-batch of the policy.
    fn policy_pass(
        &mut self,
        stage: &Stage,
        (batch, own, range): (&MiniBatch, &Own<'_, TrainRow>, Range<usize>),
        whole: Option<&ObjectiveOutput>,
        (sums, grads): (&mut PolicySums, &mut Store),
    ) -> Result<(), Error> {
        let (rows, places) = (&own.items[range.clone()], &own.indices[range]);
        let shared = Arc::clone(&self.policy);
        let policy = shared.read().unwrap_or_else(PoisonError::into_inner);
        let train = train_batch(rows.iter().map(|row| &row.sequence));
        let tape = policy.train_forward(&train, stage.recompute, &mut self.arena);
        if stage.objective.scope() == Scope::Token && self.shared_head.is_none() {
            let mut loss = BlockLoss::new(&stage.objective, rows, global_counts(batch));
            let mut pass = Pass::new((&*self.device, self.ranks.as_ref()), &self.weights.masters, grads);
            let stats =
                policy.train_backward(tape, batch.temperature, &mut |tokens, said| loss.take(tokens, said), &mut pass);
            pass.finish()?;
            let out = loss.finish().map_err(|error| error.in_rows(places))?;
            sums.add(rows, &stats.log_probs, &out);
            return Ok(());
        }
        let stats = policy.log_probs(&tape, batch.temperature);
        check_exchange(self.ranks.as_ref())?;
        sums.log_probs.extend(unpack(rows.iter().map(|row| &row.sequence), &stats.log_probs));
        let gradients = match whole {
            Some(out) => pick_gradients(out, &batch.rows, places),
            None => {
                let says = PolicyStats {
                    log_probs: &stats.log_probs,
                    entropies: &stats.entropies,
                    sum_pi_squared: &stats.sum_squares,
                };
                let out = evaluate(&stage.objective, rows, says, &global_counts(batch))
                    .map_err(|error| error.in_rows(places))?;
                sums.loss += out.loss;
                sums.metrics.merge(&out.metrics);
                slice_gradients(&out, 0..stats.log_probs.len())
            }
        };
        let outputs = OutputGrads::LogProbs {
            d_log_probs: &gradients.d_log_probs,
            d_entropies: &gradients.d_entropies,
            temperature: batch.temperature,
        };
        let d_hidden = match &mut self.shared_head {
            Some(head) => Some(
                head.accumulate(&policy.hidden(&tape), rows, &global_counts(batch))
                    .map_err(|error| error.in_rows(places))?,
            ),
            None => None,
        };
        let mut pass = Pass::new((&*self.device, self.ranks.as_ref()), &self.weights.masters, grads);
        match d_hidden {
            Some(d_hidden) => policy.backward_beside(tape, (outputs, &d_hidden), &mut pass),
            None => policy.backward_units(tape, outputs, &mut pass),
        }
        pass.finish()
    }

    /// Take part in a backward of the other ranks.
    pub(crate) fn idle_pass(&self, packed: &SharedPolicy, weights: &Weights, grads: &mut Store) -> Result<(), Error> {
        let mut pass = Pass::new((&*self.device, self.ranks.as_ref()), &weights.masters, grads);
        packed.read().unwrap_or_else(PoisonError::into_inner).visit_units(&mut pass);
        pass.finish()
    }

    /// The objective over the whole mini-batch at once, from log-probs that keep no activations.
    fn whole_batch_gradients(&mut self, stage: &Stage, batch: &MiniBatch) -> Result<ObjectiveOutput, Error> {
        let sequences: Vec<TokenSequence> = batch.rows.iter().map(|row| row.sequence.clone()).collect();
        let mut stats = self.log_probs(PolicyRole::Policy, &sequences, batch.temperature)?;
        if let Some(ranks) = &self.ranks {
            share_rows(ranks, &sequences, &mut stats.log_probs)?;
            share_rows(ranks, &sequences, &mut stats.entropies)?;
            share_rows(ranks, &sequences, &mut stats.sum_pi_squared)?;
        }
        let says = PolicyStats {
            log_probs: &stats.log_probs.concat(),
            entropies: &stats.entropies.concat(),
            sum_pi_squared: &stats.sum_pi_squared.concat(),
        };
        evaluate(&stage.objective, &batch.rows, says, &global_counts(batch))
    }

    /// Hash the weights and name them.
    ///
    /// # Errors
    /// A lost rank.
    pub fn publish(&mut self, number: u64) -> Result<PolicyVersion, Error> {
        let hash = content_hash(&*self.device, self.ranks.as_ref(), &self.weights.masters)?;
        self.set_version(PolicyVersion { number, hash })
    }

    /// Every process of ranks has its own packed weights to name.
    pub(crate) fn set_version(&mut self, version: PolicyVersion) -> Result<PolicyVersion, Error> {
        self.policy.write().unwrap_or_else(PoisonError::into_inner).version = version;
        if let Some(published) = &mut self.weights.published {
            published.keep(&*self.device, version.hash, &self.weights.masters);
        }
        self.ranks.as_ref().map_or(Ok(()), Ranks::fence)?;
        Ok(version)
    }

    /// Write the weights as a Hugging Face directory: the first rank does, and the others let it have their shards.
    ///
    /// # Errors
    /// A file that cannot be written, or a lost rank.
    pub fn save_model(&self, dir: &Path) -> Result<(), Error> {
        let options = WriteOptions { side_files_from: Some(&self.side_files_from), ..WriteOptions::default() };
        let saved = self.weights.masters.on_first(&*self.device, self.ranks.as_ref(), |store| {
            Ok(store.save(&*self.device, dir, &self.config, &options)?)
        });
        self.or_give_up(saved.map(drop))
    }

    /// Write all that resume needs beside the model, as [`Trainer::save_model`] does.
    ///
    /// # Errors
    /// As [`Trainer::save_model`].
    pub fn save_state(&self, dir: &Path) -> Result<(), Error> {
        self.or_give_up(state_io::save(self, dir))
    }

    /// Load weights and state of a checkpoint into the stage that has begun. Every rank reads it, and keeps its part.
    ///
    /// # Errors
    /// A damaged file, or weights that do not hash to `version`.
    pub fn restore(&mut self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> Result<(), Error> {
        let restored = self.restore_parts(model_dir, state_dir, version);
        self.or_give_up(restored)
    }

    fn restore_parts(&mut self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> Result<(), Error> {
        let ranks = master_ranks(self.ranks.as_ref());
        let (masters, got) = load_store(&*self.device, &self.config, model_dir, ranks)?;
        if got != version.hash {
            return Err(Error::WrongWeights { path: model_dir.to_path_buf(), expected: version.hash, got });
        }
        self.weights.set_masters(&*self.device, masters);
        state_io::restore(self, state_dir)?;
        repack(&*self.device, self.ranks.as_ref(), &self.weights.masters, &self.policy)?;
        self.set_version(version).map(drop)
    }

    /// A rank that fails alone leaves no other one waiting.
    pub(crate) fn or_give_up(&self, result: Result<(), Error>) -> Result<(), Error> {
        if let (Err(error), Some(ranks)) = (&result, &self.ranks)
            && !matches!(error, Error::Collective(_))
        {
            ranks.give_up();
        }
        result
    }

    /// Bytes of the policy's masters, gradients and moments on this rank, as they are allocated now.
    pub fn memory(&self) -> Memory {
        self.weights.memory()
    }

    /// Bytes of activations, their gradients, and training's keys and values that passes of the policy and of scalar
    /// models have allocated on this rank.
    pub fn activation_bytes(&self) -> usize {
        self.arena.num_bytes() + self.lone_arena.as_ref().map_or(0, TrainArena::num_bytes)
    }

    /// What this rank has sent and received; none where it is alone.
    pub fn counts(&self) -> Option<Counts> {
        self.ranks.as_ref().map(Ranks::counts)
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

/// Every row's numbers, of which this rank has those of its own rows.
fn share_rows(ranks: &Ranks, sequences: &[TokenSequence], rows: &mut [Vec<f32>]) -> Result<(), Error> {
    let own: Vec<f64> = rows.iter().flatten().map(|x| f64::from(*x)).collect();
    let lists = ranks.world_lists(&own)?;
    let RowGroups { num_groups, size, .. } = ranks.row_groups();
    let firsts = lists.into_iter().step_by(size);
    for (indices, list) in divide(sequences.iter(), num_groups).into_iter().zip(firsts) {
        let mut rest = &list[..];
        for index in indices {
            let len = sequences[index].response_token_ids.len();
            let Some((row, tail)) = rest.split_at_checked(len) else { continue };
            rows[index] = row.iter().map(|x| *x as f32).collect();
            rest = tail;
        }
    }
    Ok(())
}

fn name_metrics(report: &mut UpdateReport, metrics: &LossMetrics) {
    report.entropy = metrics.entropy();
    report.metrics = metrics.named().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
}
