//! Between the messages of the traits and those of the wire. What comes from the wire is checked.

/// Conversions both ways between a message of the traits and one of the wire. `fields` pass as they are; what differs
/// stands behind `to` (ours to the wire's) and `from`, or `try_from` where the wire may say what cannot be.
macro_rules! same_fields {
    ($ours:ty, $wire:ty, $m:ident => { $($field:ident),* $(,)? }) => {
        same_fields!($ours, $wire, $m => { $($field),* } to {} from {});
    };
    ($ours:ty, $wire:ty, $m:ident => { $($field:ident),* $(,)? }
     to { $($to:ident: $theirs:expr),* $(,)? } from { $($from:ident: $own:expr),* $(,)? }) => {
        same_fields!(@to $ours, $wire, $m => { $($field),* } { $($to: $theirs),* });
        impl From<$wire> for $ours {
            fn from($m: $wire) -> Self {
                Self { $($from: $own,)* $($field: $m.$field,)* }
            }
        }
    };
    ($ours:ty, $wire:ty, $m:ident => { $($field:ident),* $(,)? }
     to { $($to:ident: $theirs:expr),* $(,)? } try_from { $($from:ident: $own:expr),* $(,)? }) => {
        same_fields!(@to $ours, $wire, $m => { $($field),* } { $($to: $theirs),* });
        impl TryFrom<$wire> for $ours {
            type Error = ConvertError;

            fn try_from($m: $wire) -> Result<Self, ConvertError> {
                Ok(Self { $($from: $own,)* $($field: $m.$field,)* })
            }
        }
    };
    (@to $ours:ty, $wire:ty, $m:ident => { $($field:ident),* } { $($to:ident: $theirs:expr),* }) => {
        impl From<$ours> for $wire {
            fn from($m: $ours) -> Self {
                Self { $($to: $theirs,)* $($field: $m.$field,)* }
            }
        }
    };
}

mod common;
mod control;
mod mirror;
mod reward;
mod rollout;
mod scalar;
mod trainer;
mod weights;
mod worker;

pub(crate) use common::hash_from_wire;
pub use common::{version_from_wire, version_to_wire};
pub(crate) use trainer::{PartReader, metrics_to_wire};

/// A message that the wire brought and the service cannot read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field `{field}` of the message: expected {expected}, got {got}")]
pub struct ConvertError {
    /// Name of the field.
    pub field: &'static str,
    /// What would be right.
    pub expected: &'static str,
    /// What came.
    pub got: String,
}

impl ConvertError {
    pub(crate) fn new(field: &'static str, expected: &'static str, got: impl std::fmt::Display) -> Self {
        ConvertError { field, expected, got: got.to_string() }
    }

    pub(crate) fn missing(field: &'static str) -> Self {
        ConvertError::new(field, "a value", "nothing")
    }
}

/// The field, or an error that names it.
pub(crate) fn required<T>(value: Option<T>, field: &'static str) -> Result<T, ConvertError> {
    value.ok_or(ConvertError::missing(field))
}

/// A count that fits the machine.
pub(crate) fn count(value: u64, field: &'static str) -> Result<usize, ConvertError> {
    usize::try_from(value).map_err(|_| ConvertError::new(field, "a count", value))
}
