//! Identifiers as newtypes, so that a step is never passed for a rank.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// Row number of a prompt in its dataset.
    PromptId(u64)
);
id!(
    /// Number of a group of samples of one prompt, unique within a run.
    GroupId(u64)
);
id!(
    /// Index of a sample within its group, `0..num_generations`.
    SampleIndex(u32)
);
id!(
    /// Position of a process or thread in a world.
    Rank(u32)
);
id!(
    /// Number of an optimisation step within a stage, from 1; 0 is "before the first".
    Step(u64)
);

/// Names one sample of a run: which prompt, which member of its group, in which pass over the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleKey {
    /// The prompt.
    pub prompt_id: PromptId,
    /// The group this sample belongs to.
    pub group_id: GroupId,
    /// Its index in the group.
    pub sample_index: SampleIndex,
    /// Pass over the data, from 0.
    pub epoch: u64,
}
