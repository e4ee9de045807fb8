//! What a recipe says about rewards that are the user's own code.

use crate::Error;
use crate::validate::Check;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Limits of the processes of one reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ProcessLimits {
    /// Longest wait for the answer to one sample; then the process is killed.
    pub timeout_seconds: f64,
    /// CPU time that one sample may take, over all processes of the worker.
    pub cpu_seconds: f64,
    /// Address space of each process, and resident memory of all processes of a worker together.
    pub memory_mb: u64,
    /// Processes that a worker may have at once, the program itself included.
    pub max_processes: u32,
    /// Processes that score samples side by side. Changes no reward.
    pub workers: usize,
}

impl Default for ProcessLimits {
    fn default() -> Self {
        ProcessLimits { timeout_seconds: 10.0, cpu_seconds: 10.0, memory_mb: 4096, max_processes: 64, workers: 2 }
    }
}

/// When failed samples stop the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct BreakerConfig {
    /// Share of the window's samples that may fail; 1 never stops a run.
    pub max_error_rate: f64,
    /// Number of samples that are looked back on.
    pub error_window: usize,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig { max_error_rate: 0.5, error_window: 32 }
    }
}

/// Parameters of a `command` component: a program that speaks JSON lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct CommandConfig {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Limits of its processes.
    #[serde(flatten)]
    pub limits: ProcessLimits,
    /// When failed samples stop the run.
    #[serde(flatten)]
    pub breaker: BreakerConfig,
}

/// Parameters of a `python` component: a file with verl's `compute_score`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PythonConfig {
    /// The Python file.
    pub path: PathBuf,
    /// Name of the function `(data_source, solution_str, ground_truth, extra_info)`.
    #[serde(default = "default_function")]
    pub function: String,
    /// The interpreter: a path, or a name to be found in `PATH`.
    #[serde(default = "default_python")]
    pub python: String,
    /// Longest wait for the file to be loaded.
    #[serde(default = "default_start_seconds")]
    pub start_seconds: f64,
    /// Limits of its processes.
    #[serde(flatten)]
    pub limits: ProcessLimits,
    /// When failed samples stop the run.
    #[serde(flatten)]
    pub breaker: BreakerConfig,
}

/// Parameters of an `http` component: an endpoint that a request object is POSTed to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct HttpConfig {
    /// The endpoint: `http://HOST[:PORT]/PATH`.
    pub url: String,
    /// Longest wait for the whole answer to one sample.
    #[serde(default = "default_timeout_seconds")]
    pub timeout_seconds: f64,
    /// Requests that are open at once. Changes no reward.
    #[serde(default = "default_connections")]
    pub workers: usize,
    /// When failed samples stop the run.
    #[serde(flatten)]
    pub breaker: BreakerConfig,
}

fn default_function() -> String {
    "compute_score".to_owned()
}

fn default_python() -> String {
    "python3".to_owned()
}

fn default_start_seconds() -> f64 {
    60.0
}

fn default_timeout_seconds() -> f64 {
    ProcessLimits::default().timeout_seconds
}

fn default_connections() -> usize {
    8
}

/// Longest time that a key may give: a day.
const MAX_SECONDS: f64 = 86_400.0;
/// Most workers of one component.
const MAX_WORKERS: usize = 1024;
/// Largest memory limit: 1 PiB.
const MAX_MEMORY_MB: u64 = 1 << 30;

impl CommandConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<(), Error> {
        let given = self.command.first().is_some_and(|program| !program.is_empty());
        check.that(
            given,
            "command",
            &self.command,
            "the program and its arguments, as in [\"./score\", \"--strict\"]",
        )?;
        let has_nul = self.command.iter().any(|argument| argument.contains('\0'));
        check.that(!has_nul, "command", &self.command, "arguments without NUL")?;
        self.limits.validate(check)?;
        self.breaker.validate(check)
    }
}

impl PythonConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<(), Error> {
        check.that(!self.path.as_os_str().is_empty(), "path", &"", "a Python file")?;
        check.that(!self.python.is_empty(), "python", &"", "a Python interpreter, as in \"python3\"")?;
        let is_name = !self.function.is_empty() && !self.function.contains(|c: char| !c.is_alphanumeric() && c != '_');
        check.that(is_name, "function", &self.function, "the name of a function")?;
        check_seconds(check, "start_seconds", self.start_seconds)?;
        self.limits.validate(check)?;
        self.breaker.validate(check)
    }
}

impl HttpConfig {
    pub(crate) fn validate(&self, check: &Check<'_>) -> Result<(), Error> {
        let parsed = super::http::Endpoint::parse(&self.url);
        check.that(parsed.is_some(), "url", &self.url, "http://HOST[:PORT]/PATH (put a proxy before https)")?;
        check_seconds(check, "timeout_seconds", self.timeout_seconds)?;
        check_workers(check, self.workers)?;
        self.breaker.validate(check)
    }
}

impl ProcessLimits {
    fn validate(&self, check: &Check<'_>) -> Result<(), Error> {
        check_seconds(check, "timeout_seconds", self.timeout_seconds)?;
        check_seconds(check, "cpu_seconds", self.cpu_seconds)?;
        let memory = (16..=MAX_MEMORY_MB).contains(&self.memory_mb);
        check.that(memory, "memory_mb", &self.memory_mb, "16 or more, at most 1073741824")?;
        let processes = (1..=4096).contains(&self.max_processes);
        check.that(processes, "max_processes", &self.max_processes, "1 to 4096")?;
        check_workers(check, self.workers)
    }
}

impl BreakerConfig {
    fn validate(&self, check: &Check<'_>) -> Result<(), Error> {
        let rate = (0.0..=1.0).contains(&self.max_error_rate);
        check.that(rate, "max_error_rate", &self.max_error_rate, "0 to 1 (1 never stops a run)")?;
        let window = (1..=100_000).contains(&self.error_window);
        check.that(window, "error_window", &self.error_window, "1 to 100000 samples")
    }
}

fn check_seconds(check: &Check<'_>, key: &'static str, seconds: f64) -> Result<(), Error> {
    let holds = (0.001..=MAX_SECONDS).contains(&seconds);
    check.that(holds, key, &seconds, "0.001 or more, at most 86400")
}

fn check_workers(check: &Check<'_>, workers: usize) -> Result<(), Error> {
    check.that((1..=MAX_WORKERS).contains(&workers), "workers", &workers, "1 to 1024")
}
