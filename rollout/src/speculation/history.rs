//! Responses of earlier passes over a prompt, by the prompt's ids.
//!
//! Kept in memory and bounded; a resumed run starts without it, which costs time and changes no bit.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use temper_proto::GeneratedSample;

/// One earlier response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastResponse {
    /// Index in its group.
    pub sample_index: usize,
    /// Ids, the stop token included.
    pub token_ids: Arc<[u32]>,
}

/// Earlier responses of all prompts.
#[derive(Debug)]
pub(super) struct History {
    max_epochs: usize,
    max_tokens: usize,
    num_tokens: usize,
    /// Passes over each prompt, latest first.
    passes: HashMap<Arc<[u32]>, VecDeque<Vec<PastResponse>>>,
    /// Prompts in the order of their passes, one entry for each.
    order: VecDeque<Arc<[u32]>>,
}

impl History {
    /// Keep the last `max_epochs` passes over each prompt, and at most `max_tokens` tokens in all.
    pub fn new(max_epochs: usize, max_tokens: usize) -> Self {
        History { max_epochs, max_tokens, num_tokens: 0, passes: HashMap::new(), order: VecDeque::new() }
    }

    /// Responses to `prompt`, latest pass first, ascending samples within.
    pub fn get(&self, prompt: &[u32]) -> Vec<PastResponse> {
        self.passes.get(prompt).into_iter().flatten().flatten().cloned().collect()
    }

    /// Remember a pass over `prompt`.
    pub fn add(&mut self, prompt: &[u32], samples: &[GeneratedSample]) {
        if self.max_epochs == 0 || samples.is_empty() {
            return;
        }
        let pass = samples.iter().map(|sample| PastResponse {
            sample_index: sample.sample_index.0 as usize,
            token_ids: sample.token_ids.as_slice().into(),
        });
        let pass: Vec<PastResponse> = pass.collect();
        let key = self.passes.get_key_value(prompt).map_or_else(|| prompt.into(), |(key, _)| Arc::clone(key));
        self.num_tokens += num_tokens(&pass);
        self.order.push_back(Arc::clone(&key));
        self.passes.entry(Arc::clone(&key)).or_default().push_front(pass);
        if self.passes[prompt].len() > self.max_epochs {
            self.drop_oldest(prompt);
            let first = self.order.iter().position(|other| Arc::ptr_eq(other, &key));
            first.and_then(|at| self.order.remove(at)).expect("every pass stands in the order");
        }
        while self.num_tokens > self.max_tokens {
            let Some(oldest) = self.order.pop_front() else { return };
            self.drop_oldest(&oldest);
        }
    }

    fn drop_oldest(&mut self, prompt: &[u32]) {
        let Some(passes) = self.passes.get_mut(prompt) else { return };
        self.num_tokens -= passes.pop_back().as_deref().map_or(0, num_tokens);
        if passes.is_empty() {
            self.passes.remove(prompt);
        }
    }
}

fn num_tokens(pass: &[PastResponse]) -> usize {
    pass.iter().map(|response| response.token_ids.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use temper_types::{FinishReason, SampleIndex, SampleTimings};

    fn sample(sample_index: u32, token_ids: &[u32]) -> GeneratedSample {
        GeneratedSample {
            sample_index: SampleIndex(sample_index),
            seed: 0,
            token_ids: token_ids.to_vec(),
            log_probs: Vec::new(),
            sampled_log_probs: Vec::new(),
            surviving_mass: Vec::new(),
            policy_versions: Vec::new(),
            finish_reason: FinishReason::Length,
            num_drafted: 0,
            num_accepted: 0,
            timings: SampleTimings::default(),
        }
    }

    fn first_tokens(history: &History, prompt: &[u32]) -> Vec<u32> {
        history.get(prompt).iter().map(|past| past.token_ids[0]).collect()
    }

    #[test]
    fn the_latest_passes_stay_and_the_oldest_prompts_go() {
        let mut history = History::new(2, 10);
        for pass in 0..3 {
            history.add(&[1], &[sample(0, &[10 * pass, 0]), sample(1, &[10 * pass + 1])]);
        }
        assert_eq!(first_tokens(&history, &[1]), [20, 21, 10, 11]);
        history.add(&[2], &[sample(0, &[7, 7, 7, 7, 7])]);
        assert_eq!(first_tokens(&history, &[1]), [20, 21], "11 tokens are too many: the oldest pass went");
        history.add(&[3], &[sample(0, &[9; 11])]);
        assert_eq!(history.num_tokens, 0, "a pass longer than the bound leaves nothing");
        assert!(history.passes.is_empty() && history.order.is_empty());
    }
}
