//! Broken recipes: exit code 2, one message that says what is wrong, where, and what would be right.

mod common;

use common::{SMALL, recipe, temper};
use std::path::{Path, PathBuf};

struct Case {
    name: &'static str,
    /// Replaced in the small recipe.
    from: &'static str,
    to: &'static str,
    /// What the message must say.
    says: &'static [&'static str],
}

const fn case(name: &'static str, from: &'static str, to: &'static str, says: &'static [&'static str]) -> Case {
    Case { name, from, to, says }
}

const CASES: &[Case] = &[
    case(
        "typo in a key",
        "mini_batches = 2",
        "mini_batchs = 2",
        &["recipe.toml:4", "mini_batchs", "did you mean `mini_batches`?"],
    ),
    case(
        "typo in a section",
        "[validation]",
        "[validaton]",
        &["recipe.toml:", "validaton", "did you mean `validation`?"],
    ),
    case("wrong type", "batch_size = 16", "batch_size = \"many\"", &["recipe.toml:35", "stage.0.batch_size", "string"]),
    case(
        "impossible batch split",
        "mini_batches = 2",
        "mini_batches = 3",
        &["stage.1.mini_batches", "4 prompts", "3 equal mini-batches", "divisor"],
    ),
    case("no name", "name = \"small\"", "name = \"\"", &["recipe.toml:2", "`name`", "cannot name the directory"]),
    case(
        "a path as a name",
        "name = \"small\"",
        "name = \"../x\"",
        &["recipe.toml:2", "`name`", "\"../x\"", "without `/`"],
    ),
    case("the directory above", "name = \"small\"", "name = \"..\"", &["recipe.toml:2", "`name`", "\"..\""]),
    case(
        "a seed beyond TOML",
        "seed = 5",
        "seed = 18446744073709551615",
        &["recipe.toml:4", "at most 9223372036854775807"],
    ),
    case("group of one", "num_generations = 4", "num_generations = 1", &["stage.1.num_generations", "at least 2"]),
    case(
        "missing data file",
        "generate = { generator = { task = \"sort_digits\", min_digits = 2, max_digits = 3 }, num_rows = 32, seed = 2 }",
        "files = [\"nowhere.jsonl\"]",
        &["data.train", "nowhere.jsonl"],
    ),
    case("unknown reward", "kind = \"exact_match\"", "kind = \"exact_mach\"", &["reward", "exact_mach", "exact_match"]),
    case("bad pattern", "pattern = \"^[0-9]+$\"", "pattern = \"^[0-9+$\"", &["reward", "^[0-9+$"]),
    case("unknown stage kind", "kind = \"grpo\"", "kind = \"gppo\"", &["stage.1.kind", "grpo"]),
    case(
        "no number to be correct at",
        "every_steps = 3",
        "every_steps = 3\ncorrect_at = nan",
        &["recipe.toml:", "validation.correct_at", "finite number"],
    ),
    case(
        "missing dataset",
        "data = \"demonstrations\"",
        "data = \"demonstration\"",
        &["stage.0.data", "did you mean `demonstrations`?"],
    ),
    case(
        "ranks that divide no heads",
        "[placement]",
        "[placement]\nrollout_tensor_parallel = 2",
        &[
            "placement.rollout_tensor_parallel",
            "2 does not fit the model",
            "`num_key_value_heads` is 1",
            "multiple of 2",
        ],
    ),
    case(
        "ranks that divide no sums",
        "[placement]",
        "[placement]\nrollout_tensor_parallel = 3",
        &["placement.rollout_tensor_parallel", "3 is out of range", "1, 2, 4 or 8"],
    ),
    case(
        "workers in one process",
        "[placement]",
        "[placement]\nrollout_workers = 2",
        &["placement.rollout_workers", "2 workers", "mode = \"processes\""],
    ),
    case(
        "nobody to mirror it",
        "[placement]",
        "[placement]\nmode = \"processes\"\nmirror_shards = true",
        &["placement.mirror_shards", "1 trainer rank has nobody", "trainer_ranks = 2 or more"],
    ),
    case(
        "mirrors that are lost together",
        "[placement]",
        "[placement]\ntrainer_ranks = 2\nmirror_shards = true",
        &["placement.mirror_shards", "are threads", "mode = \"processes\""],
    ),
    case(
        "asleep while it generates",
        "[placement]",
        "[placement]\nsleep = true\nstaleness = 1",
        &["placement.sleep", "does not go with staleness = 1", "staleness = 0"],
    ),
    case(
        "too far ahead",
        "[placement]",
        "[placement]\nstaleness = 9",
        &["placement.staleness", "9 is out of range", "0 (synchronous) to 8"],
    ),
    case(
        "nowhere to join",
        "[placement]",
        "[placement]\nmode = \"processes\"\nspawn_workers = false",
        &["placement.listen", "with a port"],
    ),
    case(
        "a wait without an end",
        "seed = 5",
        "seed = 5\nrollout_timeout_seconds = 1e300",
        &["recipe.toml:5", "rollout_timeout_seconds", "1e300 is out of range", "more than 0, at most 1000000000"],
    ),
    case(
        "ranks that wait without an end",
        "[placement]",
        "[placement]\ncollective_timeout_seconds = 9223372036854775807",
        &["placement.collective_timeout_seconds", "out of range", "1 to 1000000000"],
    ),
    case("no completions", "demonstration = \"solution\"", "demonstration = \"none\"", &["stage.0.data", "completion"]),
    case(
        "unknown estimator",
        "algorithm = { policy_loss",
        "algorithm = { advantage = { adv_estimator = \"grpoo\" }, policy_loss",
        &["adv_estimator", "grpoo", "did you mean `grpo`?"],
    ),
    case(
        "sampling out of range",
        "sampling = { max_new_tokens = 6 }",
        "sampling = { max_new_tokens = 6, top_p = 1.5 }",
        &["stage.1.sampling", "top_p", "at most 1"],
    ),
    case(
        "response longer than the model",
        "sampling = { max_new_tokens = 6 }",
        "sampling = { max_new_tokens = 64 }",
        &["max_new_tokens", "64", "32 positions"],
    ),
    case(
        "a curriculum without a band",
        "steps = 6\n",
        "steps = 6\ncurriculum = { enable = true, min_pass_rate = 0.9, max_pass_rate = 0.1 }\n",
        &["stage.1.curriculum", "max_pass_rate", "min_pass_rate to 1"],
    ),
    case(
        "more kept than drawn",
        "algorithm = { policy_loss",
        "algorithm = { best_of_n = { best = 3, worst = 2 }, policy_loss",
        &["stage.1.algorithm.best_of_n", "5 of 4 samples"],
    ),
    case(
        "a reference that moves too far",
        "steps = 6\n",
        "steps = 6\nreference = { sync_every_steps = 2, mixup_alpha = 2.0 }\n",
        &["stage.1.reference.mixup_alpha", "at most 1"],
    ),
    case(
        "on-policy weights that are not 1",
        "policy_loss = { use_kl_loss = true",
        "policy_loss = { rollout_correction = { rollout_is = \"token\", rollout_is_threshold = 0.5 }, use_kl_loss = true",
        &["stage.1.algorithm", "rollout_is_threshold", "bounds around 1"],
    ),
    case(
        "nothing is over-sampled",
        "sampling = { max_new_tokens = 6 }",
        "sampling = { max_new_tokens = 6 }\npartial_rollouts = { over_sampling = 1.0, round_tokens = 2 }",
        &["stage.1.partial_rollouts.over_sampling", "4 prompts", "more than 1"],
    ),
    case(
        "a round longer than a response",
        "sampling = { max_new_tokens = 6 }",
        "sampling = { max_new_tokens = 6 }\npartial_rollouts = { round_tokens = 6 }",
        &["stage.1.partial_rollouts.round_tokens", "less than the 6 tokens"],
    ),
    case(
        "dynamic sampling over partial rollouts",
        "algorithm = { policy_loss",
        "partial_rollouts = { round_tokens = 2 }\nalgorithm = { filter_groups = { enable = true }, policy_loss",
        &["stage.1.partial_rollouts", "filter_groups.enable = false"],
    ),
    case(
        "greedy responses beside partial rollouts",
        "algorithm = { policy_loss",
        "partial_rollouts = { round_tokens = 2 }\nalgorithm = { advantage = { adv_estimator = \"remax\" }, policy_loss",
        &["stage.1.partial_rollouts", "another adv_estimator"],
    ),
    case("no TOML", "steps = 6", "steps = ", &["recipe.toml:4"]),
    case(
        "a task that cannot be",
        "min_digits = 2, max_digits = 3 }, num_rows = 8",
        "min_digits = 4, max_digits = 3 }, num_rows = 8",
        &["data.held_out", "min_digits", "1 to max_digits"],
    ),
    case(
        "bad engine",
        "[placement]",
        "[engine]\nblock_size = 20\n[placement]",
        &["engine", "block_size", "multiple of 16"],
    ),
    case(
        "ranks that cannot be grouped",
        "[placement]",
        "[placement]\ntrainer_ranks = 3\nsharding = \"hybrid\"\nshard_size = 2",
        &["recipe.toml:", "placement.shard_size", "divisor of trainer_ranks = 3"],
    ),
    case(
        "ranks that cannot share rows",
        "[placement]",
        "[placement]\ntrainer_ranks = 4\nsequence_parallel = 3",
        &["recipe.toml:", "placement.sequence_parallel", "divisor of trainer_ranks = 4"],
    ),
    case(
        "heads that ranks cannot divide",
        "[placement]",
        "[placement]\ntrainer_ranks = 4\nsequence_parallel = 4",
        &["recipe.toml:", "placement.sequence_parallel", "4 ranks cannot divide 2 query heads and 1 key/value heads"],
    ),
    case(
        "a system prompt before a text",
        "num_rows = 32, seed = 2 }",
        "num_rows = 32, seed = 2 }\nsystem_prompt = \"sort\"",
        &["recipe.toml:", "data.train.system_prompt", "row 0 has no messages"],
    ),
    case(
        "validation that draws nothing",
        "every_steps = 3\n",
        "every_steps = 3\nsampling = { temperature = -1.0 }\n",
        &["recipe.toml:", "validation.sampling", "temperature"],
    ),
    case(
        "validation longer than the model",
        "every_steps = 3\n",
        "every_steps = 3\nsampling = { temperature = 0.5 }\n",
        &["data.held_out", "up to 128 are drawn behind it", "the model has 32 positions"],
    ),
    case(
        "a draft model that is not there",
        "[placement]",
        "[engine]\ndraft_model = \"nowhere\"\n[placement]",
        &["recipe.toml:", "engine.draft_model", "nowhere"],
    ),
    case(
        "an overlong penalty that no response reaches",
        "use_kl_loss = true, entropy_coeff = 0.001 }",
        "use_kl_loss = true, entropy_coeff = 0.001 }, overlong = { enable = true, len = 4, max_response_length = 20 }",
        &["stage.1.algorithm", "overlong.max_response_length", "less than max_new_tokens + len"],
    ),
    case(
        "an overlong penalty longer than responses",
        "use_kl_loss = true, entropy_coeff = 0.001 }",
        "use_kl_loss = true, entropy_coeff = 0.001 }, overlong = { enable = true, len = 7 }",
        &["stage.1.algorithm", "overlong.len"],
    ),
    case("nothing to resume from", "keep_last = 2", "keep_last = 0", &["checkpoint.keep_last", "at least 1"]),
    case("bad heads", "num_attention_heads = 2", "num_attention_heads = 3", &["model.init", "multiple"]),
    case(
        "negative learning rate",
        "learning_rate = 1e-2",
        "learning_rate = -1.0",
        &["stage.0.optimizer.learning_rate", "0 or more"],
    ),
];

#[test]
fn every_broken_recipe_gets_one_message_and_exit_code_2() {
    let mut wrong = Vec::new();
    for case in CASES {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(SMALL.contains(case.from), "{}: the small recipe has no `{}`", case.name, case.from);
        let path = recipe(dir.path(), &SMALL.replacen(case.from, case.to, 1));
        let output = temper().arg("check").arg(&path).output().expect("the binary starts");
        let message = common::stderr(&output);
        let says_all = case.says.iter().all(|part| message.contains(part));
        if output.status.code() != Some(2) || !says_all || message.trim().lines().count() != 1 {
            wrong.push(format!(
                "{}: exit {:?}, expected {:?} in: {message}",
                case.name,
                output.status.code(),
                case.says
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_model_without_a_tokenizer_and_pickles_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let init = SMALL.split("[model.init]").nth(1).and_then(|s| s.split("\n\n").next()).expect("the recipe has an init");
    let with_path = |path: &std::path::Path| {
        SMALL.replace(&format!("[model.init]{init}"), &format!("[model]\npath = {:?}", path.display().to_string()))
    };
    let model = dir.path().join("model");
    std::fs::create_dir(&model).expect("writable");
    for (file, text, says) in [
        (None, "", "config.json"),
        (Some("config.json"), r#"{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}"#, "mamba"),
        (Some("config.json"), include_str!("data/config.json"), "tokenizer.json"),
    ] {
        if let Some(file) = file {
            std::fs::write(model.join(file), text).expect("writable");
        }
        let path = recipe(dir.path(), &with_path(&model));
        let output = temper().arg("check").arg(&path).output().expect("the binary starts");
        let message = common::stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains("model.path") && message.contains(says), "{message}");
    }
}

/// The small recipe over rows of files of its own.
fn over_files(dir: &Path, rows: [&[&str]; 2], settings: &str) -> PathBuf {
    let names = ["first.jsonl", "second.jsonl"].map(|name| dir.join(name));
    for (name, rows) in names.iter().zip(rows) {
        let line = |prompt: &&str| {
            let (prompt, completion) = prompt.split_once('|').unwrap_or((prompt, "12"));
            let row = serde_json::json!({"prompt": prompt, "ground_truth": "12", "completion": completion});
            format!("{row}\n")
        };
        std::fs::write(name, rows.iter().map(line).collect::<String>()).expect("writable");
    }
    let made = "generate = { generator = { task = \"sort_digits\", min_digits = 2, max_digits = 3 }, num_rows = 32, \
                seed = 2 }";
    assert!(SMALL.contains(made));
    recipe(dir, &SMALL.replace(made, &format!("files = {names:?}\n{settings}")))
}

const GOOD: &[&str] = &["sort 21=", "sort 12="];
const LONG: &str = "sort 123 123 123 123 123 123 123=";

#[test]
fn rows_that_do_not_fit_the_model_are_named_by_file_and_row() {
    let to_supervised = ["--set", "stage.0.data=train"];
    let cases: [(&[&str], &[&str], &str); 5] = [
        (
            &["sort 21=", LONG],
            &[],
            "the prompt has 33 tokens and up to 6 are drawn behind it: the model has 32 positions",
        ),
        (&["sort 21=", LONG], &[], "expected max_prompt_tokens = 27 or less"),
        (&["sort 21=", "sort z="], &[], "the prompt cannot be encoded: "),
        (&["sort 21=", ""], &[], "the prompt has no token"),
        (
            &["sort 21=|12", "sort 21=|12345678901234567890123456"],
            &to_supervised,
            "the prompt has 8 tokens and `completion` 27: the model has 32 positions",
        ),
    ];
    for (rows, sets, says) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = over_files(dir.path(), [GOOD, rows], "");
        let output = temper().arg("check").arg(&path).args(sets).output().expect("the binary starts");
        let message = common::stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        let place = format!("`data.train`: row 1 of {}: ", dir.path().join("second.jsonl").display());
        assert!(message.contains(&place) && message.contains(says), "{says}: {message}");
    }
}

#[test]
fn long_prompts_are_left_out_where_asked_for_and_counted() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = over_files(dir.path(), [&["sort 21=", LONG, "sort 12="], GOOD], "max_prompt_tokens = 20");
    let output = temper().arg("check").arg(&path).output().expect("the binary starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("data.train: 1 of 5 prompts have more than 20 tokens and are left out"), "{text}");
    let run_dir = dir.path().join("run");
    let output = temper().arg("train").arg(&path).arg("--run-dir").arg(&run_dir).output().expect("the binary starts");
    assert!(output.status.success(), "{}", common::stderr(&output));
    let none = ["--set", "data.train.max_prompt_tokens=2"];
    let output = temper().arg("check").arg(&path).args(none).output().expect("the binary starts");
    let message = common::stderr(&output);
    assert!(message.contains("every prompt has more than 2 tokens: no row is left"), "{message}");
}

#[test]
fn a_good_recipe_is_explained_in_words() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), SMALL);
    let output = temper().arg("check").arg(&path).output().expect("the binary starts");
    assert!(output.status.success(), "{}", common::stderr(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("4 prompts x 4 samples = 16 samples"), "{text}");
    assert!(text.contains("2 optimizer step(s) of 8 samples"), "{text}");
}

/// Partial rollouts are another run, are announced, and exclude lenient replay.
#[test]
fn partial_rollouts_are_explained_and_part_of_the_identity() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), SMALL);
    let partial = ["--set", "stage.1.partial_rollouts={ over_sampling = 1.5, round_tokens = 2 }"];
    let check = |sets: &[&str]| {
        let output = temper().arg("check").arg(&path).arg("--json").args(sets).output().expect("the binary starts");
        assert!(output.status.success(), "{}", common::stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        (report["identity"].to_string(), report["summary"].to_string())
    };
    let ((plain, _), (identity, text)) = (check(&[]), check(&partial));
    assert_ne!(identity, plain);
    assert!(text.contains("6 prompts under way") && text.contains("the first 4 that are complete"), "{text}");
    assert!(text.contains("go on under the weights of the next step; no rollout correction is set"), "{text}");
    let lenient = ["--set", "engine.replay=lenient"];
    let output = temper().arg("check").arg(&path).args(partial).args(lenient).output().expect("the binary starts");
    let message = common::stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("stage.1.partial_rollouts") && message.contains("engine.replay"), "{message}");
}

/// What replays tokens or noise is another run; what only guesses is not.
#[test]
fn replay_is_part_of_the_identity_and_announced() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), SMALL);
    let check = |sets: &[&str]| {
        let output = temper().arg("check").arg(&path).arg("--json").args(sets).output().expect("the binary starts");
        assert!(output.status.success(), "{}", common::stderr(&output));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        (report["identity"].to_string(), report.to_string())
    };
    let (plain, text) = check(&[]);
    assert!(!text.contains("LOSSY") && !text.contains("coupled"));
    assert_eq!(check(&["--set", "engine.speculative=off"]).0, plain);
    let (coupled, text) = check(&["--set", "engine.replay=coupled"]);
    assert!(text.contains("the noise of the first") && coupled != plain, "{text}");
    let lenient = ["--set", "engine.replay=lenient", "--set", "engine.speculative=replay"];
    let (identity, text) = check(&lenient);
    assert!(text.contains("LOSSY") && text.contains("no rollout correction"), "{text}");
    assert!(identity != plain && identity != coupled);
    assert_ne!(check(&[&lenient[..], &["--set", "engine.lenience=1.5"]].concat()).0, identity);

    let top_p = ["--set", "stage.1.sampling.top_p=0.9"];
    let output = temper().arg("check").arg(&path).args(lenient).args(top_p).output().expect("the binary starts");
    let message = common::stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("stage.1.sampling") && message.contains("untruncated law"), "{message}");
}

#[test]
fn a_resolved_recipe_names_origins_and_is_a_recipe_of_the_same_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), SMALL);
    let identity = |path: &std::path::Path, sets: &[&str]| {
        let output = temper().arg("check").arg(path).arg("--json").args(sets).output().expect("the binary starts");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("a report");
        report["identity"].as_str().expect("an identity").to_owned()
    };
    let sets = ["--set", "seed=9"];
    let output = temper().arg("check").arg(&path).arg("--resolved").args(sets).output().expect("the binary starts");
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(
        text.contains("seed = 9  # --set") && text.contains("# default") && text.contains("recipe.toml:"),
        "{text}"
    );
    let resolved = dir.path().join("resolved.toml");
    std::fs::write(&resolved, text).expect("writable");
    assert_eq!(identity(&resolved, &[]), identity(&path, &sets));
    assert_ne!(identity(&resolved, &[]), identity(&path, &[]));
}

/// What `--set` gives is the command line's, in the resolved recipe and in errors.
#[test]
fn what_is_set_is_blamed_on_set() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), SMALL);
    let check = |sets: &[&str]| temper().arg("check").arg(&path).args(sets).output().expect("the binary starts");
    let overlong = "stage.1.algorithm.overlong={enable=true,len=4}";
    let output = check(&["--resolved", "--set", overlong]);
    let text = String::from_utf8(output.stdout).expect("text");
    let table = text.split_once("overlong]").map_or(text.as_str(), |(_, rest)| rest);
    assert!(table.contains("enable = true  # --set\n") && table.contains("len = 4  # --set\n"), "{text}");
    for (set, says) in [
        ("stage.1.sampling.temperature=-1", "--set: `stage.1.sampling`: temperature"),
        ("foo.bar=1", "--set: `foo`: unknown key"),
        ("stage.1.sampling.foo=1", "--set: `stage.1.sampling.foo`: unknown key"),
        ("engine.max_num_seqs=0", "--set: `engine`"),
        (
            "seed=18446744073709551615",
            "--set: `seed`: 18446744073709551615 is out of range: expected an integer from 0 to 9223372036854775807",
        ),
    ] {
        let output = check(&["--set", set]);
        let message = common::stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{set}: {message}");
        assert!(message.starts_with(&format!("error: {says}")), "{set}: {message}");
    }
}
