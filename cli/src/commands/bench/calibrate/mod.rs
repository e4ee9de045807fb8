//! `temper bench calibrate`: what `temper plan` has to know of this machine, measured with the recipe's own model.

mod around;
mod engine;
mod links;
mod tensor;
mod training;

use crate::commands::bench::samples::median;
use crate::commands::common::output::{print, write_json};
use crate::local_text::LocalText;
use crate::plan::{Calibration, FORMAT, ModelSizes, Point};
use crate::planned::{Lengths, Planned};
use crate::runtime::initial_model;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use temper_proto::TokenSequence;
use temper_tensor::bench::{measure_peak, measure_read_rate};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::DType;

/// Measure on this machine, with the recipe's model and lengths, what `temper plan` predicts from: generation by rows,
/// training by tokens, updates, weight sync, messages, and the links between trainer ranks and between the ranks of an
/// engine. Takes less than a minute.
///
/// Nothing is written but the file; a model that the recipe makes itself is made in a temporary directory. Other work
/// on the machine makes the figures worse: measure it as the run will find it.
#[derive(clap::Args)]
pub struct Calibrate {
    /// The recipe.
    recipe: PathBuf,
    /// Override a key of the recipe, as in `temper train`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The stage to measure for, by its name; without it the first that learns from samples.
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    #[command(flatten)]
    lengths: Lengths,
    /// Write the measurement as JSON to this file; without it to stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Calibrate {
    pub(super) fn run(self) -> Result<()> {
        let planned = Planned::load((&self.recipe, &self.set), self.stage.as_deref(), &self.lengths)?;
        let cal = calibrate(&planned)?;
        write_json(self.output.as_deref(), &serde_json::to_value(&cal)?)?;
        match &self.output {
            Some(path) => print(&format!(
                "{}: now `temper plan {} --calibration {}`\n",
                path.display(),
                self.recipe.display(),
                path.display()
            )),
            None => Ok(()),
        }
    }
}

/// Time after which a measurement is repeated no more.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Longest that a single run of anything but the smallest size may take.
const MOST_SECONDS: f64 = 4.0;
/// Repetitions where there is time.
const REPEATS: usize = 7;

/// Median seconds of `work`, which is repeated while there is time; the first run warms up, and counts where it took
/// all the time there is.
fn median_seconds(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let begin = Instant::now();
    let mut seconds = Vec::new();
    for _ in 0..=REPEATS {
        let start = Instant::now();
        work()?;
        seconds.push(start.elapsed().as_secs_f64());
        if begin.elapsed() > PATIENCE {
            break;
        }
    }
    if seconds.len() > 1 {
        seconds.remove(0);
    }
    Ok(median(&seconds))
}

/// What measurements share.
struct Bench<'a> {
    planned: &'a Planned,
    device: Arc<dyn Device>,
    dtype: DType,
    model_dir: &'a Path,
    text: Arc<LocalText>,
    /// Tokens of a prompt and of a response.
    lengths: (usize, usize),
}

impl Bench<'_> {
    /// Pseudo-random ids, special tokens at the ends of the vocabulary left out where it is large.
    fn ids(&self, len: usize, stream: u64) -> Vec<u32> {
        super::samples::random_ids(self.planned.config.vocab_size, len, stream)
    }

    fn masked_ids(&self) -> Vec<u32> {
        self.text.tokenizer().missing_ids(self.planned.config.vocab_size)
    }

    /// Groups of the recipe's shape, with responses of the expected length.
    fn sequences(&self, groups: usize, rows: usize) -> Vec<TokenSequence> {
        let (prompt, response) = self.lengths;
        let row = |group: usize, row: usize| TokenSequence {
            prompt_token_ids: self.ids(prompt, group as u64),
            response_token_ids: self.ids(response, (1 << 32) + (group * rows + row) as u64),
            response_mask: vec![1; response],
        };
        (0..groups).flat_map(|group| (0..rows).map(move |index| (group, index))).map(|(g, r)| row(g, r)).collect()
    }
}

/// A directory that ends with its owner.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // A directory that is left behind in the system's place for such is no reason to fail.
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

/// Measure, saying so on stderr.
///
/// # Errors
/// A model that cannot be loaded, or a measurement that fails.
pub fn calibrate(planned: &Planned) -> Result<Calibration> {
    eprintln!("measuring this machine with the recipe's model (less than a minute; `temper bench calibrate` keeps it)");
    let begin = Instant::now();
    let process_bytes = resident_bytes().unwrap_or(0);
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("temper-calibrate-{}-{:x}", std::process::id(), since.as_nanos());
    let scratch = Scratch(std::env::temp_dir().join(name));
    std::fs::create_dir_all(&scratch.0).with_context(|| format!("creating {}", scratch.0.display()))?;
    let model_dir = initial_model(&planned.recipe, &scratch.0)?;
    let cpu = CpuDevice::new(CpuConfig { num_threads: planned.recipe.placement.threads, isa: None });
    let info = cpu.info();
    let dtype = planned.dtype;
    let (peak_gflops, memory_bytes_per_second) = (measure_peak(&cpu, dtype), measure_read_rate(&cpu));
    let device: Arc<dyn Device> = Arc::new(cpu);
    let expected = planned.work.expected;
    let lengths =
        (expected.prompt_tokens.round().max(1.0) as usize, expected.response_tokens.round().max(1.0) as usize);
    let text = Arc::new(LocalText::load(&model_dir)?);
    let bench = Bench { planned, device, dtype, model_dir: &model_dir, text, lengths };
    let mut trainer = Trainer::load(Arc::clone(&bench.device), &model_dir, dtype, bench.masked_ids())?;
    let training = training::measure(&bench, &mut trainer)?;
    let generation = engine::measure(&bench, &trainer)?;
    let (threads, sockets) = (links::threads(&planned.work.shapes)?, links::sockets(&planned.work.shapes)?);
    let (tensor_threads, tensor_sockets) = tensor::measure(&bench, &trainer, &generation.decode, (threads, sockets))?;
    let trainer = Arc::new(LocalTrainerService::new(trainer));
    let (hash_seconds, pull_seconds) = links::sync(&bench, &trainer)?;
    let (sample_seconds, remote_sample_seconds) = around::sample_seconds(&bench, &trainer)?;
    let mut cal = Calibration {
        format: FORMAT,
        machine: format!("{} ({}), {} threads", info.name, info.instruction_set, info.num_threads),
        cores: info.num_threads,
        dtype,
        model: ModelSizes::of(&planned.config),
        group_size: planned.work.samples,
        prompt_tokens: lengths.0,
        response_tokens: lengths.1,
        peak_gflops,
        memory_bytes_per_second,
        process_bytes,
        start: generation.start,
        decode: generation.decode,
        forward: training.forward,
        train: training.train,
        train_recompute: training.train_recompute,
        update_seconds: training.update_seconds,
        hash_seconds,
        pull_seconds,
        sample_seconds,
        remote_sample_seconds,
        message_seconds: around::message_seconds(&bench)?,
        threads,
        sockets,
        tensor_threads,
        tensor_sockets,
        engine_crowding: generation.crowding,
        trainer_crowding: training.crowding[0],
        thread_crowding: training.crowding[1],
    };
    cal.check().map_err(|(key, problem)| anyhow::anyhow!("measured `{key}`: {problem}"))?;
    eprintln!("measured in {:.0} s", begin.elapsed().as_secs_f64());
    Ok(cal)
}

/// Resident memory of this process in bytes, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Sizes from `first` up to `last`, each four times the one before, `last` always among them.
fn sizes(first: usize, last: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> =
        std::iter::successors(Some(first.max(1)), |n| Some(4 * n)).take_while(|n| *n < last).collect();
    sizes.push(last.max(1));
    sizes
}

/// Whether something of a size would take so long, in proportion to the largest that was timed, that it is left to be
/// predicted: a large model is measured in the same minute.
fn is_too_long(table: &[Point], size: usize, times: f64) -> bool {
    table.last().is_some_and(|last| times * last.seconds * size as f64 / last.size > MOST_SECONDS)
}

fn point(size: usize, seconds: f64) -> Point {
    Point { size: size as f64, seconds: seconds.max(1e-9) }
}
