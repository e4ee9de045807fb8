//! What becomes of generated samples.

use temper_types::{GroupId, SampleIndex};

/// What became of a sample that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fate {
    /// A step trained on it.
    Trained,
    /// No step does.
    Dropped(Unused),
}

/// Why no step trains on a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unused {
    /// Its group says nothing: dynamic sampling took another one.
    Filtered,
    /// It could not be scored.
    RewardError,
    /// None of its tokens may be trained on.
    Masked,
    /// The algorithm chose others of its group.
    NotChosen,
    /// It is a greedy response, with which others are compared.
    Baseline,
    /// It answers a held-out prompt.
    Validation,
    /// Its group was given up before it was whole.
    Aborted,
    /// It had not ended when the step had enough, and was thrown away.
    Unfinished,
}

impl Unused {
    /// Name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Unused::Filtered => "filtered",
            Unused::RewardError => "reward_error",
            Unused::Masked => "masked",
            Unused::NotChosen => "not_chosen",
            Unused::Baseline => "baseline",
            Unused::Validation => "validation",
            Unused::Aborted => "aborted",
            Unused::Unfinished => "unfinished",
        }
    }
}

/// A sample whose fate is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settled {
    /// Its group.
    pub group_id: GroupId,
    /// Its index in the group.
    pub sample_index: SampleIndex,
    /// What became of it.
    pub fate: Fate,
}

/// What many workers did besides answering once, since the first of them joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FleetCounts {
    /// Messages about attempts that had ended, or from earlier lives of workers.
    pub late_answers: u64,
    /// Second answers to the same attempt.
    pub duplicates: u64,
    /// Samples that were issued again because an attempt at them was lost.
    pub reissued: u64,
}
