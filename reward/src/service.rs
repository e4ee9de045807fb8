//! The reward service in this process.

use crate::Error;
use crate::external::{Answer, ExternalScorer, Launcher};
use crate::reward_model::{RewardModelConfig, SequenceScorer};
use crate::scorer::{ScoreInput, Scorer};
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use temper_proto::{RewardService, ScoreRequest, ServiceError, ServiceResult};
use temper_types::{ErrorCode, RewardFailure, RewardOutcome, SampleKey};

/// Scores batches with a [`Scorer`] on threads of its own. Outcomes do not depend on the number of threads.
///
/// Reward models score the whole batch first, on the calling thread: the caller asks when nothing else computes. The
/// user's own code scores it next, in its processes.
#[derive(Clone)]
pub struct LocalRewardService {
    scorer: Scorer,
    num_threads: NonZeroUsize,
    models: BTreeMap<usize, Arc<dyn SequenceScorer>>,
    external: BTreeMap<usize, Arc<ExternalScorer>>,
}

/// Scores of one reward model for a batch, or why it has none.
type ModelScores = Result<Vec<f32>, String>;

/// What was scored elsewhere for a batch, by component.
#[derive(Default)]
struct Elsewhere {
    models: BTreeMap<usize, ModelScores>,
    external: BTreeMap<usize, Vec<Result<Answer, String>>>,
}

impl Elsewhere {
    /// What the component says of the sample in `row`.
    fn answer(&self, component: usize, row: usize) -> Result<Answer, String> {
        if let Some(answers) = self.external.get(&component) {
            return answers[row].clone();
        }
        match self.models.get(&component) {
            Some(Ok(scores)) => Ok(Answer { score: f64::from(scores[row]), components: Vec::new() }),
            Some(Err(cause)) => Err(cause.clone()),
            None => Err("the service was made without this model or reward".to_owned()),
        }
    }
}

impl LocalRewardService {
    /// A service that scores with `scorer` on at most `num_threads` threads.
    pub fn new(scorer: Scorer, num_threads: NonZeroUsize) -> Self {
        LocalRewardService { scorer, num_threads, models: BTreeMap::new(), external: BTreeMap::new() }
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

    /// The same service with processes (or connections) for every component that is the user's own code. Python files
    /// are loaded once.
    ///
    /// # Errors
    /// A file or program that is missing, or a Python file that cannot be loaded, with the component.
    pub fn with_external(mut self, launcher: &Launcher) -> Result<Self, Error> {
        for (index, component) in self.scorer.components().enumerate() {
            if let Some(external) = ExternalScorer::new(component, launcher)? {
                self.external.insert(index, Arc::new(external));
            }
        }
        Ok(self)
    }

    /// As [`RewardService::score`], but causes of failures do not name their sample, so that they can be counted.
    ///
    /// # Errors
    /// Where so many samples fail that a reward must be broken.
    pub fn outcomes(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        let elsewhere = &Elsewhere { models: self.model_scores(requests), external: self.external_answers(requests)? };
        let requests: Vec<(usize, &ScoreRequest)> = requests.iter().enumerate().collect();
        let chunk = requests.len().div_ceil(self.num_threads.get()).max(1);
        if requests.len() <= chunk {
            return Ok(requests.into_iter().map(|request| self.score_one(request, elsewhere)).collect());
        }
        Ok(std::thread::scope(|scope| {
            let workers: Vec<_> = requests
                .chunks(chunk)
                .map(|part| scope.spawn(move || part.iter().map(|r| self.score_one(*r, elsewhere)).collect::<Vec<_>>()))
                .collect();
            workers.into_iter().flat_map(|w| w.join().expect("verifiers do not panic")).collect()
        }))
    }

    /// Every external reward's answers to the batch, one reward after the other.
    fn external_answers(
        &self,
        requests: &[ScoreRequest],
    ) -> ServiceResult<BTreeMap<usize, Vec<Result<Answer, String>>>> {
        let failed = |cause| ServiceError::new(ErrorCode::InvalidArgument, "reward", "score", cause);
        let answers = |(index, external): (&usize, &Arc<ExternalScorer>)| Ok((*index, external.score(requests)?));
        self.external.iter().map(answers).collect::<Result<_, String>>().map_err(failed)
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

    fn score_one(&self, (row, request): (usize, &ScoreRequest), elsewhere: &Elsewhere) -> RewardOutcome {
        let input = ScoreInput {
            data_source: &request.data_source,
            response: &request.response,
            ground_truth: request.ground_truth.as_deref(),
            extra_info: request.extra_info.as_deref(),
            finish_reason: request.finish_reason,
            response_len_tokens: request.num_response_tokens,
        };
        self.scorer.score_with(input, &|component| elsewhere.answer(component, row))
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
        let name = |(outcome, request): (RewardOutcome, &ScoreRequest)| match outcome {
            RewardOutcome::Failed(failure) => RewardOutcome::Failed(name_sample(failure, &request.key)),
            scored @ RewardOutcome::Scored { .. } => scored,
        };
        Ok(self.outcomes(requests)?.into_iter().zip(requests).map(name).collect())
    }
}
