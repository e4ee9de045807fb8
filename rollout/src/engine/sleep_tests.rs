//! An engine that is put to sleep whenever somebody asks: it refuses by name while a group is open, has no block in use
//! and no memory while it sleeps, wakes with the next group, and says what it would have said without.

use super::fake_model::respond;
use super::tests::{engine, request, roomy, run};
use crate::Error;
use proptest::prelude::*;
use temper_types::ErrorCode;

/// One group, and after how many steps of it sleep is asked for.
fn lives() -> impl Strategy<Value = Vec<((usize, u64, u32), usize)>> {
    prop::collection::vec(((1usize..50, 1u64..5, 1u32..30), 0usize..40), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sleep_is_refused_while_a_group_is_open_and_changes_no_response(lives in lives()) {
        let mut engine = engine(roomy());
        for (group, ((prompt_len, num_samples, max_new_tokens), num_steps)) in lives.into_iter().enumerate() {
            // Every other group repeats a prompt: what was cached of it is gone.
            let request = temper_proto::GroupRequest {
                group_id: temper_types::GroupId(group as u64),
                ..request(group as u64 / 2, prompt_len, num_samples, max_new_tokens)
            };
            engine.submit(vec![request.clone()]).unwrap();
            for _ in 0..num_steps {
                engine.step().unwrap();
            }
            if !engine.is_idle() {
                let before = engine.stats();
                let refused = engine.sleep().unwrap_err();
                prop_assert_eq!(&refused, &Error::NotIdle { num_open: 1 });
                prop_assert_eq!(refused.code(), ErrorCode::InvalidArgument);
                prop_assert_eq!(engine.stats(), before);
            }
            let mut results = run(&mut engine);
            results.extend(std::iter::from_fn(|| engine.pop_finished()));
            for (index, sample) in results[0].samples.iter().enumerate() {
                prop_assert_eq!(&sample.token_ids, &respond(&request, index).0, "group {} sample {}", group, index);
            }
            prop_assert!(engine.sleep().unwrap() > 0);
            prop_assert_eq!(engine.stats().kv_blocks_in_use, 0);
            prop_assert_eq!(engine.sleep().unwrap(), 0, "it sleeps already");
        }
    }
}
