//! Several trainer ranks as one trainer.

use crate::division::divide;
use crate::{Error, LocalTrainerService, ProcessRole, ProcessShare, Ranks, Sharding, Trainer};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use temper_collective::connect_threads;
use temper_proto::{
    DistillService, DistillSpec, HeldShard, LogProbs, MiniBatch, MirrorPlan, MirrorReport, MirrorService, PolicyRole,
    PreferencePair, ScalarModelService, ScalarModelSpec, ScalarReport, ServiceError, ServiceResult, StageSpec,
    TokenSequence, TrainerService, UpdateReport,
};
use temper_types::{ErrorCode, PolicyVersion};

/// Ranks that serve as one trainer: every call goes to all of them at once with the whole batch, each works on its own
/// rows, and their answers are joined by row.
pub struct TrainerGroup {
    ranks: Vec<Arc<dyn TrainerService>>,
    /// Consecutive ranks that work on the same rows together.
    sequence_parallel: usize,
}

/// Load `world` ranks as threads of this process, in rank order: `load` is called on all of them at once.
///
/// # Errors
/// A sharding that does not fit the world, or what `load` fails with.
///
/// # Panics
/// If `world` is 0.
pub fn load_local_ranks(
    world: usize,
    sharding: Sharding,
    timeout: Duration,
    load: impl Fn(Ranks) -> Result<Trainer, Error> + Sync,
) -> Result<Vec<Trainer>, Error> {
    let share = ProcessShare::default();
    let start = |collective: temper_collective::Collective| {
        let role = if collective.rank() == 0 { ProcessRole::Leader } else { ProcessRole::Follower };
        load(Ranks::new(collective, sharding, (role, share.clone()))?)
    };
    let start = &start;
    let loaded: Vec<Result<Trainer, Error>> = std::thread::scope(|scope| {
        let ranks = connect_threads(world, timeout).into_iter();
        let threads: Vec<_> = ranks.map(|rank| scope.spawn(move || start(rank))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err(Error::invalid("a trainer rank", "panicked while it was loaded")))
        };
        threads.into_iter().map(join).collect()
    });
    // A rank whose load failed makes the others lose it: its own error comes first.
    let is_loss = |result: &&Result<Trainer, Error>| matches!(result, Err(Error::Collective(_)));
    if loaded.iter().any(|result| result.is_err()) && !loaded.iter().all(|r| r.is_ok() || is_loss(&r)) {
        let cause = loaded.into_iter().filter(|result| !is_loss(&result)).find_map(Result::err);
        return Err(cause.unwrap_or_else(|| Error::invalid("a trainer rank", "was not loaded")));
    }
    loaded.into_iter().collect()
}

impl TrainerGroup {
    /// Join ranks, given in rank order.
    ///
    /// # Errors
    /// No rank at all.
    pub fn new(ranks: Vec<Arc<dyn TrainerService>>) -> Result<Self, Error> {
        match ranks.is_empty() {
            true => Err(Error::invalid("a trainer group", "has no rank: expected at least one")),
            false => Ok(TrainerGroup { ranks, sequence_parallel: 1 }),
        }
    }

    /// The same ranks, of which groups of `size` consecutive ones share the rows of every micro-batch.
    ///
    /// # Errors
    /// A size that does not divide the number of ranks.
    pub fn with_sequence_parallel(self, size: usize) -> Result<Self, Error> {
        if size == 0 || !self.ranks.len().is_multiple_of(size) {
            let problem = format!("is {size}: expected a divisor of {} ranks", self.ranks.len());
            return Err(Error::invalid("sequence_parallel", problem));
        }
        Ok(TrainerGroup { sequence_parallel: size, ..self })
    }

    /// Join ranks of this process.
    ///
    /// # Errors
    /// As [`TrainerGroup::new`].
    pub fn of_trainers(trainers: Vec<Trainer>) -> Result<Self, Error> {
        let serve = |trainer| Arc::new(LocalTrainerService::new(trainer)) as Arc<dyn TrainerService>;
        let first = trainers.first().and_then(|trainer| trainer.ranks.as_ref());
        let sequence_parallel = first.map_or(1, Ranks::sequence_parallel);
        TrainerGroup::new(trainers.into_iter().map(serve).collect())?.with_sequence_parallel(sequence_parallel)
    }

    /// Ask all ranks at once; their answers in rank order.
    fn ask<R: Send>(
        &self,
        operation: &'static str,
        call: impl Fn(&dyn TrainerService) -> ServiceResult<R> + Sync,
    ) -> ServiceResult<Vec<R>> {
        let call = &call;
        let answers: Vec<ServiceResult<R>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self.ranks.iter().map(|rank| scope.spawn(move || call(&**rank))).collect();
            let panicked = || ServiceError::new(ErrorCode::Internal, "trainer", operation, "the rank panicked");
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(panicked()))).collect()
        });
        let mut good = Vec::with_capacity(answers.len());
        let mut bad = Vec::new();
        for (rank, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(answer) => good.push(answer),
                Err(error) => bad.push((rank, error)),
            }
        }
        if bad.is_empty() { Ok(good) } else { Err(join_errors(operation, bad)) }
    }

    /// Answers that every rank has to give alike.
    fn agree<R: Send + PartialEq>(
        &self,
        operation: &'static str,
        call: impl Fn(&dyn TrainerService) -> ServiceResult<R> + Sync,
    ) -> ServiceResult<R> {
        let mut answers = self.ask(operation, call)?;
        let first = answers.swap_remove(0);
        match answers.iter().all(|answer| *answer == first) {
            true => Ok(first),
            false => Err(disagreement(operation)),
        }
    }

    /// The rows of every rank; those of a group have the same ones.
    fn divide<'a>(&self, sequences: impl Iterator<Item = &'a TokenSequence>) -> Vec<Vec<usize>> {
        let groups = divide(sequences, self.ranks.len() / self.sequence_parallel);
        (0..self.ranks.len()).map(|rank| groups[rank / self.sequence_parallel].clone()).collect()
    }
}

fn disagreement(operation: &'static str) -> ServiceError {
    ServiceError::new(ErrorCode::Internal, "trainer", operation, "the ranks do not agree about the result")
}

/// All failures in one error. That a rank failed because another did is left out where the other's own error is there,
/// and so is a repetition.
fn join_errors(operation: &'static str, errors: Vec<(usize, ServiceError)>) -> ServiceError {
    let is_consequence = |error: &ServiceError| matches!(error.code, ErrorCode::Cancelled | ErrorCode::Unavailable);
    let has_cause = errors.iter().any(|(_, error)| !is_consequence(error));
    let causes: Vec<_> = errors.into_iter().filter(|(_, error)| !has_cause || !is_consequence(error)).collect();
    let (first_rank, first) = &causes[0];
    if causes.iter().all(|(_, error)| error == first) {
        return ServiceError { operation: operation.into(), ..first.clone() };
    }
    let texts: BTreeSet<String> =
        causes.iter().map(|(rank, error)| format!("rank {rank}: {}", error.message)).collect();
    let service = format!("{} (rank {first_rank})", first.service);
    let message = texts.into_iter().collect::<Vec<_>>().join("; ");
    ServiceError { service, operation: operation.into(), message, ..first.clone() }
}

/// Per-row answers, each from the rank whose row it is.
fn join_rows<T: Clone>(
    operation: &'static str,
    answers: &[Vec<T>],
    rows: &[Vec<usize>],
    len: usize,
) -> ServiceResult<Vec<T>> {
    let mut joined: Vec<Option<T>> = vec![None; len];
    for (answer, rows) in answers.iter().zip(rows) {
        rows.iter().for_each(|row| joined[*row] = answer.get(*row).cloned());
    }
    joined.into_iter().collect::<Option<Vec<T>>>().ok_or_else(|| disagreement(operation))
}

/// A report of all ranks: numbers are those of every rank, log-probs each rank's own.
fn join_reports(
    operation: &'static str,
    mut reports: Vec<UpdateReport>,
    rows: &[Vec<usize>],
    len: usize,
) -> ServiceResult<UpdateReport> {
    let same = |a: &UpdateReport, b: &UpdateReport| {
        let bits = |x: &UpdateReport| [x.loss, x.grad_norm, x.entropy].map(f64::to_bits);
        bits(a) == bits(b) && a.num_tokens == b.num_tokens
    };
    if !reports.iter().all(|report| same(report, &reports[0])) {
        return Err(disagreement(operation));
    }
    let log_probs: Vec<_> = reports.iter_mut().map(|report| std::mem::take(&mut report.log_probs)).collect();
    let log_probs = join_rows(operation, &log_probs, rows, len)?;
    let metrics: Vec<_> = reports.iter().map(|report| report.metrics.clone()).collect();
    let mut report = UpdateReport { log_probs, ..reports.swap_remove(0) };
    join_metrics(&mut report.metrics, &metrics);
    Ok(report)
}

/// Communication is each rank's own: bytes add up, the longest time counts.
fn join_metrics(joined: &mut std::collections::BTreeMap<String, f64>, all: &[std::collections::BTreeMap<String, f64>]) {
    for (name, value) in joined {
        let values = all.iter().filter_map(|metrics| metrics.get(name.as_str()).copied());
        match name.as_str() {
            crate::trainer::COMMUNICATION_BYTES => *value = values.sum(),
            crate::trainer::COMMUNICATION_SECONDS => *value = values.fold(0.0, f64::max),
            _ => {}
        }
    }
}

fn join_scalar(operation: &'static str, mut reports: Vec<ScalarReport>) -> ServiceResult<ScalarReport> {
    let bits = |x: &ScalarReport| [x.loss, x.grad_norm].map(f64::to_bits);
    if !reports.iter().all(|report| bits(report) == bits(&reports[0])) {
        return Err(disagreement(operation));
    }
    let metrics: Vec<_> = reports.iter().map(|report| report.metrics.clone()).collect();
    let mut report = reports.swap_remove(0);
    join_metrics(&mut report.metrics, &metrics);
    Ok(report)
}

impl TrainerService for TrainerGroup {
    fn begin_stage(&self, spec: StageSpec) -> ServiceResult<()> {
        self.ask("begin_stage", |rank| rank.begin_stage(spec.clone())).map(drop)
    }

    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], temperature: f32) -> ServiceResult<LogProbs> {
        let operation = "log_probs";
        let answers = self.ask(operation, |rank| rank.log_probs(role, sequences, temperature))?;
        let rows = self.divide(sequences.iter());
        let join = |column: fn(&LogProbs) -> &Vec<Vec<f32>>| {
            let columns: Vec<_> = answers.iter().map(|answer| column(answer).clone()).collect();
            join_rows(operation, &columns, &rows, sequences.len())
        };
        Ok(LogProbs {
            log_probs: join(|a| &a.log_probs)?,
            entropies: join(|a| &a.entropies)?,
            sum_pi_squared: join(|a| &a.sum_pi_squared)?,
        })
    }

    fn mix_reference(&self, alpha: f64) -> ServiceResult<()> {
        self.ask("mix_reference", |rank| rank.mix_reference(alpha)).map(drop)
    }

    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        let reports = self.ask("update", |rank| rank.update(batch.clone()))?;
        let rows = self.divide(batch.rows.iter().map(|row| &row.sequence));
        join_reports("update", reports, &rows, batch.rows.len())
    }

    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion> {
        self.agree("publish", |rank| rank.publish(number))
    }

    fn version(&self) -> PolicyVersion {
        self.ranks[0].version()
    }

    fn save_model(&self, dir: &Path) -> ServiceResult<()> {
        self.ask("save_model", |rank| rank.save_model(dir)).map(drop)
    }

    fn save_state(&self, dir: &Path) -> ServiceResult<()> {
        self.ask("save_state", |rank| rank.save_state(dir)).map(drop)
    }

    fn restore(&self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> ServiceResult<()> {
        self.ask("restore", |rank| rank.restore(model_dir, state_dir, version)).map(drop)
    }
}

impl ScalarModelService for TrainerGroup {
    fn begin_scalar_model(&self, spec: ScalarModelSpec) -> ServiceResult<()> {
        self.ask("begin_scalar_model", |rank| rank.begin_scalar_model(spec.clone())).map(drop)
    }

    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>> {
        let answers = self.ask("values", |rank| rank.values(sequences))?;
        join_rows("values", &answers, &self.divide(sequences.iter()), sequences.len())
    }

    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport> {
        join_scalar("update_critic", self.ask("update_critic", |rank| rank.update_critic(batch.clone()))?)
    }

    fn update_reward_model(&self, pairs: &[PreferencePair], learning_rate: f64) -> ServiceResult<ScalarReport> {
        let operation = "update_reward_model";
        join_scalar(operation, self.ask(operation, |rank| rank.update_reward_model(pairs, learning_rate))?)
    }

    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>> {
        let answers = self.ask("scores", |rank| rank.scores(sequences))?;
        join_rows("scores", &answers, &divide(sequences.iter(), self.ranks.len()), sequences.len())
    }

    fn save_reward_model(&self, dir: &Path) -> ServiceResult<bool> {
        self.agree("save_reward_model", |rank| rank.save_reward_model(dir))
    }

    fn restore_reward_model(&self, dir: &Path) -> ServiceResult<()> {
        self.ask("restore_reward_model", |rank| rank.restore_reward_model(dir)).map(drop)
    }
}

impl DistillService for TrainerGroup {
    fn begin_distillation(&self, spec: DistillSpec) -> ServiceResult<()> {
        self.ask("begin_distillation", |rank| rank.begin_distillation(spec.clone())).map(drop)
    }

    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        let reports = self.ask("update_distilled", |rank| rank.update_distilled(batch.clone()))?;
        let rows = self.divide(batch.rows.iter().map(|row| &row.sequence));
        join_reports("update_distilled", reports, &rows, batch.rows.len())
    }
}

impl MirrorService for TrainerGroup {
    /// Bytes add up, the longest times count.
    fn mirror(&self, step: u64) -> ServiceResult<MirrorReport> {
        let join = |a: MirrorReport, b: MirrorReport| MirrorReport {
            bytes_sent: a.bytes_sent + b.bytes_sent,
            wait_seconds: a.wait_seconds.max(b.wait_seconds),
            transfer_seconds: a.transfer_seconds.max(b.transfer_seconds),
        };
        Ok(self.ask("mirror", |rank| rank.mirror(step))?.into_iter().fold(MirrorReport::default(), join))
    }

    fn held_shards(&self) -> ServiceResult<Vec<HeldShard>> {
        Ok(self.ask("held_shards", |rank| rank.held_shards())?.concat())
    }

    fn rejoin(&self) -> ServiceResult<()> {
        self.ask("rejoin", |rank| rank.rejoin()).map(drop)
    }

    fn restore_mirrored(&self, plan: &MirrorPlan) -> ServiceResult<()> {
        self.ask("restore_mirrored", |rank| rank.restore_mirrored(plan)).map(drop)
    }
}
