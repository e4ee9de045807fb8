//! Training: forwards, micro-batches and what an update does once.

use super::{Bench, is_too_long, median_seconds, point};
use crate::plan::Point;
use anyhow::Result;
use std::sync::Arc;
use temper_algos::{Objective, PolicyLossConfig};
use temper_proto::{GlobalCounts, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow};
use temper_tensor::Device;
use temper_trainer::Trainer;

/// Micro-batches of the measurement that tells an update's fixed part from theirs.
const SLICES: usize = 8;
/// Tokens up to which micro-batches are timed; larger ones take time in proportion.
const MOST_TOKENS: usize = 4096;

pub(super) struct Training {
    pub(super) forward: Vec<Point>,
    pub(super) train: Vec<Point>,
    pub(super) train_recompute: Vec<Point>,
    pub(super) update_seconds: f64,
    /// Of two trainers with all cores each, and of two that share compute threads.
    pub(super) crowding: [f64; 2],
}

/// Groups and rows of each whose micro-batches are timed, ascending in tokens.
fn shapes(bench: &Bench<'_>) -> Vec<(usize, usize)> {
    let work = &bench.planned.work;
    let (prompt, response) = bench.lengths;
    let rows = work.trained_samples;
    let most = work.max_micro_batch_tokens.clamp(1, MOST_TOKENS);
    let group = prompt + rows * response;
    let groups = (most / group).min(work.prompts.div_ceil(work.mini_batches));
    let mut shapes: Vec<(usize, usize)> = match groups {
        0 => [1, most.saturating_sub(prompt) / response / 4, most.saturating_sub(prompt) / response]
            .map(|rows_of_one| (1, rows_of_one.clamp(1, rows)))
            .to_vec(),
        groups => vec![(1, rows.div_ceil(4)), (1, rows), (groups.div_ceil(4), rows), (groups, rows)],
    };
    shapes.dedup();
    shapes
}

pub(super) fn measure(bench: &Bench<'_>, trainer: &mut Trainer) -> Result<Training> {
    let update_seconds = fixed_part(bench, trainer)?;
    let (mut forward, mut train, mut train_recompute) = (Vec::new(), Vec::new(), Vec::new());
    for (groups, rows) in shapes(bench) {
        let (prompt, response) = bench.lengths;
        let tokens = groups * (prompt + rows * response);
        if train.last().is_some_and(|last: &Point| last.size >= tokens as f64) {
            continue;
        }
        if is_too_long(&train, tokens, 1.0) {
            break;
        }
        let sequences = bench.sequences(groups, rows);
        begin(trainer, tokens, false)?;
        let seconds = median_seconds(|| {
            trainer.log_probs(PolicyRole::Policy, &sequences, 1.0)?;
            Ok(())
        })?;
        forward.push(point(tokens, seconds));
        let batch = mini_batch(sequences);
        let seconds = median_seconds(|| update(trainer, &batch))?;
        train.push(point(tokens, seconds - update_seconds));
        begin(trainer, tokens, true)?;
        let seconds = median_seconds(|| update(trainer, &batch))?;
        train_recompute.push(point(tokens, seconds - update_seconds));
    }
    let own = crate::runtime::device(bench.planned.recipe.placement.threads);
    let (apart, shared) = ((&train[..], own), (&train[..], Arc::clone(&bench.device)));
    let crowding = [crowding(bench, trainer, apart)?, crowding(bench, trainer, shared)?];
    Ok(Training { forward, train, train_recompute, update_seconds, crowding })
}

/// Two trainers at once, the other one on `device`, against one after the other: half of the largest measured
/// micro-batch.
fn crowding(bench: &Bench<'_>, trainer: &mut Trainer, (train, device): (&[Point], Arc<dyn Device>)) -> Result<f64> {
    let (prompt, response) = bench.lengths;
    let largest = train.last().map_or(0.0, |point| point.size) as usize;
    let rows = (largest / 2).saturating_sub(prompt) / response;
    let rows = rows.clamp(1, bench.planned.work.trained_samples);
    let groups = (largest / 2 / (prompt + rows * response)).max(1);
    let mut other = Trainer::load(device, bench.model_dir, bench.dtype, bench.masked_ids())?;
    let batch = mini_batch(bench.sequences(groups, rows));
    begin(trainer, largest.max(1), false)?;
    begin(&mut other, largest.max(1), false)?;
    let alone = median_seconds(|| update(trainer, &batch))?;
    let together = median_seconds(|| {
        std::thread::scope(|scope| {
            let second = scope.spawn(|| update(&mut other, &batch));
            update(trainer, &batch)?;
            second.join().map_err(|_| anyhow::anyhow!("a trainer panicked"))?
        })
    })?;
    Ok((together / (2.0 * alone)).max(0.5))
}

/// An update of one small micro-batch against one of several: the rest is what an update does once.
fn fixed_part(bench: &Bench<'_>, trainer: &mut Trainer) -> Result<f64> {
    let rows = bench.sequences(SLICES, 1);
    begin(trainer, 1, false)?;
    let all = mini_batch(rows.clone());
    let one = mini_batch(rows[..1].to_vec());
    let many = median_seconds(|| update(trainer, &all))?;
    let single = median_seconds(|| update(trainer, &one))?;
    let slice = (many - single) / (SLICES - 1) as f64;
    Ok((single - slice).clamp(0.0, single))
}

fn update(trainer: &mut Trainer, batch: &MiniBatch) -> Result<()> {
    trainer.update(batch)?;
    Ok(())
}

/// A stage whose micro-batches have at most `tokens`.
fn begin(trainer: &mut Trainer, tokens: usize, recompute_activations: bool) -> Result<()> {
    trainer.begin_stage(StageSpec {
        name: "calibrate".to_owned(),
        objective_json: serde_json::to_string(&Objective::Policy(PolicyLossConfig::default()))?,
        optimizer: OptimizerConfig::default(),
        needs_reference: false,
        max_micro_batch_tokens: tokens,
        recompute_activations,
    })?;
    Ok(())
}

/// Rows with advantages that pull both ways, at a rate that moves little.
fn mini_batch(sequences: Vec<TokenSequence>) -> MiniBatch {
    let num_tokens = sequences.iter().map(|s| s.response_token_ids.len() as u64).sum();
    let num_rows = sequences.len() as u64;
    let row = |(index, sequence): (usize, TokenSequence)| {
        let advantage = if index % 2 == 0 { 1.0 } else { -1.0 };
        let advantages = vec![advantage; sequence.response_token_ids.len()];
        TrainRow { advantages, ..TrainRow::demonstration(sequence) }
    };
    MiniBatch {
        rows: sequences.into_iter().enumerate().map(row).collect(),
        global: GlobalCounts {
            num_tokens,
            num_sequences: num_rows,
            num_rows,
            loss_scale_factor: num_tokens.max(1) as f64,
        },
        temperature: 1.0,
        learning_rate: 1e-9,
    }
}
