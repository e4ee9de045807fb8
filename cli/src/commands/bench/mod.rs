//! `temper bench`: how fast this machine generates, trains, multiplies and moves weights.

pub mod calibrate;
mod gemm;
mod group;
mod grpo;
mod rollout;
mod roofline;
mod samples;
mod sync;
mod train;

use anyhow::Result;
use clap::Subcommand;

/// Measure speed on this machine. Every sample is kept in the JSON; figures are medians.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper bench gemm\n  temper bench rollout --model models/smollm2-135m --batch 32 --prompt-len 64 --new-tokens 128 --dtype bf16 --json\n  temper bench train --model models/smollm2-135m --batch 8 --seq 256 --json\n  temper bench grpo --model models/smollm2-135m --prompts 4 --gens 8 --len 64 --json\n  temper bench sync --model models/smollm2-135m --from fsdp:2 --to 1\n  temper bench calibrate recipes/quickstart.toml --output quickstart.calibration.json"
)]
pub struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Gemm(gemm::Gemm),
    Rollout(rollout::Rollout),
    Train(train::Train),
    Grpo(grpo::Grpo),
    Sync(sync::WeightSync),
    Calibrate(calibrate::Calibrate),
}

impl Bench {
    /// Run the benchmark.
    ///
    /// # Errors
    /// Flags out of range (exit code 2), a model that cannot be read.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Gemm(command) => command.run(),
            Command::Rollout(command) => command.run(),
            Command::Train(command) => command.run(),
            Command::Grpo(command) => command.run(),
            Command::Sync(command) => command.run(),
            Command::Calibrate(command) => command.run(),
        }
    }
}
