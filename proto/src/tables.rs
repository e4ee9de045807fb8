//! Tables of a run that leave it while it is under way: trajectories, metrics.

use crate::{ServiceError, ServiceResult};
use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::sync::Arc;
use temper_types::ErrorCode;

/// Which rows of which table. On the wire it is JSON: the ticket, or the command of the descriptor, of Arrow Flight.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRequest {
    /// Name of the table.
    pub dataset: String,
    /// This step alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// From this step on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_step: Option<u64>,
    /// Up to this step, included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_step: Option<u64>,
    /// Go on with new steps as they are committed, until `to_step` or the end of the run.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub follow: bool,
    /// Also complete steps after the last checkpoint, which a resume writes again: equal but for timings and worker.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub beyond_checkpoint: bool,
}

/// What a request looks like, for errors.
const EXAMPLE: &str = r#"expected JSON such as {"dataset":"rollouts","from_step":3}"#;

impl TableRequest {
    /// All rows of the table `dataset`.
    pub fn of(dataset: impl Into<String>) -> Self {
        TableRequest { dataset: dataset.into(), ..TableRequest::default() }
    }

    /// Read a request.
    ///
    /// # Errors
    /// `InvalidArgument` where it is no JSON, has an unknown key, or keys that contradict each other.
    pub fn from_json(json: &[u8]) -> ServiceResult<Self> {
        let request: TableRequest = serde_json::from_slice(json).map_err(|e| invalid(format!("{e}: {EXAMPLE}")))?;
        request.check()?;
        Ok(request)
    }

    /// The request as it goes over the wire.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a request is plain data")
    }

    /// Check that the keys do not contradict each other.
    ///
    /// # Errors
    /// `InvalidArgument` with the keys.
    pub fn check(&self) -> ServiceResult<()> {
        if self.step.is_some() && (self.from_step.is_some() || self.to_step.is_some() || self.follow) {
            return Err(invalid("`step` is one step: it does not go with `from_step`, `to_step` or `follow`"));
        }
        match (self.from_step, self.to_step) {
            (Some(from), Some(to)) if from > to => Err(invalid(format!("from_step {from} is above to_step {to}"))),
            _ => Ok(()),
        }
    }

    /// First and last step that are asked for.
    pub fn range(&self) -> (u64, u64) {
        match self.step {
            Some(step) => (step, step),
            None => (self.from_step.unwrap_or(0), self.to_step.unwrap_or(u64::MAX)),
        }
    }
}

/// A request that cannot be answered, whenever it is made.
fn invalid(message: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(ErrorCode::InvalidArgument, "run", "read a table", message)
}

/// What a table has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableInfo {
    /// Its name.
    pub dataset: String,
    /// Its columns.
    pub schema: SchemaRef,
    /// Its steps, ascending.
    pub steps: Vec<u64>,
    /// Number of rows of these steps.
    pub num_rows: u64,
    /// Their size in bytes, as they stand on disk.
    pub num_bytes: u64,
}

/// The rows of a table, in the order of their steps. `None` says that there is nothing new yet, so that whoever reads
/// can see whether anybody still listens; it blocks no longer than a moment.
pub type TableBatches = Box<dyn Iterator<Item = ServiceResult<Option<RecordBatch>>> + Send>;

/// Rows that are read as they are asked for.
pub struct TableReader {
    /// Columns of every batch.
    pub schema: SchemaRef,
    /// The rows.
    pub batches: TableBatches,
    /// Held until the last row has left: the run's end waits a little for those.
    pub in_use: Arc<dyn Any + Send + Sync>,
}

/// Served by a run to whoever reads its tables.
pub trait TableService: Send + Sync {
    /// Every table with what a resume does not take back.
    ///
    /// # Errors
    /// `DataLoss` for a file that cannot be read.
    fn tables(&self) -> ServiceResult<Vec<TableInfo>>;
    /// The part of a table that `request` asks for, as it is now.
    ///
    /// # Errors
    /// `InvalidArgument` for a table or step that is not there, with what there is.
    fn table(&self, request: &TableRequest) -> ServiceResult<TableInfo>;
    /// The rows that `request` asks for. Memory holds one batch at a time.
    ///
    /// # Errors
    /// As [`TableService::table`]; each batch, as [`TableService::tables`].
    fn read(&self, request: &TableRequest) -> ServiceResult<TableReader>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_says_what_it_asks_for_or_what_is_wrong() {
        let read = |text: &str| TableRequest::from_json(text.as_bytes());
        let request = read(r#"{"dataset":"rollouts","from_step":3}"#).unwrap();
        assert_eq!(request.range(), (3, u64::MAX));
        assert_eq!(request.to_json(), r#"{"dataset":"rollouts","from_step":3}"#);
        assert_eq!(read(r#"{"dataset":"x","step":7}"#).unwrap().range(), (7, 7));
        for (text, complaint) in [
            ("rollouts", "expected JSON such as"),
            ("{}", "missing field `dataset`"),
            (r#"{"dataset":"rollouts","fromstep":3}"#, "unknown field `fromstep`"),
            (r#"{"dataset":"rollouts","step":-1}"#, "expected u64"),
            (r#"{"dataset":"rollouts","step":1,"follow":true}"#, "`step` is one step"),
            (r#"{"dataset":"rollouts","from_step":4,"to_step":3}"#, "from_step 4 is above to_step 3"),
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            assert!(error.message.contains(complaint), "{text}: {error}");
        }
    }
}
