//! Rows of a preference dataset as token sequences.
//!
//! A *unit* is what a mini-batch counts: a pair, or one labelled response. A row of `chosen` and `rejected` is two
//! units where labels are asked for. Beliefs stand in the row's `extra_info`.

use crate::beliefs::Beliefs;
use crate::{Controller, Error};
use temper_algos::preference::PreferenceForm;
use temper_proto::TokenSequence;
use temper_types::{PromptContent, PromptRow};

/// One response to learn from, with what the stage knows of it.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) sequence: TokenSequence,
    /// What tells the rows of a mini-batch apart, where they are not pairs: the advantage of every token.
    pub(crate) mark: f64,
    /// Log-probs under the reference; empty until they are computed.
    pub(crate) ref_log_probs: Vec<f32>,
}

/// What a mini-batch counts: the responses of a pair (chosen first) with what belongs to it, or one labelled response.
pub(crate) type Unit = Vec<Response>;

/// Check that every row of a dataset gives units of `form`; `name` is the dataset's.
///
/// # Errors
/// The first row that does not, with the column that is missing or wrong.
pub fn check_preferences(form: PreferenceForm, name: &str, rows: &[PromptRow]) -> Result<(), Error> {
    rows.iter().try_for_each(|row| check_row(form, row).map_err(|problem| row_error(name, row, &problem)))
}

/// Mark of a desirable response.
const DESIRABLE: f64 = 1.0;
/// Mark of an undesirable one.
const UNDESIRABLE: f64 = -1.0;

pub(crate) fn row_error(name: &str, row: &PromptRow, problem: &str) -> Error {
    Error::config(format!("data.{name}"), format!("row {}: {problem}", row.prompt_id))
}

fn check_row(form: PreferenceForm, row: &PromptRow) -> Result<(), String> {
    let is_labelled = matches!(form, PreferenceForm::Labels { .. }) && row.chosen.is_none() && row.rejected.is_none();
    if is_labelled {
        let problem = match (&row.completion, row.label) {
            (Some(_), Some(_)) => return Ok(()),
            (Some(_), None) => "has no `label`: expected true (desirable) or false beside `completion`",
            (None, _) => "has no `completion`: expected `completion` with `label`, or `chosen` with `rejected`",
        };
        return Err(problem.to_owned());
    }
    if form == PreferenceForm::Beliefs {
        Beliefs::of(row)?;
    }
    match (&row.chosen, &row.rejected) {
        (Some(chosen), Some(rejected)) if chosen == rejected => {
            Err("`chosen` equals `rejected`: expected two different responses".to_owned())
        }
        (Some(_), Some(_)) => Ok(()),
        (Some(_), None) => Err("has no `rejected`: expected the response that `chosen` is preferred to".to_owned()),
        (None, Some(_)) => Err("has no `chosen`: expected the response preferred to `rejected`".to_owned()),
        (None, None) => Err("has no `chosen` and no `rejected`: expected both".to_owned()),
    }
}

impl Controller {
    /// The units of every row of a dataset, in the rows' order.
    pub(crate) fn units(&self, form: PreferenceForm, name: &str) -> Result<Vec<Unit>, Error> {
        let rows = self.data.get(name).map_or(&[][..], |rows| rows.as_slice());
        check_preferences(form, name, rows)?;
        let mut units = Vec::with_capacity(rows.len());
        for row in rows {
            match (&row.chosen, &row.rejected, form) {
                (Some(chosen), Some(rejected), PreferenceForm::Pairs) => {
                    units.push(vec![self.response(row, chosen, 0.0)?, self.response(row, rejected, 0.0)?]);
                }
                (Some(chosen), Some(rejected), PreferenceForm::Beliefs) => {
                    let answers = [self.response(row, chosen, 0.0)?, self.response(row, rejected, 0.0)?];
                    units.push(self.believed(name, row, answers)?);
                }
                (Some(chosen), Some(rejected), PreferenceForm::Labels { .. }) => {
                    units.push(vec![self.response(row, chosen, DESIRABLE)?]);
                    units.push(vec![self.response(row, rejected, UNDESIRABLE)?]);
                }
                _ => {
                    let (Some(completion), Some(label)) = (&row.completion, row.label) else { continue };
                    let mark = if label { DESIRABLE } else { UNDESIRABLE };
                    units.push(vec![self.response(row, completion, mark)?]);
                }
            }
        }
        Ok(units)
    }

    fn response(&self, row: &PromptRow, content: &PromptContent, mark: f64) -> Result<Response, Error> {
        let prompt_token_ids = self.attribute(self.services.text.encode_prompt(&row.prompt))?;
        let response_token_ids = self.attribute(self.services.text.encode_response(content))?;
        Ok(Response::new(prompt_token_ids, response_token_ids, mark))
    }
}

impl Response {
    pub(crate) fn new(prompt_token_ids: Vec<u32>, response_token_ids: Vec<u32>, mark: f64) -> Self {
        let response_mask = vec![1; response_token_ids.len()];
        let sequence = TokenSequence { prompt_token_ids, response_token_ids, response_mask };
        Response { sequence, mark, ref_log_probs: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use temper_types::PromptId;

    fn row(columns: [Option<&str>; 3], label: Option<bool>) -> PromptRow {
        let text = |column: Option<&str>| column.map(|t| PromptContent::Text(t.to_owned()));
        let [completion, chosen, rejected] = columns.map(text);
        PromptRow {
            prompt_id: PromptId(7),
            data_source: "test".to_owned(),
            prompt: PromptContent::Text("p".to_owned()),
            ability: None,
            ground_truth: None,
            extra_info: None,
            completion,
            chosen,
            rejected,
            label,
            margin: None,
        }
    }

    const LABELS: PreferenceForm = PreferenceForm::Labels { mismatched: true };

    #[test]
    fn rows_that_fit_pass() {
        for (form, row) in [
            (PreferenceForm::Pairs, row([None, Some("a"), Some("b")], None)),
            (LABELS, row([None, Some("a"), Some("b")], None)),
            (LABELS, row([Some("a"), None, None], Some(false))),
        ] {
            check_preferences(form, "train", &[row]).expect("a fitting row");
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_named_with_their_column() {
        for (form, row, says) in [
            (PreferenceForm::Pairs, row([None, Some("a"), None], None), "row 7: has no `rejected`"),
            (PreferenceForm::Pairs, row([None, None, Some("a")], None), "row 7: has no `chosen`"),
            (PreferenceForm::Pairs, row([Some("a"), None, None], Some(true)), "no `chosen` and no `rejected`"),
            (PreferenceForm::Pairs, row([None, Some("a"), Some("a")], None), "`chosen` equals `rejected`"),
            (LABELS, row([Some("a"), None, None], None), "row 7: has no `label`"),
            (LABELS, row([None, None, None], Some(true)), "row 7: has no `completion`"),
            (LABELS, row([None, Some("a"), None], Some(true)), "row 7: has no `rejected`"),
        ] {
            let error = check_preferences(form, "train", &[row]).expect_err(says).to_string();
            assert!(error.starts_with("`data.train`: ") && error.contains(says), "{error}");
        }
    }
}
