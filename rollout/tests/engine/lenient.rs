//! The law of lenient replay over a random policy: not the policy's, and off by the amount that theory says.

use crate::support::{Model, engine_of, run_all};
use temper_proto::{EarlierResponse, GroupRequest, Reuse};
use temper_types::{GroupId, SamplingParams};

const VOCAB: usize = 61;
const NUM_SAMPLES: u64 = 8_000;

fn request(seeds: std::ops::Range<u64>) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(seeds.start),
        prompt_token_ids: vec![5, 17, 3, 40, 8],
        seeds: seeds.collect(),
        sampling: SamplingParams { max_new_tokens: 1, ..SamplingParams::default() },
        ..GroupRequest::default()
    }
}

/// The probability of every first token, from its log-prob where it alone is allowed.
fn law(model: Model) -> Vec<f64> {
    let one = |id: u32| {
        let mut request = request(0..1);
        request.group_id = GroupId(u64::from(id));
        request.sampling.allowed_token_ids = vec![id];
        request
    };
    let results = run_all(&mut engine_of(model), (0..VOCAB as u32).map(one).collect());
    results.iter().map(|result| f64::from(result.samples[0].log_probs[0]).exp()).collect()
}

/// Numbers of the cells of a chi-square test against `law`: ids of fewer than 5 expected samples are one cell.
fn cells(numbers: &[f64], law: &[f64]) -> Vec<f64> {
    let is_large = |p: &f64| p * NUM_SAMPLES as f64 >= 5.0;
    let large = numbers.iter().zip(law).filter(|(_, p)| is_large(p)).map(|(x, _)| *x);
    let rest = numbers.iter().zip(law).filter(|(_, p)| !is_large(p)).map(|(x, _)| *x).sum();
    large.chain([rest]).collect()
}

/// sum of (observed - expected)^2 / expected, and the degrees of freedom.
fn chi_square(counts: &[f64], law: &[f64]) -> (f64, f64) {
    let (observed, law) = (cells(counts, law), cells(law, law));
    let term = |(observed, p): (&f64, &f64)| (observed - p * NUM_SAMPLES as f64).powi(2) / (p * NUM_SAMPLES as f64);
    (observed.iter().zip(&law).map(term).sum(), law.len() as f64 - 1.0)
}

/// Mean and standard deviation of that statistic where the samples follow `actual`, to the first order of counts.
fn chi_square_under(actual: &[f64], law: &[f64]) -> (f64, f64) {
    let (actual, tested, n) = (cells(actual, law), cells(law, law), NUM_SAMPLES as f64);
    let pairs = || actual.iter().zip(&tested);
    let mean = pairs().map(|(a, p)| (a * (1.0 - a) + n * (a - p).powi(2)) / p).sum();
    let slope: f64 = pairs().map(|(a, p)| a * (a - p) / p).sum();
    let square: f64 = pairs().map(|(a, p)| a * ((a - p) / p).powi(2)).sum();
    (mean, (4.0 * n * (square - slope * slope) + 2.0 * (tested.len() as f64 - 1.0)).sqrt())
}

#[test]
fn the_law_is_the_predicted_one_and_not_the_policys() {
    let (old, new) = (Model::llama(5), Model::llama(6));
    let (p_old, p_new) = (law(old), law(new));
    assert!((p_new.iter().sum::<f64>() - 1.0).abs() < 1e-4);
    let first = run_all(&mut engine_of(old), vec![request(0..NUM_SAMPLES)]).remove(0);
    let earlier = first.samples.iter().map(|sample| EarlierResponse {
        token_ids: sample.token_ids.clone(),
        log_probs: sample.log_probs.clone(),
        policy_versions: Vec::new(),
    });
    let earlier: Vec<EarlierResponse> = earlier.collect();
    for lenience in [1.0f32, 1.6] {
        let reuse = Some(Reuse { lenience, responses: earlier.clone() });
        let second = GroupRequest { reuse, ..request(NUM_SAMPLES..2 * NUM_SAMPLES) };
        let samples = run_all(&mut engine_of(new), vec![second]).remove(0).samples;
        let mut counts = vec![0.0; VOCAB];
        samples.iter().for_each(|sample| counts[sample.token_ids[0] as usize] += 1.0);

        let l = f64::from(lenience);
        let kept: Vec<f64> = p_old.iter().zip(&p_new).map(|(old, new)| old.min(l * new)).collect();
        let share: f64 = kept.iter().sum();
        let predicted: Vec<f64> = kept.iter().zip(&p_new).map(|(kept, new)| kept + (1.0 - share) * new).collect();
        let num_reused = samples.iter().filter(|sample| sample.reused == [1]).count() as f64;
        let sigma = (share * (1.0 - share) / NUM_SAMPLES as f64).sqrt();
        assert!((num_reused / NUM_SAMPLES as f64 - share).abs() < 5.0 * sigma, "reused {num_reused}, share {share}");

        // Under its own law the statistic is about its degrees of freedom; against the policy's it grows as predicted.
        let (statistic, freedom) = chi_square(&counts, &predicted);
        assert!(statistic < freedom + 6.0 * (2.0 * freedom).sqrt(), "l = {l}: {statistic} of {freedom}");
        let (statistic, freedom) = chi_square(&counts, &p_new);
        assert!(statistic > freedom + 6.0 * (2.0 * freedom).sqrt(), "l = {l}: {statistic} of {freedom}");
        let (mean, deviation) = chi_square_under(&predicted, &p_new);
        assert!((statistic - mean).abs() < 5.0 * deviation, "l = {l}: {statistic}, predicted {mean} +- {deviation}");
    }
}

/// Sampling without reuse passes the same test that lenient replay fails.
#[test]
fn plain_draws_follow_the_policy() {
    let new = Model::llama(6);
    let samples = run_all(&mut engine_of(new), vec![request(0..NUM_SAMPLES)]).remove(0).samples;
    let mut counts = vec![0.0; VOCAB];
    samples.iter().for_each(|sample| counts[sample.token_ids[0] as usize] += 1.0);
    let (statistic, freedom) = chi_square(&counts, &law(new));
    assert!(statistic < freedom + 6.0 * (2.0 * freedom).sqrt(), "{statistic} of {freedom}");
}

#[test]
fn unchanged_weights_reuse_everything_at_l_1() {
    let model = Model::llama(5);
    let mut first = request(0..40);
    first.sampling.max_new_tokens = 25;
    let said = run_all(&mut engine_of(model), vec![first.clone()]).remove(0);
    let responses = said.samples.iter().map(|sample| EarlierResponse {
        token_ids: sample.token_ids.clone(),
        log_probs: sample.log_probs.clone(),
        policy_versions: sample.policy_versions.clone(),
    });
    let reuse = Some(Reuse { lenience: 1.0, responses: responses.collect() });
    let second = GroupRequest { reuse, seeds: (100..140).collect(), ..first };
    let again = run_all(&mut engine_of(model), vec![second]).remove(0);
    for (old, new) in said.samples.iter().zip(&again.samples) {
        assert_eq!((&new.token_ids, &new.log_probs), (&old.token_ids, &old.log_probs));
        assert!(new.reused.iter().all(|flag| *flag == 1));
    }
}
