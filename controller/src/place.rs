//! Where the run is: the step and phase that errors, logs and observers are told.

use crate::control::RunControl;
use crate::{Error, Phase, PhaseObserver};
use std::sync::Arc;
use temper_proto::{ServiceError, ServiceResult};

/// One line of work of a run: the loop itself, or the generation of a batch beside it.
#[derive(Clone)]
pub(crate) struct Place {
    /// The step that is under way, or was last.
    pub(crate) step: u64,
    phase: Phase,
    observer: Arc<dyn PhaseObserver>,
    /// Shows the phase to whoever controls the run; only the loop has it.
    control: Option<Arc<RunControl>>,
}

impl Place {
    pub(crate) fn new(control: Arc<RunControl>) -> Self {
        Place { step: 0, phase: Phase::BeginStage, observer: Arc::new(()), control: Some(control) }
    }

    pub(crate) fn observe(&mut self, observer: Arc<dyn PhaseObserver>) {
        self.observer = observer;
    }

    /// The same place for work beside the loop's.
    pub(crate) fn beside(&self) -> Self {
        Place { control: None, ..self.clone() }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        tracing::debug!(step = self.step, phase = phase.name(), "phase");
        self.control.iter().for_each(|control| control.enter(phase.name()));
        self.observer.enter(self.step, phase);
    }

    /// Say in which step and phase a service failed.
    pub(crate) fn attribute<T>(&self, result: ServiceResult<T>) -> Result<T, Error> {
        result.map_err(|source| self.error(source))
    }

    pub(crate) fn error(&self, source: ServiceError) -> Error {
        self.error_in(self.phase, source)
    }

    /// The same of work that belongs to another phase.
    pub(crate) fn error_in(&self, phase: Phase, source: ServiceError) -> Error {
        Error::Service { step: self.step, phase: phase.name(), source: Box::new(source) }
    }
}
