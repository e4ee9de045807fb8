//! Rewards that are the user's own code: a command, a Python file or an HTTP endpoint.
//!
//! Owns: what a recipe says about them, the line protocol, the processes that run them and what keeps those within
//! their limits. Knows nothing of weights of components or of training.
//!
//! Per worker there are two processes. The *warden* is temper's own binary in another role: it starts the user's
//! program, hands it one sample at a time, watches wall clock, CPU time, memory and number of processes, and kills the
//! whole tree below it where a limit is passed or where temper is gone (its stdin ends). It is the subreaper of that
//! tree, so that no double fork and no session of its own leaves it. The *launcher* is the same binary once more: it
//! sets the limits that the kernel keeps and becomes the user's program. Setting them there and not between fork and
//! exec needs no unsafe code.
//!
//! Invariants: what cannot be scored is an error with its cause, never a number · one sample is in flight per worker,
//! so a crash or a kill has one guilty sample · answers stand in the requests' order and do not depend on the number
//! of workers · nothing runs on once the last handle of a reward is dropped, or temper is killed.

mod answer;
mod breaker;
mod check;
mod config;
mod http;
mod launch;
mod line;
mod pool;
mod proc_tree;
mod request;
mod warden;
mod watch;
mod worker;

pub use answer::MAX_ABS_SCORE;
pub use config::{BreakerConfig, CommandConfig, HttpConfig, ProcessLimits, PythonConfig};
pub use launch::role;
pub use worker::Launcher;

pub(crate) use answer::Answer;
pub(crate) use pool::ExternalScorer;
