//! The service contract over the fake model.

use super::LocalRolloutService;
use crate::engine::fake_model::FakeModel;
use crate::{Clock, EngineOptions, SchedulerLimits, SpeculationConfig};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use temper_proto::{GroupRequest, RolloutService};
use temper_types::{ContentHash, ErrorCode, GroupId, PolicyVersion, PromptId, SamplingParams};

/// A clock that advances one millisecond with every look.
#[derive(Default)]
struct CountingClock(AtomicU64);

impl Clock for CountingClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

fn service() -> LocalRolloutService<FakeModel> {
    let limits = SchedulerLimits {
        max_num_seqs: 8,
        max_batch_tokens: 32,
        prefill_chunk: 16,
        block_size: 16,
        num_blocks: 40,
        watermark_blocks: 0,
        reserve_tokens: 16,
    };
    let options = EngineOptions {
        limits,
        max_queued_samples: 100,
        token_bytes: None,
        clock: Arc::new(CountingClock::default()),
        worker: "rollout-7".to_owned(),
        speculation: SpeculationConfig::OFF,
        prefix_cache: true,
    };
    LocalRolloutService::with_engine(FakeModel::new(limits.num_blocks, limits.block_size), options)
}

fn request(group: u64, max_new_tokens: u32) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(group),
        prompt_id: PromptId(group),
        epoch: 0,
        prompt_token_ids: vec![1, 2, 3],
        seeds: vec![4, 5],
        sampling: SamplingParams { max_new_tokens, ..SamplingParams::default() },
        ..GroupRequest::default()
    }
}

const LONG: Duration = Duration::from_secs(3600);

#[test]
fn groups_come_as_they_finish_and_then_none() {
    let service = service();
    service.submit(vec![request(0, 9), request(1, 3)]).unwrap();
    let order: Vec<u64> =
        std::iter::from_fn(|| service.next_group(LONG).unwrap()).map(|result| result.group_id.0).collect();
    assert_eq!(order, [1, 0]);
    assert_eq!(service.next_group(LONG), Ok(None));
    assert_eq!(service.stats().kv_blocks_in_use, 0);
    assert_eq!(service.stats().num_generated_tokens, 2 * (9 + 3));
}

#[test]
fn a_passed_deadline_is_named_and_the_groups_go_on() {
    let service = service();
    service.submit(vec![request(0, 9)]).unwrap();
    let mut deadlines = 0;
    let result = loop {
        match service.next_group(Duration::ZERO) {
            Ok(result) => break result.unwrap(),
            Err(error) => {
                assert_eq!(error.code, ErrorCode::DeadlineExceeded);
                assert_eq!(error.to_string(), "rollout-7: next_group failed: none of 1 groups finished within 0ns");
                deadlines += 1;
            }
        }
    };
    assert_eq!((deadlines, result.samples.len(), result.worker.as_str()), (8, 2, "rollout-7"));
}

#[test]
fn an_abort_drops_what_is_open_and_keeps_what_is_finished() {
    let service = service();
    service.submit(vec![request(0, 3), request(1, 3), request(2, 30)]).unwrap();
    assert_eq!(service.next_group(LONG).unwrap().unwrap().group_id, GroupId(0));
    assert_eq!(service.abort_all(), Ok(1), "group 1 finished in the same step as group 0");
    assert_eq!(service.stats().kv_blocks_in_use, 0);
    assert_eq!(service.next_group(LONG).unwrap().unwrap().group_id, GroupId(1));
    assert_eq!(service.next_group(LONG), Ok(None));
    service.submit(vec![request(2, 3)]).unwrap();
    assert_eq!(service.next_group(LONG).unwrap().unwrap().group_id, GroupId(2));
}

#[test]
fn only_the_weights_that_are_held_can_be_served() {
    let service = service();
    assert_eq!(service.set_version(PolicyVersion::default()), Ok(()));
    let other = PolicyVersion { number: 3, hash: ContentHash([9; 16]) };
    let error = service.set_version(other).unwrap_err();
    assert_eq!(error.code, ErrorCode::VersionMismatch);
    assert!(error.message.contains(&other.to_string()), "{error}");
}

#[test]
fn refusals_carry_their_code() {
    let service = service();
    let code = |request| service.submit(vec![request]).unwrap_err().code;
    assert_eq!(code(request(0, 2000)), ErrorCode::ResourceExhausted);
    assert_eq!(code(GroupRequest { seeds: vec![], ..request(0, 5) }), ErrorCode::InvalidArgument);
    assert_eq!(service.next_group(LONG), Ok(None));
}

#[test]
fn a_failing_model_fails_the_call() {
    let service = service();
    service.submit(vec![request(0, 3)]).unwrap();
    service.engine.lock().unwrap().model_mut().fails = true;
    assert_eq!(service.next_group(LONG).unwrap_err().code, ErrorCode::Internal);
    service.engine.lock().unwrap().model_mut().fails = false;
    assert_eq!(service.next_group(LONG).unwrap().unwrap().samples.len(), 2);
}
