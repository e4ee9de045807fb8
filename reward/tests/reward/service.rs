use crate::scorer;
use std::num::NonZeroUsize;
use temper_proto::{RewardService, ScoreRequest};
use temper_reward::LocalRewardService;
use temper_types::{FinishReason, GroupId, PromptContent, PromptId, RewardOutcome, SampleIndex, SampleKey};

pub fn request(prompt: u64, truth: Option<&str>) -> ScoreRequest {
    ScoreRequest {
        key: SampleKey {
            prompt_id: PromptId(prompt),
            group_id: GroupId(prompt),
            sample_index: SampleIndex(2),
            epoch: 1,
        },
        data_source: "test".to_owned(),
        prompt: PromptContent::Text(format!("number {prompt}")),
        response: format!("it is {}", prompt % 3),
        prompt_token_ids: vec![1],
        response_token_ids: vec![2],
        num_response_tokens: 3,
        finish_reason: FinishReason::Stop,
        ground_truth: truth.map(str::to_owned),
        extra_info: None,
    }
}

#[test]
fn outcomes_stand_in_order_whatever_the_number_of_threads() {
    let requests: Vec<_> = (0..23).map(|prompt| request(prompt, Some("1"))).collect();
    for num_threads in [1, 2, 7, 64] {
        let service = LocalRewardService::new(scorer("\"number\""), NonZeroUsize::new(num_threads).unwrap());
        let rewards: Vec<_> = service.score(&requests).unwrap().iter().map(RewardOutcome::reward).collect();
        let wanted: Vec<_> = (0..23).map(|prompt| Some(f64::from(u8::from(prompt % 3 == 1)))).collect();
        assert_eq!(rewards, wanted, "{num_threads} threads");
        assert_eq!(service.score(&[]).unwrap(), []);
    }
}

#[test]
fn a_failure_names_scorer_sample_and_cause_and_leaves_the_others_alone() {
    let service = LocalRewardService::new(scorer("\"number\""), NonZeroUsize::new(2).unwrap());
    let outcomes = service.score(&[request(1, Some("1")), request(5, None), request(4, Some("1"))]).unwrap();
    assert_eq!((outcomes[0].reward(), outcomes[2].reward()), (Some(1.0), Some(1.0)));
    let RewardOutcome::Failed(failure) = &outcomes[1] else {
        panic!("a sample without ground truth cannot be scored");
    };
    assert_eq!(
        failure.to_string(),
        "reward `number` failed: the sample has no ground truth (prompt 5, group 5, sample 2, epoch 1)"
    );
}
