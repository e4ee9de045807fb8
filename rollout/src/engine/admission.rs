//! What the engine refuses before it queues anything.

use crate::scheduler::GroupShape;
use crate::{Error, ModelLimits};
use temper_proto::GroupRequest;
use temper_types::GroupId;

/// Check a request against the model; returns its shape.
pub(super) fn check_request(
    request: &GroupRequest,
    limits: ModelLimits,
    has_token_bytes: bool,
) -> Result<GroupShape, Error> {
    let group_id = request.group_id;
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
    if sampling.min_new_tokens > 0 && sampling.stop_token_ids.len() >= limits.num_drawable_ids {
        return refuse(format!(
            "sampling: {} stop ids before min_new_tokens leave none of {} ids to draw",
            sampling.stop_token_ids.len(),
            limits.num_drawable_ids
        ));
    }
    check_length(request, limits)
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
    let shape = GroupShape { prompt_len, max_new_tokens, num_samples: request.seeds.len() };
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
