//! Every environment variable that temper reads, in one place.

/// `TEMPER_LOG`: filter of log messages on stderr (`warn` where it is not set).
pub const LOG: &str = "TEMPER_LOG";

/// `TEMPER_KILL_AT=STEP:PHASE`: the process kills itself with SIGKILL when that phase of that step begins;
/// `STEP:PHASE:WORKER` kills that worker, `STEP:PHASE:WORKER:stop` stops it with SIGSTOP. Several points are joined by
/// commas. For tests of resume and recovery.
pub const KILL_AT: &str = "TEMPER_KILL_AT";

/// `PATH`: where programs of rewards are looked for that are given by a bare name.
pub const PATH: &str = "PATH";

/// Value of a variable, where it is set to valid text.
pub fn read(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
