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

same_fields!(RunStatus, v1::StatusResponse, s => { run, stage, step, num_steps, phase, metrics_json, error }
    to { state: v1::RunState::from(s.state).into(), version: Some(version_to_wire(s.version)) }
    try_from { state: phase_from_wire(s.state)?, version: version_from_wire(s.version)? });

same_fields!(WorkerStatus, v1::WorkerStatus, w => { name, role, address, incarnation, state, last_error }
    to { process_id: w.process_id.into() }
    from { process_id: u32::try_from(w.process_id).unwrap_or_default() });
