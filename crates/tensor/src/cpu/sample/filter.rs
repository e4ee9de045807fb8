//! Bias, penalties, bans and truncation of one row.

use crate::SampleRow;
use std::cmp::Ordering;

/// Ids sorted first when looking for a nucleus; grows by this factor until the mass is reached.
const FIRST_PREFIX: usize = 64;
const PREFIX_GROWTH: usize = 8;

/// Apply bias and penalties to raw logits.
pub(super) fn penalise(params: &SampleRow<'_>, logits: &mut [f32]) {
    for &(id, bias) in params.logit_bias {
        logits[id as usize] += bias;
    }
    for &(id, count) in params.seen {
        let logit = &mut logits[id as usize];
        if params.repetition_penalty != 1.0 {
            *logit = if *logit < 0.0 { *logit * params.repetition_penalty } else { *logit / params.repetition_penalty };
        }
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
}

/// Take all mass from the ids that may not be drawn.
pub(super) fn ban(params: &SampleRow<'_>, logits: &mut [f32]) {
    for id in params.banned_ids {
        logits[*id as usize] = f32::NEG_INFINITY;
    }
    if params.allowed_ids.is_empty() {
        return;
    }
    let mut start = 0;
    for id in params.allowed_ids {
        logits[start..*id as usize].fill(f32::NEG_INFINITY);
        start = *id as usize + 1;
    }
    logits[start..].fill(f32::NEG_INFINITY);
}

/// Ids that survive min-p, top-k and top-p, ascending; `weights` are `e^(z - max)`. At temperature 0 nothing is
/// dropped. `ids` is overwritten.
pub(super) fn keep_ids(params: &SampleRow<'_>, logits: &[f32], weights: &[f32], ids: &mut Vec<u32>) {
    let truncates = params.temperature > 0.0;
    let floor = if truncates { params.min_p } else { 0.0 };
    ids.clear();
    ids.reserve(weights.len());
    ids.extend((0..weights.len() as u32).filter(|id| weights[*id as usize] > 0.0 && weights[*id as usize] >= floor));
    if !truncates {
        return;
    }
    let likelier =
        |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then_with(|| a.cmp(b)) };
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < ids.len() {
        ids.select_nth_unstable_by(top_k - 1, likelier);
        ids.truncate(top_k);
        ids.sort_unstable();
    }
    if params.top_p < 1.0 && !ids.is_empty() {
        let total: f64 = ids.iter().map(|id| f64::from(weights[*id as usize])).sum();
        let wanted = f64::from(params.top_p) * total;
        // Ids this unlikely hold less than the mass that may go, all together, so the nucleus lies among the others.
        let unlikely = 0.99 * (total - wanted) / ids.len() as f64;
        ids.retain(|id| f64::from(weights[*id as usize]) >= unlikely);
        let nucleus = nucleus_len(ids, weights, wanted, likelier);
        ids.truncate(nucleus);
        ids.sort_unstable();
    }
}

/// Sort the likeliest ids to the front until their mass reaches `wanted`; returns how many that takes, at least 1.
fn nucleus_len(
    ids: &mut [u32],
    weights: &[f32],
    wanted: f64,
    likelier: impl Fn(&u32, &u32) -> Ordering + Copy,
) -> usize {
    let mut prefix = FIRST_PREFIX;
    loop {
        let len = prefix.min(ids.len());
        if len < ids.len() {
            ids.select_nth_unstable_by(len - 1, likelier);
        }
        ids[..len].sort_unstable_by(likelier);
        let mut mass = 0f64;
        for (index, id) in ids[..len].iter().enumerate() {
            mass += f64::from(weights[*id as usize]);
            if mass >= wanted {
                return index + 1;
            }
        }
        if len == ids.len() {
            return len;
        }
        prefix *= PREFIX_GROWTH;
    }
}
