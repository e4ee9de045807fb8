//! The two roles of temper's own binary below a reward worker, and the second of them: the launcher, which sets what
//! the kernel limits and becomes the user's program.

use super::proc_tree;
use rustix::process::{Pid, Resource, Rlimit, Signal};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// First argument of the process that watches over a user's program.
pub(crate) const WARDEN: &str = "__reward-warden";
/// First argument of the process that becomes a user's program.
pub(crate) const LAUNCHER: &str = "__reward-launcher";
/// Exit code of a launcher that could not become the program, as shells have it.
pub(crate) const NOT_LAUNCHED: u8 = 127;
/// Tasks that the user may start beside the worker's own before the kernel refuses its forks.
const SPARE_TASKS: u64 = 1024;

/// Play the role that the arguments (the program's name left out) ask for. `None` where they ask for none: the caller
/// is then an ordinary temper.
pub fn role(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    match arguments.next()?.to_str()? {
        WARDEN => Some(super::warden::main()),
        LAUNCHER => Some(launch(&arguments.collect::<Vec<_>>())),
        _ => None,
    }
}

/// Arguments of a launcher: the limits, its parent, and the program with its own arguments.
pub(crate) fn arguments(memory_mb: u64, max_processes: u32, argv: &[String]) -> Vec<OsString> {
    let parent = rustix::process::getpid().as_raw_pid();
    let numbers = [LAUNCHER.to_owned(), memory_mb.to_string(), max_processes.to_string(), parent.to_string()];
    numbers.into_iter().chain(argv.iter().cloned()).map(OsString::from).collect()
}

fn launch(arguments: &[OsString]) -> ExitCode {
    let number = |index: usize| arguments.get(index)?.to_str()?.parse::<u64>().ok();
    let cause = match (number(0), number(1), number(2), arguments.get(3)) {
        (Some(memory_mb), Some(max_processes), Some(parent), Some(program)) => {
            match confine(memory_mb, max_processes, parent) {
                Ok(()) => Command::new(program).args(&arguments[4..]).exec().to_string(),
                Err(cause) => cause,
            }
        }
        _ => "a launcher is started by a warden alone".to_owned(),
    };
    let program = arguments.get(3).map(|p| p.to_string_lossy()).unwrap_or_default();
    tell(&format!("cannot run {program}: {cause}\n"));
    ExitCode::from(NOT_LAUNCHED)
}

/// Write to stderr, which the warden reads.
fn tell(message: &str) {
    let _nobody_listens = std::io::Write::write_all(&mut std::io::stderr(), message.as_bytes());
}

/// Set every limit of this process that its children inherit.
fn confine(memory_mb: u64, max_processes: u64, parent: u64) -> Result<(), String> {
    let failed = |what: &'static str| move |error: rustix::io::Errno| format!("{what}: {error}");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed("death signal"))?;
    // The parent may have died before the line above; then nobody sends that signal any more.
    if rustix::process::getppid().map(Pid::as_raw_pid).and_then(|pid| u64::try_from(pid).ok()) != Some(parent) {
        return Err("the warden is gone".to_owned());
    }
    rustix::process::setsid().map_err(failed("session"))?;
    lower(Resource::Core, 0).map_err(failed("core size"))?;
    lower(Resource::As, memory_mb << 20).map_err(failed("address space"))?;
    // Counts all tasks of the user, hence beside those that are there; the kernel exempts root.
    let user = rustix::process::geteuid();
    if !user.is_root() {
        let tasks = proc_tree::num_tasks_of(user.as_raw()) + max_processes + SPARE_TASKS;
        lower(Resource::Nproc, tasks).map_err(failed("number of processes"))?;
    }
    Ok(())
}

/// Set both the soft and the hard limit, never beyond the hard one that holds already.
fn lower(resource: Resource, value: u64) -> Result<(), rustix::io::Errno> {
    let hard = rustix::process::getrlimit(resource).maximum;
    let value = Some(hard.map_or(value, |hard| hard.min(value)));
    rustix::process::setrlimit(resource, Rlimit { current: value, maximum: value })
}
