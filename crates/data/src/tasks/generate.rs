//! Drawing one problem: prompt and answer, its demonstration and its corruption.

use super::{Demonstration, Split, TEST_SHARE, Task, WrongAnswer};
use crate::Error;
use temper_types::Philox;

/// Draws tried before a split counts as empty; a split that exists holds a tenth of the contents or so.
const MAX_DRAWS: u64 = 4096;

/// Orders of the digits tried before they count as all equal: a list with two unequal digits has a wrong order in at
/// least half of the draws.
const MAX_ORDERS: usize = 64;

/// What the noise of a row is used for; each use has counters of its own.
#[derive(Debug, Clone, Copy)]
enum Use {
    Content = 0,
    Permutation = 1,
    Corruption = 2,
    WrongKind = 3,
    WrongOrder = 4,
}

/// Noise of one row, drawn number by number.
#[derive(Debug, Clone)]
struct Noise {
    philox: Philox,
    stream: u64,
    counter: u64,
}

impl Noise {
    fn new(task: Task, seed: u64, index: u64, purpose: Use) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"temper task v1 ").update(task.name().as_bytes()).update(&seed.to_le_bytes());
        let key = first_u64(&hasher.finalize());
        Noise { philox: Philox::new(key), stream: index, counter: (purpose as u64) << 32 }
    }

    /// A number in `0..bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.counter += 1;
        self.philox.below(bound, self.counter, self.stream)
    }

    /// A number in `low..=high`.
    fn between(&mut self, low: u32, high: u32) -> u32 {
        low + self.below(u64::from(high - low) + 1) as u32
    }

    fn digits(&mut self, count: u32) -> Vec<u8> {
        (0..count).map(|_| b'0' + self.below(10) as u8).collect()
    }
}

fn first_u64(hash: &blake3::Hash) -> u64 {
    hash.as_bytes().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A prompt with its one right answer.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Text of the prompt, ending in `=`.
    pub prompt: String,
    /// The one right response.
    pub answer: String,
    task: Task,
    seed: u64,
    index: u64,
}

/// A content before its split is known: the prompt, the answer, and what decides the split.
struct Candidate {
    prompt: String,
    answer: String,
    key: String,
}

impl Problem {
    /// Problem `index` of a validated task: the first draw that falls in `split`.
    ///
    /// # Errors
    /// Where the task is so small that the split has no content.
    pub(super) fn draw(task: Task, split: Split, seed: u64, index: u64) -> Result<Self, Error> {
        let mut noise = Noise::new(task, seed, index, Use::Content);
        for _ in 0..MAX_DRAWS {
            let Candidate { prompt, answer, key } = candidate(task, &mut noise);
            if split_of(task, &key) == split {
                return Ok(Problem { prompt, answer, task, seed, index });
            }
        }
        let value = split.name().to_owned();
        Err(Error::Task {
            task: task.name(),
            key: "split",
            value,
            expected: "a task with more contents: raise max_digits",
        })
    }

    /// The completion that `kind` asks for.
    pub fn demonstration(&self, kind: Demonstration) -> Option<String> {
        match kind {
            Demonstration::None => None,
            Demonstration::Solution => Some(self.answer.clone()),
            Demonstration::RandomPermutation => {
                Some(self.permuted(&mut Noise::new(self.task, self.seed, self.index, Use::Permutation)))
            }
        }
    }

    /// The answer's digits in random order, a sign left in front.
    fn permuted(&self, noise: &mut Noise) -> String {
        self.with_digits(|digits| {
            for last in (1..digits.len()).rev() {
                digits.swap(last, noise.below(last as u64 + 1) as usize);
            }
        })
    }

    /// A wrong answer of the given kind. Where no order of the digits is wrong, a digit is changed.
    pub fn wrong(&self, kind: WrongAnswer) -> String {
        let noise = |purpose| Noise::new(self.task, self.seed, self.index, purpose);
        let permute = match kind {
            WrongAnswer::NearMiss => false,
            WrongAnswer::RandomPermutation => true,
            WrongAnswer::Mixed => noise(Use::WrongKind).below(2) == 1,
            WrongAnswer::Varied => match noise(Use::WrongKind).below(4) {
                0 => false,
                1 => true,
                _ => return self.with_other_digits(),
            },
        };
        if !permute {
            return self.corrupted();
        }
        let mut noise = noise(Use::WrongOrder);
        let mut orders = (0..MAX_ORDERS).map(|_| self.permuted(&mut noise));
        orders.find(|order| *order != self.answer).unwrap_or_else(|| self.corrupted())
    }

    /// A wrong answer that looks right: two unequal digits exchanged, or, where all are equal, one of them changed.
    pub fn corrupted(&self) -> String {
        let mut noise = Noise::new(self.task, self.seed, self.index, Use::Corruption);
        self.with_digits(|digits| {
            let first = noise.below(digits.len() as u64) as usize;
            let others: Vec<usize> = (0..digits.len()).filter(|&at| digits[at] != digits[first]).collect();
            match others.len() {
                0 => digits[first] = b'0' + (digits[first] - b'0' + 1 + noise.below(9) as u8) % 10,
                count => digits.swap(first, others[noise.below(count as u64) as usize]),
            }
        })
    }

    /// A wrong answer whose digits are not those of the right one: one changed, left out, or given twice.
    fn with_other_digits(&self) -> String {
        let mut noise = Noise::new(self.task, self.seed, self.index, Use::Corruption);
        self.with_digits(|digits| {
            let at = noise.below(digits.len() as u64) as usize;
            match noise.below(4) {
                0 if digits.len() > 1 => {
                    digits.remove(at);
                }
                0 | 1 => digits.insert(at, digits[at]),
                _ => digits[at] = b'0' + (digits[at] - b'0' + 1 + noise.below(9) as u8) % 10,
            }
            if matches!(self.task, Task::SortDigits { .. }) {
                digits.sort_unstable();
            }
        })
    }

    fn with_digits(&self, change: impl FnOnce(&mut Vec<u8>)) -> String {
        let (sign, digits) = match self.answer.strip_prefix('-') {
            Some(digits) => ("-", digits),
            None => ("", self.answer.as_str()),
        };
        let mut digits = digits.as_bytes().to_vec();
        change(&mut digits);
        format!("{sign}{}", text(&digits))
    }
}

fn text(digits: &[u8]) -> String {
    digits.iter().map(|&digit| char::from(digit)).collect()
}

fn candidate(task: Task, noise: &mut Noise) -> Candidate {
    match task {
        Task::SortDigits { min_digits, max_digits } => {
            let digits = draw_digits(noise, min_digits, max_digits);
            let mut sorted = digits.clone();
            sorted.sort_unstable();
            let answer = text(&sorted);
            Candidate { prompt: format!("sort {}=", text(&digits)), key: answer.clone(), answer }
        }
        Task::ReverseDigits { min_digits, max_digits } => {
            let digits = draw_digits(noise, min_digits, max_digits);
            let answer: String = digits.iter().rev().map(|&digit| char::from(digit)).collect();
            Candidate { prompt: format!("reverse {}=", text(&digits)), key: text(&digits), answer }
        }
        Task::ChainSum { min_terms, max_terms, min_digits, max_digits } => {
            let num_terms = noise.between(min_terms, max_terms);
            let (expression, sum) = chain(noise, num_terms, (min_digits, max_digits));
            Candidate { prompt: format!("{expression}="), answer: sum.to_string(), key: expression }
        }
    }
}

fn draw_digits(noise: &mut Noise, min_digits: u32, max_digits: u32) -> Vec<u8> {
    let count = noise.between(min_digits, max_digits);
    noise.digits(count)
}

/// Terms of the given numbers of digits joined by random signs, and their sum.
fn chain(noise: &mut Noise, num_terms: u32, (min_digits, max_digits): (u32, u32)) -> (String, i64) {
    let mut expression = String::new();
    let mut sum = 0;
    for index in 0..num_terms {
        let count = noise.between(min_digits, max_digits);
        let term = term(noise, count);
        let is_minus = index > 0 && noise.below(2) == 1;
        if index > 0 {
            expression.push(if is_minus { '-' } else { '+' });
        }
        expression.push_str(&term.to_string());
        sum += if is_minus { -term } else { term };
    }
    (expression, sum)
}

/// A number of exactly `count` digits; a single digit may be 0.
fn term(noise: &mut Noise, count: u32) -> i64 {
    let low = if count == 1 { 0 } else { 10i64.pow(count - 1) };
    low + noise.below((10i64.pow(count) - low) as u64) as i64
}

/// The split of a content: by its hash, the same for every seed.
fn split_of(task: Task, key: &str) -> Split {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"temper task split v1 ").update(task.name().as_bytes()).update(b" ").update(key.as_bytes());
    if first_u64(&hasher.finalize()).is_multiple_of(TEST_SHARE) { Split::Test } else { Split::Train }
}
