//! Distillation: the update of a policy on its divergence from a frozen teacher.

use crate::division::spread;
use crate::exchange::{Own, add_up, own_rows};
use crate::micro_batch::train_batch;
use crate::sequence::{arena, check_exchange};
use crate::store::Store;
use crate::trainer::{SharedPolicy, Stage, sequence_len, unpack};
use crate::weights::Pass;
use crate::{Error, LocalTrainerService, Trainer};
use std::cell::RefCell;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use temper_actor::{CheckpointReader, Distillation, Head, ModelConfig, PackedPolicy, TrainArena};
use temper_algos::distill::DistillConfig;
use temper_proto::{DistillService, DistillSpec, MiniBatch, ServiceResult, TrainRow, UpdateReport};
use temper_tensor::{DistillStats, Divergence};

/// The teacher of a stage, with activations of its own.
#[derive(Debug)]
pub(crate) struct Distiller {
    teacher: SharedPolicy,
    arena: TrainArena,
    config: DistillConfig,
}

impl Distiller {
    fn divergence(&self) -> Divergence {
        match self.config.top_k {
            0 => Divergence::GeneralizedJsd { beta: self.config.beta as f32 },
            k => Divergence::ForwardKlTopK { k },
        }
    }

    fn check_lengths(&self, rows: &[TrainRow]) -> Result<(), Error> {
        let teacher = self.teacher.read().unwrap_or_else(PoisonError::into_inner);
        let longest = teacher.config().max_position_embeddings;
        match rows.iter().position(|row| sequence_len(&row.sequence) > longest) {
            Some(index) => {
                let length = sequence_len(&rows[index].sequence);
                let problem = format!("has {length} tokens: the teacher takes at most {longest}");
                Err(Error::invalid(format!("sequence {index}"), problem))
            }
            None => Ok(()),
        }
    }
}

/// What the micro-batches add up.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    reverse_kl: f64,
    entropy: f64,
}

impl Trainer {
    /// Load the teacher of the stage that has begun.
    ///
    /// # Errors
    /// A loss that cannot be read or has a setting out of range; a teacher that is damaged, no language model, or of
    /// another vocabulary.
    pub fn begin_distillation(&mut self, spec: &DistillSpec) -> Result<(), Error> {
        let wrong = |e: serde_json::Error| Error::invalid("the loss of the distillation", e.to_string());
        let config: DistillConfig = serde_json::from_str(&spec.loss_json).map_err(wrong)?;
        config.validate()?;
        let teacher = self.load_teacher(&spec.teacher)?;
        self.distiller = Some(Distiller { teacher, arena: arena(self.ranks.as_ref()), config });
        Ok(())
    }

    /// One packed teacher for all ranks of a process.
    fn load_teacher(&self, dir: &Path) -> Result<SharedPolicy, Error> {
        let config = ModelConfig::load(dir)?;
        let what = || format!("teacher {}", dir.display());
        if config.head != Head::CausalLm {
            return Err(Error::invalid(what(), "is a value or reward model: expected a language model"));
        }
        let (got, expected) = (config.vocab_size, self.config.vocab_size);
        if got != expected {
            let problem = format!("has a vocabulary of {got}: expected {expected}, the policy's");
            return Err(Error::invalid(what(), problem));
        }
        if let Some(ranks) = &self.ranks {
            ranks.check_heads(&config, &what())?;
        }
        let reader = CheckpointReader::open(dir)?;
        reader.validate(&config)?;
        let load = || PackedPolicy::load(&self.device, &config, &reader, self.dtype);
        match &self.ranks {
            None => Ok(Arc::new(RwLock::new(load()?))),
            Some(ranks) => ranks.hand_on(ranks.leads().then(load).transpose()?),
        }
    }

    /// One optimizer step on the divergence from the teacher. On an error no weight has changed.
    ///
    /// # Errors
    /// No teacher in this stage, a bad row, or a divergence or gradient that is not finite.
    pub fn update_distilled(&mut self, batch: &MiniBatch) -> Result<UpdateReport, Error> {
        let missing = || Error::invalid("update_distilled", "this stage has no teacher");
        let mut distiller = self.distiller.take().ok_or_else(missing)?;
        let result = self.update_with(batch, |trainer, stage, grads| {
            distiller.check_lengths(&batch.rows)?;
            trainer.accumulate_distilled(&mut distiller, stage, batch, grads)
        });
        self.distiller = Some(distiller);
        result
    }

    /// Forward of both and backward of every micro-batch; gradients add up in `grads`.
    fn accumulate_distilled(
        &mut self,
        distiller: &mut Distiller,
        stage: &Stage,
        batch: &MiniBatch,
        grads: &mut Store,
    ) -> Result<UpdateReport, Error> {
        let num_tokens = batch.rows.iter().map(|row| sequence_len(&row.sequence) as u64).sum();
        let mut report = UpdateReport { num_tokens, ..UpdateReport::default() };
        let own = own_rows(self.ranks.as_ref(), &batch.rows, stage.max_micro_batch_tokens);
        let (mut sums, mut log_probs) = (Sums::default(), Vec::new());
        let failed = {
            let grads = RefCell::new(grads);
            self.each_round(
                &own,
                |trainer, range| {
                    let mut grads = grads.borrow_mut();
                    trainer.distill_pass(
                        distiller,
                        stage,
                        (batch, &own, range),
                        (&mut sums, &mut log_probs, &mut **grads),
                    )
                },
                |trainer| trainer.idle_pass(&trainer.policy, &trainer.weights, &mut grads.borrow_mut()),
            )?
        };
        let lists = self.settle(failed.map(|()| vec![sums.loss, sums.entropy, sums.reverse_kl]))?;
        let total = add_up(&lists);
        let count = batch.global.num_tokens.max(1) as f64;
        report.log_probs = spread(&own.indices, log_probs, batch.rows.len());
        report.loss = total[0] / count;
        report.entropy = total[1] / count;
        report.metrics.insert("kl".to_owned(), total[2] / count);
        Ok(report)
    }

    /// Forward of both and backward of one micro-batch.
    fn distill_pass(
        &mut self,
        distiller: &mut Distiller,
        stage: &Stage,
        (batch, own, range): (&MiniBatch, &Own<'_, TrainRow>, Range<usize>),
        (sums, log_probs, grads): (&mut Sums, &mut Vec<Vec<f32>>, &mut Store),
    ) -> Result<(), Error> {
        let (rows, places) = (&own.items[range.clone()], &own.indices[range]);
        let divergence = distiller.divergence();
        let count = batch.global.num_tokens.max(1) as f64;
        let train = train_batch(rows.iter().map(|row| &row.sequence));
        let teacher = distiller.teacher.read().unwrap_or_else(PoisonError::into_inner);
        let teacher = teacher.teach(&train, &mut distiller.arena);
        let shared = Arc::clone(&self.policy);
        let policy = shared.read().unwrap_or_else(PoisonError::into_inner);
        let tape = policy.train_forward(&train, stage.recompute, &mut self.arena);
        let stats = policy.log_probs(&tape, batch.temperature);
        check_exchange(self.ranks.as_ref())?;
        log_probs.extend(unpack(rows.iter().map(|row| &row.sequence), &stats.log_probs));
        let weights: Vec<f32> = masks(rows).map(|on| if on { (1.0 / count) as f32 } else { 0.0 }).collect();
        let temperature = distiller.config.temperature as f32;
        let loss = Distillation { teacher, divergence, temperature, weights: &weights };
        let mut pass = Pass::new((&*self.device, self.ranks.as_ref()), &self.weights.masters, grads);
        let distilled = policy.backward_distilled(tape, loss, &mut pass);
        pass.finish()?;
        sums.add(rows, places, (&distilled, &stats.entropies))
    }
}

/// Whether each response token of the rows takes part.
fn masks(rows: &[TrainRow]) -> impl Iterator<Item = bool> {
    rows.iter().flat_map(|row| row.sequence.response_mask.iter().map(|m| *m == 1))
}

impl Sums {
    /// Add the unmasked tokens of a micro-batch whose rows stand at `places` of the mini-batch.
    fn add(
        &mut self,
        rows: &[TrainRow],
        places: &[usize],
        (distilled, entropies): (&DistillStats, &[f32]),
    ) -> Result<(), Error> {
        let numbers = distilled.divergences.iter().zip(&distilled.reverse_kls).zip(entropies);
        for (index, ((divergence, reverse_kl), entropy)) in numbers.enumerate().filter(on(rows)) {
            if !divergence.is_finite() {
                let (row, token) = place_of(rows, index);
                let (operation, name, value) = ("distill", "divergence", *divergence);
                let cause = temper_algos::Error::NonFinite {
                    operation,
                    name,
                    row: places.get(row).copied().unwrap_or(row),
                    token,
                    value,
                };
                return Err(cause.into());
            }
            self.loss += divergence;
            self.reverse_kl += reverse_kl;
            self.entropy += f64::from(*entropy);
        }
        Ok(())
    }
}

/// Keeps the numbers of unmasked tokens.
fn on<T>(rows: &[TrainRow]) -> impl FnMut(&(usize, T)) -> bool {
    let masks: Vec<bool> = masks(rows).collect();
    move |(index, _)| masks[*index]
}

/// Row and place within it of response token `index` of the rows.
fn place_of(rows: &[TrainRow], index: usize) -> (usize, usize) {
    let mut start = 0;
    for (row, one) in rows.iter().enumerate() {
        let len = one.sequence.response_token_ids.len();
        if index < start + len {
            return (row, index - start);
        }
        start += len;
    }
    (rows.len(), 0)
}

impl DistillService for LocalTrainerService {
    fn begin_distillation(&self, spec: DistillSpec) -> ServiceResult<()> {
        self.lock().begin_distillation(&spec).map_err(|e| e.into_service("begin_distillation"))
    }

    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        self.lock().update_distilled(&batch).map_err(|e| e.into_service("update_distilled"))
    }
}
