//! Generation: first tokens and decode steps by rows, and two engines at once.

use super::{Bench, is_too_long, median_seconds, point, sizes};
use crate::plan::Point;
use anyhow::{Context, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use temper_proto::{GroupRequest, RolloutService};
use temper_rollout::{LocalRolloutService, RankGroup};
use temper_tensor::Device;
use temper_trainer::{SharedPolicy, Trainer};
use temper_types::{GroupId, PromptId, SamplingParams, derive_seed};

/// Decode steps that are timed: enough for a mean, few enough for a large model.
const STEPS: usize = 16;
/// Longest wait for a group.
const TIMEOUT: Duration = Duration::from_secs(600);

pub(super) struct Generation {
    pub(super) start: Vec<Point>,
    pub(super) decode: Vec<Point>,
    pub(super) crowding: f64,
}

pub(super) fn measure(bench: &Bench<'_>, trainer: &Trainer) -> Result<Generation> {
    let work = &bench.planned.work;
    let engine = Engine::new(bench, (Arc::clone(&bench.device), trainer.policy()), None)?;
    let largest = work.num_samples().min(work.engine.max_num_seqs);
    let (mut start, mut decode) = (Vec::new(), Vec::new());
    for rows in sizes(work.samples.min(largest), largest) {
        if is_too_long(&decode, rows, engine.new_tokens as f64) || is_too_long(&start, rows, 1.0) {
            break;
        }
        let first = median_seconds(|| engine.run(bench, rows, 1))?;
        let whole = median_seconds(|| engine.run(bench, rows, engine.new_tokens))?;
        start.push(point(rows, first));
        let steps = (engine.new_tokens - 1).max(1) as f64;
        decode.push(point(rows, (whole - first) / steps));
    }
    let measured = decode.last().map_or(1, |point: &Point| point.size as usize);
    let crowding = crowding(bench, trainer, &engine, measured.div_ceil(2))?;
    Ok(Generation { start, decode, crowding })
}

/// Two engines with all cores each, at once, against one after the other.
fn crowding(bench: &Bench<'_>, trainer: &Trainer, engine: &Engine, rows: usize) -> Result<f64> {
    let other_device = crate::runtime::device(bench.planned.recipe.placement.threads);
    let other = Engine::new(bench, (other_device, trainer.policy()), None)?;
    let run = |engine: &Engine| engine.run(bench, rows, engine.new_tokens);
    let alone = median_seconds(|| run(engine))?;
    let together = median_seconds(|| {
        std::thread::scope(|scope| {
            let second = scope.spawn(|| run(&other));
            run(engine)?;
            second.join().map_err(|_| anyhow::anyhow!("an engine panicked"))?
        })
    })?;
    Ok((together / (2.0 * alone)).max(0.5))
}

/// An engine of its own.
pub(super) struct Engine {
    service: LocalRolloutService,
    /// Tokens of a response.
    pub(super) new_tokens: usize,
    next_group: AtomicU64,
}

impl Engine {
    /// Over the weights of `policy`, with the other ranks of `ranks` where it is divided.
    pub(super) fn new(
        bench: &Bench<'_>,
        (device, policy): (Arc<dyn Device>, SharedPolicy),
        ranks: Option<Arc<RankGroup>>,
    ) -> Result<Self> {
        let work = &bench.planned.work;
        let bytes = Arc::new(bench.text.token_byte_table(bench.planned.config.vocab_size));
        let mut service = LocalRolloutService::new(device, policy, work.engine.clone(), bytes)?;
        if let Some(ranks) = ranks {
            service = service.with_ranks(ranks);
        }
        // At least two tokens, so that there is a step to time.
        let new_tokens = bench.lengths.1.clamp(2, STEPS);
        Ok(Engine { service, new_tokens, next_group: AtomicU64::new(0) })
    }

    /// `rows` samples in groups of the recipe's size, each of exactly `new_tokens` tokens, at about the mean length of
    /// a response under way.
    pub(super) fn run(&self, bench: &Bench<'_>, rows: usize, new_tokens: usize) -> Result<()> {
        let (prompt, response) = bench.lengths;
        let context = prompt + response.saturating_sub(new_tokens.max(self.new_tokens)) / 2;
        let sampling = SamplingParams { max_new_tokens: new_tokens as u32, ..SamplingParams::default() };
        let per_group = bench.planned.work.samples;
        let num_groups = rows.div_ceil(per_group);
        let first = self.next_group.fetch_add(num_groups as u64, Ordering::Relaxed);
        let mut groups = Vec::with_capacity(num_groups);
        for start in (0..rows).step_by(per_group) {
            let id = first + groups.len() as u64;
            groups.push(GroupRequest {
                group_id: GroupId(id),
                prompt_id: PromptId(id),
                epoch: 0,
                prompt_token_ids: bench.ids(context, id),
                seeds: (0..per_group.min(rows - start) as u32).map(|i| derive_seed(0, id, i, 0)).collect(),
                sampling: sampling.clone(),
                ..GroupRequest::default()
            });
        }
        self.service.submit(groups)?;
        let deadline = Instant::now() + TIMEOUT;
        for _ in 0..num_groups {
            let wait = deadline.saturating_duration_since(Instant::now());
            self.service.next_group(wait)?.context("a prompt was submitted and never came back")?;
        }
        Ok(())
    }
}
