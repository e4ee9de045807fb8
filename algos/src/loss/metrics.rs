//! What a loss reports, as sums that add up over micro-batches and ranks.

use crate::preference::PreferenceMetrics;

/// Sums over one call; add them up, then ask for means.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossMetrics {
    /// Number of unmasked tokens.
    pub num_tokens: f64,
    /// Number of tokens in the policy-gradient part: fewer than `num_tokens` where bypass mode rejects some.
    pub num_pg_tokens: f64,
    /// The policy-gradient part of the loss, already divided by the global counts.
    pub pg_loss: f64,
    /// The KL part before its coefficient, already divided by the global counts.
    pub kl_loss: f64,
    /// The aggregated entropy before its coefficient, already divided by the global counts.
    pub entropy_agg: f64,
    /// Number of tokens at which a clip bound holds.
    pub num_clipped: f64,
    /// Number of tokens at which the dual clip holds.
    pub num_clipped_lower: f64,
    /// Number of tokens that off-policy sequence masking left out, where it is on.
    pub num_opsm: Option<f64>,
    /// Sum of `old_log_prob - log_prob` (kl_cov: of its absolute value).
    pub ppo_kl_sum: f64,
    /// Sum of the entropies of the unmasked tokens.
    pub entropy_sum: f64,
    /// Largest `|log_prob - old_log_prob|`; combines by maximum.
    pub log_ratio_max: f64,
    /// Sums over pairs, where the loss is one over preferences.
    pub preference: PreferenceMetrics,
}

impl LossMetrics {
    /// Add the metrics of another part of the same mini-batch.
    pub fn merge(&mut self, other: &LossMetrics) {
        self.num_tokens += other.num_tokens;
        self.num_pg_tokens += other.num_pg_tokens;
        self.pg_loss += other.pg_loss;
        self.kl_loss += other.kl_loss;
        self.entropy_agg += other.entropy_agg;
        self.num_clipped += other.num_clipped;
        self.num_clipped_lower += other.num_clipped_lower;
        self.num_opsm = self.num_opsm.map_or(other.num_opsm, |n| Some(n + other.num_opsm.unwrap_or(0.0)));
        self.ppo_kl_sum += other.ppo_kl_sum;
        self.entropy_sum += other.entropy_sum;
        self.preference.merge(&other.preference);
        self.log_ratio_max = self.log_ratio_max.max(other.log_ratio_max);
    }

    /// What there is to report, by name: the policy's numbers where it has tokens, the preferences' where it has pairs.
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let mut named = Vec::new();
        if self.num_pg_tokens > 0.0 {
            named.extend([
                ("pg_loss", self.pg_loss),
                ("pg_clipfrac", self.pg_clipfrac()),
                ("pg_clipfrac_lower", self.pg_clipfrac_lower()),
                ("ppo_kl", self.ppo_kl()),
                ("kl_loss", self.kl_loss),
                ("log_ratio_max", self.log_ratio_max),
            ]);
            named.extend(self.num_opsm.map(|n| ("opsm_clipfrac", self.per_pg_token(n))));
        }
        let m = &self.preference;
        if m.num_pairs > 0.0 {
            let (chosen, rejected) = (m.chosen(), m.rejected());
            named.extend(chosen.iter().flat_map(|(r, lp)| [("rewards/chosen", *r), ("logps/chosen", *lp)]));
            named.extend(rejected.iter().flat_map(|(r, lp)| [("rewards/rejected", *r), ("logps/rejected", *lp)]));
            named.extend(chosen.zip(rejected).map(|(c, r)| ("rewards/margins", c.0 - r.0)));
            named.extend([("rewards/accuracies", m.accuracy()), ("nll_loss", m.nll_loss)]);
        }
        named
    }

    fn per_pg_token(&self, sum: f64) -> f64 {
        if self.num_pg_tokens > 0.0 { sum / self.num_pg_tokens } else { 0.0 }
    }

    /// Share of tokens at which a clip bound holds.
    pub fn pg_clipfrac(&self) -> f64 {
        self.per_pg_token(self.num_clipped)
    }

    /// Share of tokens at which the dual clip holds.
    pub fn pg_clipfrac_lower(&self) -> f64 {
        self.per_pg_token(self.num_clipped_lower)
    }

    /// Mean of `old_log_prob - log_prob`: an estimate of KL(old || policy).
    pub fn ppo_kl(&self) -> f64 {
        self.per_pg_token(self.ppo_kl_sum)
    }

    /// Mean entropy per token.
    pub fn entropy(&self) -> f64 {
        if self.num_tokens > 0.0 { self.entropy_sum / self.num_tokens } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(rows: &[(bool, f64)]) -> Vec<(&'static str, f64)> {
        let mut metrics = LossMetrics::default();
        rows.iter().for_each(|(desirable, reward)| metrics.preference.add_labelled(*desirable, *reward, 2.0 * reward));
        metrics.named()
    }

    fn find(named: &[(&'static str, f64)], name: &str) -> Option<f64> {
        named.iter().find(|(n, _)| *n == name).map(|(_, value)| *value)
    }

    #[test]
    fn the_sides_of_labelled_rows_are_averaged_one_by_one() {
        let three_and_one = named(&[(true, 1.0), (true, 2.0), (true, 6.0), (false, -4.0)]);
        for (name, expected) in [
            ("rewards/chosen", 3.0),
            ("logps/chosen", 6.0),
            ("rewards/rejected", -4.0),
            ("logps/rejected", -8.0),
            ("rewards/margins", 7.0),
            ("rewards/accuracies", 1.0),
        ] {
            assert_eq!(find(&three_and_one, name), Some(expected), "{name}");
        }
        let one_side = named(&[(true, 1.0), (true, 3.0)]);
        assert_eq!(find(&one_side, "rewards/chosen"), Some(2.0));
        assert_eq!(find(&one_side, "rewards/rejected"), None, "there is no such row");
        assert_eq!(find(&one_side, "rewards/margins"), None, "there is nothing to compare with");
    }
}
