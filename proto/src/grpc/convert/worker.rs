//! Messages of registration.

use super::ConvertError;
use crate::grpc::v1;
use crate::{Assignment, WorkerHello, WorkerId, WorkerRole};
use std::time::Duration;

impl From<WorkerHello> for v1::RegisterRequest {
    fn from(hello: WorkerHello) -> Self {
        let role = match hello.role {
            WorkerRole::Rollout => v1::WorkerRole::Rollout,
            WorkerRole::Reward => v1::WorkerRole::Reward,
            WorkerRole::Trainer => v1::WorkerRole::Trainer,
        };
        v1::RegisterRequest {
            role: role.into(),
            name: hello.name,
            address: hello.address,
            process_id: hello.process_id.into(),
            build: hello.build,
            collective_address: hello.collective_address,
        }
    }
}

impl TryFrom<v1::RegisterRequest> for WorkerHello {
    type Error = ConvertError;

    fn try_from(request: v1::RegisterRequest) -> Result<Self, ConvertError> {
        let role = match v1::WorkerRole::try_from(request.role) {
            Ok(v1::WorkerRole::Rollout) => WorkerRole::Rollout,
            Ok(v1::WorkerRole::Reward) => WorkerRole::Reward,
            Ok(v1::WorkerRole::Trainer) => WorkerRole::Trainer,
            _ => return Err(ConvertError::new("role", "a role of WorkerRole", request.role)),
        };
        let process_id = u32::try_from(request.process_id)
            .map_err(|_| ConvertError::new("process_id", "an id of a process", request.process_id))?;
        Ok(WorkerHello {
            role,
            name: request.name,
            address: request.address,
            process_id,
            build: request.build,
            collective_address: request.collective_address,
        })
    }
}

impl From<Assignment> for v1::RegisterResponse {
    fn from(a: Assignment) -> Self {
        v1::RegisterResponse {
            name: a.id.name,
            incarnation: a.id.incarnation,
            lease_millis: u64::try_from(a.lease.as_millis()).unwrap_or(u64::MAX),
            recipe: a.recipe,
            model_dir: a.model_dir,
            run_dir: a.run_dir,
            rank: a.rank,
            world: a.world,
            weight_sources: a.weight_sources,
        }
    }
}

impl From<v1::RegisterResponse> for Assignment {
    fn from(r: v1::RegisterResponse) -> Self {
        Assignment {
            id: WorkerId { name: r.name, incarnation: r.incarnation },
            lease: Duration::from_millis(r.lease_millis),
            recipe: r.recipe,
            model_dir: r.model_dir,
            run_dir: r.run_dir,
            rank: r.rank,
            world: r.world,
            weight_sources: r.weight_sources,
        }
    }
}
