//! What a loss reports, as sums that add up over micro-batches and ranks.

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
        self.log_ratio_max = self.log_ratio_max.max(other.log_ratio_max);
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
