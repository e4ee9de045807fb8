//! The tables of a run, read from its directory for whoever fetches them while it goes on.
//!
//! What is served is committed: complete steps up to the last checkpoint, which no resume takes back; later ones only
//! to whoever asks for them. Nothing here is asked by the loop, and it asks nothing of the loop: a reader costs the run
//! no more than its reads from disk.

mod dataset;
mod reading;

use self::dataset::Dataset;
use self::reading::Reading;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use temper_controller::last_checkpoint_step;
use temper_proto::{ServiceError, ServiceResult, TableInfo, TableReader, TableRequest, TableService};
use temper_types::{ErrorCode, did_you_mean};

/// How long readers have, once the run is over, to take what is left.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// The tables of the run in a directory.
pub struct RunTables {
    shared: Arc<Shared>,
}

/// What all readers of a run have in common.
struct Shared {
    run_dir: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    has_ended: bool,
    num_readers: usize,
}

/// What new steps come with.
#[derive(Debug, PartialEq, Eq)]
enum Mark {
    /// The last checkpoint.
    Checkpoint(u64),
    /// Length and time of the file that grows with the table; nothing where it is not there.
    File(Option<(u64, SystemTime)>),
}

/// A stream of rows that has not left yet.
struct InUse(Arc<Shared>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.lock().num_readers -= 1;
        self.0.changed.notify_all();
    }
}

impl RunTables {
    /// The tables of the run in `run_dir`.
    pub fn new(run_dir: &Path) -> Self {
        let (run_dir, state, changed) = (run_dir.to_owned(), Mutex::default(), Condvar::new());
        RunTables { shared: Arc::new(Shared { run_dir, state, changed }) }
    }

    /// The run is over: whoever follows it is given what is left, and a moment to take it.
    pub fn end(&self) {
        let deadline = Instant::now() + END_TIMEOUT;
        let mut state = self.shared.lock();
        state.has_ended = true;
        self.shared.changed.notify_all();
        while state.num_readers > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                tracing::warn!(readers = state.num_readers, "the run ends before its tables were read to their end");
                return;
            }
            state = self.shared.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn info(&self, dataset: Dataset, steps: Vec<u64>) -> ServiceResult<TableInfo> {
        let size = dataset.size(&self.shared.run_dir, &steps)?;
        Ok(TableInfo {
            dataset: dataset.name().to_owned(),
            schema: dataset.schema(),
            steps,
            num_rows: size.num_rows,
            num_bytes: size.num_bytes,
        })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True where the run is over.
    fn has_ended(&self) -> bool {
        self.lock().has_ended
    }

    /// Wait a moment, or until the run is over.
    fn wait(&self, moment: Duration) {
        let state = self.lock();
        if !state.has_ended {
            // What has changed is looked at by the caller.
            drop(self.changed.wait_timeout(state, moment).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Changes whenever there may be new steps of a table that `request` may see.
    fn mark(&self, dataset: Dataset, request: &TableRequest) -> ServiceResult<Mark> {
        match request.beyond_checkpoint {
            true => Ok(Mark::File(dataset.stamp(&self.run_dir))),
            false => Ok(Mark::Checkpoint(self.last_checkpoint()?)),
        }
    }

    fn last_checkpoint(&self) -> ServiceResult<u64> {
        let last = last_checkpoint_step(&self.run_dir.join("checkpoints")).map_err(unreadable)?;
        Ok(last.unwrap_or(0))
    }

    /// The steps of a table that `request` may see, ascending.
    fn steps(&self, dataset: Dataset, request: &TableRequest) -> ServiceResult<Vec<u64>> {
        let last = if request.beyond_checkpoint { u64::MAX } else { self.last_checkpoint()? };
        let mut steps = dataset.steps(&self.run_dir)?;
        steps.retain(|step| *step <= last);
        Ok(steps)
    }

    /// The steps that a request asks for. A step that is named must be there, but where new ones are waited for.
    fn asked(&self, dataset: Dataset, request: &TableRequest) -> ServiceResult<Vec<u64>> {
        let mut steps = self.steps(dataset, request)?;
        let (first, last) = request.range();
        let is_there = match request.step {
            Some(step) => steps.contains(&step),
            None => request.follow || request.from_step.is_none() || steps.last().is_some_and(|last| first <= *last),
        };
        if !is_there {
            return Err(self.no_such_step(dataset, (request, first), &steps));
        }
        steps.retain(|step| (first..=last).contains(step));
        Ok(steps)
    }

    fn no_such_step(&self, dataset: Dataset, (request, step): (&TableRequest, u64), steps: &[u64]) -> ServiceError {
        let there = match (steps.first(), steps.last()) {
            (Some(first), Some(last)) => format!("there are {} steps from {first} to {last}", steps.len()),
            _ => "there is none yet".to_owned(),
        };
        let all = TableRequest { beyond_checkpoint: true, ..request.clone() };
        let is_complete = self.steps(dataset, &all).is_ok_and(|steps| steps.contains(&step));
        let hint = match is_complete && !request.beyond_checkpoint {
            true => {
                "; it is complete but in no checkpoint: `beyond_checkpoint` gives it, as a resume may write it again"
            }
            false if request.beyond_checkpoint => "",
            false => " in the last checkpoint",
        };
        refused(format!("{} has no step {step}: {there}{hint}", dataset.name()))
    }
}

impl TableService for RunTables {
    fn tables(&self) -> ServiceResult<Vec<TableInfo>> {
        let info = |dataset: Dataset| {
            let steps = self.shared.steps(dataset, &TableRequest::of(dataset.name()))?;
            self.info(dataset, steps)
        };
        Dataset::ALL.into_iter().map(info).collect()
    }

    fn table(&self, request: &TableRequest) -> ServiceResult<TableInfo> {
        request.check()?;
        let dataset = find(&request.dataset)?;
        self.info(dataset, self.shared.asked(dataset, request)?)
    }

    fn read(&self, request: &TableRequest) -> ServiceResult<TableReader> {
        request.check()?;
        let dataset = find(&request.dataset)?;
        self.shared.asked(dataset, request)?;
        self.shared.lock().num_readers += 1;
        let in_use = Arc::new(InUse(Arc::clone(&self.shared)));
        let reading = Reading::new(Arc::clone(&self.shared), dataset, request.clone());
        Ok(TableReader { schema: dataset.schema(), batches: Box::new(reading), in_use })
    }
}

fn find(name: &str) -> ServiceResult<Dataset> {
    let names = || Dataset::ALL.into_iter().map(Dataset::name);
    Dataset::ALL.into_iter().find(|dataset| dataset.name() == name).ok_or_else(|| {
        let hint = did_you_mean(name, names()).map_or_else(String::new, |n| format!(" (`{n}`?)"));
        let known: Vec<&str> = names().collect();
        refused(format!("no dataset `{name}`{hint}: a run has {}", known.join(" and ")))
    })
}

fn refused(message: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(ErrorCode::InvalidArgument, "run", "read a table", message)
}

/// A file of the run that cannot be read.
fn unreadable(error: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(ErrorCode::DataLoss, "run", "read a table", error)
}

#[cfg(test)]
mod tests;
