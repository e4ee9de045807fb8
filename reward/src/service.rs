//! The reward service in this process.

use crate::reward_model::{RewardModelConfig, SequenceScorer};
use crate::scorer::{ScoreInput, Scorer};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use temper_proto::{RewardService, ScoreRequest, ServiceResult};
use temper_types::{RewardFailure, RewardOutcome, SampleKey};

/// Scores batches with a [`Scorer`] on threads of its own. Outcomes do not depend on the number of threads.
///
/// Reward models score the whole batch first, on the calling thread: the caller asks when nothing else computes.
#[derive(Clone)]
pub struct LocalRewardService {
    scorer: Scorer,
    num_threads: NonZeroUsize,
    models: BTreeMap<usize, Arc<dyn SequenceScorer>>,
}

/// Scores of one reward model for a batch, or why it has none.
type ModelScores = Result<Vec<f32>, String>;

impl LocalRewardService {
    /// A service that scores with `scorer` on at most `num_threads` threads.
    pub fn new(scorer: Scorer, num_threads: NonZeroUsize) -> Self {
        LocalRewardService { scorer, num_threads, models: BTreeMap::new() }
    }

    /// The same service with the model that `find` gives for every component of kind `reward_model`.
    ///
    /// # Errors
    /// The first error of `find`.
    pub fn with_models<E>(
        mut self,
        mut find: impl FnMut(&RewardModelConfig) -> Result<Arc<dyn SequenceScorer>, E>,
    ) -> Result<Self, E> {
        for (index, config) in self.scorer.reward_models() {
            self.models.insert(index, find(config)?);
        }
        Ok(self)
    }

    /// Every model's scores of the batch. An error of a model fails every sample that it should have scored.
    fn model_scores(&self, requests: &[ScoreRequest]) -> BTreeMap<usize, ModelScores> {
        let score = |model: &Arc<dyn SequenceScorer>| {
            let sequences: Vec<(&[u32], &[u32])> =
                requests.iter().map(|r| (&r.prompt_token_ids[..], &r.response_token_ids[..])).collect();
            let scores = model.scores(&sequences)?;
            let (got, expected) = (scores.len(), requests.len());
            if got == expected { Ok(scores) } else { Err(format!("{got} scores for {expected} samples")) }
        };
        self.models.iter().map(|(index, model)| (*index, score(model))).collect()
    }

    fn score_one(
        &self,
        (row, request): (usize, &ScoreRequest),
        models: &BTreeMap<usize, ModelScores>,
    ) -> RewardOutcome {
        let model_score = |component: usize| match models.get(&component) {
            Some(Ok(scores)) => Ok(f64::from(scores[row])),
            Some(Err(cause)) => Err(cause.clone()),
            None => Err("the service was made without this model".to_owned()),
        };
        let input = ScoreInput {
            data_source: &request.data_source,
            response: &request.response,
            ground_truth: request.ground_truth.as_deref(),
            extra_info: request.extra_info.as_deref(),
            finish_reason: request.finish_reason,
            response_len_tokens: request.num_response_tokens,
        };
        match self.scorer.score_with(input, &model_score) {
            RewardOutcome::Failed(failure) => RewardOutcome::Failed(name_sample(failure, &request.key)),
            scored @ RewardOutcome::Scored { .. } => scored,
        }
    }
}

impl std::fmt::Debug for LocalRewardService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (scorer, models) = (&self.scorer, self.models.len());
        f.debug_struct("LocalRewardService").field("scorer", scorer).field("models", &models).finish_non_exhaustive()
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
        let models = &self.model_scores(requests);
        let requests: Vec<(usize, &ScoreRequest)> = requests.iter().enumerate().collect();
        let chunk = requests.len().div_ceil(self.num_threads.get()).max(1);
        if requests.len() <= chunk {
            return Ok(requests.into_iter().map(|request| self.score_one(request, models)).collect());
        }
        Ok(std::thread::scope(|scope| {
            let workers: Vec<_> = requests
                .chunks(chunk)
                .map(|part| scope.spawn(move || part.iter().map(|r| self.score_one(*r, models)).collect::<Vec<_>>()))
                .collect();
            workers.into_iter().flat_map(|w| w.join().expect("verifiers do not panic")).collect()
        }))
    }
}
