//! What a run says of itself: events, metrics, progress on the terminal, and logs.
//!
//! Owns: `events.jsonl` ([`EventLog`]), `metrics.jsonl` ([`MetricsLog`]), the progress display ([`Progress`]) and the
//! subscriber of `tracing` ([`init_tracing`]). Does not know what a metric means, what a step does, or the environment:
//! names and filters are given to it.
//!
//! Invariants: a line that is in a file is whole after a crash of the process (a torn last line is cut when the file is
//! opened again); the clock is injected; nothing here writes to stdout.

mod clock;
mod error;
mod events;
mod lines;
mod logs;
mod metrics;
mod progress;

pub use clock::{Clock, ManualClock, SystemClock, rfc3339};
pub use error::Error;
pub use events::EventLog;
pub use logs::init_tracing;
pub use metrics::{MetricsLog, MetricsRow, read_metrics};
pub use progress::{Progress, describe};
