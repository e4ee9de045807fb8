//! Messages of registration.

use super::ConvertError;
use crate::grpc::v1;
use crate::{Assignment, WorkerHello, WorkerId, WorkerRole};
use std::time::Duration;

fn role_to_wire(role: WorkerRole) -> v1::WorkerRole {
    match role {
        WorkerRole::Rollout => v1::WorkerRole::Rollout,
        WorkerRole::Reward => v1::WorkerRole::Reward,
        WorkerRole::Trainer => v1::WorkerRole::Trainer,
    }
}

fn role_from_wire(role: i32) -> Result<WorkerRole, ConvertError> {
    match v1::WorkerRole::try_from(role) {
        Ok(v1::WorkerRole::Rollout) => Ok(WorkerRole::Rollout),
        Ok(v1::WorkerRole::Reward) => Ok(WorkerRole::Reward),
        Ok(v1::WorkerRole::Trainer) => Ok(WorkerRole::Trainer),
        _ => Err(ConvertError::new("role", "a role of WorkerRole", role)),
    }
}

same_fields!(WorkerHello, v1::RegisterRequest, hello => { name, address, build, collective_address }
to { role: role_to_wire(hello.role).into(), process_id: hello.process_id.into() }
try_from {
    role: role_from_wire(hello.role)?,
    process_id: u32::try_from(hello.process_id)
        .map_err(|_| ConvertError::new("process_id", "an id of a process", hello.process_id))?,
});

same_fields!(Assignment, v1::RegisterResponse, a => { recipe, model_dir, run_dir, rank, world, weight_sources }
to {
    name: a.id.name,
    incarnation: a.id.incarnation,
    lease_millis: u64::try_from(a.lease.as_millis()).unwrap_or(u64::MAX),
}
from {
    id: WorkerId { name: a.name, incarnation: a.incarnation },
    lease: Duration::from_millis(a.lease_millis),
});
