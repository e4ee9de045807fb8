//! Messages of models with a scalar head, and of distillation.

use super::{ConvertError, required};
use crate::grpc::v1;
use crate::{Backbone, DistillSpec, PreferencePair, ScalarModelSpec, ScalarReport, ScalarRole};

impl From<ScalarModelSpec> for v1::ScalarModelSpec {
    fn from(spec: ScalarModelSpec) -> Self {
        let role = match spec.role {
            ScalarRole::Critic => v1::ScalarRole::Critic,
            ScalarRole::RewardModel => v1::ScalarRole::RewardModel,
        };
        let backbone = match spec.backbone {
            Backbone::Policy => v1::Backbone::Policy,
            Backbone::RewardModel => v1::Backbone::RewardModel,
            Backbone::Shared => v1::Backbone::Shared,
        };
        v1::ScalarModelSpec {
            role: role.into(),
            loss_json: spec.loss_json,
            optimizer: Some(spec.optimizer.into()),
            backbone: backbone.into(),
            seed: spec.seed,
        }
    }
}

impl TryFrom<v1::ScalarModelSpec> for ScalarModelSpec {
    type Error = ConvertError;

    fn try_from(spec: v1::ScalarModelSpec) -> Result<Self, ConvertError> {
        let role = match v1::ScalarRole::try_from(spec.role) {
            Ok(v1::ScalarRole::Critic) => ScalarRole::Critic,
            Ok(v1::ScalarRole::RewardModel) => ScalarRole::RewardModel,
            _ => return Err(ConvertError::new("role", "a role of ScalarRole", spec.role)),
        };
        let backbone = match v1::Backbone::try_from(spec.backbone) {
            Ok(v1::Backbone::Policy) => Backbone::Policy,
            Ok(v1::Backbone::RewardModel) => Backbone::RewardModel,
            Ok(v1::Backbone::Shared) => Backbone::Shared,
            _ => return Err(ConvertError::new("backbone", "a value of Backbone", spec.backbone)),
        };
        let optimizer = required(spec.optimizer, "optimizer")?.into();
        Ok(ScalarModelSpec { role, loss_json: spec.loss_json, optimizer, backbone, seed: spec.seed })
    }
}

impl From<ScalarReport> for v1::ScalarReport {
    fn from(report: ScalarReport) -> Self {
        v1::ScalarReport {
            loss: report.loss,
            grad_norm: report.grad_norm,
            num_tokens: report.num_tokens,
            metrics: super::metrics_to_wire(report.metrics),
        }
    }
}

impl From<v1::ScalarReport> for ScalarReport {
    fn from(report: v1::ScalarReport) -> Self {
        ScalarReport {
            loss: report.loss,
            grad_norm: report.grad_norm,
            num_tokens: report.num_tokens,
            metrics: report.metrics.into_iter().map(|m| (m.name, m.value)).collect(),
        }
    }
}

impl From<PreferencePair> for v1::PreferencePair {
    fn from(pair: PreferencePair) -> Self {
        v1::PreferencePair {
            chosen: Some(pair.chosen.into()),
            rejected: Some(pair.rejected.into()),
            margin: pair.margin,
        }
    }
}

impl TryFrom<v1::PreferencePair> for PreferencePair {
    type Error = ConvertError;

    fn try_from(pair: v1::PreferencePair) -> Result<Self, ConvertError> {
        let (chosen, rejected) = (required(pair.chosen, "chosen")?.into(), required(pair.rejected, "rejected")?.into());
        Ok(PreferencePair { chosen, rejected, margin: pair.margin })
    }
}

/// The wire carries text: a path that is not UTF-8 is carried with replacement characters, and not found.
impl From<DistillSpec> for v1::DistillSpec {
    fn from(spec: DistillSpec) -> Self {
        v1::DistillSpec { teacher: spec.teacher.to_string_lossy().into_owned(), loss_json: spec.loss_json }
    }
}

impl From<v1::DistillSpec> for DistillSpec {
    fn from(spec: v1::DistillSpec) -> Self {
        DistillSpec { teacher: spec.teacher.into(), loss_json: spec.loss_json }
    }
}
