//! The table of what was learned.

use super::Outcome;
use super::curve::{Change, Curve};
use std::fmt::Write;

const HEAD: &str = "# What the recipes learn

Written by `cargo xtask learning`, which trains each recipe with the release binary, one after another, and reads its
`metrics.jsonl`. Reward: mean over the step's samples, averaged over the first and the last five steps of the policy
stages; where a reward model scores, the share of right answers, not its score. Held-out: the same of greedy responses to
prompts that no stage has seen. Accuracy: share of held-out pairs whose chosen response is preferred. Minutes: from start to end, all
stages, validation and checkpoints, and whatever else the machine was doing.

![Reward by step](learning.svg)

| recipe | seed | steps | minutes | reward | held-out | accuracy |
|---|---|---|---|---|---|---|
";

/// The whole page.
pub(crate) fn render(outcomes: &[Outcome]) -> String {
    let mut page = HEAD.to_owned();
    for outcome in outcomes {
        let line = match &outcome.result {
            Ok(curve) => row(curve),
            Err(cause) => format!("failed | {} | | | |", cause.replace('|', "\\|").replace('\n', " ")),
        };
        // Writing to a String cannot fail.
        let _infallible = writeln!(page, "| {} | {} | {line}", outcome.recipe, outcome.seed);
    }
    let _infallible = write!(page, "\nMeasured on {}.\n", machine());
    page
}

fn row(curve: &Curve) -> String {
    let Curve { num_steps, minutes, .. } = curve;
    let (reward, held_out, accuracy) = (arrow(curve.reward), arrow(curve.held_out), arrow(curve.accuracy));
    format!("{num_steps} | {minutes:.1} | {reward} | {held_out} | {accuracy} |")
}

fn arrow(change: Change) -> String {
    change.map_or_else(|| "-".to_owned(), |(before, after)| format!("{before:.3} → {after:.3}"))
}

/// One run in words, for the terminal.
pub(crate) fn in_words(curve: &Curve) -> String {
    let mut text = format!("{} steps in {:.1} minutes", curve.num_steps, curve.minutes);
    for (name, change) in [("reward", curve.reward), ("held-out", curve.held_out), ("accuracy", curve.accuracy)] {
        if change.is_some() {
            let _infallible = write!(text, ", {name} {}", arrow(change));
        }
    }
    text
}

/// The processor and its cores, as far as the system tells.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':')).map(|(_, name)| name);
    format!("{cores} cores of {}", model.map_or("an unnamed processor", str::trim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_has_a_row_and_a_failure_says_why() {
        let curve = Curve { num_steps: 250, minutes: 1.25, held_out: Some((0.05, 0.931)), ..Curve::default() };
        let outcome = |recipe: &str, result| Outcome { recipe: recipe.to_owned(), seed: 2, result };
        let page = render(&[outcome("rloo", Ok(curve)), outcome("kto", Err("no | data".to_owned()))]);
        assert!(page.contains("| rloo | 2 | 250 | 1.2 | - | 0.050 → 0.931 | - |\n"), "{page}");
        assert!(page.contains("| kto | 2 | failed | no \\| data | | | |\n"), "{page}");
        let widths: Vec<usize> = page
            .lines()
            .filter(|line| line.starts_with('|'))
            .map(|line| line.replace("\\|", "").matches('|').count())
            .collect();
        assert!(widths.iter().all(|w| *w == 8), "{widths:?}");
    }
}
