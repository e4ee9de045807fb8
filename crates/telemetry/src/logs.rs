//! Log messages: `tracing` to stderr.

use crate::Error;
use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// Send log messages that pass `filter` (as in `info` or `warn,temper_rollout=debug`) to stderr, in colour where that
/// is a terminal. Once a process.
///
/// # Errors
/// A malformed filter, or a second call.
pub fn init_tracing(filter: &str) -> Result<(), Error> {
    let wrong =
        |e: tracing_subscriber::filter::ParseError| Error::Filter { filter: filter.to_owned(), problem: e.to_string() };
    let parsed = EnvFilter::builder().parse(filter).map_err(wrong)?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init()
        .map_err(|_| Error::AlreadyInitialised)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, because a process has one subscriber.
    #[test]
    fn a_filter_is_checked_and_a_second_subscriber_refused() {
        let error = init_tracing("temper=loud").expect_err("no such level").to_string();
        assert!(error.starts_with("`temper=loud` is no log filter: "), "{error}");
        init_tracing("warn,temper_rollout=debug").expect("the first");
        assert!(matches!(init_tracing("info"), Err(Error::AlreadyInitialised)));
    }
}
