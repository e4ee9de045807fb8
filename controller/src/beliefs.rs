//! Beliefs of a preference row: in its `extra_info`, `belief` is the text under which its answers were given, and
//! `belief_probs` the target law, the share of every class of beliefs by the one token that names it.

use crate::preference_data::{Response, Unit, row_error};
use crate::{Controller, Error};
use serde::Deserialize;
use std::collections::BTreeMap;
use temper_types::{PromptContent, PromptRow};

/// Mark of a belief's row.
const BELIEF: f64 = -1.0;
/// By how much the shares may miss 1.
const TOLERANCE: f64 = 1e-6;

/// What `extra_info` says; it may say more.
#[derive(Debug, Deserialize)]
pub(crate) struct Beliefs {
    belief: String,
    belief_probs: BTreeMap<String, f64>,
}

impl Beliefs {
    pub(crate) fn of(row: &PromptRow) -> Result<Self, String> {
        let expected = "expected `belief` (a text) and `belief_probs` (shares that add up to 1, by class)";
        let text = row.extra_info.as_deref().ok_or_else(|| format!("has no `extra_info`: {expected}"))?;
        let beliefs: Beliefs = serde_json::from_str(text).map_err(|e| format!("`extra_info`: {e}: {expected}"))?;
        if beliefs.belief.is_empty() {
            return Err("`extra_info.belief` is empty: expected the text of a belief".to_owned());
        }
        let is_share = |share: &f64| *share >= 0.0 && share.is_finite();
        if let Some((class, share)) = beliefs.belief_probs.iter().find(|(_, share)| !is_share(share)) {
            return Err(format!("`extra_info.belief_probs.{class}` is {share}: expected a share from 0 to 1"));
        }
        let sum: f64 = beliefs.belief_probs.values().sum();
        if (sum - 1.0).abs() > TOLERANCE {
            return Err(format!("`extra_info.belief_probs` adds up to {sum}: expected 1"));
        }
        Ok(beliefs)
    }
}

impl Controller {
    /// The unit of a pair under a belief: its answers to the prompt that ends with the belief, the belief, and the
    /// classes that have a share.
    pub(crate) fn believed(&self, name: &str, row: &PromptRow, answers: [Response; 2]) -> Result<Unit, Error> {
        let beliefs = Beliefs::of(row).map_err(|problem| row_error(name, row, &problem))?;
        let prompt = answers[0].sequence.prompt_token_ids.clone();
        let belief = self.encode_text(&beliefs.belief)?;
        let mut unit: Unit = answers.into_iter().collect();
        unit.iter_mut().for_each(|answer| answer.sequence.prompt_token_ids.extend(&belief));
        unit.push(without_reference(Response::new(prompt.clone(), belief, BELIEF)));
        for (class, share) in beliefs.belief_probs.into_iter().filter(|(_, share)| *share > 0.0) {
            let ids = self.encode_text(&class)?;
            if ids.len() != 1 {
                let problem = format!("the class `{class}` takes {} tokens: expected one", ids.len());
                return Err(row_error(name, row, &problem));
            }
            unit.push(without_reference(Response::new(prompt.clone(), ids, share)));
        }
        Ok(unit)
    }

    /// Ids of a text inside a response: without the end of sequence.
    fn encode_text(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encode = |text: &str| self.services.text.encode_response(&PromptContent::Text(text.to_owned()));
        let mut ids = self.attribute(encode(text))?;
        let end = self.attribute(encode(""))?.len();
        ids.truncate(ids.len().saturating_sub(end));
        Ok(ids)
    }
}

/// Beliefs and classes are not compared with the reference.
fn without_reference(response: Response) -> Response {
    Response { ref_log_probs: vec![0.0; response.sequence.response_token_ids.len()], ..response }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preference_data::check_preferences;
    use temper_algos::preference::PreferenceForm;
    use temper_types::PromptId;

    fn row(extra_info: Option<&str>) -> PromptRow {
        let text = |text: &str| Some(PromptContent::Text(text.to_owned()));
        PromptRow {
            prompt_id: PromptId(7),
            data_source: "test".to_owned(),
            prompt: PromptContent::Text("p".to_owned()),
            ability: None,
            ground_truth: None,
            extra_info: extra_info.map(str::to_owned),
            completion: None,
            chosen: text("a"),
            rejected: text("b"),
            label: None,
            margin: None,
        }
    }

    #[test]
    fn rows_without_a_law_are_named_with_what_is_missing() {
        let check = |extra_info| check_preferences(PreferenceForm::Beliefs, "train", &[row(extra_info)]);
        check(Some(r#"{"belief": "A", "belief_probs": {"A": 0.25, "B": 0.75}, "index": 3}"#)).expect("a fitting row");
        for (extra_info, says) in [
            (None, "row 7: has no `extra_info`"),
            (Some(r#"{"belief_probs": {"A": 1.0}}"#), "missing field `belief`"),
            (Some(r#"{"belief": "A"}"#), "missing field `belief_probs`"),
            (Some(r#"{"belief": "", "belief_probs": {"A": 1.0}}"#), "`extra_info.belief` is empty"),
            (Some(r#"{"belief": "A", "belief_probs": {"A": 1.5, "B": -0.5}}"#), "belief_probs.B` is -0.5"),
            (Some(r#"{"belief": "A", "belief_probs": {"A": 0.5}}"#), "adds up to 0.5"),
        ] {
            let error = check(extra_info).expect_err(says).to_string();
            assert!(error.starts_with("`data.train`: ") && error.contains(says), "{error}");
        }
    }
}
