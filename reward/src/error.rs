//! The errors of building a scorer. Failing to score one sample is no `Error` but a
//! [`RewardFailure`](temper_types::RewardFailure).

/// Why a reward configuration cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No reward of this name exists.
    #[error("unknown reward `{given}`{}; known: {}", suggestion_text(.suggestion.as_deref()), .known.join(", "))]
    UnknownReward {
        /// What was asked for.
        given: String,
        /// The nearest known name, where one is near.
        suggestion: Option<String>,
        /// All known names.
        known: Vec<&'static str>,
    },
    /// A name that cannot stand alone, because its reward has parameters without a default.
    #[error("reward `{name}` needs parameters: give it as a component with `kind = \"{name}\"` and {required}")]
    NeedsParameters {
        /// The reward's name.
        name: &'static str,
        /// The parameters it needs.
        required: &'static str,
    },
    /// A key holds a value that cannot work.
    #[error("reward component `{component}`: {key} = {got}: expected {expected}")]
    InvalidValue {
        /// Name of the component.
        component: String,
        /// The key.
        key: &'static str,
        /// The value found.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// A regular expression does not compile.
    #[error("reward component `{component}`: {key} is no regular expression: {cause}")]
    Pattern {
        /// Name of the component.
        component: String,
        /// The key.
        key: &'static str,
        /// The parser's words, on one line.
        cause: String,
    },
    /// A reward model cannot be used.
    #[error("reward model {}: {cause}", path.display())]
    Model {
        /// Its directory.
        path: std::path::PathBuf,
        /// What is wrong and what would be right.
        cause: String,
    },
    /// A reward of the user's own code cannot be run.
    #[error("reward component `{component}`: {cause}")]
    External {
        /// Name of the component.
        component: String,
        /// What is wrong and what would be right.
        cause: String,
    },
    /// There is nothing to score with.
    #[error("reward has no components: expected at least one")]
    NoComponents,
    /// Two components share a name, so their columns could not be told apart.
    #[error("reward component name `{name}` is used twice: give one of them another `name`")]
    DuplicateName {
        /// The name.
        name: String,
    },
}

fn suggestion_text(suggestion: Option<&str>) -> String {
    suggestion.map(|name| format!(", did you mean `{name}`?")).unwrap_or_default()
}

/// Why one component could not score one sample. The text of it becomes the cause of a `RewardFailure`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(crate) enum Cause {
    #[error("the sample has no ground truth")]
    MissingGroundTruth,
    #[error("ground truth `{got}` is no {expected}")]
    GroundTruth { got: String, expected: &'static str },
    #[error("{what} exceeds exact arithmetic: {limit}")]
    TooLarge { what: &'static str, limit: &'static str },
    #[error("value {0} is not finite")]
    NonFinite(f64),
    #[error("{0}")]
    Elsewhere(String),
}

impl Cause {
    /// A ground truth that the verifier cannot read, cut to a printable length.
    pub(crate) fn ground_truth(got: &str, expected: &'static str) -> Self {
        const SHOWN_CHARS: usize = 60;
        let mut shown: String = got.chars().take(SHOWN_CHARS).collect();
        if shown.len() < got.len() {
            shown.push('…');
        }
        Cause::GroundTruth { got: shown, expected }
    }
}
