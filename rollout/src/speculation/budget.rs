//! How many drafted rows a step takes: as many as maximise its expected tokens per second.
//!
//! A step that draws for n sequences in R rows and takes the k most likely drafted tokens beside them yields
//! n + (sum of their survival probabilities) tokens in f(R + k) seconds. f is measured: the seconds of a step by its
//! rows, at a few sizes with lines between them, kept current by every step that has no prompt rows. Looking for drafts
//! takes time of its own, which is measured too and must be earned as well: a draft model computes before the step.

use std::time::Duration;

/// Weight of a new measurement at its own size, and on the level of all sizes.
const OWN_WEIGHT: f64 = 0.1;
const LEVEL_WEIGHT: f64 = 0.1;
/// A token less likely to be kept is never worth its row.
const LEAST_SURVIVAL: f64 = 0.02;
/// Tokens per second that drafts must promise over none: less is within what times and trust are known to, and looking
/// for drafts takes time too.
const LEAST_GAIN: f64 = 1.03;
/// Most steps between two looks for drafts where the last looks found none that pay and cost next to nothing.
const MAX_REST: u32 = 32;
/// Share of the time that looks in vain may take, and the most steps between two of them.
const VAIN_SHARE: f64 = 0.02;
const MAX_VAIN_REST: u32 = 512;
/// Weight of a new measurement on what a look takes.
const LOOK_WEIGHT: f64 = 0.3;
/// Where looks cost too much, what they are thought to cost falls by this factor with every rest, so that they are
/// tried again.
const LOOK_DECAY: f64 = 0.9;
/// Steps with drafts after which one goes without, so that its cost stays known.
const MAX_STREAK: u32 = 64;

/// What a step may spend on drafts.
#[derive(Debug, Clone)]
pub enum Budget {
    /// Every proposed token.
    All(Choice),
    /// What pays by measured step times.
    Measured(Measured),
}

/// Memory of a choice.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    lens: Vec<usize>,
    survivals: Vec<(f64, usize)>,
}

/// Step times and what follows from them.
#[derive(Debug, Clone, Default)]
pub struct Measured {
    cost: StepCost,
    choice: Choice,
    num_rows: usize,
    /// Steps left before the next look, and how long the last rest was.
    rest: u32,
    last_rest: u32,
    /// Steps with drafts since the last without.
    streak: u32,
    look: LookCost,
}

impl Budget {
    /// A budget that spends on every proposed token.
    pub fn all() -> Self {
        Budget::All(Choice::default())
    }

    /// A budget by measured step times, none known yet.
    pub fn measured() -> Self {
        Budget::Measured(Measured::default())
    }

    /// True where it goes by step times, and none is known.
    pub(super) fn lacks_step_times(&self) -> bool {
        matches!(self, Budget::Measured(measured) if measured.cost.points.is_empty())
    }

    /// False where a step of `num_rows` rows gains nothing from a draft whose every token is kept with probability
    /// `best`, or where the last looks found nothing.
    pub(super) fn is_worth_asking(&mut self, num_rows: usize, best: f64) -> bool {
        match self {
            Budget::All(_) => true,
            Budget::Measured(measured) => measured.is_worth_asking(num_rows, best),
        }
    }

    /// Length of each of `num_drafts` drafts, given the survival of each token with the index of its draft; survivals
    /// of one draft never increase.
    pub(super) fn choose(&mut self, num_drafts: usize, survivals: impl Iterator<Item = (f64, usize)>) -> &[usize] {
        match self {
            Budget::All(choice) => choice.take(num_drafts, survivals, |_| usize::MAX),
            Budget::Measured(measured) => measured.choose(num_drafts, survivals),
        }
    }

    /// A look for drafts took `elapsed`.
    pub(super) fn note_look(&mut self, elapsed: Duration) {
        if let Budget::Measured(measured) = self {
            measured.look.note(elapsed.as_secs_f64());
        }
    }

    /// A step of `num_rows` rows took `elapsed`, looking for drafts not counted.
    pub(super) fn note_step(&mut self, num_rows: usize, elapsed: Duration) {
        if let Budget::Measured(measured) = self {
            measured.cost.note(num_rows, elapsed.as_secs_f64());
        }
    }
}

impl Choice {
    /// Take the tokens most likely to survive, as many as `num_taken` says of the sorted survivals.
    fn take(
        &mut self,
        num_drafts: usize,
        survivals: impl Iterator<Item = (f64, usize)>,
        num_taken: impl FnOnce(&[(f64, usize)]) -> usize,
    ) -> &[usize] {
        self.survivals.clear();
        self.survivals.extend(survivals);
        // Stable, so that tokens of one draft keep their order.
        self.survivals.sort_by(|a, b| b.0.total_cmp(&a.0));
        self.lens.clear();
        self.lens.resize(num_drafts, 0);
        for &(_, index) in self.survivals.iter().take(num_taken(&self.survivals)) {
            self.lens[index] += 1;
        }
        &self.lens
    }
}

impl Measured {
    fn is_worth_asking(&mut self, num_rows: usize, best: f64) -> bool {
        self.num_rows = num_rows;
        if self.rest > 0 {
            self.rest -= 1;
            return false;
        }
        if self.streak == MAX_STREAK {
            self.streak = 0;
            return false;
        }
        let longest = 2 * num_rows;
        let gain = |extra: usize, look: f64| {
            (num_rows as f64 + best * extra as f64) / (self.cost.seconds(num_rows + extra) + look)
        };
        let without = gain(0, 0.0);
        let pays = std::iter::successors(Some(1), |extra| Some(2 * extra))
            .take_while(|extra| *extra <= longest.max(8))
            .any(|extra| gain(extra, self.look.seconds) > LEAST_GAIN * without);
        if !pays {
            self.take_rest();
            self.look.seconds *= LOOK_DECAY;
        }
        pays
    }

    fn choose(&mut self, num_drafts: usize, survivals: impl Iterator<Item = (f64, usize)>) -> &[usize] {
        let (cost, num_rows, look) = (&self.cost, self.num_rows, self.look.seconds);
        let least = LEAST_GAIN * num_rows as f64 / cost.seconds(num_rows);
        let mut is_paid = false;
        let best_count = |sorted: &[(f64, usize)]| {
            let mut expected = num_rows as f64;
            let mut best = (least, 0);
            for (index, (survival, _)) in sorted.iter().enumerate().take_while(|(_, (s, _))| *s >= LEAST_SURVIVAL) {
                expected += survival;
                let seconds = cost.seconds(num_rows + index + 1);
                if expected / seconds > best.0 {
                    best = (expected / seconds, index + 1);
                    is_paid = expected / (seconds + look) > least;
                }
            }
            best.1
        };
        self.choice.take(num_drafts, survivals, best_count);
        if is_paid {
            (self.last_rest, self.streak) = (0, self.streak + 1);
        } else {
            self.take_rest();
        }
        &self.choice.lens
    }

    fn take_rest(&mut self) {
        self.last_rest = (2 * self.last_rest).clamp(1, MAX_REST);
        let vain = self.look.seconds / (VAIN_SHARE * self.cost.seconds(self.num_rows));
        self.rest = self.last_rest.max((vain as u32).min(MAX_VAIN_REST));
        self.streak = 0;
    }
}

/// Seconds that a look for drafts takes.
#[derive(Debug, Clone, Copy, Default)]
struct LookCost {
    seconds: f64,
    num_looks: u32,
}

impl LookCost {
    /// The first look may compute whole prompts; it says nothing of those that follow.
    fn note(&mut self, seconds: f64) {
        self.num_looks = self.num_looks.saturating_add(1);
        match self.num_looks {
            1 => {}
            2 => self.seconds = seconds,
            _ if seconds > 0.0 && self.seconds > 0.0 => {
                self.seconds *= (LOOK_WEIGHT * (seconds / self.seconds).ln().clamp(-1.0, 1.0)).exp();
            }
            _ => self.seconds = seconds,
        }
    }
}

/// Seconds of a step by its number of rows.
#[derive(Debug, Clone)]
struct StepCost {
    /// What was measured, ascending in rows; at most one point for each class of sizes.
    points: Vec<Point>,
    /// What moves all sizes together: longer contexts, another load on the machine.
    level: f64,
}

/// What steps of about the same size cost.
#[derive(Debug, Clone, Copy)]
struct Point {
    class: u32,
    rows: f64,
    /// Seconds over the level.
    shape: f64,
}

impl Default for StepCost {
    fn default() -> Self {
        StepCost { points: Vec::with_capacity(64), level: 1.0 }
    }
}

/// Class of a size: every number up to 4 rows has its own, and from there on every half octave.
fn class(num_rows: usize) -> u32 {
    (2.0 * (num_rows.max(1) as f64).log2()).round() as u32
}

impl StepCost {
    fn note(&mut self, num_rows: usize, seconds: f64) {
        if seconds <= 0.0 {
            return;
        }
        let (class, rows) = (class(num_rows), num_rows as f64);
        let at = match self.points.binary_search_by_key(&class, |point| point.class) {
            Ok(at) => at,
            Err(at) => return self.points.insert(at, Point { class, rows, shape: seconds / self.level }),
        };
        let residual = (seconds / self.seconds(num_rows)).ln().clamp(-1.0, 1.0);
        let point = &mut self.points[at];
        point.rows += OWN_WEIGHT * (rows - point.rows);
        point.shape *= (OWN_WEIGHT * residual).exp();
        self.level *= (LEVEL_WEIGHT * residual).exp();
    }

    /// Expected seconds of a step of `num_rows` rows. Between known sizes lies a line; up to twice the largest known
    /// one is taken to cost no more, so that it is tried and becomes known, and the rest costs in proportion.
    fn seconds(&self, num_rows: usize) -> f64 {
        let rows = num_rows as f64;
        let at = self.points.partition_point(|point| point.rows < rows);
        let shape = match (at.checked_sub(1).map(|below| self.points[below]), self.points.get(at)) {
            (None, None) => 1.0,
            (None, Some(above)) => above.shape,
            (Some(below), None) => below.shape * (rows / (2.0 * below.rows)).max(1.0),
            (Some(below), Some(above)) => {
                let share = (rows - below.rows) / (above.rows - below.rows);
                below.shape + share * (above.shape - below.shape)
            }
        };
        shape * self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A budget that has seen steps of `base + slope * rows` seconds at every size up to 64 rows.
    fn trained(base: f64, slope: f64) -> Budget {
        let mut budget = Budget::measured();
        for _ in 0..40 {
            for rows in [1usize, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128] {
                budget.note_step(rows, Duration::from_secs_f64(base + slope * rows as f64));
            }
        }
        budget
    }

    fn lens(budget: &mut Budget, num_rows: usize, drafts: &[&[f64]]) -> Vec<usize> {
        if !budget.is_worth_asking(num_rows, 1.0) {
            return vec![0; drafts.len()];
        }
        let survivals = drafts.iter().enumerate().flat_map(|(i, draft)| draft.iter().map(move |s| (*s, i)));
        budget.choose(drafts.len(), survivals).to_vec()
    }

    #[test]
    fn rows_that_cost_nothing_are_all_taken() {
        let mut budget = trained(1.0, 0.0);
        assert_eq!(lens(&mut budget, 4, &[&[0.9, 0.5, 0.05], &[0.2]]), [3, 1]);
    }

    #[test]
    fn rows_at_full_price_are_never_taken() {
        let mut budget = trained(0.0, 1.0);
        assert_eq!(lens(&mut budget, 8, &[&[0.99, 0.9], &[0.9]]), [0, 0]);
        assert!(!budget.is_worth_asking(8, 1.0), "it rests after a look in vain");
    }

    /// One sequence, f = 1 + rows / 10: a row pays while its survival exceeds the mean rate's share.
    #[test]
    fn what_pays_is_what_raises_tokens_per_second() {
        let mut budget = trained(1.0, 0.1);
        let survivals = [0.8, 0.64, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05];
        let rate = |k: usize| (1.0 + survivals[..k].iter().sum::<f64>()) / (1.0 + 0.1 * (1 + k) as f64);
        let best = (0..=survivals.len()).max_by(|a, b| rate(*a).total_cmp(&rate(*b))).unwrap();
        let chosen = lens(&mut budget, 1, &[&survivals])[0];
        assert!((1..survivals.len()).contains(&best));
        assert!(rate(chosen) > 0.98 * rate(best), "chose {chosen}, best is {best}");
    }

    #[test]
    fn unknown_sizes_are_tried_step_by_step() {
        let mut budget = Budget::measured();
        budget.note_step(4, Duration::from_secs(4));
        let draft = [0.9; 60];
        let first = lens(&mut budget, 4, &[&draft])[0];
        assert!((1..=6).contains(&first), "twice the known size at most, not {first} rows more");
    }

    /// Rows are free, and every draft comes true: three tokens a step for the price of one, were it not for the look.
    #[test]
    fn a_look_must_earn_what_it_takes() {
        for (seconds, is_worth_it) in [(0.0, true), (0.5, true), (1.5, true), (2.5, false), (100.0, false)] {
            let mut budget = trained(1.0, 0.0);
            let (mut num_looks, mut num_drafts) = (0, 0);
            for _ in 0..2000 {
                if budget.is_worth_asking(1, 1.0) {
                    num_looks += 1;
                    num_drafts += usize::from(budget.choose(1, [(1.0, 0), (1.0, 0)].into_iter())[0] > 0);
                    budget.note_look(Duration::from_secs_f64(seconds));
                }
            }
            let looks = f64::from(num_looks) * seconds;
            assert!(is_worth_it || looks <= 200.0, "{num_looks} looks of {seconds} s");
            assert!(!is_worth_it || num_drafts >= 1900, "{num_drafts} drafts where a look takes {seconds} s");
            assert!(num_drafts < 2000, "some steps go without");
        }
    }

    #[test]
    fn a_first_look_that_computes_prompts_is_forgiven() {
        let mut budget = trained(1.0, 0.0);
        let looks = [500.0, 0.1, 0.1, 8.0, 0.1, 0.1];
        for seconds in looks {
            assert!(budget.is_worth_asking(1, 1.0), "before a look of {seconds} s");
            assert_eq!(budget.choose(1, [(1.0, 0), (1.0, 0)].into_iter()), [2]);
            budget.note_look(Duration::from_secs_f64(seconds));
        }
    }

    #[test]
    fn a_slower_machine_moves_all_sizes() {
        let mut cost = StepCost::default();
        (0..50).for_each(|_| [1, 8, 64].into_iter().for_each(|rows| cost.note(rows, 1.0 + rows as f64)));
        (0..300).for_each(|_| cost.note(1, 8.0));
        assert!((cost.seconds(1) - 8.0).abs() < 0.1);
        assert!(cost.seconds(8) > 15.0, "{}", cost.seconds(8));
    }
}
