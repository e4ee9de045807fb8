//! A critic in the loop: what it is asked, in which order, and what is recorded.

use crate::fakes::{Behaviour, Call, metrics, stage, updates, value};
use crate::{number, run, samples};
use serde_json::json;
use temper_controller::{CriticConfig, Error, PolicyStage, Stage};
use temper_proto::{Backbone, MiniBatch};

fn ppo(critic: CriticConfig) -> PolicyStage {
    let algorithm = json!({"advantage": {"adv_estimator": "gae", "gamma": 0.5, "lam": 0.25}});
    PolicyStage { critic: Some(critic), mini_batches: 2, epochs: 3, ..stage(3, algorithm) }
}

fn critic_updates(calls: &[Call]) -> Vec<&MiniBatch> {
    calls.iter().filter_map(|call| if let Call::Critic(batch) = call { Some(batch) } else { None }).collect()
}

#[test]
fn the_critic_learns_alone_at_first_then_before_every_policy_update() {
    let critic = CriticConfig { warmup_steps: 1, epochs: 2, ..CriticConfig::default() };
    let (dir, calls) = run(ppo(critic), Behaviour::default());
    let order: String = calls
        .iter()
        .filter_map(|call| match call {
            Call::Critic(_) => Some('c'),
            Call::Update(_) => Some('u'),
            _ => None,
        })
        .collect();
    assert_eq!(order, "cccc".to_owned() + &"ccccuuuuuu".repeat(2));
    let rows = metrics(dir.path());
    assert!(!rows[0].contains_key("loss") && rows[1].contains_key("loss"));
    for row in &rows {
        assert_eq!((number(row, "value_loss"), number(row, "critic_grad_norm")), (2.0, 3.0));
        assert_eq!(number(row, "critic_lr"), 1e-5);
        assert!(number(row, "explained_variance") < 1.0);
    }
}

#[test]
fn returns_follow_the_recursion_over_the_critics_values() {
    let (dir, calls) = run(ppo(CriticConfig::default()), Behaviour::default());
    let samples = samples(dir.path());
    for sample in &samples {
        let reward = sample.outcome.as_ref().and_then(|outcome| outcome.reward()).expect("scored");
        let values: Vec<f32> = sample.response_token_ids.iter().map(|id| value(*id)).collect();
        assert_eq!(sample.values, values);
        let (mut next, mut trace) = (0.0, 0.0);
        for (t, v) in values.iter().map(|v| f64::from(*v)).enumerate().rev() {
            let here = if t + 1 == values.len() { reward } else { 0.0 };
            trace = here + 0.5 * next - v + 0.5 * 0.25 * trace;
            next = v;
            assert!((f64::from(sample.returns[t]) - (trace + v)).abs() < 1e-6, "token {t} of {:?}", sample.returns);
        }
    }
    let advantages: Vec<f64> = samples[..16].iter().flat_map(|s| &s.advantages).map(|a| f64::from(*a)).collect();
    assert!(advantages.iter().sum::<f64>().abs() < 1e-4, "whitened over the step");
    let columns =
        |batch: &&MiniBatch| batch.rows.iter().map(|row| (row.returns.clone(), row.values.clone())).collect::<Vec<_>>();
    let (critic, policy) = (critic_updates(&calls), updates(&calls));
    assert_eq!(
        critic.iter().take(2).map(columns).collect::<Vec<_>>(),
        policy[..2].iter().map(columns).collect::<Vec<_>>()
    );
}

#[test]
fn a_head_on_the_policys_trunk_learns_in_the_policys_update() {
    let shared = CriticConfig { backbone: Backbone::Shared, ..CriticConfig::default() };
    let (dir, calls) = run(ppo(shared), Behaviour::default());
    assert!(critic_updates(&calls).is_empty());
    for batch in updates(&calls) {
        assert!(batch.rows.iter().all(|row| row.returns.len() == row.values.len() && !row.values.is_empty()));
    }
    let rows = metrics(dir.path());
    assert!(rows.iter().all(|row| row.contains_key("explained_variance") && !row.contains_key("critic_lr")));
}

#[test]
fn a_critic_stands_exactly_where_values_are_read() {
    let check = |stage: PolicyStage| match Stage::Policy(Box::new(stage)).validate("stage.0") {
        Err(Error::Config { key, problem }) => format!("{key}: {problem}"),
        other => panic!("expected an error of a key, got {other:?}"),
    };
    let without = PolicyStage { critic: None, ..ppo(CriticConfig::default()) };
    let message = check(without);
    assert!(message.starts_with("stage.0.algorithm.advantage.adv_estimator") && message.contains("ppo"), "{message}");
    let needless = PolicyStage { critic: Some(CriticConfig::default()), ..stage(3, json!({})) };
    let message = check(needless);
    assert!(message.starts_with("stage.0.critic") && message.contains("no critic"), "{message}");
    let message = check(ppo(CriticConfig { warmup_steps: 3, ..CriticConfig::default() }));
    assert!(message.starts_with("stage.0.critic.warmup_steps"), "{message}");
    let message = check(ppo(CriticConfig { epochs: 0, ..CriticConfig::default() }));
    assert!(message.starts_with("stage.0.critic.epochs"), "{message}");
    let own = CriticConfig { vf_coef: Some(0.5), ..CriticConfig::default() };
    let message = check(ppo(own));
    assert!(message.starts_with("stage.0.critic.vf_coef") && message.contains("shared"), "{message}");
    let shared = || CriticConfig { backbone: Backbone::Shared, ..CriticConfig::default() };
    let optimizer = temper_proto::OptimizerConfig::default();
    for (name, critic) in [
        ("warmup_steps", CriticConfig { warmup_steps: 1, ..shared() }),
        ("epochs", CriticConfig { epochs: 2, ..shared() }),
        ("optimizer", CriticConfig { optimizer, ..shared() }),
    ] {
        let message = check(ppo(critic));
        assert!(message.starts_with(&format!("stage.0.critic.{name}: ")) && message.contains("trunk"), "{message}");
    }
    let message = check(ppo(CriticConfig { vf_coef: Some(-1.0), ..shared() }));
    assert!(message.starts_with("stage.0.critic") && message.contains("vf_coef"), "{message}");
}
