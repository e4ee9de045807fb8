//! What is kept of earlier passes, in memory and on disk.

use super::*;
use std::path::PathBuf;
use temper_types::{FinishReason, SampleIndex, SampleTimings};

fn sample(sample_index: u32, token_ids: &[u32]) -> GeneratedSample {
    GeneratedSample {
        sample_index: SampleIndex(sample_index),
        seed: 0,
        num_begun: 0,
        num_kept: 0,
        token_ids: token_ids.to_vec(),
        reused: Vec::new(),
        log_probs: Vec::new(),
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        policy_versions: Vec::new(),
        finish_reason: FinishReason::Length,
        num_drafted: 0,
        num_accepted: 0,
        timings: SampleTimings::default(),
    }
}

fn first_tokens(history: &mut History, prompt: &[u32]) -> Vec<u32> {
    history.get(prompt).iter().map(|past| past.token_ids[0]).collect()
}

/// A directory that goes with the test.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("temper-history-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Dir(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.join("tokens.bin")
    }

    fn open(&self, max_tokens: usize) -> History {
        let mut history = History::new(2, max_tokens);
        history.open(&self.file(), "words");
        assert!(history.file.is_some());
        history
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn check_bounds(history: &mut History) {
    for pass in 0..3 {
        history.add(&[1], &[sample(0, &[10 * pass, 0]), sample(1, &[10 * pass + 1])]);
    }
    assert_eq!(first_tokens(history, &[1]), [20, 21, 10, 11]);
    history.add(&[2], &[sample(0, &[7, 7, 7, 7, 7])]);
    assert_eq!(first_tokens(history, &[1]), [20, 21], "11 tokens are too many: the oldest pass went");
    history.add(&[3], &[sample(0, &[9; 11])]);
    assert_eq!(history.num_tokens, 0, "a pass longer than the bound leaves nothing");
    assert!(history.passes.is_empty() && history.order.is_empty());
}

#[test]
fn the_latest_passes_stay_and_the_oldest_prompts_go() {
    check_bounds(&mut History::new(2, 10));
    check_bounds(&mut Dir::new("bounds").open(10));
}

#[test]
fn what_was_written_is_there_for_the_next_process() {
    let dir = Dir::new("resume");
    let mut history = dir.open(1000);
    for pass in 0..4 {
        history.add(&[1, 2], &[sample(0, &[10 * pass, 5]), sample(1, &[10 * pass + 1, 6, 7])]);
        history.add(&[3], &[sample(0, &[pass])]);
    }
    let expected = history.get(&[1, 2]);
    drop(history);
    let mut again = dir.open(1000);
    assert_eq!(again.get(&[1, 2]), expected);
    assert_eq!(first_tokens(&mut again, &[3]), [3, 2]);
    assert_eq!(again.num_tokens, 2 * 5 + 2);
    assert!(again.get(&[2, 1]).is_empty());
}

#[test]
fn the_file_stays_bounded_and_keeps_what_is_remembered() {
    let dir = Dir::new("bounded");
    let mut history = dir.open(400);
    for pass in 0..500u32 {
        history.add(&[pass % 7], &[sample(0, &[pass; 20]), sample(1, &[pass; 10])]);
        let size = std::fs::metadata(dir.file()).unwrap().len();
        assert!(size <= 4096 + 2 * (4 * 400 + 64 * 14) + 400, "{size} bytes after pass {pass}");
    }
    let expected: Vec<_> = (0..7).map(|prompt| history.get(&[prompt])).collect();
    assert!(expected.iter().all(|responses| responses.len() >= 2), "{expected:?}");
    drop(history);
    let mut again = dir.open(400);
    assert_eq!((0..7).map(|prompt| again.get(&[prompt])).collect::<Vec<_>>(), expected);
}

/// Whatever happens to the file: what holds is used, the rest is left out, and writing goes on.
#[test]
fn a_damaged_or_foreign_file_is_never_wrong() {
    let dir = Dir::new("damaged");
    let mut history = dir.open(1000);
    let truth: Vec<u32> = (0..9).collect();
    truth.iter().for_each(|prompt| history.add(&[*prompt], &[sample(0, &[100 + prompt, 1, 2, 3])]));
    drop(history);
    let whole = std::fs::read(dir.file()).unwrap();
    let mut num_cut = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        match at % 3 {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 0x41,
            _ => drop(bytes.splice(at..at, [1, 2, 3])),
        }
        std::fs::write(dir.file(), &bytes).unwrap();
        let mut history = dir.open(1000);
        for prompt in &truth {
            let found = first_tokens(&mut history, &[*prompt]);
            assert!(found.is_empty() || found == [100 + prompt], "byte {at}, prompt {prompt}: {found:?}");
            num_cut += usize::from(found.is_empty());
        }
        history.add(&[77], &[sample(0, &[5])]);
        drop(history);
        assert_eq!(first_tokens(&mut dir.open(1000), &[77]), [5], "writing goes on behind what holds");
    }
    assert!(num_cut > truth.len(), "damage was noticed");

    std::fs::write(dir.file(), &whole).unwrap();
    let mut foreign = History::new(2, 1000);
    foreign.open(&dir.file(), "other words");
    assert!(foreign.get(&[0]).is_empty());
    let mut nowhere = History::new(2, 1000);
    nowhere.open(&dir.file().join("below a file"), "words");
    nowhere.add(&[1], &[sample(0, &[8])]);
    assert_eq!(first_tokens(&mut nowhere, &[1]), [8], "it stays in memory");
}
