//! The reports of a correction under verl's names.

use super::{CorrectionOutput, OffPolicyMetrics, OptionReport, RejectionReport, WeightMetrics};

impl WeightMetrics {
    /// `rollout_is_mean`, `rollout_is_eff_sample_size`, ...
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let mut metrics = vec![
            ("rollout_is_mean", self.mean),
            ("rollout_is_ratio_fraction_high", self.fraction_high),
            ("rollout_is_ratio_fraction_low", self.fraction_low),
            ("rollout_is_max", self.max),
            ("rollout_is_min", self.min),
            ("rollout_is_std", self.std),
            ("rollout_is_eff_sample_size", self.eff_sample_size),
            ("rollout_is_seq_mean", self.seq_mean),
            ("rollout_is_seq_std", self.seq_std),
            ("rollout_is_seq_max", self.seq_max),
            ("rollout_is_seq_min", self.seq_min),
            ("rollout_is_seq_max_deviation", self.seq_max_deviation),
            ("rollout_is_seq_fraction_high", self.seq_fraction_high),
            ("rollout_is_seq_fraction_low", self.seq_fraction_low),
        ];
        metrics.extend(self.oob_ratio.map(|v| ("rollout_is_oob_ratio", v)));
        metrics.extend(self.batch_norm_factor.map(|v| ("rollout_is_batch_norm_factor", v)));
        metrics
    }
}

impl RejectionReport {
    /// `rollout_rs_<option>_mean`, ..., `rollout_rs_masked_fraction`, ...
    pub fn named(&self) -> Vec<(String, f64)> {
        let mut metrics: Vec<(String, f64)> = self.options.iter().flat_map(option_metrics).collect();
        metrics.push(("rollout_rs_masked_fraction".to_owned(), self.masked_fraction));
        metrics.push(("rollout_rs_seq_masked_fraction".to_owned(), self.seq_masked_fraction));
        metrics
    }
}

fn option_metrics(o: &OptionReport) -> Vec<(String, f64)> {
    let mut metrics = vec![
        ("mean", o.mean),
        ("max", o.max),
        ("min", o.min),
        ("fraction_high", o.fraction_high),
        ("fraction_low", o.fraction_low),
        ("std", o.std),
        ("seq_mean", o.seq_mean),
        ("seq_std", o.seq_std),
        ("seq_max", o.seq_max),
        ("seq_min", o.seq_min),
        ("seq_max_deviation", o.seq_max_deviation),
        ("seq_fraction_high", o.seq_fraction_high),
        ("masked_fraction", o.masked_fraction),
        ("seq_masked_fraction", o.seq_masked_fraction),
    ];
    metrics.extend(o.seq_fraction_low.map(|v| ("seq_fraction_low", v)));
    metrics.into_iter().map(|(key, value)| (format!("rollout_rs_{}_{key}", o.option.name), value)).collect()
}

impl OffPolicyMetrics {
    /// `kl`, `k3_kl`, `ppl_ratio`, `chi2_token`, ...
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        vec![
            ("training_ppl", self.training_ppl),
            ("training_log_ppl", self.training_log_ppl),
            ("kl", self.kl),
            ("k3_kl", self.k3_kl),
            ("rollout_ppl", self.rollout_ppl),
            ("rollout_log_ppl", self.rollout_log_ppl),
            ("log_ppl_diff", self.log_ppl_diff),
            ("log_ppl_abs_diff", self.log_ppl_abs_diff),
            ("log_ppl_diff_max", self.log_ppl_diff_max),
            ("log_ppl_diff_min", self.log_ppl_diff_min),
            ("ppl_ratio", self.ppl_ratio),
            ("chi2_token", self.chi2_token),
            ("chi2_seq", self.chi2_seq),
        ]
    }
}

impl CorrectionOutput {
    /// Every report that there is.
    pub fn named(&self) -> Vec<(String, f64)> {
        let owned = |(name, value): (&str, f64)| (name.to_owned(), value);
        let mut metrics: Vec<(String, f64)> = self.off_policy.named().into_iter().map(owned).collect();
        metrics.extend(self.weight_metrics.iter().flat_map(|m| m.named()).map(owned));
        metrics.extend(self.rejection.iter().flat_map(|r| r.named()));
        metrics.extend(self.m2_masked_fraction.map(|share| ("m2_masked_fraction".to_owned(), share)));
        metrics
    }

    /// The same under the names of a step's metrics, `rollout_corr/...`.
    pub fn columns(&self) -> Vec<(String, f64)> {
        self.named().into_iter().map(|(name, value)| (format!("rollout_corr/{name}"), value)).collect()
    }
}
