//! Lenient replay: whether a token of an earlier response is taken again ([`temper_proto::Reuse`]).
//!
//! The question is asked at every slot that draws, as long as every token before was taken again: with the log-prob of
//! the earlier token under the weights of the day (a draw that allows no other), its log-prob when it was drawn, and
//! noise of its own. So the answer is a function of (weights, prompt, earlier response, parameters, seed) like any
//! draw, and drafts are verified against it like any draw: no budget, batch mate or preemption changes it.

use temper_proto::{EarlierResponse, Reuse};
use temper_tensor::Sampled;
use temper_types::{Philox, PolicyVersion};

/// Stream of the noise that decides about reuse; draws use stream 0.
const STREAM: u64 = 1;

/// The token at `index` of sample `sample_index`'s earlier response, where it has one.
pub(super) fn earlier_token(reuse: Option<&Reuse>, sample_index: usize, index: usize) -> Option<&u32> {
    reuse?.responses.get(sample_index)?.token_ids.get(index)
}

/// True where the token at `index` of `earlier`, whose draw of today is `scored`, is taken again: with probability
/// `min(1, lenience * p_new / p_old)`.
pub(super) fn is_taken(
    earlier: &EarlierResponse,
    (index, scored): (usize, &Sampled),
    lenience: f32,
    (seed, slot): (u64, u64),
) -> bool {
    let gain = f64::from(scored.log_prob) - f64::from(earlier.log_probs[index]);
    let ratio = f64::from(lenience) * gain.exp();
    // A token that is impossible today compares as not a number or 0 and is never taken.
    ratio >= 1.0 || Philox::new(seed).uniform(slot, STREAM) < ratio
}

/// The earlier token as if it were drawn now: with the log-prob it was drawn with.
pub(super) fn as_drawn(earlier: &EarlierResponse, index: usize) -> Sampled {
    let log_prob = earlier.log_probs[index];
    Sampled { token_id: earlier.token_ids[index], log_prob, sampled_log_prob: log_prob, surviving_mass: 1.0 }
}

/// The version that drew the token at `index`; that of today where it is not known.
pub(super) fn version_of(earlier: &EarlierResponse, index: usize, today: PolicyVersion) -> PolicyVersion {
    let mut end = 0;
    let mut runs = earlier.policy_versions.iter();
    let run = runs.find(|(_, num_tokens)| {
        end += *num_tokens as usize;
        index < end
    });
    run.map_or(today, |(version, _)| *version)
}

/// What is wrong with `reuse` for a group of `num_samples` samples, if anything.
pub(super) fn problem(reuse: &Reuse, num_samples: usize) -> Option<String> {
    if !(reuse.lenience > 0.0 && reuse.lenience.is_finite()) {
        return Some(format!("reuse: lenience = {} is out of range: expected more than 0", reuse.lenience));
    }
    if reuse.responses.len() != num_samples {
        let found = reuse.responses.len();
        return Some(format!("reuse: {found} earlier responses for {num_samples} seeds: expected one for each"));
    }
    let unequal = reuse.responses.iter().position(|r| r.token_ids.len() != r.log_probs.len())?;
    let EarlierResponse { token_ids, log_probs, .. } = &reuse.responses[unequal];
    Some(format!(
        "reuse: earlier response {unequal} has {} tokens and {} log-probs: expected as many",
        token_ids.len(),
        log_probs.len()
    ))
}
