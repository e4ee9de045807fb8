//! Messages of training. What grows with a batch is a header and its rows.

use super::{ConvertError, count, required};
use crate::grpc::v1;
use crate::{GlobalCounts, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, UpdateReport};
use std::collections::BTreeMap;

/// Metrics in the order of their names.
pub(crate) fn metrics_to_wire(metrics: BTreeMap<String, f64>) -> Vec<v1::Metric> {
    metrics.into_iter().map(|(name, value)| v1::Metric { name, value }).collect()
}

same_fields!(OptimizerConfig, v1::OptimizerConfig, c => {
    learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm
});

same_fields!(StageSpec, v1::StageSpec, spec => { name, objective_json, needs_reference, recompute_activations }
to {
    optimizer: Some(spec.optimizer.into()),
    max_micro_batch_tokens: spec.max_micro_batch_tokens as u64,
}
try_from {
    optimizer: required(spec.optimizer, "optimizer")?.into(),
    max_micro_batch_tokens: count(spec.max_micro_batch_tokens, "max_micro_batch_tokens")?,
});

same_fields!(GlobalCounts, v1::GlobalCounts, g => { num_tokens, num_sequences, num_rows, loss_scale_factor });

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

same_fields!(TokenSequence, v1::TokenSequence, s => { prompt_token_ids, response_token_ids, response_mask });

same_fields!(TrainRow, v1::TrainRow, row => {
        old_log_probs, rollout_log_probs, ref_log_probs, advantages, returns, values, rollout_weights
    }
    to { sequence: Some(row.sequence.into()) }
    try_from { sequence: required(row.sequence, "row.sequence")?.into() });

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
        let header = v1::UpdateHeader {
            global: Some(self.global.into()),
            temperature: self.temperature,
            learning_rate: self.learning_rate,
        };
        let rows = self.rows.into_iter().map(|row| Part::Row(row.into()));
        std::iter::once(Part::Header(header)).chain(rows).map(|part| v1::UpdateRequest { part: Some(part) })
    }

    /// The batch of a stream's header and rows.
    pub(crate) fn from_parts(header: &v1::UpdateHeader, rows: Vec<TrainRow>) -> Result<Self, ConvertError> {
        let global = required(header.global, "header.global")?.into();
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
