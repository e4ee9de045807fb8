//! Messages of models with a scalar head, and of distillation.

use super::{ConvertError, required};
use crate::grpc::v1;
use crate::{Backbone, DistillSpec, PreferencePair, ScalarModelSpec, ScalarReport, ScalarRole};

fn role_to_wire(role: ScalarRole) -> v1::ScalarRole {
    match role {
        ScalarRole::Critic => v1::ScalarRole::Critic,
        ScalarRole::RewardModel => v1::ScalarRole::RewardModel,
    }
}

fn role_from_wire(role: i32) -> Result<ScalarRole, ConvertError> {
    match v1::ScalarRole::try_from(role) {
        Ok(v1::ScalarRole::Critic) => Ok(ScalarRole::Critic),
        Ok(v1::ScalarRole::RewardModel) => Ok(ScalarRole::RewardModel),
        _ => Err(ConvertError::new("role", "a role of ScalarRole", role)),
    }
}

fn backbone_to_wire(backbone: Backbone) -> v1::Backbone {
    match backbone {
        Backbone::Policy => v1::Backbone::Policy,
        Backbone::RewardModel => v1::Backbone::RewardModel,
        Backbone::Shared => v1::Backbone::Shared,
    }
}

fn backbone_from_wire(backbone: i32) -> Result<Backbone, ConvertError> {
    match v1::Backbone::try_from(backbone) {
        Ok(v1::Backbone::Policy) => Ok(Backbone::Policy),
        Ok(v1::Backbone::RewardModel) => Ok(Backbone::RewardModel),
        Ok(v1::Backbone::Shared) => Ok(Backbone::Shared),
        _ => Err(ConvertError::new("backbone", "a value of Backbone", backbone)),
    }
}

same_fields!(ScalarModelSpec, v1::ScalarModelSpec, spec => { loss_json, seed }
to {
    role: role_to_wire(spec.role).into(),
    optimizer: Some(spec.optimizer.into()),
    backbone: backbone_to_wire(spec.backbone).into(),
}
try_from {
    role: role_from_wire(spec.role)?,
    optimizer: required(spec.optimizer, "optimizer")?.into(),
    backbone: backbone_from_wire(spec.backbone)?,
});

same_fields!(ScalarReport, v1::ScalarReport, report => { loss, grad_norm, num_tokens }
    to { metrics: super::metrics_to_wire(report.metrics) }
    from { metrics: report.metrics.into_iter().map(|m| (m.name, m.value)).collect() });

same_fields!(PreferencePair, v1::PreferencePair, pair => { margin }
to { chosen: Some(pair.chosen.into()), rejected: Some(pair.rejected.into()) }
try_from {
    chosen: required(pair.chosen, "chosen")?.into(),
    rejected: required(pair.rejected, "rejected")?.into(),
});

// The wire carries text: a path that is not UTF-8 is carried with replacement characters, and not found.
same_fields!(DistillSpec, v1::DistillSpec, spec => { loss_json }
    to { teacher: spec.teacher.to_string_lossy().into_owned() }
    from { teacher: spec.teacher.into() });
