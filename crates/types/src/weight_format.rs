//! In which form an engine holds the weights that it was given.

use serde::{Deserialize, Serialize};

/// Form of a policy's matrices where it generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// The numbers that train, in the compute dtype.
    #[default]
    Exact,
    /// Signed bytes with one scale for every 64 inputs of an output, quantised anew from each set of weights. Another
    /// policy than the one that trains.
    Int8,
}

impl WeightFormat {
    /// Lower-case name as it stands in recipes and flags.
    pub const fn name(self) -> &'static str {
        match self {
            WeightFormat::Exact => "exact",
            WeightFormat::Int8 => "int8",
        }
    }

    /// What a dataset says of responses that such weights drew; nothing of exact ones.
    pub const fn dataset_note(self) -> Option<&'static str> {
        match self {
            WeightFormat::Exact => None,
            WeightFormat::Int8 => Some(
                "Responses were drawn from int8 weights, and rollout_log_probs are those of that law (off-policy). The \
                 hash of a policy version is that of the weights before they were quantised.",
            ),
        }
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
