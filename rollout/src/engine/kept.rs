//! K/V that a paused sample keeps ([`temper_proto::GroupRequest::keep_kv`]), so that its next round attends to them
//! whatever weights stored them.
//!
//! Nothing is pinned: the full blocks of such a sample stay in the prefix cache under the names that they have, of
//! which some begin with older weights, and only their names are remembered here. No other sample is given such a name,
//! so none finds them. What the pool gave away in the meantime is computed anew, and everything behind it.

use super::prefix::BlockNamer;
use super::sample::OpenSample;
use super::{Engine, SeqKey};
use crate::block_manager::BlockHash;
use crate::model::Model;
use std::collections::{BTreeMap, HashSet};
use temper_types::GroupId;

/// The K/V of one sample, by name.
#[derive(Debug)]
pub(super) struct KeptKv {
    /// Of its full blocks, from the first on.
    pub names: Vec<BlockHash>,
    /// Hash of the tokens of these blocks.
    pub text: u128,
    /// What names of the weights that stored the last of them begin with.
    pub seed: u128,
    /// Leading blocks that were stored by other weights than those.
    pub num_old: usize,
}

/// K/V of paused samples, by group and sample.
#[derive(Debug, Default)]
pub(super) struct KeptSamples {
    by_sample: BTreeMap<(GroupId, usize), KeptKv>,
}

impl KeptSamples {
    pub fn clear(&mut self) {
        self.by_sample.clear();
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_sample.len()
    }

    /// Let go of what is not in the pool any more: its samples may never come back.
    fn retain(&mut self, is_cached: impl Fn(BlockHash) -> bool) {
        self.by_sample.retain(|_, kept| kept.names.first().is_some_and(|name| is_cached(*name)));
    }

    fn names(&self) -> impl Iterator<Item = BlockHash> + '_ {
        self.by_sample.values().flat_map(|kept| kept.names.iter().copied())
    }
}

impl BlockNamer {
    /// What `sample` keeps of its K/V under `names`.
    fn keep(&mut self, sample: &OpenSample, names: &[BlockHash]) -> KeptKv {
        let text = self.text(sample, names.len());
        KeptKv { names: names.to_vec(), text, seed: self.seed(), num_old: sample.num_old_blocks.min(names.len()) }
    }
}

impl<M: Model> Engine<M> {
    /// Remember the K/V of the sample behind `key`, which pauses.
    pub(super) fn keep_kv(&mut self, key: SeqKey) {
        let (Some(namer), Some(sample)) = (&mut self.namer, &self.samples[key.index()]) else { return };
        let names = self.scheduler.cached_names(key);
        if sample.context.request.keep_kv && !names.is_empty() {
            let kept = namer.keep(sample, names);
            self.kept.by_sample.insert((sample.context.request.group_id, sample.sample_index()), kept);
            if self.kept.by_sample.len() > self.options.limits.num_blocks {
                self.let_go();
            }
        }
    }

    /// Give the sample behind `key`, which has just been queued, what it kept, where that is of these very tokens.
    pub(super) fn take_kept_kv(&mut self, key: SeqKey) {
        let (Some(namer), Some(sample)) = (&mut self.namer, &mut self.samples[key.index()]) else { return };
        let request = &sample.context.request;
        let kept = self.kept.by_sample.remove(&(request.group_id, sample.sample_index()));
        let kept = kept.filter(|_| request.keep_kv);
        sample.kept = kept.filter(|kept| {
            let num_slots = kept.names.len() * self.options.limits.block_size;
            num_slots < sample.num_tokens() && namer.text(sample, kept.names.len()) == kept.text
        });
        self.name_kept_blocks(key);
    }

    /// Begin the names of the sample behind `key`, which has none, with those of the blocks that it kept and the pool
    /// still has.
    pub(super) fn name_kept_blocks(&mut self, key: SeqKey) {
        let (Some(namer), Some(sample)) = (&mut self.namer, &mut self.samples[key.index()]) else { return };
        let num_kept = sample.kept.as_ref().map_or(0, |kept| self.scheduler.blocks().num_cached(&kept.names));
        sample.num_old_blocks = 0;
        if let Some(kept) = sample.kept.as_ref().filter(|_| num_kept > 0) {
            kept.names[..num_kept].iter().for_each(|name| self.scheduler.push_hash(key, *name));
            let is_of_today = kept.seed == namer.seed();
            sample.num_old_blocks = if is_of_today { kept.num_old.min(num_kept) } else { num_kept };
            sample.chain = namer.behind(kept.names[num_kept - 1], num_kept, sample.num_old_blocks == num_kept);
        }
        self.scheduler.set_kept(key, num_kept);
    }

    /// Let go of what the pool gave away.
    fn let_go(&mut self) {
        let blocks = self.scheduler.blocks();
        self.kept.retain(|name| blocks.num_cached(&[name]) > 0);
    }

    /// Forget cached prefixes but those that samples kept, because the weights changed.
    pub(super) fn forget_prefixes(&mut self) {
        self.let_go();
        let open = self.samples.iter().flatten().filter_map(|sample| sample.kept.as_ref());
        let kept: HashSet<BlockHash> =
            self.kept.names().chain(open.flat_map(|kept| kept.names.iter().copied())).collect();
        self.scheduler.invalidate_cache(|name| kept.contains(&name));
    }
}
