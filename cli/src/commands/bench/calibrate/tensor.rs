//! Engines over two tensor-parallel ranks: what their exchanges add to the steps of an engine that is whole.

use super::engine::Engine;
use super::links::two_processes;
use super::{Bench, PATIENCE, REPEATS};
use crate::commands::bench::samples::median;
use crate::plan::{Link, ModelSizes, Point, tensor_exchange};
use crate::{rollout_ranks, runtime};
use anyhow::{Context, Result};
use std::sync::{Arc, RwLock};
use std::time::Instant;
use temper_actor::{CheckpointReader, PackedPolicy, ParamStore, TensorPart};
use temper_rollout::{RankGroup, follow};
use temper_trainer::Trainer;

/// Ranks that are timed.
const NUM_RANKS: usize = 2;

/// Links between ranks that are threads, and between ranks in processes: `raw` ones where the model cannot be divided.
/// `decode` says how many rows were timed of a whole engine.
pub(super) fn measure(
    bench: &Bench<'_>,
    trainer: &Trainer,
    decode: &[Point],
    (threads, processes): (Link, Link),
) -> Result<(Link, Link)> {
    if TensorPart::check(&bench.planned.config, NUM_RANKS).is_err() {
        return Ok((threads, processes));
    }
    let sizes = [decode.first(), decode.last()].map(|point| point.map_or(1, |point| point.size as usize));
    let model = (&bench.planned.config, bench.dtype);
    let timeout = rollout_ranks::timeout(&bench.planned.recipe.placement);
    let whole = Engine::new(bench, (Arc::clone(&bench.device), trainer.policy()), None)?;
    let group = RankGroup::of_threads(&bench.device, model, NUM_RANKS, timeout)?;
    let of_threads = link(bench, (&whole, &divided(bench, group)?), sizes, threads)?;

    let [first, second] = two_processes()?;
    let (config, dtype) = (bench.planned.config.clone(), bench.dtype);
    let num_threads = match bench.planned.recipe.placement.threads {
        0 => (bench.device.info().num_threads / NUM_RANKS).max(1),
        threads => threads,
    };
    let device = runtime::device(num_threads);
    let other = std::thread::spawn(move || follow(&device, &config, dtype, second));
    let engine = divided(bench, RankGroup::lead(model.0, first)?)?;
    let of_processes = link(bench, (&whole, &engine), sizes, processes);
    drop(engine);
    other.join().map_err(|_| anyhow::anyhow!("a tensor-parallel rank panicked"))??;
    Ok((of_threads, of_processes?))
}

/// An engine over the ranks of `group`.
fn divided(bench: &Bench<'_>, group: RankGroup) -> Result<Engine> {
    let (device, config) = (&bench.device, &bench.planned.config);
    let params = ParamStore::load(&**device, config, &CheckpointReader::open(bench.model_dir)?)?;
    let hash = params.content_hash(&**device);
    group.hand_out(&**device, &params, hash).context("handing weights to tensor-parallel ranks")?;
    let mut policy = PackedPolicy::new_part(device, &params, group.part(), bench.dtype);
    policy.set_masked_ids(bench.masked_ids());
    policy.version.hash = hash;
    Engine::new(bench, (Arc::clone(device), Arc::new(RwLock::new(policy))), Some(Arc::new(group)))
}

/// What two engines differ by, as a link that is no faster than `raw`.
fn link(bench: &Bench<'_>, engines: (&Engine, &Engine), sizes: [usize; 2], raw: Link) -> Result<Link> {
    let [few, many] = sizes.map(|rows| {
        let (bytes, messages) = exchanged(bench, engines.0.new_tokens, rows);
        anyhow::Ok((bytes, messages, longer_seconds(bench, engines, rows)?))
    });
    let (few, many) = (few?, many?);
    let per_byte = match many.0 - few.0 {
        more if more > 0.0 => ((many.2 - few.2) / more).max(1.0 / raw.bytes_per_second),
        _ => 1.0 / raw.bytes_per_second,
    };
    let latency_seconds = ((few.2 - few.0 * per_byte) / few.1).max(raw.latency_seconds);
    Ok(Link { bytes_per_second: 1.0 / per_byte, latency_seconds })
}

/// Bytes and messages of [`Engine::run`] over two ranks.
fn exchanged(bench: &Bench<'_>, new_tokens: usize, rows: usize) -> (f64, f64) {
    let (work, steps) = (&bench.planned.work, (new_tokens - 1) as f64);
    let prompts = (rows.div_ceil(work.samples) * bench.lengths.0) as f64;
    let first = (prompts / work.engine.max_batch_tokens as f64).ceil();
    let model = ModelSizes::of(&bench.planned.config);
    tensor_exchange(&model, NUM_RANKS, (prompts + steps * rows as f64, first + steps))
}

/// Median seconds by which the second engine takes longer for `rows` samples; they take turns, so that both find the
/// machine in the same state.
fn longer_seconds(bench: &Bench<'_>, (whole, divided): (&Engine, &Engine), rows: usize) -> Result<f64> {
    let time = |engine: &Engine| -> Result<f64> {
        let start = Instant::now();
        engine.run(bench, rows, engine.new_tokens)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let (begin, mut longer) = (Instant::now(), Vec::new());
    for _ in 0..=REPEATS {
        let seconds = time(whole)?;
        longer.push(time(divided)? - seconds);
        if begin.elapsed() > PATIENCE {
            break;
        }
    }
    if longer.len() > 1 {
        longer.remove(0);
    }
    Ok(median(&longer))
}
