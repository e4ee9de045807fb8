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
        }
        let m = &self.preference;
        if m.num_pairs > 0.0 {
            let (chosen, rejected) = (m.per_pair(m.chosen_reward_sum), m.per_pair(m.rejected_reward_sum));
            named.extend([
                ("rewards/chosen", chosen),
                ("rewards/rejected", rejected),
                ("rewards/accuracies", m.accuracy()),
                ("rewards/margins", chosen - rejected),
                ("logps/chosen", m.per_pair(m.chosen_log_prob_sum)),
                ("logps/rejected", m.per_pair(m.rejected_log_prob_sum)),
                ("nll_loss", m.nll_loss),
            ]);
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
