//! Files under temporary names, none of which outlives the process: where Ctrl-C or SIGTERM ends it, they are removed.
//!
//! A command that handles these signals itself has no such files.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

/// What is there under a temporary name.
static FILES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn files() -> MutexGuard<'static, Vec<PathBuf>> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Make an empty file.
///
/// # Errors
/// The system's answer.
pub fn create(path: &Path) -> io::Result<File> {
    remove_on_signals();
    let mut files = files();
    let file = File::create(path)?;
    files.push(path.to_owned());
    Ok(file)
}

/// Give a file that was made here its final name.
///
/// # Errors
/// The system's answer.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let mut files = files();
    std::fs::rename(from, to)?;
    files.retain(|file| file != from);
    Ok(())
}

/// Remove a file that was made here.
///
/// # Errors
/// The system's answer.
pub fn remove(path: &Path) -> io::Result<()> {
    let mut files = files();
    files.retain(|file| file != path);
    std::fs::remove_file(path)
}

/// From now on a signal that ends the process removes the files first.
fn remove_on_signals() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| match Signals::new([SIGINT, SIGTERM]) {
        Ok(mut signals) => {
            std::thread::spawn(move || signals.forever().for_each(end));
        }
        Err(error) => tracing::warn!(%error, "a signal would leave unfinished files behind"),
    });
}

/// Remove the files, and do what the signal does where nobody handles it: end the process.
fn end(signal: i32) {
    // Held to the end: nothing is made or renamed in between.
    let files = files();
    for file in files.iter() {
        if let Err(error) = std::fs::remove_file(file) {
            tracing::warn!(file = %file.display(), %error, "an unfinished file was left behind");
        }
    }
    if let Err(error) = signal_hook::low_level::emulate_default_handler(signal) {
        tracing::warn!(%error, signal, "the signal ends nothing");
        std::process::exit(128 + signal);
    }
}
