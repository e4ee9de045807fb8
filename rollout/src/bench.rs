//! Generation throughput, measured.

use crate::clock::Clock;
use crate::engine::Engine;
use crate::model::Model;
use crate::{EngineOptions, Error};
use serde::Serialize;
use temper_proto::GroupRequest;
use temper_types::{GroupId, Philox, PromptId, SamplingParams};

/// What to generate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BenchSpec {
    /// Prompts generated for at once, each different, one sample each.
    pub batch_size: usize,
    /// Tokens of a prompt.
    pub prompt_len: usize,
    /// Tokens of a response; at least 2.
    pub new_tokens: u32,
    /// Measured runs.
    pub num_runs: usize,
    /// Runs before them.
    pub num_warmup_runs: usize,
}

/// What was measured. Seconds by run, rates from their medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BenchReport {
    /// What was generated.
    pub spec: BenchSpec,
    /// Seconds of every run, prompts and responses, in order.
    pub seconds: Vec<f64>,
    /// Seconds of runs over the same prompts that end with the first token.
    pub prefill_seconds: Vec<f64>,
    /// Response tokens per second of a whole run.
    pub tokens_per_second: f64,
    /// Prompt tokens per second.
    pub prefill_tokens_per_second: f64,
    /// Response tokens after the first, per second beyond the prefill.
    pub decode_tokens_per_second: f64,
}

/// Measure a fresh engine over `model`. Prompts are random ids; no response stops early.
///
/// # Errors
/// Where the spec is empty or does not fit the engine, or the model fails.
pub fn measure_generation<M: Model>(model: M, options: EngineOptions, spec: BenchSpec) -> Result<BenchReport, Error> {
    let at_least = |key, value: usize, least: usize| match value >= least {
        true => Ok(()),
        false => Err(Error::InvalidConfig { key, value: value.to_string(), expected: format!("{least} or more") }),
    };
    at_least("bench.batch_size", spec.batch_size, 1)?;
    at_least("bench.new_tokens", spec.new_tokens as usize, 2)?;
    at_least("bench.num_runs", spec.num_runs, 1)?;
    let clock = std::sync::Arc::clone(&options.clock);
    let mut bench = Bench { engine: Engine::new(model, options), clock: &*clock, spec };
    let (mut seconds, mut prefill_seconds) = (Vec::new(), Vec::new());
    for run in 0..spec.num_warmup_runs + spec.num_runs {
        let (prefill, whole) = (bench.run(1)?, bench.run(spec.new_tokens)?);
        if run >= spec.num_warmup_runs {
            prefill_seconds.push(prefill);
            seconds.push(whole);
        }
    }
    Ok(report(spec, seconds, prefill_seconds))
}

struct Bench<'a, M> {
    engine: Engine<M>,
    clock: &'a dyn Clock,
    spec: BenchSpec,
}

impl<M: Model> Bench<'_, M> {
    /// Seconds that `new_tokens` tokens for every prompt take.
    fn run(&mut self, new_tokens: u32) -> Result<f64, Error> {
        let requests = (0..self.spec.batch_size).map(|index| self.request(index as u64, new_tokens)).collect();
        let start = self.clock.now();
        self.engine.submit(requests)?;
        while !self.engine.is_idle() {
            self.engine.step()?;
        }
        let seconds = self.clock.now().saturating_sub(start).as_secs_f64();
        while self.engine.pop_finished().is_some() {}
        Ok(seconds)
    }

    fn request(&self, index: u64, new_tokens: u32) -> GroupRequest {
        let vocab_size = self.engine.model().limits().vocab_size as u64;
        let noise = Philox::new(index);
        GroupRequest {
            group_id: GroupId(index),
            prompt_id: PromptId(index),
            epoch: 0,
            prompt_token_ids: (0..self.spec.prompt_len as u64).map(|i| noise.below(vocab_size, i, 1) as u32).collect(),
            seeds: vec![index],
            sampling: SamplingParams { max_new_tokens: new_tokens, ..SamplingParams::default() },
            ..GroupRequest::default()
        }
    }
}

fn report(spec: BenchSpec, seconds: Vec<f64>, prefill_seconds: Vec<f64>) -> BenchReport {
    let (whole, prefill) = (median(&seconds), median(&prefill_seconds));
    let batch = spec.batch_size as f64;
    BenchReport {
        spec,
        tokens_per_second: batch * f64::from(spec.new_tokens) / whole,
        prefill_tokens_per_second: batch * spec.prompt_len as f64 / prefill,
        decode_tokens_per_second: batch * f64::from(spec.new_tokens - 1) / (whole - prefill),
        seconds,
        prefill_seconds,
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fake_model::FakeModel;
    use crate::{SchedulerLimits, SpeculationConfig};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// A clock that advances one second with every look.
    struct CountingClock(AtomicU64);

    impl Clock for CountingClock {
        fn now(&self) -> Duration {
            Duration::from_secs(self.0.fetch_add(1, Ordering::Relaxed))
        }
    }

    fn measure(spec: BenchSpec) -> Result<BenchReport, Error> {
        let limits = SchedulerLimits {
            max_num_seqs: 8,
            max_batch_tokens: 32,
            prefill_chunk: 16,
            block_size: 16,
            num_blocks: 40,
            watermark_blocks: 0,
            reserve_tokens: 16,
        };
        let clock = Arc::new(CountingClock(AtomicU64::new(0)));
        let worker = "bench".to_owned();
        let options = EngineOptions {
            limits,
            max_queued_samples: 100,
            token_bytes: None,
            clock,
            worker,
            speculation: SpeculationConfig::OFF,
            prefix_cache: true,
        };
        measure_generation(FakeModel::new(40, 16), options, spec)
    }

    #[test]
    fn rates_follow_from_the_clock() {
        let spec = BenchSpec { batch_size: 2, prompt_len: 10, new_tokens: 4, num_runs: 3, num_warmup_runs: 1 };
        let report = measure(spec).unwrap();
        // Looks at the clock of a run: start; 2 submits; 2 a step; 1 first step for both; 2 ends; the end itself.
        assert_eq!((report.prefill_seconds, report.seconds), (vec![8.0; 3], vec![14.0; 3]));
        assert_eq!((report.tokens_per_second, report.prefill_tokens_per_second), (8.0 / 14.0, 20.0 / 8.0));
    }

    #[test]
    fn an_empty_spec_is_refused() {
        let spec = BenchSpec { batch_size: 2, prompt_len: 10, new_tokens: 1, num_runs: 3, num_warmup_runs: 0 };
        let message = measure(spec).unwrap_err().to_string();
        assert_eq!(message, "rollout.bench.new_tokens = 1 is out of range: expected 2 or more");
    }

    #[test]
    fn the_median_of_an_even_number_is_between() {
        assert_eq!(median(&[4.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
