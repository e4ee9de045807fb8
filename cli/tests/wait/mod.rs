//! Waiting in tests that run beside a process.

use std::time::{Duration, Instant};

/// Longest wait for anything that a test waits for.
const PATIENCE: Duration = Duration::from_secs(120);

/// Wait until `probe` gives something.
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
