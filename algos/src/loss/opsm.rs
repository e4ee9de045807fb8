//! Off-policy sequence masking: rows that drifted too far keep only what pulls them up.
//!
//! A token is left out where its advantage is below 0 and the mean `old - log_prob` of its row is above a bound. Its
//! loss is 0; the denominators stay.
//!
//! # Source
//! slime's OPSM.

use crate::TokenBatch;
use crate::loss::{PolicyLossInput, sequence_kl};

/// 1 for the tokens that stay and 0 for the others, `[T]`.
pub(crate) fn kept(batch: &TokenBatch, arrays: OpsmInput<'_>, delta: f64) -> Vec<f64> {
    let mut kept = vec![1.0; batch.num_slots()];
    let drift = sequence_kl(batch, arrays.log_probs, arrays.old_log_probs);
    for (row, range) in batch.rows().enumerate() {
        let drops = |t: &usize| arrays.advantages[*t] < 0.0 && drift[row] > delta;
        range.filter(drops).for_each(|t| kept[t] = 0.0);
    }
    kept
}

/// What the mask looks at; arrays are `[T]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OpsmInput<'a> {
    pub(crate) log_probs: &'a [f64],
    pub(crate) old_log_probs: &'a [f64],
    pub(crate) advantages: &'a [f64],
}

impl<'a> OpsmInput<'a> {
    pub(crate) fn of(input: &PolicyLossInput<'a>) -> Self {
        let PolicyLossInput { log_probs, old_log_probs, advantages, .. } = *input;
        OpsmInput { log_probs, old_log_probs, advantages }
    }
}

#[cfg(test)]
mod tests {
    use crate::{GlobalCounts, LossOutput, PolicyLossConfig, PolicyLossInput, TokenBatch, policy_loss};

    /// Two rows of two tokens: the second drifted by .4 on average.
    const LOG_PROBS: [f64; 4] = [-1.0, -2.0, -1.5, -0.5];
    const OLD: [f64; 4] = [-0.9, -2.1, -1.0, -0.2];
    const REFERENCE: [f64; 4] = [-1.2, -1.9, -1.4, -0.6];

    fn loss(config: &PolicyLossConfig, advantages: &[f64; 4]) -> LossOutput {
        let batch = TokenBatch::new(&[0, 2, 4], &[1; 4]).expect("two rows");
        let input = PolicyLossInput {
            batch,
            log_probs: &LOG_PROBS,
            old_log_probs: &OLD,
            advantages,
            ref_log_probs: Some(&REFERENCE),
            ..PolicyLossInput::default()
        };
        policy_loss(config, &input, &GlobalCounts::of(&batch, 2.0)).expect("a loss")
    }

    #[test]
    fn tokens_of_negative_advantage_leave_rows_that_drifted() {
        let masked = PolicyLossConfig { opsm_delta: Some(0.3), ..PolicyLossConfig::default() };
        let advantages = [-1.0, -1.0, -1.0, 2.0];
        let out = loss(&masked, &advantages);
        let expected = loss(&PolicyLossConfig::default(), &[-1.0, -1.0, 0.0, 2.0]);
        assert_eq!((out.loss, &out.d_log_probs), (expected.loss, &expected.d_log_probs));
        assert_eq!(out.metrics.num_opsm, Some(1.0));
        assert!(out.metrics.named().contains(&("opsm_clipfrac", 0.25)));
        let wide = loss(&PolicyLossConfig { opsm_delta: Some(0.5), ..masked }, &advantages);
        assert_eq!(wide.loss, loss(&PolicyLossConfig::default(), &advantages).loss);
    }

    #[test]
    fn the_unbiased_kl_has_its_value_and_the_gradient_of_the_reverse_one() {
        let plain = PolicyLossConfig { use_kl_loss: true, kl_loss_coef: 0.5, ..PolicyLossConfig::default() };
        let unbiased = PolicyLossConfig { unbiased_kl: true, ..plain.clone() };
        let (plain, unbiased) = (loss(&plain, &[0.0; 4]), loss(&unbiased, &[0.0; 4]));
        assert_eq!(unbiased.loss, plain.loss);
        for t in 0..4 {
            let expected = 0.5 * (LOG_PROBS[t] - OLD[t]).exp() * (LOG_PROBS[t] - REFERENCE[t]) / 4.0;
            assert!((unbiased.d_log_probs[t] - expected).abs() < 1e-15, "{t}: {}", unbiased.d_log_probs[t]);
        }
    }

    #[test]
    fn settings_of_the_other_loss_are_named_instead() {
        let trl = PolicyLossConfig { loss_mode: crate::LossMode::Trl, ..PolicyLossConfig::default() };
        for (config, says) in [
            (PolicyLossConfig { opsm_delta: Some(0.1), ..trl.clone() }, "trl.off_policy_mask_threshold"),
            (PolicyLossConfig { unbiased_kl: true, ..trl.clone() }, "trl.use_bias_correction_kl"),
            (PolicyLossConfig { opsm_delta: Some(-0.1), ..PolicyLossConfig::default() }, "a number from 0"),
        ] {
            let error = config.validate().expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
