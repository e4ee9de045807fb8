//! Columns to samples.

use super::schema::{SCHEMA_VERSION, SCHEMA_VERSION_KEY, schema};
use arrow_array::cast::AsArray;
use arrow_array::types::{ArrowPrimitiveType, Float32Type, Float64Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use temper_types::{
    FinishReason, GroupId, PolicyVersion, PromptContent, PromptId, RewardComponent, RewardFailure, RewardOutcome,
    Sample, SampleIndex, SampleTimings, Step,
};

/// The samples of a batch of [`schema`].
///
/// Neighbouring runs of one policy version come back as one run.
///
/// # Errors
/// In words: another schema or version of it, or a row and column with a value that no sample has.
pub fn from_batch(batch: &RecordBatch) -> Result<Vec<Sample>, String> {
    check_schema(batch)?;
    let row = |row| Row { batch, row }.sample().map_err(|problem| format!("row {row}, {problem}"));
    (0..batch.num_rows()).map(row).collect()
}

/// Check that a batch has exactly the columns of [`schema`].
pub(super) fn check_schema(batch: &RecordBatch) -> Result<(), String> {
    let found = batch.schema_ref();
    let version = found.metadata().get(SCHEMA_VERSION_KEY).map_or("none", String::as_str);
    if version != SCHEMA_VERSION {
        return Err(format!("schema metadata {SCHEMA_VERSION_KEY} is {version}: expected {SCHEMA_VERSION}"));
    }
    let expected = schema();
    if found.fields().len() != expected.fields().len() {
        return Err(format!("{} columns: expected {}", found.fields().len(), expected.fields().len()));
    }
    for (found, expected) in found.fields().iter().zip(expected.fields()) {
        if found.name() != expected.name() || found.data_type() != expected.data_type() {
            let (name, kind) = (expected.name(), expected.data_type());
            return Err(format!(
                "column `{}` of type {}: expected `{name}` of type {kind}",
                found.name(),
                found.data_type()
            ));
        }
    }
    Ok(())
}

/// One row of a batch whose schema was checked.
struct Row<'a> {
    batch: &'a RecordBatch,
    row: usize,
}

impl<'a> Row<'a> {
    fn column(&self, name: &str) -> &'a ArrayRef {
        self.batch.column_by_name(name).expect("the schema was checked")
    }

    /// The column, or `None` where this row is null.
    fn present(&self, name: &str) -> Option<&'a ArrayRef> {
        Some(self.column(name)).filter(|column| !column.is_null(self.row))
    }

    fn optional_text(&self, name: &str) -> Option<String> {
        self.present(name).map(|column| column.as_string::<i32>().value(self.row).to_owned())
    }

    fn text(&self, name: &str) -> Result<String, String> {
        self.optional_text(name).ok_or_else(|| missing(name))
    }

    fn optional_number<T: ArrowPrimitiveType>(&self, name: &str) -> Option<T::Native> {
        self.present(name).map(|column| column.as_primitive::<T>().value(self.row))
    }

    fn number<T: ArrowPrimitiveType>(&self, name: &str) -> Result<T::Native, String> {
        self.optional_number::<T>(name).ok_or_else(|| missing(name))
    }

    /// The entries of a list; none where it is null.
    fn list<T: ArrowPrimitiveType>(&self, name: &str) -> Result<Vec<T::Native>, String> {
        let Some(column) = self.present(name) else { return Ok(Vec::new()) };
        let items = column.as_list::<i32>().value(self.row);
        if items.null_count() > 0 {
            return Err(format!("column `{name}`: a null entry"));
        }
        Ok(items.as_primitive::<T>().values().to_vec())
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>, String> {
        self.list::<Float32Type>(name)
    }

    fn sample(&self) -> Result<Sample, String> {
        let prompt_token_ids = self.list::<UInt32Type>("prompt_token_ids")?;
        Ok(Sample {
            step: Step(self.number::<UInt64Type>("step")?),
            prompt_id: PromptId(self.number::<UInt64Type>("prompt_id")?),
            group_id: GroupId(self.number::<UInt64Type>("group_id")?),
            sample_index: SampleIndex(self.number::<UInt32Type>("sample_index")?),
            epoch: self.number::<UInt64Type>("epoch")?,
            seed: self.number::<UInt64Type>("seed")?,
            data_source: self.text("data_source")?,
            prompt: self.prompt(&prompt_token_ids)?,
            response: self.text("response")?,
            prompt_token_ids,
            response_token_ids: self.list::<UInt32Type>("response_token_ids")?,
            response_mask: self.list::<UInt8Type>("response_mask")?,
            response_reused: self.list::<UInt8Type>("response_reused")?,
            rollout_log_probs: self.floats("rollout_log_probs")?,
            sampled_log_probs: self.floats("sampled_log_probs")?,
            surviving_mass: self.floats("surviving_mass")?,
            old_log_probs: self.floats("old_log_probs")?,
            ref_log_probs: self.floats("ref_log_probs")?,
            values: self.floats("values")?,
            advantages: self.floats("advantages")?,
            returns: self.floats("returns")?,
            outcome: self.outcome()?,
            ground_truth: self.optional_text("ground_truth"),
            extra_info: self.optional_text("extra_info"),
            finish_reason: self.finish_reason()?,
            policy_versions: self.policy_versions()?,
            staleness: self.number::<UInt32Type>("staleness")?,
            num_drafted: self.number::<UInt32Type>("num_drafted")?,
            num_accepted: self.number::<UInt32Type>("num_accepted")?,
            worker: self.text("worker")?,
            timings: SampleTimings {
                queue_seconds: self.number::<Float64Type>("queue_seconds")?,
                rollout_seconds: self.number::<Float64Type>("rollout_seconds")?,
                reward_seconds: self.number::<Float64Type>("reward_seconds")?,
            },
        })
    }

    fn prompt(&self, token_ids: &[u32]) -> Result<PromptContent, String> {
        match self.text("prompt_format")?.as_str() {
            "text" => Ok(PromptContent::Text(self.text("prompt")?)),
            "token_ids" => Ok(PromptContent::TokenIds(token_ids.to_vec())),
            "messages" => serde_json::from_str(&self.text("prompt")?)
                .map(PromptContent::Messages)
                .map_err(|e| format!("column `prompt`: no JSON list of chat messages: {e}")),
            other => Err(format!("column `prompt_format`: `{other}`: expected text, messages or token_ids")),
        }
    }

    fn outcome(&self) -> Result<Option<RewardOutcome>, String> {
        if let Some(scorer) = self.optional_text("reward_error_scorer") {
            let cause = self.text("reward_error")?;
            return Ok(Some(RewardOutcome::Failed(RewardFailure { scorer, cause })));
        }
        let Some(reward) = self.optional_number::<Float64Type>("reward") else { return Ok(None) };
        let column = self.present("reward_components").ok_or_else(|| missing("reward_components"))?;
        let items = column.as_list::<i32>().value(self.row);
        let (names, values) = (items.as_struct().column(0), items.as_struct().column(1));
        if items.null_count() + names.null_count() + values.null_count() > 0 {
            return Err("column `reward_components`: a null entry".to_owned());
        }
        let (names, values) = (names.as_string::<i32>(), values.as_primitive::<Float64Type>());
        let component = |i| RewardComponent { name: names.value(i).to_owned(), value: values.value(i) };
        Ok(Some(RewardOutcome::Scored { reward, components: (0..items.len()).map(component).collect() }))
    }

    fn finish_reason(&self) -> Result<FinishReason, String> {
        let name = self.text("finish_reason")?;
        use FinishReason::{Abort, Length, Paused, Stop, StopString};
        let expected = "stop, stop_string, length, abort or paused";
        [Stop, StopString, Length, Abort, Paused]
            .into_iter()
            .find(|reason| reason.name() == name)
            .ok_or_else(|| format!("column `finish_reason`: `{name}`: expected {expected}"))
    }

    fn policy_versions(&self) -> Result<Vec<(PolicyVersion, u32)>, String> {
        let mut runs: Vec<(PolicyVersion, u32)> = Vec::new();
        let numbers = self.list::<UInt64Type>("policy_version")?;
        let versions = self.versions()?;
        for number in numbers {
            let version = versions.iter().find(|version| version.number == number);
            let version =
                *version.ok_or_else(|| format!("column `policy_version_hashes`: no hash of version {number}"))?;
            match runs.last_mut() {
                Some((last, count)) if *last == version => *count += 1,
                _ => runs.push((version, 1)),
            }
        }
        Ok(runs)
    }

    /// The row's `policy_version_hashes`.
    fn versions(&self) -> Result<Vec<PolicyVersion>, String> {
        let Some(column) = self.present("policy_version_hashes") else { return Ok(Vec::new()) };
        let items = column.as_list::<i32>().value(self.row);
        let numbers = items.as_struct().column(0).as_primitive::<UInt64Type>();
        let hashes = items.as_struct().column(1).as_string::<i32>();
        let parse = |i| {
            let text = format!("{}-{}", numbers.value(i), hashes.value(i));
            text.parse().map_err(|e| format!("column `policy_version_hashes`: {e}"))
        };
        (0..items.len()).map(parse).collect()
    }
}

fn missing(name: &str) -> String {
    format!("column `{name}`: null where a value is expected")
}
