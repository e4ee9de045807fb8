//! Samples to columns.

use super::schema::{component_fields, schema, version_fields};
use crate::Error;
use arrow_array::builder::{ListBuilder, PrimitiveBuilder};
use arrow_array::types::{ArrowPrimitiveType, Float32Type, UInt8Type, UInt32Type, UInt64Type};
use arrow_array::{ArrayRef, Float64Array, ListArray, RecordBatch, StringArray, StructArray, UInt32Array, UInt64Array};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields};
use std::sync::Arc;
use temper_types::{PolicyVersion, PromptContent, RewardComponent, RewardFailure, RewardOutcome, Sample};

/// The samples as one batch of [`schema`], in order.
///
/// # Errors
/// Names a sample and column where a per-token array is neither empty nor as long as `response_token_ids`.
pub fn to_batch(run: &str, samples: &[Sample]) -> Result<RecordBatch, Error> {
    samples.iter().try_for_each(check_lengths)?;
    let mut columns = identity_columns(run, samples);
    columns.extend(token_columns(samples));
    columns.extend(reward_columns(samples));
    columns.extend(origin_columns(samples));
    Ok(RecordBatch::try_new(schema(), columns).expect("columns are built in the schema's order and types"))
}

fn check_lengths(sample: &Sample) -> Result<(), Error> {
    let expected = sample.response_token_ids.len();
    let num_versions: usize = sample.policy_versions.iter().map(|(_, count)| *count as usize).sum();
    let lengths = [
        ("response_mask", sample.response_mask.len()),
        ("response_reused", sample.response_reused.len()),
        ("rollout_log_probs", sample.rollout_log_probs.len()),
        ("sampled_log_probs", sample.sampled_log_probs.len()),
        ("surviving_mass", sample.surviving_mass.len()),
        ("old_log_probs", sample.old_log_probs.len()),
        ("ref_log_probs", sample.ref_log_probs.len()),
        ("values", sample.values.len()),
        ("advantages", sample.advantages.len()),
        ("returns", sample.returns.len()),
        ("policy_versions", num_versions),
    ];
    match lengths.into_iter().find(|(_, found)| *found != 0 && *found != expected) {
        None => Ok(()),
        Some((column, found)) => Err(Error::Sample {
            step: sample.step,
            prompt_id: sample.prompt_id,
            sample_index: sample.sample_index,
            column,
            found,
            expected,
        }),
    }
}

fn texts<'a>(samples: &'a [Sample], text: impl Fn(&'a Sample) -> Option<&'a str>) -> ArrayRef {
    Arc::new(samples.iter().map(text).collect::<StringArray>())
}

fn numbers(samples: &[Sample], number: impl Fn(&Sample) -> u64) -> ArrayRef {
    Arc::new(UInt64Array::from_iter_values(samples.iter().map(number)))
}

fn counts(samples: &[Sample], count: impl Fn(&Sample) -> u32) -> ArrayRef {
    Arc::new(UInt32Array::from_iter_values(samples.iter().map(count)))
}

fn seconds(samples: &[Sample], seconds: impl Fn(&Sample) -> f64) -> ArrayRef {
    Arc::new(Float64Array::from_iter_values(samples.iter().map(seconds)))
}

/// A list column of primitives; `None` is null.
fn lists<T: ArrowPrimitiveType>(lists: impl Iterator<Item = Option<Vec<T::Native>>>) -> ArrayRef {
    let mut builder = ListBuilder::new(PrimitiveBuilder::<T>::new());
    for list in lists {
        if let Some(items) = &list {
            builder.values().append_slice(items);
        }
        builder.append(list.is_some());
    }
    Arc::new(builder.finish())
}

/// A list column of structs from its flattened members; `lengths` has one entry a row, `None` is null.
fn struct_lists(fields: Fields, members: Vec<ArrayRef>, lengths: &[Option<usize>]) -> ArrayRef {
    let nulls = NullBuffer::from_iter(lengths.iter().map(Option::is_some));
    let offsets = OffsetBuffer::from_lengths(lengths.iter().map(|length| length.unwrap_or(0)));
    let item = Arc::new(Field::new_list_field(DataType::Struct(fields.clone()), true));
    let values = StructArray::new(fields, members, None);
    Arc::new(ListArray::new(item, offsets, Arc::new(values), Some(nulls)))
}

fn identity_columns(run: &str, samples: &[Sample]) -> Vec<ArrayRef> {
    let prompts: Vec<(Option<String>, &str)> = samples.iter().map(|s| prompt_text(&s.prompt)).collect();
    vec![
        Arc::new(StringArray::from_iter_values(samples.iter().map(|_| run))),
        numbers(samples, |s| s.step.0),
        numbers(samples, |s| s.prompt_id.0),
        numbers(samples, |s| s.group_id.0),
        counts(samples, |s| s.sample_index.0),
        numbers(samples, |s| s.epoch),
        texts(samples, |s| Some(&s.data_source)),
        Arc::new(prompts.iter().map(|(text, _)| text.as_deref()).collect::<StringArray>()),
        Arc::new(StringArray::from_iter_values(prompts.iter().map(|(_, format)| *format))),
        texts(samples, |s| Some(&s.response)),
    ]
}

/// The text of a prompt and its format's name.
fn prompt_text(prompt: &PromptContent) -> (Option<String>, &'static str) {
    match prompt {
        PromptContent::Text(text) => (Some(text.clone()), "text"),
        PromptContent::Messages(messages) => {
            let json = serde_json::to_string(messages).expect("messages are plain strings");
            (Some(json), "messages")
        }
        PromptContent::TokenIds(_) => (None, "token_ids"),
    }
}

fn token_columns(samples: &[Sample]) -> Vec<ArrayRef> {
    let floats = |values: fn(&Sample) -> &[f32]| {
        lists::<Float32Type>(samples.iter().map(|s| Some(values(s).to_vec()).filter(|v| !v.is_empty())))
    };
    let bytes = |values: fn(&Sample) -> &[u8]| {
        lists::<UInt8Type>(samples.iter().map(|s| Some(values(s).to_vec()).filter(|v| !v.is_empty())))
    };
    vec![
        lists::<UInt32Type>(samples.iter().map(|s| Some(s.prompt_token_ids.clone()))),
        lists::<UInt32Type>(samples.iter().map(|s| Some(s.response_token_ids.clone()))),
        bytes(|s| &s.response_mask),
        bytes(|s| &s.response_reused),
        floats(|s| &s.rollout_log_probs),
        floats(|s| &s.sampled_log_probs),
        floats(|s| &s.surviving_mass),
        floats(|s| &s.old_log_probs),
        floats(|s| &s.ref_log_probs),
        floats(|s| &s.values),
        floats(|s| &s.advantages),
        floats(|s| &s.returns),
    ]
}

fn components(sample: &Sample) -> Option<&[RewardComponent]> {
    match &sample.outcome {
        Some(RewardOutcome::Scored { components, .. }) => Some(components),
        Some(RewardOutcome::Failed(_)) | None => None,
    }
}

fn failure(sample: &Sample) -> Option<&RewardFailure> {
    match &sample.outcome {
        Some(RewardOutcome::Failed(failure)) => Some(failure),
        Some(RewardOutcome::Scored { .. }) | None => None,
    }
}

fn reward_columns(samples: &[Sample]) -> Vec<ArrayRef> {
    let rewards: Float64Array = samples.iter().map(|s| s.outcome.as_ref().and_then(RewardOutcome::reward)).collect();
    let flat = || samples.iter().filter_map(components).flatten();
    let members: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(flat().map(|c| &c.name))),
        Arc::new(Float64Array::from_iter_values(flat().map(|c| c.value))),
    ];
    let lengths: Vec<_> = samples.iter().map(|s| components(s).map(<[_]>::len)).collect();
    vec![
        Arc::new(rewards),
        struct_lists(component_fields(), members, &lengths),
        texts(samples, |s| failure(s).map(|f| f.scorer.as_str())),
        texts(samples, |s| failure(s).map(|f| f.cause.as_str())),
        texts(samples, |s| s.ground_truth.as_deref()),
        texts(samples, |s| s.extra_info.as_deref()),
        texts(samples, |s| Some(s.finish_reason.name())),
    ]
}

/// The version number of every token, or `None` where versions are not known.
fn version_numbers(sample: &Sample) -> Option<Vec<u64>> {
    let runs = sample.policy_versions.iter();
    let numbers: Vec<u64> = runs.flat_map(|(version, n)| std::iter::repeat_n(version.number, *n as usize)).collect();
    (!numbers.is_empty()).then_some(numbers)
}

/// The versions that produced a token of the sample, each once.
fn distinct_versions(sample: &Sample) -> Vec<PolicyVersion> {
    let mut versions: Vec<_> = sample.policy_versions.iter().filter(|(_, n)| *n > 0).map(|(v, _)| *v).collect();
    versions.sort_unstable();
    versions.dedup();
    versions
}

fn origin_columns(samples: &[Sample]) -> Vec<ArrayRef> {
    let versions: Vec<Vec<PolicyVersion>> = samples.iter().map(distinct_versions).collect();
    let flat = || versions.iter().flatten();
    let members: Vec<ArrayRef> = vec![
        Arc::new(UInt64Array::from_iter_values(flat().map(|v| v.number))),
        Arc::new(StringArray::from_iter_values(flat().map(|v| v.hash.to_string()))),
    ];
    let lengths: Vec<_> = versions.iter().map(|v| Some(v.len()).filter(|n| *n > 0)).collect();
    vec![
        lists::<UInt64Type>(samples.iter().map(version_numbers)),
        struct_lists(version_fields(), members, &lengths),
        counts(samples, |s| s.staleness),
        numbers(samples, |s| s.seed),
        texts(samples, |s| Some(&s.worker)),
        seconds(samples, |s| s.timings.queue_seconds),
        seconds(samples, |s| s.timings.rollout_seconds),
        seconds(samples, |s| s.timings.reward_seconds),
        counts(samples, |s| s.num_drafted),
        counts(samples, |s| s.num_accepted),
    ]
}
