//! Versions, samples, codes.

use super::ConvertError;
use crate::grpc::v1;
use temper_types::{ContentHash, ErrorCode, FinishReason, GroupId, PolicyVersion, PromptId, SampleIndex, SampleKey};

/// A version as the wire carries it.
pub fn version_to_wire(version: PolicyVersion) -> v1::PolicyVersion {
    v1::PolicyVersion { number: version.number, hash: version.hash.0.to_vec() }
}

/// A version from the wire.
///
/// # Errors
/// A version that is absent, or a hash that has not 16 bytes.
pub fn version_from_wire(version: Option<v1::PolicyVersion>) -> Result<PolicyVersion, ConvertError> {
    let version = super::required(version, "version")?;
    Ok(PolicyVersion { number: version.number, hash: hash_from_wire(&version.hash, "version.hash")? })
}

/// A hash from the wire.
pub(crate) fn hash_from_wire(bytes: &[u8], field: &'static str) -> Result<ContentHash, ConvertError> {
    let hash = <[u8; 16]>::try_from(bytes)
        .map_err(|_| ConvertError::new(field, "16 bytes", format!("{} bytes", bytes.len())))?;
    Ok(ContentHash(hash))
}

impl From<SampleKey> for v1::SampleKey {
    fn from(key: SampleKey) -> Self {
        v1::SampleKey {
            prompt_id: key.prompt_id.0,
            group_id: key.group_id.0,
            sample_index: key.sample_index.0,
            epoch: key.epoch,
        }
    }
}

impl From<v1::SampleKey> for SampleKey {
    fn from(key: v1::SampleKey) -> Self {
        SampleKey {
            prompt_id: PromptId(key.prompt_id),
            group_id: GroupId(key.group_id),
            sample_index: SampleIndex(key.sample_index),
            epoch: key.epoch,
        }
    }
}

impl From<ErrorCode> for v1::ErrorCode {
    fn from(code: ErrorCode) -> Self {
        match code {
            ErrorCode::InvalidArgument => v1::ErrorCode::InvalidArgument,
            ErrorCode::ResourceExhausted => v1::ErrorCode::ResourceExhausted,
            ErrorCode::DeadlineExceeded => v1::ErrorCode::DeadlineExceeded,
            ErrorCode::Unavailable => v1::ErrorCode::Unavailable,
            ErrorCode::VersionMismatch => v1::ErrorCode::VersionMismatch,
            ErrorCode::NonFinite => v1::ErrorCode::NonFinite,
            ErrorCode::DataLoss => v1::ErrorCode::DataLoss,
            ErrorCode::Cancelled => v1::ErrorCode::Cancelled,
            ErrorCode::Internal => v1::ErrorCode::Internal,
        }
    }
}

/// Codes that this build does not know are bugs of the other end.
impl From<v1::ErrorCode> for ErrorCode {
    fn from(code: v1::ErrorCode) -> Self {
        match code {
            v1::ErrorCode::InvalidArgument => ErrorCode::InvalidArgument,
            v1::ErrorCode::ResourceExhausted => ErrorCode::ResourceExhausted,
            v1::ErrorCode::DeadlineExceeded => ErrorCode::DeadlineExceeded,
            v1::ErrorCode::Unavailable => ErrorCode::Unavailable,
            v1::ErrorCode::VersionMismatch => ErrorCode::VersionMismatch,
            v1::ErrorCode::NonFinite => ErrorCode::NonFinite,
            v1::ErrorCode::DataLoss => ErrorCode::DataLoss,
            v1::ErrorCode::Cancelled => ErrorCode::Cancelled,
            v1::ErrorCode::Internal | v1::ErrorCode::Unspecified => ErrorCode::Internal,
        }
    }
}

pub(super) fn finish_to_wire(reason: FinishReason) -> i32 {
    let wire = match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::StopString => v1::FinishReason::StopString,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Abort => v1::FinishReason::Abort,
        FinishReason::Paused => v1::FinishReason::Paused,
    };
    wire.into()
}

pub(super) fn finish_from_wire(reason: i32) -> Result<FinishReason, ConvertError> {
    match v1::FinishReason::try_from(reason) {
        Ok(v1::FinishReason::Stop) => Ok(FinishReason::Stop),
        Ok(v1::FinishReason::StopString) => Ok(FinishReason::StopString),
        Ok(v1::FinishReason::Length) => Ok(FinishReason::Length),
        Ok(v1::FinishReason::Abort) => Ok(FinishReason::Abort),
        Ok(v1::FinishReason::Paused) => Ok(FinishReason::Paused),
        Ok(v1::FinishReason::Unspecified) | Err(_) => {
            Err(ConvertError::new("finish_reason", "a reason of FinishReason", reason))
        }
    }
}
