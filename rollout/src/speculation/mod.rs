//! Speculation: which tokens to verify in a step beside the ones that must be computed.
//!
//! Owns: drafters, what they know of earlier responses, how often their guesses came true, and what a step of so many
//! rows costs. Knows no model and no block. Nothing in here can change a response: a draft is verified by replaying
//! the pure sampler, so a wrong guess costs time only.
//!
//! Called by the engine: before a step is planned, and where [`Speculation::begin_step`] says that drafts may pay,
//! [`Speculation::observe`] with the tokens that were verified since, [`Speculation::propose`] and
//! [`Speculation::choose`]; [`Speculation::settle`] with what was kept of a draft; `observe` with the rest of a sample
//! that ends; [`Speculation::close_group`] when a group ends.

mod budget;
mod calibration;
mod draft_model;
mod history;
mod history_file;
mod replay;
mod suffix;

pub use budget::Budget;
pub use calibration::{Cell, match_bucket};
pub use draft_model::ModelDrafter;
pub use history::PastResponse;
pub use replay::ReplayDrafter;
pub use suffix::SuffixDrafter;

use crate::Error;
use crate::scheduler::SeqKey;
use calibration::Calibration;
use history::History;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;
use temper_proto::{DraftCounts, GeneratedSample, GroupRequest, SpeculationStats};
use temper_types::GroupId;

/// Which drafters guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Speculative {
    /// None: one row per sequence and step.
    Off,
    /// Continuations of the same words in the prompt, in siblings and in earlier responses to the prompt.
    Suffix,
    /// The same sample's response of the previous pass.
    Replay,
    /// A smaller model of the same vocabulary.
    Model,
    /// Suffix, replay, and the draft model where there is one, whichever expects more; nothing where nothing pays.
    #[default]
    Auto,
}

/// What a later pass over a prompt has of the pass before, whichever drafters guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Replay {
    /// Nothing but guesses: every pass has noise of its own, and earlier responses change no token.
    #[default]
    Exact,
    /// The noise of the first pass, for the same (prompt, sample): where the weights did not move a draw, it comes out
    /// as before, and the earlier response is guessed right. Every sample still follows the policy, but the passes over
    /// a prompt are no independent samples.
    Coupled,
    /// Its tokens, taken again with a probability ([`temper_proto::Reuse`]). Lossy: what comes out does not follow the
    /// policy. Reused tokens are flagged and keep the log-probs they were drawn with.
    Lenient,
}

/// Settings of [`Speculation`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeculationConfig {
    /// Which drafters guess.
    pub speculative: Speculative,
    /// Longest draft of one sequence in one step.
    pub max_draft_tokens: usize,
    /// Earlier passes over a prompt whose responses are kept.
    pub history_epochs: usize,
    /// Most response tokens kept of earlier passes, all prompts together; the oldest prompts go first.
    pub history_tokens: usize,
}

impl SpeculationConfig {
    /// No speculation.
    pub const OFF: Self =
        SpeculationConfig { speculative: Speculative::Off, max_draft_tokens: 0, history_epochs: 0, history_tokens: 0 };
}

/// What kind of drafter made a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrafterKind {
    /// [`SuffixDrafter`].
    Suffix,
    /// [`ReplayDrafter`].
    Replay,
    /// [`ModelDrafter`].
    Model,
}

/// A group that starts to generate.
#[derive(Debug, Clone, Copy)]
pub struct GroupStart<'a> {
    /// The group.
    pub group_id: GroupId,
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// Number of samples.
    pub num_samples: usize,
    /// Earlier responses to the same prompt, latest pass first.
    pub past: &'a [PastResponse],
}

/// A sample as far as it is verified.
#[derive(Debug, Clone, Copy)]
pub struct DraftContext<'a> {
    /// The group.
    pub group_id: GroupId,
    /// Index in the group.
    pub sample_index: usize,
    /// Its request.
    pub request: &'a GroupRequest,
    /// Stop token ids, ascending.
    pub stop_ids: &'a [u32],
    /// V, number of token ids.
    pub vocab_size: usize,
    /// Verified ids of the response.
    pub response: &'a [u32],
    /// Longest draft that can count.
    pub max_tokens: usize,
}

/// A guess at the next tokens of a sample.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// The guessed ids, in order.
    pub token_ids: Vec<u32>,
    /// Where the trust in each id is recorded; as many as ids.
    pub cells: Vec<Cell>,
}

impl Draft {
    /// Append a guess.
    pub fn push(&mut self, token_id: u32, cell: Cell) {
        self.token_ids.push(token_id);
        self.cells.push(cell);
    }

    /// Keep the first `len` guesses.
    pub fn truncate(&mut self, len: usize) {
        self.token_ids.truncate(len);
        self.cells.truncate(len);
    }

    /// Cut what could never be kept: ids outside the vocabulary, a stop id and what follows it, too many tokens.
    fn clip(&mut self, context: &DraftContext<'_>, max_draft_tokens: usize) {
        let is_usable = |id: &u32| (*id as usize) < context.vocab_size && context.stop_ids.binary_search(id).is_err();
        let num_usable = self.token_ids.iter().take_while(|id| is_usable(id)).count();
        self.cells.resize(self.token_ids.len(), Cell::default());
        self.truncate(num_usable.min(context.max_tokens).min(max_draft_tokens));
    }
}

/// Guesses continuations. Whatever it says is verified.
pub trait Drafter: Send {
    /// Under which name its guesses are counted.
    fn kind(&self) -> DrafterKind;

    /// A group is about to draw its first token.
    fn open_group(&mut self, start: &GroupStart<'_>);

    /// The last `num_new` tokens of `context.response` are new.
    fn observe(&mut self, context: &DraftContext<'_>, num_new: usize);

    /// True where [`Drafter::prepare`] wants to see all samples of a step at once.
    fn wants_all(&self) -> bool {
        false
    }

    /// All samples that are about to be guessed for, each with [`Drafter::propose`], `max_tokens` tokens at most.
    fn prepare(&mut self, contexts: &[DraftContext<'_>], max_tokens: usize) {
        let _ = (contexts, max_tokens);
    }

    /// Guess how `context` goes on; `draft` comes empty and may stay so.
    fn propose(&mut self, context: &DraftContext<'_>, draft: &mut Draft);

    /// A group ended.
    fn close_group(&mut self, group_id: GroupId);

    /// Give memory back that only drafting needs; gives the number of bytes.
    ///
    /// # Errors
    /// Where a draft is under way.
    fn sleep(&mut self) -> Result<usize, Error> {
        Ok(0)
    }
}

/// A draft for one sequence, and who made it.
#[derive(Debug, Clone, Default)]
pub struct Proposal {
    /// Index of the drafter.
    drafter: usize,
    /// The guess; empty for none.
    pub draft: Draft,
}

/// All drafters of an engine and what decides between them.
pub struct Speculation {
    max_draft_tokens: usize,
    drafters: Vec<Box<dyn Drafter>>,
    calibrations: Vec<Calibration>,
    history: History,
    budget: Budget,
    open: BTreeSet<GroupId>,
    proposals: Vec<(SeqKey, Proposal)>,
    num_proposals: usize,
    spare: Draft,
    /// Longest draft that was granted in the last step that drafted.
    longest: usize,
    stats: SpeculationStats,
}

impl Speculation {
    /// Drafters after `config`, with a measured budget; `None` where it says off.
    pub fn new(config: SpeculationConfig) -> Option<Self> {
        let drafters: Vec<Box<dyn Drafter>> = match config.speculative {
            Speculative::Off => return None,
            Speculative::Suffix => vec![Box::new(SuffixDrafter::new(config.max_draft_tokens))],
            Speculative::Replay => vec![Box::new(ReplayDrafter::new(config.max_draft_tokens))],
            Speculative::Model => Vec::new(),
            Speculative::Auto => vec![
                Box::new(ReplayDrafter::new(config.max_draft_tokens)),
                Box::new(SuffixDrafter::new(config.max_draft_tokens)),
            ],
        };
        Some(Self::with_drafters(config, drafters, Budget::measured()))
    }

    /// These drafters and this budget.
    pub fn with_drafters(config: SpeculationConfig, drafters: Vec<Box<dyn Drafter>>, budget: Budget) -> Self {
        Speculation {
            max_draft_tokens: config.max_draft_tokens,
            calibrations: drafters.iter().map(|_| Calibration::default()).collect(),
            drafters,
            history: History::new(config.history_epochs, config.history_tokens),
            budget,
            open: BTreeSet::new(),
            proposals: Vec::new(),
            num_proposals: 0,
            spare: Draft::default(),
            longest: 2,
            stats: SpeculationStats::default(),
        }
    }

    /// True where drafts are chosen by what steps cost, and that is not known of any yet.
    pub(crate) fn lacks_step_times(&self) -> bool {
        self.budget.lacks_step_times()
    }

    /// Let every drafter give back what memory it can; gives the number of bytes.
    pub(crate) fn sleep(&mut self) -> Result<usize, Error> {
        self.drafters.iter_mut().map(|drafter| drafter.sleep()).sum()
    }

    /// Begin a step of `num_rows` rows that draw, drafts not counted. False where no draft can pay, so that looking
    /// for any is a waste.
    pub fn begin_step(&mut self, num_rows: usize) -> bool {
        self.num_proposals = 0;
        let best = self.calibrations.iter().map(Calibration::best).fold(0.0, f64::max);
        self.budget.is_worth_asking(num_rows, best)
    }

    /// Let this drafter guess too.
    pub fn add_drafter(&mut self, drafter: Box<dyn Drafter>) {
        self.drafters.push(drafter);
        self.calibrations.push(Calibration::default());
    }

    /// Keep the history in the file at `path`, and know what stands there. `vocabulary` is what ids mean.
    pub fn keep_history(&mut self, path: &std::path::Path, vocabulary: &str) {
        self.history.open(path, vocabulary);
    }

    /// True where a drafter wants to see all samples of a step at once, in [`Speculation::prepare`].
    pub fn wants_all(&self) -> bool {
        self.drafters.iter().any(|drafter| drafter.wants_all())
    }

    /// Show all samples that will be proposed for. Drafters that compute do so up to twice the longest draft that paid
    /// last time, so that the budget decides the length.
    pub fn prepare(&mut self, contexts: &[DraftContext<'_>]) {
        let max_tokens = (2 * self.longest).max(2).min(self.max_draft_tokens);
        for drafter in self.drafters.iter_mut().filter(|drafter| drafter.wants_all()) {
            drafter.prepare(contexts, max_tokens);
        }
    }

    /// Ask every drafter how the sample behind `key` goes on, and keep the answer that expects most.
    pub fn propose(&mut self, key: SeqKey, context: &DraftContext<'_>) {
        if self.proposals.len() == self.num_proposals {
            self.proposals.push((key, Proposal::default()));
        }
        let (slot, best) = &mut self.proposals[self.num_proposals];
        (*slot, best.drafter) = (key, 0);
        best.draft.truncate(0);
        let mut most = 0.0;
        for (index, drafter) in self.drafters.iter_mut().enumerate() {
            self.spare.truncate(0);
            drafter.propose(context, &mut self.spare);
            self.spare.clip(context, self.max_draft_tokens);
            let expected: f64 = self.calibrations[index].survivals(&self.spare.cells).sum();
            if expected > most {
                most = expected;
                best.drafter = index;
                std::mem::swap(&mut best.draft, &mut self.spare);
            }
        }
        self.num_proposals += usize::from(!best.draft.token_ids.is_empty());
    }

    /// Cut the proposals to what maximises the expected tokens per second of the step, and hand them to `take`, which
    /// may swap its own memory in.
    pub fn choose(&mut self, mut take: impl FnMut(SeqKey, &mut Proposal)) {
        let proposals = &mut self.proposals[..self.num_proposals];
        let survivals = proposals.iter().enumerate().flat_map(|(index, (_, proposal))| {
            self.calibrations[proposal.drafter].survivals(&proposal.draft.cells).map(move |s| (s, index))
        });
        let lens = self.budget.choose(proposals.len(), survivals);
        self.longest = lens.iter().copied().max().unwrap_or(0);
        for ((key, proposal), &len) in proposals.iter_mut().zip(lens) {
            if len > 0 {
                proposal.draft.truncate(len);
                take(*key, proposal);
            }
        }
    }

    /// Record that of the first `num_drafted` tokens of `proposal`, all computed, `num_accepted` were what was drawn.
    pub fn settle(&mut self, proposal: &Proposal, num_drafted: usize, num_accepted: usize) {
        if num_drafted == 0 {
            return;
        }
        let counts = match self.drafters[proposal.drafter].kind() {
            DrafterKind::Suffix => &mut self.stats.suffix,
            DrafterKind::Replay => &mut self.stats.replay,
            DrafterKind::Model => &mut self.stats.model,
        };
        self.stats.num_drafts += 1;
        for (index, cell) in proposal.draft.cells[..num_drafted].iter().enumerate() {
            let DraftCounts { num_draft_tokens, num_accepted_tokens } = &mut counts[cell.match_bucket()];
            *num_draft_tokens += 1;
            *num_accepted_tokens += u64::from(index < num_accepted);
        }
        self.calibrations[proposal.drafter].record(&proposal.draft.cells[..num_drafted], num_accepted);
    }

    /// The last `num_new` tokens of `context.response` are verified.
    pub fn observe(&mut self, context: &DraftContext<'_>, num_new: usize) {
        if self.open.insert(context.group_id) {
            let prompt = &context.request.prompt_token_ids;
            let num_samples = context.request.seeds.len();
            let past = self.history.get(prompt);
            let start = GroupStart { group_id: context.group_id, prompt, num_samples, past: &past };
            self.drafters.iter_mut().for_each(|drafter| drafter.open_group(&start));
            self.show_begun(context);
        }
        self.drafters.iter_mut().for_each(|drafter| drafter.observe(context, num_new));
    }

    /// Show what earlier rounds have drawn of a group that goes on.
    fn show_begun(&mut self, context: &DraftContext<'_>) {
        let begun = context.request.begun.iter().enumerate().filter(|(_, begun)| !begun.token_ids.is_empty());
        for (sample_index, begun) in begun {
            let context = DraftContext { sample_index, response: &begun.token_ids, ..*context };
            self.drafters.iter_mut().for_each(|drafter| drafter.observe(&context, begun.token_ids.len()));
        }
    }

    /// A group ended; its responses are remembered under its prompt.
    pub fn close_group(&mut self, request: &GroupRequest, samples: &[GeneratedSample]) {
        if self.open.remove(&request.group_id) {
            self.drafters.iter_mut().for_each(|drafter| drafter.close_group(request.group_id));
            self.history.add(&request.prompt_token_ids, samples);
        }
    }

    /// Looking for the drafts of a step took `elapsed`.
    pub fn note_look(&mut self, elapsed: Duration) {
        self.budget.note_look(elapsed);
    }

    /// A step of `num_rows` rows, none of them of a prompt, took `elapsed`, looking for drafts not counted.
    pub fn note_step(&mut self, num_rows: usize, elapsed: Duration) {
        self.budget.note_step(num_rows, elapsed);
    }

    /// Counters.
    pub fn stats(&self) -> SpeculationStats {
        self.stats
    }
}

#[cfg(test)]
mod tests;
