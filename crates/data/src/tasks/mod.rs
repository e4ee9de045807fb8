//! The project's own verifiable tasks: rows as a pure function of (configuration, index).
//!
//! The split of a task is decided by its content alone, never by the seed: whatever seeds two stages use, a prompt of
//! the `test` split is never in a `train` row. For `sort_digits` the content is the sorted list, so that no permutation
//! of a held-out list is ever seen, neither as a prompt nor in a demonstration.

mod generate;

use crate::Error;
use serde::{Deserialize, Serialize};
use temper_types::{PromptContent, PromptId, PromptRow};

pub use generate::Problem;

/// Most digits a list or number of a task may have, where nothing smaller is said.
const MAX_DIGITS: u32 = 64;
/// Most digits of one term of a sum: sums of 64 such terms stay far inside 64 bits.
const MAX_TERM_DIGITS: u32 = 9;
/// Most terms of a sum.
const MAX_TERMS: u32 = 64;

/// One task in `TEST_SHARE` contents is held out.
const TEST_SHARE: u64 = 10;

/// A generator and its difficulty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "task", rename_all = "snake_case", deny_unknown_fields)]
pub enum Task {
    /// `sort 8526=` -> `2568`: the digits in ascending order.
    SortDigits {
        /// Length of the shortest list, at least 1.
        min_digits: u32,
        /// Length of the longest list, at most 64.
        max_digits: u32,
    },
    /// `reverse 8526=` -> `6258`: the digits from last to first.
    ReverseDigits {
        /// Length of the shortest list, at least 1.
        min_digits: u32,
        /// Length of the longest list, at most 64.
        max_digits: u32,
    },
    /// `12+7-30=` -> `-11`: a sum with signs.
    ChainSum {
        /// Fewest terms, at least 2.
        min_terms: u32,
        /// Most terms, at most 64.
        max_terms: u32,
        /// Fewest digits of a term, at least 1.
        min_digits: u32,
        /// Most digits of a term, at most 9.
        max_digits: u32,
    },
}

/// Which part of a task's contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Nine in ten contents.
    #[default]
    Train,
    /// The held-out tenth.
    Test,
}

impl Split {
    /// Name as it stands in recipes.
    pub const fn name(self) -> &'static str {
        match self {
            Split::Train => "train",
            Split::Test => "test",
        }
    }
}

/// What the `completion` of a row shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Demonstration {
    /// Rows have no completion.
    #[default]
    None,
    /// The answer's digits in random order: the format without the skill.
    RandomPermutation,
    /// The answer.
    Solution,
}

/// What a wrong answer of a preference looks like; it always differs from the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WrongAnswer {
    /// The answer with two digits exchanged, or one changed where all are equal.
    #[default]
    NearMiss,
    /// The answer's digits in random order.
    RandomPermutation,
    /// One or the other, by the row's noise.
    Mixed,
    /// One or the other, or a digit changed, left out or given twice (in order again where the task sorts), by the
    /// row's noise: what a reward model has to know apart, so that no other answer scores like the right one.
    Varied,
}

/// A generated dataset, as it stands in a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// The task and its difficulty.
    pub generator: Task,
    /// Which contents; `test` contents never occur in `train`.
    #[serde(default)]
    pub split: Split,
    /// Number of rows.
    pub num_rows: u64,
    /// Seed of the rows; which contents are held out does not depend on it.
    #[serde(default)]
    pub seed: u64,
    /// What `completion` shows.
    #[serde(default)]
    pub demonstration: Demonstration,
    /// Rows get `chosen` (the answer) and `rejected` (a wrong answer).
    #[serde(default)]
    pub preferences: bool,
    /// Rows get a `completion` with its `label` in turn: the answer (true), a wrong answer (false). Excludes
    /// `demonstration`.
    #[serde(default)]
    pub unpaired: bool,
    /// What the wrong answers of `preferences` and `unpaired` look like.
    #[serde(default)]
    pub wrong_answer: WrongAnswer,
}

impl Task {
    /// Name as it stands in recipes.
    pub const fn name(self) -> &'static str {
        match self {
            Task::SortDigits { .. } => "sort_digits",
            Task::ReverseDigits { .. } => "reverse_digits",
            Task::ChainSum { .. } => "chain_sum",
        }
    }

    /// Every character of prompts, answers and demonstrations, ascending: what a character-level tokenizer needs.
    pub fn alphabet(self) -> Vec<char> {
        let words = match self {
            Task::SortDigits { .. } => "sort =",
            Task::ReverseDigits { .. } => "reverse =",
            Task::ChainSum { .. } => "+-=",
        };
        let mut chars: Vec<char> = words.chars().chain('0'..='9').collect();
        chars.sort_unstable();
        chars.dedup();
        chars
    }

    /// Check every range.
    ///
    /// # Errors
    /// The first key out of range, and what would be right.
    pub fn validate(self) -> Result<(), Error> {
        let check = |ok: bool, key, value: u32, expected| {
            let value = value.to_string();
            if ok { Ok(()) } else { Err(Error::Task { task: self.name(), key, value, expected }) }
        };
        match self {
            Task::SortDigits { min_digits, max_digits } | Task::ReverseDigits { min_digits, max_digits } => {
                check(min_digits >= 1 && min_digits <= max_digits, "min_digits", min_digits, "1 to max_digits")?;
                check(max_digits <= MAX_DIGITS, "max_digits", max_digits, "at most 64")
            }
            Task::ChainSum { min_terms, max_terms, min_digits, max_digits } => {
                check(min_terms >= 2 && min_terms <= max_terms, "min_terms", min_terms, "2 to max_terms")?;
                check(max_terms <= MAX_TERMS, "max_terms", max_terms, "at most 64")?;
                check(min_digits >= 1 && min_digits <= max_digits, "min_digits", min_digits, "1 to max_digits")?;
                check(max_digits <= MAX_TERM_DIGITS, "max_digits", max_digits, "at most 9")
            }
        }
    }
}

impl TaskConfig {
    /// Check the configuration without generating a row.
    ///
    /// # Errors
    /// The first key out of range, and what would be right.
    pub fn validate(&self) -> Result<(), Error> {
        self.generator.validate()?;
        if self.num_rows == 0 {
            let task = self.generator.name();
            return Err(Error::Task { task, key: "num_rows", value: "0".to_owned(), expected: "at least 1" });
        }
        if self.unpaired && self.demonstration != Demonstration::None {
            let (task, value) = (self.generator.name(), "true".to_owned());
            let expected = "no `demonstration` beside it: both write `completion`";
            return Err(Error::Task { task, key: "unpaired", value, expected });
        }
        Ok(())
    }

    /// Row `index`; the same for the same configuration, whatever other rows were asked for.
    ///
    /// # Errors
    /// A key out of range, or a task so small that the split has no content.
    pub fn row(&self, index: u64) -> Result<PromptRow, Error> {
        self.validate()?;
        let problem = Problem::draw(self.generator, self.split, self.seed, index)?;
        let right = || Some(PromptContent::Text(problem.answer.clone()));
        let wrong = || Some(PromptContent::Text(problem.wrong(self.wrong_answer)));
        let label = self.unpaired.then_some(index.is_multiple_of(2));
        Ok(PromptRow {
            prompt_id: PromptId(index),
            data_source: format!("temper/{}", self.generator.name()),
            prompt: PromptContent::Text(problem.prompt.clone()),
            ability: None,
            ground_truth: Some(problem.answer.clone()),
            extra_info: Some(format!("{{\"split\":\"{}\",\"index\":{index}}}", self.split.name())),
            completion: match label {
                None => problem.demonstration(self.demonstration).map(PromptContent::Text),
                Some(true) => right(),
                Some(false) => wrong(),
            },
            chosen: if self.preferences { right() } else { None },
            rejected: if self.preferences { wrong() } else { None },
            label,
            margin: None,
        })
    }

    /// All rows, `0..num_rows`. Contents may repeat where the task has few.
    ///
    /// # Errors
    /// Those of [`TaskConfig::row`].
    pub fn rows(&self) -> Result<Vec<PromptRow>, Error> {
        self.validate()?;
        (0..self.num_rows).map(|index| self.row(index)).collect()
    }
}

#[cfg(test)]
mod tests;
