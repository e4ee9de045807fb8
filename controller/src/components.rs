//! Reward components by name: those that an algorithm reads one by one, and whether a recipe has them.

use crate::{Error, PolicyStage};
use temper_algos::Plan;
use temper_types::{RewardOutcome, Sample, did_you_mean};

/// Name of the component that a long response adds.
pub(crate) const OVERLONG_PENALTY: &str = "overlong_penalty";
/// Name of the component that a response adds which the limit cut off.
pub(crate) const STOP_PROPERLY_PENALTY: &str = "stop_properly_penalty";

impl PolicyStage {
    /// Check that every component that the stage reads by name is one of `known`, the names of the recipe's, or one
    /// that the stage adds itself; `key` is the stage's place in the recipe.
    ///
    /// # Errors
    /// The first name that is none, with those there are.
    pub fn check_components(&self, key: &str, known: &[&str]) -> Result<(), Error> {
        let algorithm = &self.algorithm;
        let mut known = known.to_vec();
        known.extend(algorithm.overlong.enable.then_some(OVERLONG_PENALTY));
        known.extend(algorithm.stop_properly_penalty_coef.map(|_| STOP_PROPERLY_PENALTY));
        let check = |key: String, name: &str| match known.contains(&name) {
            true => Ok(()),
            false => Err(Error::config(key, unknown(name, &known))),
        };
        let filter = &algorithm.filter_groups;
        if filter.enable && filter.metric != "reward" {
            check(format!("{key}.algorithm.filter_groups.metric"), &filter.metric)?;
        }
        let keys = &algorithm.advantage.gdpo_reward_keys;
        keys.iter().try_for_each(|name| check(format!("{key}.algorithm.advantage.gdpo_reward_keys"), name))
    }
}

fn unknown(name: &str, known: &[&str]) -> String {
    let hint = did_you_mean(name, known.iter().copied())
        .map_or_else(|| format!("expected one of: {}", known.join(", ")), |near| format!("did you mean `{near}`?"));
    format!("there is no reward component `{name}`: {hint}")
}

/// One array per component that the algorithm reads: those it names, else all, in the order of the first row's; empty
/// where the plan does not ask for them. `rows` are indices of scored samples.
///
/// # Errors
/// A sample that has no component of such a name.
pub(crate) fn reward_components(
    stage: &PolicyStage,
    plan: &Plan,
    rows: &[usize],
    samples: &[Sample],
) -> Result<Vec<Vec<f64>>, Error> {
    if !plan.reward_components {
        return Ok(Vec::new());
    }
    let of = |index: usize| match &samples[index].outcome {
        Some(RewardOutcome::Scored { components, .. }) => &components[..],
        _ => &[],
    };
    let mut names: Vec<&str> = stage.algorithm.advantage.gdpo_reward_keys.iter().map(String::as_str).collect();
    if names.is_empty() {
        // What a component reports beside its value has a slash in its name, and is recorded only.
        let all = rows.first().map_or(&[][..], |index| of(*index)).iter().map(|c| c.name.as_str());
        names = all.filter(|name| !name.contains('/')).collect();
    }
    let value = |name: &str, index: usize| {
        let known: Vec<&str> = of(index).iter().map(|c| c.name.as_str()).collect();
        let found = of(index).iter().find(|c| c.name == name).map(|c| c.value);
        let key = format!("{}.algorithm.advantage.gdpo_reward_keys", stage.name);
        found.ok_or_else(|| Error::config(key, format!("a sample was scored without: {}", unknown(name, &known))))
    };
    names.iter().map(|name| rows.iter().map(|index| value(name, *index)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_components_that_are_none_are_refused() {
        let mut stage = PolicyStage::default();
        stage.algorithm.advantage.gdpo_reward_keys = vec!["format".to_owned()];
        stage.check_components("stage.0", &["number", "format"]).expect("both are there");
        let error = stage.check_components("stage.0", &["number", "formats"]).expect_err("a typo").to_string();
        assert!(
            error.contains("stage.0.algorithm.advantage.gdpo_reward_keys") && error.contains("`formats`?"),
            "{error}"
        );
        stage.algorithm.advantage.gdpo_reward_keys = vec![OVERLONG_PENALTY.to_owned()];
        stage.check_components("stage.0", &["number"]).expect_err("no penalty is on");
        stage.algorithm.overlong.enable = true;
        stage.check_components("stage.0", &["number"]).expect("the stage adds it");
        stage.algorithm.filter_groups.metric = "nmber".to_owned();
        stage.check_components("stage.0", &["number"]).expect("dynamic sampling is off");
        stage.algorithm.filter_groups.enable = true;
        let error = stage.check_components("stage.0", &["number"]).expect_err("a typo").to_string();
        assert!(error.contains("filter_groups.metric") && error.contains("`number`?"), "{error}");
    }
}
