//! What is written while a run goes on: events, metrics, trajectories. One owner for all three.

use crate::control::RunControl;
use crate::{Clock, Error, RunDir};
use serde_json::Value;
use std::sync::Arc;
use temper_data::trajectories::DatasetWriter;
use temper_telemetry::{EventLog, MetricsLog, MetricsRow};
use temper_types::{Sample, Step, WeightFormat};

/// Adapts the run's clock to the event log's.
pub(crate) struct EventClock(pub(crate) Arc<dyn Clock>);

impl temper_telemetry::Clock for EventClock {
    fn unix_ms(&self) -> u64 {
        self.0.unix().as_millis() as u64
    }
}

/// The three records of a run.
pub(crate) struct Record {
    events: EventLog,
    metrics: MetricsLog,
    dataset: DatasetWriter,
    control: Arc<RunControl>,
}

impl Record {
    pub(crate) fn open(
        dir: &RunDir,
        (run, weights): (&str, WeightFormat),
        (clock, control): (&Arc<dyn Clock>, &Arc<RunControl>),
    ) -> Result<Self, Error> {
        let dataset = DatasetWriter::open(&dir.rollouts(), run)?;
        if let Some(note) = weights.dataset_note() {
            dataset.describe(note)?;
        }
        Ok(Record {
            events: EventLog::open(&dir.events(), Arc::new(EventClock(Arc::clone(clock))))?,
            metrics: MetricsLog::open(&dir.metrics())?,
            dataset,
            control: Arc::clone(control),
        })
    }

    /// Forget what lies after `step`: resume writes it again.
    pub(crate) fn truncate_after(&mut self, step: u64) -> Result<(), Error> {
        self.metrics.truncate_after(step)?;
        self.dataset.truncate_after(Step(step))?;
        Ok(())
    }

    pub(crate) fn event(&self, name: &str, fields: &[(&str, Value)]) -> Result<(), Error> {
        self.events.record(name, fields)?;
        let object: serde_json::Map<String, Value> = fields.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
        self.control.publish(name, Value::Object(object).to_string());
        Ok(())
    }

    pub(crate) fn metrics(&mut self, row: &MetricsRow) -> Result<(), Error> {
        Ok(self.metrics.append(row)?)
    }

    pub(crate) fn samples(&mut self, step: u64, samples: &[Sample]) -> Result<(), Error> {
        Ok(self.dataset.write_step(Step(step), samples)?)
    }

    /// Make metrics and events durable: a checkpoint that is on disk implies the rows before it are.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        self.metrics.sync()?;
        Ok(self.events.sync()?)
    }
}
