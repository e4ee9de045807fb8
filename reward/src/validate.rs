//! Checks of a reward configuration that its types cannot make.

use crate::config::{ComponentConfig, Extract, RewardConfig, RewardKind};
use crate::error::Error;
use crate::reward_model::RewardModelSource;
use std::collections::BTreeSet;

impl RewardConfig {
    /// Check everything that does not need a sample: ranges, patterns, names.
    ///
    /// # Errors
    /// The first thing wrong, with component, key and what would be right.
    pub fn validate(&self) -> Result<(), Error> {
        if self.components.is_empty() {
            return Err(Error::NoComponents);
        }
        let mut seen = BTreeSet::new();
        for component in &self.components {
            if !seen.insert(component.name()) {
                return Err(Error::DuplicateName { name: component.name().to_owned() });
            }
            check_component(component)?;
        }
        Ok(())
    }
}

fn check_component(component: &ComponentConfig) -> Result<(), Error> {
    let check = Check { component: component.name() };
    // A slash stands between an external component and what it reports beside its score.
    let is_name = !component.name().is_empty() && !component.name().contains('/');
    check.that(is_name, "name", &component.name(), "a name without a slash")?;
    check.that(component.weight.is_finite(), "weight", &component.weight, "a finite number")?;
    check_extract(&check, component)?;
    match &component.kind {
        RewardKind::Number(number) => {
            let range = |x: f64| x >= 0.0 && x.is_finite();
            check.that(range(number.tolerance), "tolerance", &number.tolerance, "a finite number, 0 or more")?;
            let relative = number.relative_tolerance;
            check.that(range(relative), "relative_tolerance", &relative, "a finite number, 0 or more")
        }
        RewardKind::Regex(config) => check.pattern("pattern", crate::verifiers::regex::compile(config)).map(|_| ()),
        RewardKind::Format(config) => check_tags(&check, &config.tags),
        RewardKind::Length(config) => {
            let falloff = config.falloff();
            check.that(falloff > 0, "falloff_tokens", &falloff, "1 or more (it defaults to target_tokens)")
        }
        RewardKind::Overlong(config) => {
            let (max, buffer) = (config.max_tokens, config.buffer_tokens);
            check.that(buffer > 0 && buffer <= max, "buffer_tokens", &buffer, "1 or more, at most max_tokens")?;
            let range = |x: f64| x >= 0.0 && x.is_finite();
            check.that(range(config.penalty), "penalty", &config.penalty, "a finite number, 0 or more")?;
            let truncated = config.truncated_penalty;
            check.that(range(truncated), "truncated_penalty", &truncated, "a finite number, 0 or more")
        }
        RewardKind::Contains(config) => {
            check.that(config.text.as_deref() != Some(""), "text", &"", "a text, or none to use the ground truth")
        }
        RewardKind::RewardModel(config) => check.that(
            !matches!(&config.model, RewardModelSource::Path(path) if path.as_os_str().is_empty()),
            "model.path",
            &"",
            "a Hugging Face directory of a sequence classifier with one label",
        ),
        RewardKind::Command(config) => config.validate(&check),
        RewardKind::Python(config) => config.validate(&check),
        RewardKind::Http(config) => config.validate(&check),
        RewardKind::ExactMatch(_) | RewardKind::Math(_) | RewardKind::Json(_) => Ok(()),
    }
}

fn check_tags(check: &Check<'_>, tags: &[String]) -> Result<(), Error> {
    check.that(!tags.is_empty(), "tags", &tags, "at least one tag name")?;
    let mut seen = BTreeSet::new();
    for tag in tags {
        let is_name = !tag.is_empty() && !tag.contains(['<', '>', '/']);
        check.that(is_name, "tags", tag, "a name without angle brackets or slash, as in `think`")?;
        check.that(seen.insert(tag), "tags", tag, "each tag once")?;
    }
    Ok(())
}

fn check_extract(check: &Check<'_>, component: &ComponentConfig) -> Result<(), Error> {
    let Some(extract) = &component.extract else {
        return Ok(());
    };
    let measures_all =
        matches!(component.kind, RewardKind::Length(_) | RewardKind::Overlong(_) | RewardKind::RewardModel(_));
    let reads_part = !measures_all && !component.kind.is_external();
    check.that(reads_part, "extract", extract, "none: this kind measures the whole response")?;
    match extract {
        Extract::After(text) | Extract::Tag(text) => {
            check.that(!text.is_empty(), "extract", &"", "a text that is not empty")
        }
        Extract::Regex(config) => {
            let groups = check.pattern("extract", regex::Regex::new(&config.pattern))?.captures_len();
            let expected = format!("a group below {groups}, the number of groups of the pattern with the whole match");
            check.that(config.group < groups, "extract.group", &config.group, &expected)
        }
        Extract::Boxed | Extract::LastLine | Extract::CodeBlock => Ok(()),
    }
}

/// Names the component in every finding.
pub(crate) struct Check<'a> {
    component: &'a str,
}

impl Check<'_> {
    pub(crate) fn that(
        &self,
        holds: bool,
        key: &'static str,
        got: &dyn std::fmt::Debug,
        expected: &str,
    ) -> Result<(), Error> {
        if holds {
            return Ok(());
        }
        let (component, got) = (self.component.to_owned(), format!("{got:?}"));
        Err(Error::InvalidValue { component, key, got, expected: expected.to_owned() })
    }

    fn pattern(&self, key: &'static str, compiled: Result<regex::Regex, regex::Error>) -> Result<regex::Regex, Error> {
        compiled.map_err(|e| {
            let cause = e.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            Error::Pattern { component: self.component.to_owned(), key, cause }
        })
    }
}
