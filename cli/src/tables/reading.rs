//! One reader of a table: rows as they are taken, steps as they are committed.

use super::dataset::{Batches, Dataset};
use super::{Mark, Shared};
use arrow_array::RecordBatch;
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{ServiceResult, TableRequest};

/// How often new steps are looked for.
const TICK: Duration = Duration::from_millis(200);

/// The rows that a request asks for. Each step comes once, also where a resume writes it again.
pub(super) struct Reading {
    shared: Arc<Shared>,
    dataset: Dataset,
    request: TableRequest,
    /// The first step that has not been read.
    next: u64,
    last: u64,
    batches: Batches,
    /// What there was at the last look.
    mark: Option<Mark>,
    /// True where nothing more can come of what was asked for.
    is_complete: bool,
    is_over: bool,
}

impl Reading {
    pub(super) fn new(shared: Arc<Shared>, dataset: Dataset, request: TableRequest) -> Self {
        let (next, last) = request.range();
        let batches: Batches = Box::new(std::iter::empty());
        Reading { shared, dataset, request, next, last, batches, mark: None, is_complete: false, is_over: false }
    }

    /// Begin with the steps that have come since the last look; false where there are none.
    fn look(&mut self) -> ServiceResult<bool> {
        let mark = self.shared.mark(self.dataset, &self.request)?;
        if self.mark.as_ref() == Some(&mark) {
            return Ok(false);
        }
        let mut steps = self.shared.steps(self.dataset, &self.request)?;
        self.mark = Some(mark);
        let is_complete = steps.last().is_some_and(|newest| *newest >= self.last);
        steps.retain(|step| (self.next..=self.last).contains(step));
        self.is_complete = is_complete;
        match steps.last() {
            Some(newest) => self.next = newest + 1,
            None => return Ok(false),
        }
        self.batches = self.dataset.open(&self.shared.run_dir, steps)?;
        Ok(true)
    }

    /// `None` at the end.
    fn advance(&mut self) -> ServiceResult<Option<Option<RecordBatch>>> {
        if let Some(batch) = self.batches.next() {
            return batch.map(|batch| Some(Some(batch)));
        }
        // Asked before the look: what was committed before the end is seen by the look after it.
        let is_last_look = self.shared.has_ended();
        let has_looked = self.mark.is_some();
        if has_looked && (self.is_complete || !self.request.follow) {
            return Ok(None);
        }
        if !self.look()? {
            if is_last_look || !self.request.follow {
                return Ok(None);
            }
            self.shared.wait(TICK);
        }
        Ok(Some(None))
    }
}

impl Iterator for Reading {
    type Item = ServiceResult<Option<RecordBatch>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let item = self.advance().transpose();
        self.is_over = !matches!(item, Some(Ok(_)));
        item
    }
}
