//! Messages of training. What grows with a batch is a header and its rows.

use super::{ConvertError, count, required};
use crate::grpc::v1;
use crate::{GlobalCounts, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, UpdateReport};
use std::collections::BTreeMap;

/// Metrics in the order of their names.
pub(crate) fn metrics_to_wire(metrics: BTreeMap<String, f64>) -> Vec<v1::Metric> {
    metrics.into_iter().map(|(name, value)| v1::Metric { name, value }).collect()
}

impl From<OptimizerConfig> for v1::OptimizerConfig {
    fn from(c: OptimizerConfig) -> Self {
        v1::OptimizerConfig {
            learning_rate: c.learning_rate,
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
            weight_decay: c.weight_decay,
            max_grad_norm: c.max_grad_norm,
        }
    }
}

impl From<v1::OptimizerConfig> for OptimizerConfig {
    fn from(c: v1::OptimizerConfig) -> Self {
        OptimizerConfig {
            learning_rate: c.learning_rate,
            beta1: c.beta1,
            beta2: c.beta2,
            eps: c.eps,
            weight_decay: c.weight_decay,
            max_grad_norm: c.max_grad_norm,
        }
    }
}

impl From<StageSpec> for v1::StageSpec {
    fn from(spec: StageSpec) -> Self {
        v1::StageSpec {
            name: spec.name,
            objective_json: spec.objective_json,
            optimizer: Some(spec.optimizer.into()),
            needs_reference: spec.needs_reference,
            max_micro_batch_tokens: spec.max_micro_batch_tokens as u64,
            recompute_activations: spec.recompute_activations,
        }
    }
}

impl TryFrom<v1::StageSpec> for StageSpec {
    type Error = ConvertError;

    fn try_from(spec: v1::StageSpec) -> Result<Self, ConvertError> {
        Ok(StageSpec {
            name: spec.name,
            objective_json: spec.objective_json,
            optimizer: required(spec.optimizer, "optimizer")?.into(),
            needs_reference: spec.needs_reference,
            max_micro_batch_tokens: count(spec.max_micro_batch_tokens, "max_micro_batch_tokens")?,
            recompute_activations: spec.recompute_activations,
        })
    }
}

impl From<PolicyRole> for v1::PolicyRole {
    fn from(role: PolicyRole) -> Self {
        match role {
            PolicyRole::Policy => v1::PolicyRole::Policy,
            PolicyRole::Reference => v1::PolicyRole::Reference,
        }
    }
}

impl v1::LogProbsHeader {
    /// Whose log-probs are asked for.
    pub(crate) fn policy_role(&self) -> Result<PolicyRole, ConvertError> {
        match v1::PolicyRole::try_from(self.role) {
            Ok(v1::PolicyRole::Policy) => Ok(PolicyRole::Policy),
            Ok(v1::PolicyRole::Reference) => Ok(PolicyRole::Reference),
            _ => Err(ConvertError::new("role", "a role of PolicyRole", self.role)),
        }
    }
}

impl From<TokenSequence> for v1::TokenSequence {
    fn from(s: TokenSequence) -> Self {
        v1::TokenSequence {
            prompt_token_ids: s.prompt_token_ids,
            response_token_ids: s.response_token_ids,
            response_mask: s.response_mask,
        }
    }
}

impl From<v1::TokenSequence> for TokenSequence {
    fn from(s: v1::TokenSequence) -> Self {
        TokenSequence {
            prompt_token_ids: s.prompt_token_ids,
            response_token_ids: s.response_token_ids,
            response_mask: s.response_mask,
        }
    }
}

impl From<TrainRow> for v1::TrainRow {
    fn from(row: TrainRow) -> Self {
        v1::TrainRow {
            sequence: Some(row.sequence.into()),
            old_log_probs: row.old_log_probs,
            rollout_log_probs: row.rollout_log_probs,
            ref_log_probs: row.ref_log_probs,
            advantages: row.advantages,
            returns: row.returns,
            values: row.values,
            rollout_weights: row.rollout_weights,
        }
    }
}

impl TryFrom<v1::TrainRow> for TrainRow {
    type Error = ConvertError;

    fn try_from(row: v1::TrainRow) -> Result<Self, ConvertError> {
        Ok(TrainRow {
            sequence: required(row.sequence, "row.sequence")?.into(),
            old_log_probs: row.old_log_probs,
            rollout_log_probs: row.rollout_log_probs,
            ref_log_probs: row.ref_log_probs,
            advantages: row.advantages,
            returns: row.returns,
            values: row.values,
            rollout_weights: row.rollout_weights,
        })
    }
}

/// Reads `header` parts and the rows that follow them.
pub(crate) struct PartReader<H, R> {
    header: Option<H>,
    rows: Vec<R>,
}

impl<H, R> PartReader<H, R> {
    pub(crate) fn new() -> Self {
        PartReader { header: None, rows: Vec::new() }
    }

    /// The header comes first, and once.
    pub(crate) fn header(&mut self, header: H) -> Result<(), ConvertError> {
        match self.header.replace(header) {
            None if self.rows.is_empty() => Ok(()),
            _ => Err(ConvertError::new("header", "one header before all rows", "a header after them")),
        }
    }

    pub(crate) fn row(&mut self, row: R) {
        self.rows.push(row);
    }

    pub(crate) fn finish(self) -> Result<(H, Vec<R>), ConvertError> {
        Ok((required(self.header, "header")?, self.rows))
    }
}

impl MiniBatch {
    /// The batch as the parts of a stream.
    pub(crate) fn into_parts(self) -> impl Iterator<Item = v1::UpdateRequest> + Send {
        use v1::update_request::Part;
        let g = self.global;
        let header = v1::UpdateHeader {
            global: Some(v1::GlobalCounts {
                num_tokens: g.num_tokens,
                num_sequences: g.num_sequences,
                num_rows: g.num_rows,
                loss_scale_factor: g.loss_scale_factor,
            }),
            temperature: self.temperature,
            learning_rate: self.learning_rate,
        };
        let rows = self.rows.into_iter().map(|row| Part::Row(row.into()));
        std::iter::once(Part::Header(header)).chain(rows).map(|part| v1::UpdateRequest { part: Some(part) })
    }

    /// The batch of a stream's header and rows.
    pub(crate) fn from_parts(header: &v1::UpdateHeader, rows: Vec<TrainRow>) -> Result<Self, ConvertError> {
        let g = required(header.global, "header.global")?;
        let global = GlobalCounts {
            num_tokens: g.num_tokens,
            num_sequences: g.num_sequences,
            num_rows: g.num_rows,
            loss_scale_factor: g.loss_scale_factor,
        };
        Ok(MiniBatch { rows, global, temperature: header.temperature, learning_rate: header.learning_rate })
    }
}

impl UpdateReport {
    /// The report and the log-probs of every row as the parts of a stream.
    pub(crate) fn into_parts(self) -> impl Iterator<Item = v1::UpdateResponse> + Send {
        use v1::update_response::Part;
        let report = v1::UpdateReport {
            loss: self.loss,
            grad_norm: self.grad_norm,
            entropy: self.entropy,
            num_tokens: self.num_tokens,
            metrics: metrics_to_wire(self.metrics),
        };
        let rows = self.log_probs.into_iter().map(|values| Part::LogProbs(v1::FloatArray { values }));
        std::iter::once(Part::Report(report)).chain(rows).map(|part| v1::UpdateResponse { part: Some(part) })
    }

    /// The report of a stream.
    pub(crate) fn from_parts(report: v1::UpdateReport, log_probs: Vec<Vec<f32>>) -> Self {
        UpdateReport {
            loss: report.loss,
            grad_norm: report.grad_norm,
            entropy: report.entropy,
            num_tokens: report.num_tokens,
            metrics: report.metrics.into_iter().map(|m| (m.name, m.value)).collect(),
            log_probs,
        }
    }
}
