//! The reward service in this process.

use crate::scorer::{ScoreInput, Scorer};
use std::num::NonZeroUsize;
use temper_proto::{RewardService, ScoreRequest, ServiceResult};
use temper_types::{RewardFailure, RewardOutcome, SampleKey};

/// Scores batches with a [`Scorer`] on threads of its own. Outcomes do not depend on the number of threads.
#[derive(Debug, Clone)]
pub struct LocalRewardService {
    scorer: Scorer,
    num_threads: NonZeroUsize,
}

impl LocalRewardService {
    /// A service that scores with `scorer` on at most `num_threads` threads.
    pub fn new(scorer: Scorer, num_threads: NonZeroUsize) -> Self {
        LocalRewardService { scorer, num_threads }
    }

    fn score_one(&self, request: &ScoreRequest) -> RewardOutcome {
        let outcome = self.scorer.score(ScoreInput {
            data_source: &request.data_source,
            response: &request.response,
            ground_truth: request.ground_truth.as_deref(),
            extra_info: request.extra_info.as_deref(),
            finish_reason: request.finish_reason,
            response_len_tokens: request.num_response_tokens,
        });
        match outcome {
            RewardOutcome::Failed(failure) => RewardOutcome::Failed(name_sample(failure, &request.key)),
            scored @ RewardOutcome::Scored { .. } => scored,
        }
    }
}

fn name_sample(failure: RewardFailure, key: &SampleKey) -> RewardFailure {
    let cause = format!(
        "{} (prompt {}, group {}, sample {}, epoch {})",
        failure.cause, key.prompt_id, key.group_id, key.sample_index, key.epoch
    );
    RewardFailure { cause, ..failure }
}

impl RewardService for LocalRewardService {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        let chunk = requests.len().div_ceil(self.num_threads.get()).max(1);
        if requests.len() <= chunk {
            return Ok(requests.iter().map(|request| self.score_one(request)).collect());
        }
        Ok(std::thread::scope(|scope| {
            let workers: Vec<_> = requests
                .chunks(chunk)
                .map(|part| scope.spawn(move || part.iter().map(|r| self.score_one(r)).collect::<Vec<_>>()))
                .collect();
            workers.into_iter().flat_map(|w| w.join().expect("verifiers do not panic")).collect()
        }))
    }
}
