//! Continuations of the same words: in the prompt, in siblings, and in earlier responses to the prompt (in the manner
//! of SuffixDecoding, arXiv 2411.04975).
//!
//! Each open group has an index from two consecutive tokens to the places where they stood. The places whose longer
//! context agrees best with the end of a sample are followed together: at every token the majority decides. The index
//! takes a bounded list per pair; a guess costs at most [`MAX_PLACES`] comparisons of [`MAX_MATCH`] tokens. A token is
//! entered when the next guess is asked for: where no guess could pay, nobody asks.

use super::calibration::Cell;
use super::{Draft, DraftContext, Drafter, DrafterKind, GroupStart};
use std::collections::HashMap;
use std::ops::Range;
use temper_types::GroupId;

/// Latest places of a pair that are looked at.
const MAX_PLACES: usize = 32;
/// Tokens of context that are compared.
const MAX_MATCH: usize = 32;

/// Drafts from what the group and its past have said. See the module.
#[derive(Debug)]
pub struct SuffixDrafter {
    max_tokens: usize,
    groups: HashMap<GroupId, GroupIndex>,
    /// Places that are being followed.
    places: Vec<Place>,
}

/// A token that followed an indexed pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Which text; the prompt itself is [`PROMPT`].
    text: u32,
    /// Slot of the token: the prompt's slots come before the response's.
    slot: u32,
}

const PROMPT: u32 = u32::MAX;

#[derive(Debug)]
struct GroupIndex {
    prompt: Vec<u32>,
    /// Responses after the prompt: one for each sample, then those of earlier passes.
    texts: Vec<Vec<u32>>,
    /// Tokens to enter, oldest first: of a text, from a slot to before another.
    unentered: Vec<(u32, Range<usize>)>,
    places: HashMap<u64, Vec<Place>>,
}

impl GroupIndex {
    fn new(start: &GroupStart<'_>) -> Self {
        let texts = vec![Vec::new(); start.num_samples];
        let unentered = vec![(PROMPT, 0..start.prompt.len())];
        let mut index = GroupIndex { prompt: start.prompt.to_vec(), texts, unentered, places: HashMap::new() };
        // The latest pass comes last, where it is looked at first.
        for past in start.past.iter().rev() {
            index.texts.push(Vec::new());
            index.extend(index.texts.len() - 1, &past.token_ids);
        }
        index
    }

    fn extend(&mut self, text: usize, token_ids: &[u32]) {
        let first = self.prompt.len() + self.texts[text].len();
        self.texts[text].extend_from_slice(token_ids);
        self.unentered.push((text as u32, first..first + token_ids.len()));
    }

    /// Enter every token that is not.
    fn catch_up(&mut self) {
        let mut unentered = std::mem::take(&mut self.unentered);
        for (text, slots) in unentered.drain(..) {
            slots.for_each(|slot| self.add(text, slot));
        }
        // Empty, but its memory stays.
        self.unentered = unentered;
    }

    /// The token at `slot`, or `None` behind the end.
    fn token(&self, text: u32, slot: usize) -> Option<u32> {
        match slot.checked_sub(self.prompt.len()) {
            None => Some(self.prompt[slot]),
            Some(at) => self.texts.get(text as usize)?.get(at).copied(),
        }
    }

    /// The pair of tokens before `slot`.
    fn pair_before(&self, text: u32, slot: usize) -> Option<u64> {
        let (first, second) = (self.token(text, slot.checked_sub(2)?)?, self.token(text, slot - 1)?);
        Some(u64::from(first) << 32 | u64::from(second))
    }

    /// Enter the token at `slot` under the pair before it.
    fn add(&mut self, text: u32, slot: usize) {
        let Some(pair) = self.pair_before(text, slot) else { return };
        let places = self.places.entry(pair).or_default();
        if places.len() >= 2 * MAX_PLACES {
            places.drain(..MAX_PLACES);
        }
        places.push(Place { text, slot: slot as u32 });
    }

    /// Number of equal tokens before `place` and before `slot` of `text`.
    fn match_len(&self, place: Place, (text, slot): (u32, usize)) -> usize {
        let other = place.slot as usize;
        let is_equal = |back: &usize| self.token(place.text, other - back) == self.token(text, slot - back);
        (1..=MAX_MATCH.min(other).min(slot)).take_while(is_equal).count()
    }

    /// Collect the places whose context agrees best with the end of sample `text`; returns over how many tokens.
    fn find(&self, text: u32, out: &mut Vec<Place>) -> usize {
        out.clear();
        let end = self.prompt.len() + self.texts[text as usize].len();
        let Some(places) = self.pair_before(text, end).and_then(|pair| self.places.get(&pair)) else { return 0 };
        let mut longest = 0;
        for &place in places.iter().rev().take(MAX_PLACES) {
            let len = self.match_len(place, (text, end));
            if len > longest {
                longest = len;
                out.clear();
            }
            if len == longest {
                out.push(place);
            }
        }
        longest
    }
}

impl SuffixDrafter {
    /// A drafter of at most `max_tokens` tokens at once.
    pub fn new(max_tokens: usize) -> Self {
        SuffixDrafter { max_tokens, groups: HashMap::new(), places: Vec::new() }
    }
}

/// The token most places agree on (the latest of them on a tie), with its votes.
fn majority(index: &GroupIndex, places: &[Place], offset: usize) -> Option<(u32, usize)> {
    let token = |place: &Place| index.token(place.text, place.slot as usize + offset);
    let votes = |id: u32| places.iter().filter(|place| token(place) == Some(id)).count();
    let mut best: Option<(u32, usize)> = None;
    for id in places.iter().filter_map(token) {
        match best {
            Some((known, _)) if known == id => {}
            Some((_, most)) if votes(id) <= most => {}
            _ => best = Some((id, votes(id))),
        }
    }
    best
}

impl Drafter for SuffixDrafter {
    fn kind(&self) -> DrafterKind {
        DrafterKind::Suffix
    }

    fn open_group(&mut self, start: &GroupStart<'_>) {
        self.groups.insert(start.group_id, GroupIndex::new(start));
    }

    fn observe(&mut self, context: &DraftContext<'_>, num_new: usize) {
        if let Some(index) = self.groups.get_mut(&context.group_id) {
            index.extend(context.sample_index, &context.response[context.response.len() - num_new..]);
        }
    }

    fn propose(&mut self, context: &DraftContext<'_>, draft: &mut Draft) {
        let Some(index) = self.groups.get_mut(&context.group_id) else { return };
        index.catch_up();
        let match_len = index.find(context.sample_index as u32, &mut self.places);
        for offset in 0..self.max_tokens.min(context.max_tokens).min(2 * match_len) {
            let Some((token_id, votes)) = majority(index, &self.places, offset) else { return };
            draft.push(token_id, Cell::new(match_len + offset, votes, self.places.len()));
            self.places.retain(|place| index.token(place.text, place.slot as usize + offset) == Some(token_id));
        }
    }

    fn close_group(&mut self, group_id: GroupId) {
        self.groups.remove(&group_id);
    }
}
