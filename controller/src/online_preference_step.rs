//! One step of learning from sampled pairs: responses are drawn and scored, the best and the worst of a prompt become
//! a pair, and the loss over pairs is minimised.
//!
//! consumes: prompts of the stage's dataset, in the order of its cursor
//! produces: one optimizer step per mini-batch of pairs, a new policy version, a shard of trajectories, metrics
//! waits for: the batch of the step; before the weights are published, the one under way (see `pipeline`)

use crate::record_row::StepNumbers;
use crate::{Controller, Error, OnlinePreferenceStage, Phase, PolicyStage};
use std::collections::BTreeMap;
use temper_algos::preference::{Pair, online_pairs};
use temper_proto::{GlobalCounts, MiniBatch, PolicyRole, TokenSequence, TrainRow, UpdateReport};
use temper_telemetry::MetricsRow;
use temper_types::{RewardOutcome, Sample};

/// Pairs of a step: indices of its samples.
#[derive(Debug, Default, PartialEq)]
struct SampledPairs {
    pairs: Vec<Pair>,
    /// Groups in which all rewards are equal, or fewer than two samples could be scored.
    num_dropped: u64,
}

impl Controller {
    /// Generate, score, pair, update, publish, record.
    pub(crate) fn online_preference_step(&mut self, stage: &OnlinePreferenceStage) -> Result<MetricsRow, Error> {
        let policy = &stage.policy;
        let mut numbers = StepNumbers::start(self.clock.elapsed());
        let mut columns = self.validation_at_start(policy)?;
        self.publish(self.state.step)?;
        let mut batch = self.take_batch(policy, &mut numbers)?;
        let ahead = self.begin_batch(policy, &mut numbers)?;
        self.rest_engines()?;
        let begin = self.clock.elapsed();
        let stage = OnlinePreferenceStage { policy: batch.stage_of(policy), ..stage.clone() };
        let learned = self.learn_pairs(&stage, &mut batch.samples);
        numbers.train_seconds = (self.clock.elapsed() - begin).as_secs_f64();
        let (sampled, reports) = self.finish_batch(ahead, learned, &mut numbers)?;
        self.publish(self.state.step + 1)?;
        numbers.finish(self.clock.elapsed());
        numbers.batch.num_filtered_groups += sampled.num_dropped;
        let trained: Vec<usize> = sampled.pairs.iter().flat_map(|p| [p.chosen, p.rejected]).collect();
        columns.append(&mut batch.columns);
        columns.extend(drift(&trained, &batch.samples).map(|kl| ("kl".to_owned(), kl)));
        self.record_step(&stage.policy, batch, &trained, (numbers, reports, columns))
    }

    /// Pair the samples of a batch and update on the pairs.
    fn learn_pairs(
        &mut self,
        stage: &OnlinePreferenceStage,
        samples: &mut [Sample],
    ) -> Result<(SampledPairs, Vec<UpdateReport>), Error> {
        let sampled = pair_samples(samples).map_err(|source| Error::Algorithm { step: self.state.step + 1, source })?;
        self.log_probs_of_pairs(stage, &sampled.pairs, samples)?;
        let reports = self.update_on_pairs(stage, &sampled.pairs, samples)?;
        self.settle(samples, &sampled.pairs.iter().flat_map(|p| [p.chosen, p.rejected]).collect())?;
        Ok((sampled, reports))
    }

    /// The reference's log-probs of all pairs, and the old ones of pairs that an update comes before; those of the
    /// first mini-batch come out of its own forward pass. Advantages record the side: 1 chosen, -1 rejected.
    fn log_probs_of_pairs(
        &mut self,
        stage: &OnlinePreferenceStage,
        pairs: &[Pair],
        samples: &mut [Sample],
    ) -> Result<(), Error> {
        self.enter(Phase::LogProbs);
        for pair in pairs {
            for (index, side) in [(pair.chosen, 1.0), (pair.rejected, -1.0)] {
                samples[index].advantages = vec![side; samples[index].response_token_ids.len()];
            }
        }
        let rows = |pairs: &[Pair]| -> Vec<usize> { pairs.iter().flat_map(|p| [p.chosen, p.rejected]).collect() };
        let temperature = stage.policy.sampling.log_prob_temperature();
        let late = rows(&pairs[per_batch(&stage.policy, pairs).min(pairs.len())..]);
        for (index, log_probs) in late.iter().zip(self.of_samples(PolicyRole::Policy, &late, samples, temperature)?) {
            samples[*index].old_log_probs = log_probs;
        }
        if stage.objective.needs_reference() {
            let all = rows(pairs);
            let reference = self.of_samples(PolicyRole::Reference, &all, samples, temperature)?;
            for (index, log_probs) in all.iter().zip(reference) {
                samples[*index].ref_log_probs = log_probs;
            }
        }
        Ok(())
    }

    fn of_samples(
        &self,
        role: PolicyRole,
        indices: &[usize],
        samples: &[Sample],
        temperature: f32,
    ) -> Result<Vec<Vec<f32>>, Error> {
        if indices.is_empty() {
            return Ok(Vec::new());
        }
        let sequences: Vec<TokenSequence> = indices.iter().map(|index| sequence(&samples[*index])).collect();
        Ok(self.attribute(self.services.trainer.log_probs(role, &sequences, temperature))?.log_probs)
    }

    /// One optimizer step per mini-batch of whole pairs and epoch; none where no group gave a pair.
    fn update_on_pairs(
        &mut self,
        stage: &OnlinePreferenceStage,
        pairs: &[Pair],
        samples: &mut [Sample],
    ) -> Result<Vec<UpdateReport>, Error> {
        let policy = &stage.policy;
        let learning_rate =
            policy.optimizer.learning_rate * policy.schedule.multiplier(self.state.stage_step, policy.steps);
        let mut reports = Vec::new();
        for _epoch in 0..policy.epochs {
            for part in pairs.chunks(per_batch(policy, pairs)) {
                self.enter(Phase::Update);
                self.unpublished = true;
                let indices: Vec<usize> = part.iter().flat_map(|p| [p.chosen, p.rejected]).collect();
                let updated = self.services.trainer.update(mini_batch(policy, &indices, samples, learning_rate));
                let report = self.attribute(updated)?;
                for (index, log_probs) in indices.iter().zip(&report.log_probs) {
                    if samples[*index].old_log_probs.is_empty() {
                        samples[*index].old_log_probs.clone_from(log_probs);
                    }
                }
                reports.push(report);
            }
        }
        Ok(reports)
    }
}

/// Mean of `old_log_prob - ref_log_prob` over the tokens of the pairs: how far the policy went from the reference on
/// the responses that it learns from. `None` where there is no reference or no pair.
fn drift(trained: &[usize], samples: &[Sample]) -> Option<f64> {
    let gaps = trained.iter().flat_map(|index| {
        let sample = &samples[*index];
        sample.old_log_probs.iter().zip(&sample.ref_log_probs).map(|(old, base)| f64::from(*old) - f64::from(*base))
    });
    let (sum, count) = gaps.fold((0.0, 0u64), |(sum, count), gap| (sum + gap, count + 1));
    (count > 0).then(|| sum / count as f64)
}

/// Pairs in one mini-batch: the prompts of one, of which each gives at most one pair.
fn per_batch(policy: &PolicyStage, pairs: &[Pair]) -> usize {
    (policy.prompts_per_step / policy.mini_batches).max(1).min(pairs.len().max(1))
}

fn sequence(sample: &Sample) -> TokenSequence {
    TokenSequence {
        prompt_token_ids: sample.prompt_token_ids.clone(),
        response_token_ids: sample.response_token_ids.clone(),
        response_mask: sample.response_mask.clone(),
    }
}

fn mini_batch(policy: &PolicyStage, indices: &[usize], samples: &[Sample], learning_rate: f64) -> MiniBatch {
    let row = |index: &usize| TrainRow {
        ref_log_probs: samples[*index].ref_log_probs.clone(),
        ..TrainRow::demonstration(sequence(&samples[*index]))
    };
    let rows: Vec<TrainRow> = indices.iter().map(row).collect();
    let num_rows = rows.len() as u64;
    let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
    MiniBatch {
        rows,
        global: GlobalCounts {
            num_tokens,
            num_sequences: num_rows,
            num_rows,
            loss_scale_factor: f64::from(policy.sampling.max_new_tokens),
        },
        temperature: policy.sampling.log_prob_temperature(),
        learning_rate,
    }
}

/// Best against worst of every group of scored samples; groups whose rewards are all equal say nothing.
fn pair_samples(samples: &[Sample]) -> Result<SampledPairs, temper_algos::Error> {
    let mut groups: BTreeMap<u64, Vec<(usize, f64)>> = BTreeMap::new();
    for (index, sample) in samples.iter().enumerate() {
        let group = groups.entry(sample.group_id.0).or_default();
        if let (true, Some(reward)) = (sample.is_trainable(), sample.outcome.as_ref().and_then(RewardOutcome::reward)) {
            group.push((index, reward));
        }
    }
    let mut sampled = SampledPairs::default();
    let (mut rows, mut rewards, mut group_ids) = (Vec::new(), Vec::new(), Vec::new());
    for (group_id, group) in &groups {
        if group.iter().all(|(_, reward)| *reward == group[0].1) {
            sampled.num_dropped += 1;
            continue;
        }
        for (index, reward) in group {
            rows.push(*index);
            rewards.push(*reward);
            group_ids.push(*group_id);
        }
    }
    let online = online_pairs(&rewards, &group_ids)?;
    let named = |pair: &Pair| Pair { chosen: rows[pair.chosen], rejected: rows[pair.rejected] };
    sampled.pairs = online.pairs.iter().map(named).collect();
    Ok(sampled)
}
