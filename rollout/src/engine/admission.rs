//! What the engine refuses before it queues anything.

use crate::model::Model;
use crate::scheduler::GroupShape;
use crate::{Error, ModelLimits};
use std::collections::BTreeSet;
use temper_proto::GroupRequest;
use temper_types::{GroupId, SamplingParams};

/// Check a request against the model; returns its shape.
pub(super) fn check_request<M: Model>(
    request: &GroupRequest,
    model: &M,
    has_token_bytes: bool,
) -> Result<GroupShape, Error> {
    let (group_id, limits) = (request.group_id, model.limits());
    let refuse = |cause: String| Err(Error::InvalidRequest { group_id, cause });
    let sampling = &request.sampling;
    if let Err(error) = sampling.validate() {
        return refuse(format!("sampling: {error}"));
    }
    if request.prompt_token_ids.is_empty() {
        return refuse("the prompt has no token: expected at least one".to_owned());
    }
    if request.seeds.is_empty() {
        return refuse("no seed: expected one for each sample".to_owned());
    }
    check_ids(group_id, "prompt", &request.prompt_token_ids, limits)?;
    check_ids(group_id, "stop_token_ids", &sampling.stop_token_ids, limits)?;
    if sampling.stop.iter().any(String::is_empty) {
        return refuse(
            "sampling: an empty stop string would end every response: expected at least one byte".to_owned(),
        );
    }
    if !sampling.stop.is_empty() && !has_token_bytes {
        return refuse("sampling: stop strings need the bytes of tokens, and this engine has no tokenizer".to_owned());
    }
    check_processors(group_id, sampling, limits)?;
    check_drawable(group_id, sampling, model)?;
    check_reuse(request, limits)?;
    check_begun(request, limits)?;
    check_length(request, limits)
}

/// Earlier responses are of this model, and the law is the one that their log-probs are of.
fn check_reuse(request: &GroupRequest, limits: ModelLimits) -> Result<(), Error> {
    let Some(reuse) = &request.reuse else { return Ok(()) };
    let group_id = request.group_id;
    let is_truncated = || "reuse: expected the untruncated law, without penalties, bias or bans".to_owned();
    let cause = super::reuse::problem(reuse, request.seeds.len());
    if let Some(cause) = cause.or_else(|| request.sampling.is_truncated().then(is_truncated)) {
        return Err(Error::InvalidRequest { group_id, cause });
    }
    reuse.responses.iter().try_for_each(|response| check_ids(group_id, "reuse", &response.token_ids, limits))
}

/// Responses that go on are of this model, and have something left to draw.
fn check_begun(request: &GroupRequest, limits: ModelLimits) -> Result<(), Error> {
    let group_id = request.group_id;
    if let Some(cause) = super::rounds::problem(request) {
        return Err(Error::InvalidRequest { group_id, cause });
    }
    request.begun.iter().try_for_each(|response| check_ids(group_id, "begun", &response.token_ids, limits))
}

/// Bias, allowed ids and bad words name ids of the model.
fn check_processors(group_id: GroupId, sampling: &SamplingParams, limits: ModelLimits) -> Result<(), Error> {
    let biased: Vec<u32> = sampling.logit_bias.keys().copied().collect();
    check_ids(group_id, "logit_bias", &biased, limits)?;
    check_ids(group_id, "allowed_token_ids", &sampling.allowed_token_ids, limits)?;
    for word in &sampling.bad_words_ids {
        check_ids(group_id, "bad_words_ids", word, limits)?;
    }
    if !sampling.bad_words.is_empty() {
        let cause = "sampling: bad_words are text, and engines know ids: expected them resolved to bad_words_ids";
        return Err(Error::InvalidRequest { group_id, cause: cause.to_owned() });
    }
    Ok(())
}

/// No turn of a response can leave nothing to draw, whatever words are about to be completed.
fn check_drawable<M: Model>(group_id: GroupId, sampling: &SamplingParams, model: &M) -> Result<(), Error> {
    let refuse = |cause: String| Err(Error::InvalidRequest { group_id, cause: format!("sampling: {cause}") });
    let drawable = |ids: &[u32]| -> BTreeSet<u32> { ids.iter().copied().filter(|id| !model.is_masked(*id)).collect() };
    let allowed = drawable(&sampling.allowed_token_ids);
    if allowed.is_empty() && !sampling.allowed_token_ids.is_empty() {
        return refuse(format!(
            "the tokenizer has none of the {} allowed_token_ids: expected at least one that can be drawn",
            sampling.allowed_token_ids.len()
        ));
    }
    let completing: Vec<u32> = sampling.bad_words_ids.iter().filter_map(|word| word.last().copied()).collect();
    let mut banned = drawable(&completing);
    if sampling.min_new_tokens > 0 {
        banned.extend(drawable(&sampling.stop_token_ids));
    }
    let num_drawable = if allowed.is_empty() { model.limits().num_drawable_ids } else { allowed.len() };
    let num_banned = if allowed.is_empty() { banned.len() } else { banned.intersection(&allowed).count() };
    if num_banned < num_drawable {
        return Ok(());
    }
    refuse(format!("bad words and stop ids before min_new_tokens may rule out all of {num_drawable} ids to draw"))
}

fn check_ids(group_id: GroupId, what: &str, ids: &[u32], limits: ModelLimits) -> Result<(), Error> {
    match ids.iter().position(|&id| id as usize >= limits.vocab_size) {
        None => Ok(()),
        Some(at) => Err(Error::InvalidRequest {
            group_id,
            cause: format!("{what}[{at}] = {} is no token id: expected less than {}", ids[at], limits.vocab_size),
        }),
    }
}

fn check_length(request: &GroupRequest, limits: ModelLimits) -> Result<GroupShape, Error> {
    let (prompt_len, max_new_tokens) = (request.prompt_token_ids.len(), request.sampling.max_new_tokens as usize);
    let shape = GroupShape { prompt_len, max_new_tokens, num_samples: request.seeds.len(), ..GroupShape::default() };
    if shape.max_slots() <= limits.max_positions {
        return Ok(shape);
    }
    Err(Error::NeverFits {
        group_id: request.group_id,
        prompt_len,
        max_new_tokens,
        needed: shape.max_slots(),
        available: limits.max_positions,
        unit: "positions",
    })
}
