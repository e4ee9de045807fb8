//! The way back: ranks meet anew, shards go to those that lost theirs, and everybody's state is that of the step again.

use super::copy::{CRITIC, FIRST, MASTERS, POLICY, REFERENCE, REWARD_MODEL, SECOND, ShardCopy, name_of, write};
use super::{Mirror, lock, transfer, unmirrored};
use crate::optimizer::Moments;
use crate::ranks::{Ranks, channel};
use crate::scalar_model::ScalarModel;
use crate::sequence::arena;
use crate::store::Store;
use crate::weights::{master_ranks, repack};
use crate::{Error, Trainer};
use std::sync::Arc;
use temper_actor::{ModelConfig, UnitShapes};
use temper_proto::{MirrorPlan, ScalarRole};

impl Trainer {
    /// Go on with other ranks in place of those of before, of which some were lost. State and copies are kept. A rank
    /// that was just loaded among them does the same by loading.
    ///
    /// # Errors
    /// A lost rank.
    pub fn rejoin(&mut self, ranks: Ranks) -> Result<(), Error> {
        self.arena = arena(Some(&ranks));
        if let Some(mut mirror) = self.mirror.take() {
            // What was under way between the former ranks ends with them.
            let _is_lost = mirror.settle().is_err();
            lock(&mirror.slots).confirmed = None;
            self.mirror = Some(Mirror::new(&ranks, mirror.slots)?);
        }
        let ranks = self.ranks.insert(ranks);
        // What a rank that loads says to the others: it packs its masters, and hands them on within its process.
        repack(&*self.device, Some(ranks), &self.weights.masters, &self.policy)?;
        ranks.fence()
    }

    /// Make the state that of `plan`, which all ranks are given, in a stage that has begun.
    ///
    /// # Errors
    /// A shard that is not held or not what its hash says; a lost rank.
    pub fn restore_mirrored(&mut self, plan: &MirrorPlan) -> Result<(), Error> {
        let restored = self.bring_back(plan);
        self.or_give_up(restored)
    }

    fn bring_back(&mut self, plan: &MirrorPlan) -> Result<(), Error> {
        let mirror = self.mirror.as_mut().ok_or_else(unmirrored)?;
        mirror.settle()?;
        let (slots, ranks) = (Arc::clone(&mirror.slots), self.ranks.as_ref().ok_or_else(unmirrored)?);
        let held = |shard: usize| {
            let problem = format!("shard {shard} of step {} is not held by rank {}", plan.step, ranks.rank());
            lock(&slots).find(plan.step, shard as u32).ok_or(Error::Mirror { problem })
        };
        for source in &plan.sources {
            let (rank, from) = (source.rank as usize, source.from as usize);
            if ![rank, from].contains(&ranks.rank()) {
                continue;
            }
            let link = ranks.pair((from, rank), channel::RECOVERY + source.rank)?;
            if ranks.rank() == from {
                transfer::send(&link, &*held(ranks.shard_of(rank))?, None)?;
            } else {
                let copy = Arc::new(transfer::receive(&link, None)?);
                super::put(&mut lock(&slots).own, &copy);
            }
        }
        let own = held(ranks.shard())?;
        lock(&slots).keep_only(plan.step);
        self.become_copy(&own)
    }

    /// Make the state that of a copy of this rank's shard; all ranks together.
    fn become_copy(&mut self, copy: &ShardCopy) -> Result<(), Error> {
        let device = Arc::clone(&self.device);
        let on = (&*device, self.ranks.as_ref().ok_or_else(unmirrored)?);
        let masters = name_of(POLICY, MASTERS);
        write(on, (&masters, values(copy, &masters)?), &mut self.weights.masters)?;
        self.weights.moments = moments(on, &self.config, (copy, POLICY))?;
        self.shared_head.iter_mut().zip(&copy.manifest.shared_head).try_for_each(|(head, text)| {
            head.set_text(text).map_err(|problem| Error::Mirror { problem: format!("the value head: {problem}") })
        })?;
        match copy.parts.contains_key(REFERENCE) {
            true => {
                let reference = masters_of(on, &self.config, (copy, REFERENCE))?;
                self.set_reference(reference)?;
            }
            false => self.reference = None,
        }
        self.critic = self.scalar_of(copy, (CRITIC, ScalarRole::Critic))?;
        self.reward_model = self.scalar_of(copy, (REWARD_MODEL, ScalarRole::RewardModel))?;
        repack(&*self.device, self.ranks.as_ref(), &self.weights.masters, &self.policy)?;
        self.set_version(copy.manifest.version).map(drop)
    }

    fn scalar_of(&self, copy: &ShardCopy, (name, role): (&str, ScalarRole)) -> Result<Option<ScalarModel>, Error> {
        let masters = name_of(name, MASTERS);
        if !copy.parts.contains_key(&masters) {
            return Ok(None);
        }
        let ranks = self.ranks.as_ref().ok_or_else(unmirrored)?;
        let (on, config) = ((&*self.device, ranks), self.scalar_config(role)?);
        let (masters, moments) = (masters_of(on, &config, (copy, &masters))?, moments(on, &config, (copy, name))?);
        let mut model = ScalarModel::new((&self.device, Some(ranks)), masters, config, self.dtype)?;
        model.weights.moments = moments;
        Ok(Some(model))
    }
}

fn values<'a>(copy: &'a ShardCopy, name: &str) -> Result<&'a [f32], Error> {
    let missing = || Error::Mirror { problem: format!("the shard of step {} has no `{name}`", copy.manifest.step) };
    copy.parts.get(name).map(|part| &part.values[..]).ok_or_else(missing)
}

/// A new store of a model's masters, whole where masters are.
fn masters_of(
    on: (&dyn temper_tensor::Device, &Ranks),
    config: &ModelConfig,
    (copy, name): (&ShardCopy, &str),
) -> Result<Store, Error> {
    let mut store = Store::zeros(on.0, &UnitShapes::new(config), master_ranks(Some(on.1)));
    write(on, (name, values(copy, name)?), &mut store)?;
    Ok(store)
}

fn moments(
    on: (&dyn temper_tensor::Device, &Ranks),
    config: &ModelConfig,
    (copy, model): (&ShardCopy, &str),
) -> Result<Option<Moments>, Error> {
    let Some(num_updates) = copy.manifest.num_updates.get(model).copied() else { return Ok(None) };
    let read = |store: &str| {
        let name = name_of(model, store);
        let mut moment = Store::zeros(on.0, &UnitShapes::new(config), Some(on.1));
        write(on, (&name, values(copy, &name)?), &mut moment)?;
        Ok::<_, Error>(moment)
    };
    Ok(Some(Moments { first: read(FIRST)?, second: read(SECOND)?, num_updates }))
}
