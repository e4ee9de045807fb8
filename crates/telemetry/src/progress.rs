//! How far a stage is: a bar on a terminal, one line a step elsewhere.

use crate::{Error, MetricsRow};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};

/// A figure that is shown.
struct Shown {
    /// Its key in the row.
    key: &'static str,
    label: &'static str,
    write: fn(f64) -> String,
}

const SHOWN: [Shown; 7] = [
    Shown { key: "reward_mean", label: "reward", write: |v| format!("{v:.3}") },
    Shown { key: "loss", label: "loss", write: |v| format!("{v:.4}") },
    Shown { key: "kl", label: "kl", write: |v| format!("{v:.4}") },
    Shown { key: "entropy", label: "entropy", write: |v| format!("{v:.3}") },
    Shown { key: "response_length_mean", label: "length", write: |v| format!("{v:.1}") },
    Shown { key: "tokens_per_second", label: "tokens/s", write: |v| format!("{v:.0}") },
    Shown { key: "rollout_train_log_prob_diff_max", label: "max|rollout-train|", write: difference },
];

/// An exact 0 stands out from everything that is merely small.
fn difference(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { format!("{value:.1e}") }
}

/// Shows the steps of one stage as they end.
pub struct Progress {
    num_steps: u64,
    display: Display,
}

enum Display {
    Bar(ProgressBar),
    Lines(Box<dyn Write + Send>),
    Silent,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let display = match self.display {
            Display::Bar(_) => "bar",
            Display::Lines(_) => "lines",
            Display::Silent => "silent",
        };
        f.debug_struct("Progress").field("num_steps", &self.num_steps).field("display", &display).finish()
    }
}

impl Progress {
    /// On stderr: a bar where that is a terminal, else one line a step.
    pub fn stderr(num_steps: u64) -> Self {
        if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(num_steps), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} [{elapsed}<{eta}] {msg}");
            bar.set_style(style.expect("the template is well formed"));
            return Progress { num_steps, display: Display::Bar(bar) };
        }
        Progress::lines(num_steps, Box::new(std::io::stderr()))
    }

    /// One line a step, to `out`.
    pub fn lines(num_steps: u64, out: Box<dyn Write + Send>) -> Self {
        Progress { num_steps, display: Display::Lines(out) }
    }

    /// Shows nothing.
    pub fn silent() -> Self {
        Progress { num_steps: 0, display: Display::Silent }
    }

    /// A step has ended with these figures.
    ///
    /// # Errors
    /// Where the line cannot be written.
    pub fn step(&mut self, row: &MetricsRow) -> Result<(), Error> {
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_position(row.step());
                bar.set_message(format!("{} {}", row.stage(), describe(row)));
                Ok(())
            }
            Display::Lines(out) => {
                let (stage, step, num_steps) = (row.stage(), row.step(), self.num_steps);
                let line = format!("{stage} step {step}/{num_steps}  {}\n", describe(row));
                out.write_all(line.as_bytes()).and_then(|()| out.flush()).map_err(|source| Error::Progress { source })
            }
            Display::Silent => Ok(()),
        }
    }

    /// Say something between two steps, without breaking a bar.
    ///
    /// # Errors
    /// Where the line cannot be written.
    pub fn note(&mut self, text: &str) -> Result<(), Error> {
        match &mut self.display {
            Display::Bar(bar) => {
                bar.println(text);
                Ok(())
            }
            Display::Lines(out) => writeln!(out, "{text}").map_err(|source| Error::Progress { source }),
            Display::Silent => Ok(()),
        }
    }

    /// The stage has ended; a bar stays where it is.
    pub fn finish(self) {
        if let Display::Bar(bar) = &self.display {
            bar.abandon();
        }
    }
}

/// The figures of a row that people follow, in one line; those that the row does not have are left out.
pub fn describe(row: &MetricsRow) -> String {
    let shown = SHOWN.iter().filter_map(|s| Some(format!("{} {}", s.label, (s.write)(row.get(s.key)?))));
    shown.collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no other thread").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn row() -> MetricsRow {
        let mut row = MetricsRow::new(7, "grpo");
        row.set("reward_mean", 0.91234).set("loss", -0.01234).set("kl", 0.0).set("entropy", 1.5);
        row.set("response_length_mean", 5.25).set("tokens_per_second", 12345.6);
        row.set("rollout_train_log_prob_diff_max", 0.0).set("lr", 1.0);
        row
    }

    #[test]
    fn one_line_a_step_where_there_is_no_terminal() {
        let out = Shared::default();
        let mut progress = Progress::lines(90, Box::new(out.clone()));
        progress.step(&row()).expect("writable");
        progress.note("checkpoint written").expect("writable");
        let mut sft = MetricsRow::new(8, "sft");
        sft.set("loss", f64::NAN).set("rollout_train_log_prob_diff_max", 1.1920929e-7);
        progress.step(&sft).expect("writable");
        progress.finish();
        let expected = "grpo step 7/90  reward 0.912  loss -0.0123  kl 0.0000  entropy 1.500  length 5.2  \
             tokens/s 12346  max|rollout-train| 0\n\
             checkpoint written\n\
             sft step 8/90  loss NaN  max|rollout-train| 1.2e-7\n";
        assert_eq!(String::from_utf8(out.0.lock().expect("no other thread").clone()).expect("text"), expected);
    }

    #[test]
    fn a_closed_pipe_is_an_error() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let error = Progress::lines(1, Box::new(Closed)).step(&row()).expect_err("closed").to_string();
        assert!(error.starts_with("cannot write progress: "), "{error}");
        Progress::silent().step(&row()).expect("silence cannot fail");
    }
}
