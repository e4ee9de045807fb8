//! Scoring one sample: every component, or the first failure by name.

use crate::config::{ComponentConfig, Extract, RewardConfig, RewardKind};
use crate::error::{Cause, Error};
use crate::external::Answer;
use crate::reward_model::RewardModelConfig;
use crate::text;
use crate::verifiers;
use temper_types::{FinishReason, RewardComponent, RewardFailure, RewardOutcome};

/// What is known of a sample when it is scored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreInput<'a> {
    /// Where the prompt comes from.
    pub data_source: &'a str,
    /// The response as text, the stop token left out.
    pub response: &'a str,
    /// The expected answer, where the dataset has one.
    pub ground_truth: Option<&'a str>,
    /// The dataset's extra information as JSON text.
    pub extra_info: Option<&'a str>,
    /// Why the response ended.
    pub finish_reason: FinishReason,
    /// Length of the response in tokens, the stop token included.
    pub response_len_tokens: usize,
}

/// A reward ready to score: validated, its patterns compiled. Scoring is pure, so one scorer serves many threads.
#[derive(Debug, Clone)]
pub struct Scorer {
    components: Vec<Component>,
}

#[derive(Debug, Clone)]
struct Component {
    config: ComponentConfig,
    /// Compiled pattern of a `regex` verifier.
    pattern: Option<regex::Regex>,
    /// Compiled pattern and group of a `regex` extraction.
    extract: Option<(regex::Regex, usize)>,
}

impl Scorer {
    /// Validate `config` and compile its patterns.
    ///
    /// # Errors
    /// Those of [`RewardConfig::validate`].
    pub fn new(config: RewardConfig) -> Result<Self, Error> {
        config.validate()?;
        let components = config.components.into_iter().map(Component::new).collect::<Result<_, _>>()?;
        Ok(Scorer { components })
    }

    /// Names of the components, in the order of their values.
    pub fn component_names(&self) -> Vec<&str> {
        self.components.iter().map(|component| component.config.name()).collect()
    }

    /// Score one sample: all components and their weighted sum, or the first component that failed and why. A
    /// component that is a reward model or the user's own code fails: a scorer alone holds none of them.
    pub fn score(&self, input: ScoreInput<'_>) -> RewardOutcome {
        self.score_with(input, &|_| Err("nothing is at hand to score with".to_owned()))
    }

    /// The components' configuration, in the order of their values.
    pub(crate) fn components(&self) -> impl Iterator<Item = &ComponentConfig> {
        self.components.iter().map(|component| &component.config)
    }

    /// Indices of the components that are reward models, with their configuration.
    pub(crate) fn reward_models(&self) -> impl Iterator<Item = (usize, &RewardModelConfig)> {
        self.components.iter().enumerate().filter_map(|(index, component)| match &component.config.kind {
            RewardKind::RewardModel(config) => Some((index, config)),
            _ => None,
        })
    }

    /// As [`Scorer::score`]; `elsewhere` gives what the reward model or external reward at that component says, or why
    /// it says nothing. What an external reward reports beside its score stands behind all components, named
    /// `<component>/<part>`.
    pub(crate) fn score_with(
        &self,
        input: ScoreInput<'_>,
        elsewhere: &dyn Fn(usize) -> Result<Answer, String>,
    ) -> RewardOutcome {
        let (mut values, mut parts) = (Vec::with_capacity(self.components.len()), Vec::new());
        let mut reward = 0.0;
        for (index, component) in self.components.iter().enumerate() {
            let name = component.config.name();
            let kind = &component.config.kind;
            let value = if kind.is_external() || matches!(kind, RewardKind::RewardModel(_)) {
                elsewhere(index).map_err(Cause::Elsewhere).and_then(|answer| {
                    parts.extend(answer.components.into_iter().map(|part| within(name, part)));
                    finite(answer.score)
                })
            } else {
                component.value(&input)
            };
            match value {
                Ok(value) => {
                    reward += component.config.weight * value;
                    values.push(RewardComponent { name: name.to_owned(), value });
                }
                Err(cause) => return failed(name, &cause),
            }
        }
        if reward.is_finite() {
            values.append(&mut parts);
            RewardOutcome::Scored { reward, components: values }
        } else {
            failed("weighted sum", &Cause::NonFinite(reward))
        }
    }
}

fn within(component: &str, part: RewardComponent) -> RewardComponent {
    RewardComponent { name: format!("{component}/{}", part.name), ..part }
}

fn finite(value: f64) -> Result<f64, Cause> {
    if value.is_finite() { Ok(value) } else { Err(Cause::NonFinite(value)) }
}

fn failed(scorer: &str, cause: &Cause) -> RewardOutcome {
    RewardOutcome::Failed(RewardFailure { scorer: scorer.to_owned(), cause: cause.to_string() })
}

impl Component {
    fn new(config: ComponentConfig) -> Result<Self, Error> {
        let compiled = |key, result: Result<regex::Regex, regex::Error>| {
            let component = config.name().to_owned();
            result.map_err(|e| Error::Pattern { component, key, cause: e.to_string() })
        };
        let pattern = match &config.kind {
            RewardKind::Regex(regex) => Some(compiled("pattern", verifiers::regex::compile(regex))?),
            _ => None,
        };
        let extract = match &config.extract {
            Some(Extract::Regex(e)) => Some((compiled("extract", regex::Regex::new(&e.pattern))?, e.group)),
            _ => None,
        };
        Ok(Component { config, pattern, extract })
    }

    fn value(&self, input: &ScoreInput<'_>) -> Result<f64, Cause> {
        if self.config.kind.needs_ground_truth() && input.ground_truth.is_none() {
            return Err(Cause::MissingGroundTruth);
        }
        // A response without the part that is asked for gives no answer, which is a miss and not a failure. The
        // verifier still reads the ground truth, so that a bad one is reported whatever the response is.
        let (answer, has_answer) = match self.answer(input.response) {
            Some(answer) => (answer, true),
            None => ("", false),
        };
        let value = self.verify(answer, input).and_then(finite)?;
        Ok(if has_answer { value } else { 0.0 })
    }

    fn answer<'a>(&self, response: &'a str) -> Option<&'a str> {
        match &self.config.extract {
            None => Some(response),
            Some(Extract::Boxed) => text::last_boxed(response),
            Some(Extract::LastLine) => text::last_line(response),
            Some(Extract::CodeBlock) => text::last_code_block(response),
            Some(Extract::After(marker)) => text::after_last(response, marker),
            Some(Extract::Tag(tag)) => text::last_tag(response, tag),
            Some(Extract::Regex(_)) => {
                let (pattern, group) = self.extract.as_ref()?;
                let found = pattern.captures_iter(response).last()?;
                found.get(*group).map(|m| m.as_str())
            }
        }
    }

    fn verify(&self, answer: &str, input: &ScoreInput<'_>) -> Result<f64, Cause> {
        let truth = || input.ground_truth.ok_or(Cause::MissingGroundTruth);
        match &self.config.kind {
            RewardKind::ExactMatch(config) => verifiers::exact_match::verify(config, answer, truth()?),
            RewardKind::Number(config) => verifiers::number::verify(config, answer, truth()?),
            RewardKind::Math(config) => verifiers::math::verify(config, answer, truth()?),
            RewardKind::Regex(_) => {
                verifiers::regex::verify(self.pattern.as_ref().expect("compiled when the scorer was made"), answer)
            }
            RewardKind::Format(config) => verifiers::format::verify(config, answer),
            RewardKind::Length(config) => verifiers::length::verify(config, input.response_len_tokens),
            RewardKind::Overlong(config) => {
                verifiers::overlong::verify(config, input.response_len_tokens, input.finish_reason)
            }
            RewardKind::Json(config) => verifiers::json::verify(config, answer),
            RewardKind::Contains(config) => verifiers::contains::verify(config, answer, input.ground_truth),
            RewardKind::RewardModel(_) | RewardKind::Command(_) | RewardKind::Python(_) | RewardKind::Http(_) => {
                Err(Cause::Elsewhere("it is scored elsewhere".to_owned()))
            }
        }
    }
}
