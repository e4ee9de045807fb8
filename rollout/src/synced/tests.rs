//! An engine that takes new weights while groups are open, and one that cannot get them.

use super::SyncedRolloutService;
use crate::weight_receiver::tests::{Source, receiver};
use crate::{EngineConfig, LocalRolloutService, TokenByteTable};
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{GroupRequest, GroupResult, RolloutService};
use temper_tensor::{CpuConfig, CpuDevice};
use temper_types::{ErrorCode, GroupId, PolicyVersion, SamplingParams};

const LONG: Duration = Duration::from_secs(3600);

/// A service under the weights of seed 1, which takes those of `source`.
fn service(source: Source) -> SyncedRolloutService<LocalRolloutService> {
    let (receiver, policy) = receiver(source);
    let device = Arc::new(CpuDevice::new(CpuConfig { num_threads: 1, isa: None }));
    let bytes = Arc::new(TokenByteTable(vec![vec![b'a']; 50]));
    let engine = LocalRolloutService::new(device, policy, EngineConfig::default(), bytes).expect("a valid engine");
    SyncedRolloutService::new(engine, receiver)
}

fn request(group: u64) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(group),
        prompt_token_ids: vec![1, 2, 3],
        seeds: vec![group, 5],
        sampling: SamplingParams { max_new_tokens: 9, ..SamplingParams::default() },
        ..GroupRequest::default()
    }
}

fn versions(result: Option<GroupResult>) -> Vec<(PolicyVersion, u32)> {
    result.expect("a group").samples.into_iter().flat_map(|sample| sample.policy_versions).collect()
}

#[test]
fn open_groups_end_under_the_weights_that_began_them() {
    let source = Source::new(16, 2);
    let new = source.version;
    let service = service(source);
    let old = service.receiver.version();
    service.submit(vec![request(0), request(1)]).unwrap();
    assert_eq!(service.next_group(Duration::ZERO).unwrap_err().code, ErrorCode::DeadlineExceeded, "one step is done");
    service.set_version(new).unwrap();
    assert_eq!(service.stats().num_requests_running, 0);
    service.submit(vec![request(2)]).unwrap();
    for expected in [old, old, new] {
        assert_eq!(versions(service.next_group(LONG).unwrap()), [(expected, 9); 2]);
    }
    assert_eq!(service.next_group(LONG), Ok(None));
}

#[test]
fn weights_that_do_not_come_or_are_others_leave_the_old_ones_serving() {
    let damaged = [
        (Source { cut: Some(40), ..Source::new(16, 2) }, ErrorCode::Unavailable),
        (Source { flip: Some(0), ..Source::new(16, 2) }, ErrorCode::VersionMismatch),
    ];
    for (source, expected) in damaged {
        let new = source.version;
        let service = service(source);
        let old = service.receiver.version();
        assert_eq!(service.set_version(new).unwrap_err().code, expected);
        assert_eq!(service.set_version(old), Ok(()));
        service.submit(vec![request(0)]).unwrap();
        assert_eq!(versions(service.next_group(LONG).unwrap()), [(old, 9); 2]);
    }
}
