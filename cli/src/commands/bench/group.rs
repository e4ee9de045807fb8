//! What the samples of a group share: seconds to the first token of all of them, for one sample and for many.

use super::samples::{median, random_ids, round};
use crate::commands::common::engine::Generator;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use temper_proto::{GroupRequest, RolloutService};
use temper_types::{GroupId, SamplingParams};

/// Seconds and computed prompt rows of groups that end with their first token.
pub struct GroupTimes {
    num_samples: usize,
    one: Vec<f64>,
    many: Vec<f64>,
    /// Prompt rows that a run computed, for one sample and for many.
    rows: (u64, u64),
}

impl GroupTimes {
    /// Time `runs` pairs of groups over prompts of `prompt_len` tokens, of 1 and of `num_samples` samples in turn.
    ///
    /// # Errors
    /// Where the engine fails.
    pub fn measure(
        generator: &Generator,
        num_samples: usize,
        (vocab_size, prompt_len): (usize, usize),
        runs: usize,
    ) -> Result<Self> {
        let mut times = GroupTimes { num_samples, one: Vec::new(), many: Vec::new(), rows: (0, 0) };
        for run in 0..=runs as u64 {
            let group = |n: usize, at: u64| GroupRequest {
                group_id: GroupId((1 << 62) + 2 * run + at),
                prompt_token_ids: random_ids(vocab_size, prompt_len, (1 << 62) + 2 * run + at),
                seeds: (0..n as u64).collect(),
                sampling: SamplingParams { max_new_tokens: 1, ..SamplingParams::default() },
                ..GroupRequest::default()
            };
            let (one, one_rows) = time(generator, group(1, 0))?;
            let (many, many_rows) = time(generator, group(num_samples, 1))?;
            if run > 0 {
                times.one.push(one);
                times.many.push(many);
                times.rows = (one_rows, many_rows);
            }
        }
        Ok(times)
    }

    fn medians(&self) -> (f64, f64) {
        (median(&self.one), median(&self.many))
    }

    /// As JSON, every sample included.
    pub fn to_json(&self) -> Value {
        let (one, many) = self.medians();
        json!({
            "samples": self.num_samples, "first_token_s_of_1": one, "first_token_s_of_n": many,
            "ratio": round(many / one), "prompt_rows_of_1": self.rows.0, "prompt_rows_of_n": self.rows.1,
            "samples_s_of_1": self.one, "samples_s_of_n": self.many,
        })
    }

    /// In words.
    pub fn to_text(&self) -> String {
        let (one, many) = self.medians();
        format!(
            "group of {}: first tokens after {:.1} ms, of one sample after {:.1} ms (ratio {:.2}); {} and {} prompt rows",
            self.num_samples,
            1e3 * many,
            1e3 * one,
            many / one,
            self.rows.1,
            self.rows.0
        )
    }
}

/// Seconds of a group from its submission to its end, and the prompt rows computed.
fn time(generator: &Generator, group: GroupRequest) -> Result<(f64, u64)> {
    let before = generator.service.stats().num_prefill_tokens;
    let begin = Instant::now();
    generator.service.submit(vec![group])?;
    generator.service.next_group(Duration::from_secs(3600))?.context("a group never came back")?;
    Ok((begin.elapsed().as_secs_f64(), generator.service.stats().num_prefill_tokens - before))
}
