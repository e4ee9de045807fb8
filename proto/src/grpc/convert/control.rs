//! Messages of control.

use super::{ConvertError, version_from_wire, version_to_wire};
use crate::grpc::v1;
use crate::{RunPhase, RunStatus, WorkerStatus};

impl From<RunPhase> for v1::RunState {
    fn from(phase: RunPhase) -> Self {
        match phase {
            RunPhase::Starting => v1::RunState::Starting,
            RunPhase::Running => v1::RunState::Running,
            RunPhase::Paused => v1::RunState::Paused,
            RunPhase::Draining => v1::RunState::Draining,
            RunPhase::Completed => v1::RunState::Completed,
            RunPhase::Failed => v1::RunState::Failed,
        }
    }
}

fn phase_from_wire(state: i32) -> Result<RunPhase, ConvertError> {
    match v1::RunState::try_from(state) {
        Ok(v1::RunState::Starting) => Ok(RunPhase::Starting),
        Ok(v1::RunState::Running) => Ok(RunPhase::Running),
        Ok(v1::RunState::Paused) => Ok(RunPhase::Paused),
        Ok(v1::RunState::Draining) => Ok(RunPhase::Draining),
        Ok(v1::RunState::Completed) => Ok(RunPhase::Completed),
        Ok(v1::RunState::Failed) => Ok(RunPhase::Failed),
        Ok(v1::RunState::Unspecified) | Err(_) => Err(ConvertError::new("state", "a state of RunState", state)),
    }
}

impl From<RunStatus> for v1::StatusResponse {
    fn from(s: RunStatus) -> Self {
        v1::StatusResponse {
            run: s.run,
            state: v1::RunState::from(s.state).into(),
            stage: s.stage,
            step: s.step,
            num_steps: s.num_steps,
            version: Some(version_to_wire(s.version)),
            phase: s.phase,
            metrics_json: s.metrics_json,
            error: s.error,
        }
    }
}

impl TryFrom<v1::StatusResponse> for RunStatus {
    type Error = ConvertError;

    fn try_from(s: v1::StatusResponse) -> Result<Self, ConvertError> {
        Ok(RunStatus {
            run: s.run,
            state: phase_from_wire(s.state)?,
            stage: s.stage,
            step: s.step,
            num_steps: s.num_steps,
            version: version_from_wire(s.version)?,
            phase: s.phase,
            metrics_json: s.metrics_json,
            error: s.error,
        })
    }
}

impl From<WorkerStatus> for v1::WorkerStatus {
    fn from(w: WorkerStatus) -> Self {
        v1::WorkerStatus {
            name: w.name,
            role: w.role,
            address: w.address,
            incarnation: w.incarnation,
            state: w.state,
            process_id: w.process_id.into(),
            last_error: w.last_error,
        }
    }
}

impl From<v1::WorkerStatus> for WorkerStatus {
    fn from(w: v1::WorkerStatus) -> Self {
        WorkerStatus {
            name: w.name,
            role: w.role,
            address: w.address,
            incarnation: w.incarnation,
            state: w.state,
            process_id: u32::try_from(w.process_id).unwrap_or_default(),
            last_error: w.last_error,
        }
    }
}
