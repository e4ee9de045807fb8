//! Every layout, estimated; what does not fit is dropped with the reason.

use super::cost::{Estimate, Inputs};
use super::layout::{Layout, layouts, sharding_name};
use super::{Calibration, Cluster, Workload};
use std::collections::BTreeMap;

/// A layout that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The layout.
    pub layout: Layout,
    /// What it is predicted to cost.
    pub estimate: Estimate,
}

/// Layouts that were dropped for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// Why, in words.
    pub reason: String,
    /// How many.
    pub count: usize,
    /// Of memory: the least that one of them would need, where.
    pub least: Option<(String, u64, u64)>,
}

/// The outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Search {
    /// What fits, best first: by seconds of a step, then the fewest changes of the recipe, then memory.
    pub choices: Vec<Choice>,
    /// What does not.
    pub dropped: Vec<Dropped>,
}

impl Search {
    /// The best of every kind of placement, best first.
    pub fn kinds(&self) -> Vec<&Choice> {
        let mut seen = Vec::new();
        let mut first = |choice: &&Choice| {
            let kind = choice.layout.kind();
            let is_new = !seen.contains(&kind);
            if is_new {
                seen.push(kind);
            }
            is_new
        };
        self.choices.iter().filter(|choice| first(choice)).collect()
    }
}

/// Try every placement.
pub fn search(work: &Workload, cal: &Calibration, cluster: &Cluster) -> Search {
    let inputs = Inputs { work, cal, cluster };
    let mut choices = Vec::new();
    let mut dropped: BTreeMap<&'static str, Dropped> = BTreeMap::new();
    for layout in layouts(work, cluster) {
        let problem = match idle_part(work, &layout) {
            Some(reason) => Err((reason, None)),
            None => {
                let estimate = inputs.estimate(&layout);
                match estimate.memory.misfit(cluster) {
                    Some(misfit) => Err(("memory", Some(misfit))),
                    None => Ok(estimate),
                }
            }
        };
        match problem {
            Ok(estimate) => choices.push(Choice { layout, estimate }),
            Err((reason, misfit)) => count(&mut dropped, reason, misfit),
        }
    }
    let changes = |choice: &Choice| choice.layout.assignments(work, cluster).len();
    // Seconds are not negative, so that their bits are in their order.
    choices.sort_by_cached_key(|choice| (choice.estimate.seconds.step.to_bits(), changes(choice), order(choice)));
    Search { choices, dropped: dropped.into_values().collect() }
}

/// Among equals: less memory, then less of what changes numbers, then whatever is the same every time.
fn order(choice: &Choice) -> impl Ord + use<> {
    let layout = &choice.layout;
    (
        choice.estimate.memory.largest(),
        (layout.staleness, layout.ranks, layout.sequence_parallel),
        (layout.mode, layout.engines, layout.tensor_parallel),
        (sharding_name(layout.sharding), layout.max_micro_batch_tokens, layout.recompute),
        layout.sharding.num_shards(layout.ranks),
    )
}

/// Why a layout has a part with nothing to do.
fn idle_part(work: &Workload, layout: &Layout) -> Option<&'static str> {
    let rows = work.num_rows() / work.mini_batches;
    match (layout.engines > work.prompts, layout.row_groups() > rows) {
        (true, _) => Some("more engines than prompts in a step"),
        (_, true) => Some("more trainer ranks, or groups of them that share rows, than rows in a mini-batch"),
        (false, false) => None,
    }
}

fn count(dropped: &mut BTreeMap<&'static str, Dropped>, reason: &'static str, misfit: Option<(String, u64, u64)>) {
    let entry = dropped.entry(reason);
    let entry = entry.or_insert_with(|| Dropped { reason: reason.to_owned(), count: 0, least: None });
    entry.count += 1;
    if let Some(misfit) = misfit
        && entry.least.as_ref().is_none_or(|least| misfit.1 < least.1)
    {
        entry.least = Some(misfit);
    }
}
