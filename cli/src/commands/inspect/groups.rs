//! One group of responses, for reading.

use serde_json::{Value, json};
use std::fmt::Write;
use temper_types::{PromptContent, RewardOutcome, Sample};

/// Mean advantage over the tokens that are trained on; `None` where there is none.
fn advantage(sample: &Sample) -> Option<f64> {
    let trained = sample.advantages.iter().zip(&sample.response_mask).filter(|(_, mask)| **mask == 1);
    let values: Vec<f64> = trained.map(|(advantage, _)| f64::from(*advantage)).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn prompt_text(prompt: &PromptContent) -> String {
    match prompt {
        PromptContent::Text(text) => text.clone(),
        PromptContent::Messages(messages) => {
            let lines: Vec<String> = messages.iter().map(|m| format!("{}: {}", m.role, m.content)).collect();
            lines.join("\n")
        }
        PromptContent::TokenIds(ids) => format!("{ids:?}"),
    }
}

/// The group as JSON: the prompt, and each response with what is known of it.
pub fn to_json(group: &[&Sample]) -> Value {
    let response = |sample: &&Sample| {
        let (reward, failure) = match &sample.outcome {
            Some(RewardOutcome::Scored { reward, .. }) => (Some(*reward), None),
            Some(RewardOutcome::Failed(failure)) => (None, Some(failure.to_string())),
            None => (None, None),
        };
        json!({
            "sample_index": sample.sample_index, "response": sample.response, "reward": reward,
            "reward_error": failure, "num_tokens": sample.response_token_ids.len(),
            "finish_reason": sample.finish_reason.name(), "advantage": advantage(sample),
        })
    };
    let first = group.first();
    json!({
        "group_id": first.map(|s| s.group_id), "step": first.map(|s| s.step), "prompt_id": first.map(|s| s.prompt_id),
        "prompt": first.map(|s| &s.prompt), "ground_truth": first.and_then(|s| s.ground_truth.as_ref()),
        "responses": group.iter().map(response).collect::<Vec<_>>(),
    })
}

/// The group as text, at most `limit` responses of it, the best first.
pub fn describe(group: &[&Sample], limit: usize, text: &mut String) -> std::fmt::Result {
    let Some(first) = group.first() else { return Ok(()) };
    writeln!(text, "\ngroup {} (step {}, prompt {})", first.group_id, first.step, first.prompt_id)?;
    writeln!(text, "  prompt    {}", indented(&prompt_text(&first.prompt)))?;
    if let Some(truth) = &first.ground_truth {
        writeln!(text, "  expected  {}", indented(truth))?;
    }
    let reward_of = |sample: &Sample| sample.outcome.as_ref().and_then(RewardOutcome::reward);
    let mut order: Vec<&Sample> = group.to_vec();
    order.sort_by(|a, b| {
        let key = |s: &Sample| reward_of(s).unwrap_or(f64::NEG_INFINITY);
        key(b).total_cmp(&key(a)).then(a.sample_index.cmp(&b.sample_index))
    });
    for sample in order.iter().take(limit) {
        let reward = match &sample.outcome {
            Some(RewardOutcome::Scored { reward, .. }) => format!("reward {reward:.4}"),
            Some(RewardOutcome::Failed(failure)) => format!("not scored ({failure})"),
            None => "no reward".to_owned(),
        };
        let advantage = advantage(sample).map_or_else(String::new, |a| format!(", advantage {a:+.4}"));
        let (length, reason) = (sample.response_token_ids.len(), sample.finish_reason.name());
        writeln!(text, "  [{}] {reward}{advantage}, {length} tokens, {reason}", sample.sample_index)?;
        writeln!(text, "            {}", indented(&sample.response))?;
    }
    let hidden = group.len().saturating_sub(limit);
    if hidden > 0 {
        writeln!(text, "  and {hidden} more")?;
    }
    Ok(())
}

fn indented(text: &str) -> String {
    text.trim_end().replace('\n', "\n            ")
}
