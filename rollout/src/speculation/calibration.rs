//! How often guesses came true, by how well their context matched: the measured trust in a draft.

use temper_proto::NUM_MATCH_BUCKETS;

/// Levels of agreement between candidates.
const NUM_SHARES: usize = 3;
/// Trials after which old ones count half, so that the trust follows the policy.
const MEMORY: f64 = 2048.0;
/// Weight of the prior, in trials.
const PRIOR_WEIGHT: f64 = 4.0;

/// Bucket of a match of `len` tokens: 0..=2, 3..=4, 5..=8, 9..=16, 17..=31, 32 and more.
pub fn match_bucket(len: usize) -> usize {
    match len {
        0..=2 => 0,
        3..=4 => 1,
        5..=8 => 2,
        9..=16 => 3,
        17..=31 => 4,
        _ => 5,
    }
}

/// Class of a guess: how long its context matched, and how many of the candidates agreed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell(u8);

impl Cell {
    /// The class of a guess whose context matched over `match_len` tokens, where `votes` of `num_candidates`
    /// continuations agreed.
    pub fn new(match_len: usize, votes: usize, num_candidates: usize) -> Self {
        let share = match (2 * votes > num_candidates, votes == num_candidates && votes > 1) {
            (_, true) => 2,
            (true, false) => 1,
            (false, false) => 0,
        };
        Cell((match_bucket(match_len) * NUM_SHARES + share) as u8)
    }

    /// Bucket of the match alone.
    pub fn match_bucket(self) -> usize {
        usize::from(self.0) / NUM_SHARES
    }
}

/// Acceptance by class, over the recent past.
#[derive(Debug, Clone)]
pub(super) struct Calibration {
    cells: [Trials; NUM_MATCH_BUCKETS * NUM_SHARES],
}

#[derive(Debug, Clone, Copy)]
struct Trials {
    tried: f64,
    accepted: f64,
}

impl Default for Calibration {
    /// The prior trusts longer matches and better agreement more; a few trials outweigh it.
    fn default() -> Self {
        let prior = |index: usize| {
            let (bucket, share) = (index / NUM_SHARES, index % NUM_SHARES);
            let probability = 0.4 + 0.06 * bucket as f64 + 0.1 * share as f64;
            Trials { tried: PRIOR_WEIGHT, accepted: PRIOR_WEIGHT * probability }
        };
        Calibration { cells: std::array::from_fn(prior) }
    }
}

impl Calibration {
    /// Probability that each guess of a draft is kept, which needs all before it to be kept.
    pub fn survivals<'a>(&'a self, cells: &'a [Cell]) -> impl Iterator<Item = f64> + 'a {
        cells.iter().scan(1.0, |survival, cell| {
            let Trials { tried, accepted } = self.cells[usize::from(cell.0)];
            *survival *= accepted / tried;
            Some(*survival)
        })
    }

    /// The highest trust of any class.
    pub fn best(&self) -> f64 {
        self.cells.iter().map(|trials| trials.accepted / trials.tried).fold(0.0, f64::max)
    }

    /// The first `num_accepted` guesses came true, the next one did not; those after it say nothing.
    pub fn record(&mut self, cells: &[Cell], num_accepted: usize) {
        for (index, cell) in cells.iter().enumerate().take(num_accepted + 1) {
            let trials = &mut self.cells[usize::from(cell.0)];
            if trials.tried >= MEMORY {
                (trials.tried, trials.accepted) = (trials.tried / 2.0, trials.accepted / 2.0);
            }
            trials.tried += 1.0;
            trials.accepted += f64::from(u8::from(index < num_accepted));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_follows_what_came_true_and_multiplies_along_a_draft() {
        let mut calibration = Calibration::default();
        let (good, bad) = (Cell::new(20, 3, 3), Cell::new(2, 1, 3));
        for _ in 0..4000 {
            calibration.record(&[good, good, bad, good], 2);
        }
        let survivals: Vec<f64> = calibration.survivals(&[good, good, bad]).collect();
        assert!(survivals[1] > 0.99 && survivals[2] < 0.01, "{survivals:?}");
        assert!(survivals.is_sorted_by(|a, b| a >= b));
        for _ in 0..4000 {
            calibration.record(&[good], 0);
        }
        assert!(calibration.survivals(&[good]).all(|s| s < 0.3), "a changed policy is noticed");
    }

    #[test]
    fn cells_name_match_and_agreement() {
        assert_eq!(Cell::new(32, 2, 2), Cell::new(500, 7, 7));
        assert_ne!(Cell::new(32, 1, 1), Cell::new(32, 2, 2), "one witness is not agreement");
        assert_eq!([0, 3, 8, 9, 31, 32].map(|len| Cell::new(len, 1, 9).match_bucket()), [0, 1, 2, 3, 4, 5]);
    }
}
