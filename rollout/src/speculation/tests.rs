//! What the drafters say.

use super::{Draft, DraftContext, Drafter, GroupStart, PastResponse, ReplayDrafter, SuffixDrafter};
use temper_proto::GroupRequest;
use temper_types::{GroupId, PromptId, SamplingParams};

fn request(prompt: &[u32], num_samples: u64) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(1),
        prompt_id: PromptId(1),
        epoch: 1,
        prompt_token_ids: prompt.to_vec(),
        seeds: (0..num_samples).collect(),
        sampling: SamplingParams::default(),
        ..GroupRequest::default()
    }
}

fn context<'a>(request: &'a GroupRequest, sample_index: usize, response: &'a [u32]) -> DraftContext<'a> {
    let group_id = request.group_id;
    DraftContext { group_id, sample_index, request, stop_ids: &[99], vocab_size: 100, response, max_tokens: 50 }
}

fn open(drafter: &mut dyn Drafter, request: &GroupRequest, past: &[PastResponse]) {
    let num_samples = request.seeds.len();
    drafter.open_group(&GroupStart { group_id: GroupId(1), prompt: &request.prompt_token_ids, num_samples, past });
}

fn past(sample_index: usize, token_ids: &[u32]) -> PastResponse {
    PastResponse { sample_index, token_ids: token_ids.into() }
}

fn guess(drafter: &mut dyn Drafter, context: &DraftContext<'_>) -> Vec<u32> {
    let mut draft = Draft::default();
    drafter.propose(context, &mut draft);
    assert_eq!(draft.token_ids.len(), draft.cells.len());
    draft.token_ids
}

#[test]
fn the_suffix_drafter_copies_from_the_prompt_siblings_and_the_past() {
    let request = request(&[1, 2, 3, 4, 5, 6], 2);
    let mut drafter = SuffixDrafter::new(4);
    open(&mut drafter, &request, &[past(0, &[20, 21, 22, 23])]);
    assert_eq!(guess(&mut drafter, &context(&request, 0, &[])), [20, 21, 22, 23], "the past began here");
    drafter.observe(&context(&request, 0, &[9, 2, 3]), 3);
    assert_eq!(guess(&mut drafter, &context(&request, 0, &[9, 2, 3])), [4, 5, 6], "to the end of the prompt");
    drafter.observe(&context(&request, 1, &[30, 31, 32, 33]), 4);
    drafter.observe(&context(&request, 0, &[9, 2, 3, 30, 31]), 2);
    assert_eq!(guess(&mut drafter, &context(&request, 0, &[9, 2, 3, 30, 31])), [32, 33]);
    drafter.close_group(GroupId(1));
    assert!(guess(&mut drafter, &context(&request, 0, &[9, 2, 3, 30, 31])).is_empty());
}

#[test]
fn the_majority_decides_among_equal_matches() {
    let request = request(&[7, 8], 1);
    let mut drafter = SuffixDrafter::new(8);
    let texts = [past(0, &[1, 2, 5, 5]), past(1, &[1, 2, 6, 4]), past(2, &[1, 2, 6, 3])];
    open(&mut drafter, &request, &texts);
    drafter.observe(&context(&request, 0, &[1, 2]), 2);
    assert_eq!(guess(&mut drafter, &context(&request, 0, &[1, 2])), [6, 4], "the first pass listed is the latest");
}

#[test]
fn the_longest_context_wins() {
    let request = request(&[7, 8], 1);
    let mut drafter = SuffixDrafter::new(8);
    open(&mut drafter, &request, &[past(0, &[1, 2, 3, 50]), past(1, &[9, 2, 3, 60]), past(2, &[4, 2, 3, 60])]);
    drafter.observe(&context(&request, 0, &[1, 2, 3]), 3);
    assert_eq!(guess(&mut drafter, &context(&request, 0, &[1, 2, 3])), [50]);
}

#[test]
fn replay_stays_at_its_position_and_finds_back() {
    let request = request(&[7, 8], 2);
    let mut drafter = ReplayDrafter::new(3);
    open(&mut drafter, &request, &[past(1, &[1, 2, 3, 4, 5, 6]), past(1, &[40; 9]), past(0, &[50; 9])]);
    let mut say = |sample, response: &[u32]| guess(&mut drafter, &context(&request, sample, response));
    assert_eq!(say(1, &[]), [1, 2, 3], "the latest pass");
    assert_eq!(say(1, &[1, 2]), [3, 4, 5]);
    assert!(say(1, &[1, 9]).is_empty(), "they differ here");
    assert_eq!(say(1, &[1, 9, 3]), [4, 5, 6], "and agree again");
    assert!(say(1, &[1, 2, 3, 4, 5, 6, 7]).is_empty(), "the original is over");
    assert_eq!(say(0, &[50; 8]), [50]);
    assert!(say(7, &[]).is_empty());
}
