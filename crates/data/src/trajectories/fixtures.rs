//! Samples that tests write and read.

use temper_types::{
    ChatMessage, ContentHash, FinishReason, GroupId, PolicyVersion, PromptContent, PromptId, RewardComponent,
    RewardFailure, RewardOutcome, Sample, SampleIndex, SampleTimings, Step,
};

fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8 + 0xa0; 16]) }
}

/// A sample in which every column has a value, all of them different.
pub(crate) fn full() -> Sample {
    let floats = |first: f32| vec![first, f32::MIN_POSITIVE / 2.0, -0.0];
    let component = |name: &str, value| RewardComponent { name: name.to_owned(), value };
    Sample {
        step: Step(3),
        prompt_id: PromptId(u64::MAX),
        group_id: GroupId(5),
        sample_index: SampleIndex(7),
        epoch: 2,
        seed: 0xdead_beef_dead_beef,
        data_source: "temper/sort_digits".to_owned(),
        prompt: PromptContent::Messages(vec![ChatMessage { role: "user".to_owned(), content: "\"ü\"\n".to_owned() }]),
        response: "2568 ∎".to_owned(),
        prompt_token_ids: vec![1, 2],
        response_token_ids: vec![3, 4, u32::MAX],
        response_mask: vec![1, 0, 1],
        response_reused: vec![1, 1, 0],
        rollout_log_probs: floats(-0.1),
        sampled_log_probs: floats(-0.2),
        surviving_mass: floats(0.9),
        old_log_probs: floats(-0.3),
        ref_log_probs: floats(-0.4),
        values: floats(0.5),
        advantages: floats(0.6),
        returns: floats(0.7),
        outcome: Some(RewardOutcome::Scored {
            reward: 0.1 + 0.2,
            components: vec![component("exact", 1.0), component("length", -0.25)],
        }),
        ground_truth: Some("2568".to_owned()),
        extra_info: Some("{\"index\":1}".to_owned()),
        finish_reason: FinishReason::StopString,
        policy_versions: vec![(version(1), 2), (version(2), 1)],
        staleness: 1,
        num_drafted: 9,
        num_accepted: 8,
        worker: "engine-0".to_owned(),
        timings: SampleTimings { queue_seconds: 0.5, rollout_seconds: 1.5, reward_seconds: 2.5 },
    }
}

/// A sample of which as little as possible is known.
pub(crate) fn minimal() -> Sample {
    Sample {
        step: Step(0),
        prompt_id: PromptId(0),
        group_id: GroupId(0),
        sample_index: SampleIndex(0),
        epoch: 0,
        seed: 0,
        data_source: String::new(),
        prompt: PromptContent::TokenIds(vec![8, 9]),
        response: String::new(),
        prompt_token_ids: vec![8, 9],
        response_token_ids: Vec::new(),
        response_mask: Vec::new(),
        response_reused: Vec::new(),
        rollout_log_probs: Vec::new(),
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        old_log_probs: Vec::new(),
        ref_log_probs: Vec::new(),
        values: Vec::new(),
        advantages: Vec::new(),
        returns: Vec::new(),
        outcome: None,
        ground_truth: None,
        extra_info: None,
        finish_reason: FinishReason::Abort,
        policy_versions: Vec::new(),
        staleness: 0,
        num_drafted: 0,
        num_accepted: 0,
        worker: String::new(),
        timings: SampleTimings::default(),
    }
}

/// A sample whose scoring failed.
pub(crate) fn failed() -> Sample {
    let failure = RewardFailure { scorer: "math".to_owned(), cause: "deadline of 5 s exceeded".to_owned() };
    // Text that reads like chat messages stays text.
    let prompt = PromptContent::Text("[{\"role\":\"user\",\"content\":\"x\"}]".to_owned());
    Sample { outcome: Some(RewardOutcome::Failed(failure)), prompt, finish_reason: FinishReason::Length, ..full() }
}

/// A full sample of `step`.
pub(crate) fn at_step(step: u64) -> Sample {
    Sample { step: Step(step), ..full() }
}
