//! The same sample's response of the previous pass, as a draft (SPEC-RL, arXiv 2509.23232, without its leniency: here a
//! token is kept only where the sampler draws it again).
//!
//! The guess stands at the same position as the original, so that with the same noise in every pass a response that
//! left its predecessor finds back to it where the two agree again. An earlier response that comes with the request, to
//! be replayed leniently, is the one that is guessed.

use super::calibration::Cell;
use super::{Draft, DraftContext, Drafter, DrafterKind, GroupStart};
use std::collections::HashMap;
use std::sync::Arc;
use temper_types::GroupId;

/// Tokens before the position that are compared.
const MAX_MATCH: usize = 32;

/// Drafts from the previous pass. See the module.
#[derive(Debug)]
pub struct ReplayDrafter {
    max_tokens: usize,
    /// Latest response of each sample of the open groups that have one.
    groups: HashMap<GroupId, Vec<Option<Arc<[u32]>>>>,
}

impl ReplayDrafter {
    /// A drafter of at most `max_tokens` tokens at once.
    pub fn new(max_tokens: usize) -> Self {
        ReplayDrafter { max_tokens, groups: HashMap::new() }
    }
}

impl Drafter for ReplayDrafter {
    fn kind(&self) -> DrafterKind {
        DrafterKind::Replay
    }

    fn open_group(&mut self, start: &GroupStart<'_>) {
        let latest = |index| start.past.iter().find(|past| past.sample_index == index);
        let samples = (0..start.num_samples).map(|index| latest(index).map(|past| Arc::clone(&past.token_ids)));
        if !start.past.is_empty() {
            self.groups.insert(start.group_id, samples.collect());
        }
    }

    fn observe(&mut self, _: &DraftContext<'_>, _: usize) {}

    fn propose(&mut self, context: &DraftContext<'_>, draft: &mut Draft) {
        let given = context.request.reuse.as_ref().and_then(|reuse| reuse.responses.get(context.sample_index));
        let given = given.map(|earlier| earlier.token_ids.as_slice()).filter(|ids| !ids.is_empty());
        let known = || self.groups.get(&context.group_id)?.get(context.sample_index)?.as_deref();
        let Some(past) = given.or_else(known) else { return };
        let len = context.response.len();
        let Some(rest) = past.get(len..) else { return };
        let pairs = context.response.iter().zip(past).rev().take(MAX_MATCH);
        let num_equal = pairs.take_while(|(a, b)| a == b).count();
        if num_equal == 0 && len > 0 {
            return;
        }
        let max_tokens = self.max_tokens.min(context.max_tokens);
        for (index, &token_id) in rest.iter().take(max_tokens).enumerate() {
            draft.push(token_id, Cell::new(num_equal + index, 1, 1));
        }
    }

    fn close_group(&mut self, group_id: GroupId) {
        self.groups.remove(&group_id);
    }
}
