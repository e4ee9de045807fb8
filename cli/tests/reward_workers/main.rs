//! Rewards that are the user's own code, run by the binary's own wardens: what they may do, and what is left of them.

#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod protocol;
mod python;
mod runs;

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};
use temper_proto::{RewardService, ScoreRequest};
use temper_reward::{Launcher, LocalRewardService, RewardConfig, Scorer};
use temper_types::{FinishReason, GroupId, PromptContent, PromptId, RewardOutcome, SampleIndex, SampleKey};

/// A `command` component that runs `script` with sh. `token` marks every process of it; `keys` are further keys.
pub fn shell(script: &str, token: &str, keys: &str) -> String {
    let script = format!("export TOKEN={token}; {script}");
    let command = serde_json::json!(["/bin/sh", "-c", script, token]);
    format!("{{ kind = \"command\", command = {command}, {keys} }}")
}

/// Reads a request into `$line` and its id, quotes included, into `$id`.
pub const READ: &str = r#"read -r line || exit 0; id=${line#*\"id\":}; id=${id%%,*};"#;

/// Answers every request with a score that depends on the response alone: 1 for `good`, else 0.
pub const HONEST: &str = r#"while read -r line; do id=${line#*\"id\":}; id=${id%%,*};
    case $line in *'"response":"good"'*) s=1;; *) s=0;; esac; printf '{"id":%s,"score":%s}\n' "$id" $s; done"#;

/// The service of one component, written as in a recipe.
pub fn service(component: &str) -> Result<LocalRewardService, String> {
    #[derive(serde::Deserialize)]
    struct Recipe {
        reward: RewardConfig,
    }
    let text = format!("reward = {{ components = [{component}] }}");
    let recipe: Recipe = toml::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
    let scorer = Scorer::new(recipe.reward).map_err(|e| e.to_string())?;
    let launcher = Launcher::new(env!("CARGO_BIN_EXE_temper"), std::env::var_os("PATH").unwrap_or_default());
    LocalRewardService::new(scorer, NonZeroUsize::MIN).with_external(&launcher).map_err(|e| e.to_string())
}

/// A request for the `index`th sample.
pub fn request(index: u32, response: &str) -> ScoreRequest {
    ScoreRequest {
        key: SampleKey {
            prompt_id: PromptId(u64::from(index)),
            group_id: GroupId(7),
            sample_index: SampleIndex(index),
            epoch: 0,
        },
        data_source: "test".to_owned(),
        prompt: PromptContent::Text("a prompt".to_owned()),
        response: response.to_owned(),
        num_response_tokens: response.len(),
        prompt_token_ids: vec![1],
        response_token_ids: vec![2],
        finish_reason: FinishReason::Stop,
        ground_truth: Some("truth".to_owned()),
        extra_info: Some("{\"index\": 3}".to_owned()),
    }
}

/// Score `responses` in order.
pub fn score(service: &LocalRewardService, responses: &[&str]) -> Vec<RewardOutcome> {
    let requests: Vec<ScoreRequest> = (0..).zip(responses).map(|(index, response)| request(index, response)).collect();
    service.score(&requests).expect("the breaker stays closed")
}

/// The cause of a failure; panics on a score.
pub fn cause(outcome: &RewardOutcome) -> String {
    match outcome {
        RewardOutcome::Failed(failure) => failure.to_string(),
        scored => panic!("expected a failure, got {scored:?}"),
    }
}

/// Processes that carry `token` in their environment or their arguments.
pub fn marked(token: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/proc").expect("a process table").flatten();
    let pids = entries.filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok());
    let carries = |entry: &std::fs::DirEntry| {
        let read = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        [read("environ"), read("cmdline")].iter().any(|bytes| String::from_utf8_lossy(bytes).contains(token))
    };
    let state = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
    pids.filter(carries).map(state).collect()
}

/// Wait until `holds`, at most 20 s.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !holds() {
        assert!(begin.elapsed() < Duration::from_secs(20), "waited in vain for: {what}");
        std::thread::yield_now();
    }
}
