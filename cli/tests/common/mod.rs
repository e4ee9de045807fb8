//! A small recipe and the means to run the binary on it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A recipe of two stages that runs in about a second: 4 supervised steps and 6 of GRPO, a checkpoint every 2.
pub const SMALL: &str = r#"
name = "small"
description = "a small recipe for tests"
seed = 5
dtype = "f32"

[model.init]
family = "qwen3"
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 32
alphabet = " 0123456789=orst"

[data.demonstrations]
generate = { generator = { task = "sort_digits", min_digits = 2, max_digits = 3 }, num_rows = 64, demonstration = "solution" }
[data.train]
generate = { generator = { task = "sort_digits", min_digits = 2, max_digits = 3 }, num_rows = 32, seed = 2 }
[data.held_out]
generate = { generator = { task = "sort_digits", min_digits = 2, max_digits = 3 }, num_rows = 8, split = "test" }

[[reward.components]]
kind = "exact_match"
[[reward.components]]
kind = "regex"
pattern = "^[0-9]+$"
weight = 0.5

[[stage]]
kind = "sft"
data = "demonstrations"
steps = 4
batch_size = 16
optimizer = { learning_rate = 1e-2 }

[[stage]]
kind = "grpo"
steps = 6
prompts_per_step = 4
num_generations = 4
mini_batches = 2
optimizer = { learning_rate = 1e-3, weight_decay = 0.01 }
schedule = { type = "cosine", num_warmup_steps = 1 }
sampling = { max_new_tokens = 6 }
algorithm = { policy_loss = { use_kl_loss = true, entropy_coeff = 0.001 } }

[validation]
data = "held_out"
every_steps = 3

[checkpoint]
every_steps = 2
keep_last = 2
keep_best = 1

[placement]
threads = 2
"#;

/// Write `text` as a recipe into `dir`.
pub fn recipe(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("recipe.toml");
    std::fs::write(&path, text).expect("the directory is writable");
    path
}

/// The binary under test.
pub fn temper() -> Command {
    Command::new(env!("CARGO_BIN_EXE_temper"))
}

/// stderr of a run, for messages.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
