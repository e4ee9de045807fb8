//! The error of every service call.

use std::borrow::Cow;
use temper_types::{ErrorCode, SampleKey};

/// What a service call gives.
pub type ServiceResult<T> = Result<T, ServiceError>;

/// A failed call: who, what, which sample, and whether trying again can help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{service}: {operation} failed: {message}{}", sample_suffix(.sample))]
pub struct ServiceError {
    /// Kind of failure.
    pub code: ErrorCode,
    /// Name of the worker or service.
    pub service: String,
    /// What was asked for.
    pub operation: Cow<'static, str>,
    /// Cause, in words.
    pub message: String,
    /// The sample concerned, where it is one.
    pub sample: Option<SampleKey>,
}

impl ServiceError {
    /// An error of `service` during `operation`.
    pub fn new(
        code: ErrorCode,
        service: impl Into<String>,
        operation: impl Into<Cow<'static, str>>,
        message: impl std::fmt::Display,
    ) -> Self {
        ServiceError {
            code,
            service: service.into(),
            operation: operation.into(),
            message: message.to_string(),
            sample: None,
        }
    }

    /// The same error, naming a sample.
    #[must_use]
    pub fn with_sample(mut self, sample: SampleKey) -> Self {
        self.sample = Some(sample);
        self
    }
}

fn sample_suffix(sample: &Option<SampleKey>) -> String {
    sample.as_ref().map_or_else(String::new, |s| {
        format!(" (prompt {}, group {}, sample {}, epoch {})", s.prompt_id, s.group_id, s.sample_index, s.epoch)
    })
}
