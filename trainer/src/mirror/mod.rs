//! The state after a step, each shard of it in the memory of two ranks (docs/adr/0018).
//!
//! After every step a rank copies its shard, and a thread of its own hashes the copy, sends it to the next rank of
//! those that hold one copy of the state together, and takes that of the rank before; ranks that have replicas send
//! nothing. Once every rank has said that it holds what it is to hold, the copies of the step before are let go of.
//! Until then both steps are held, so that a rank that dies on the way leaves the earlier one whole.

mod agree;
mod copy;
mod restore;
mod transfer;

pub use agree::agree_on_mirrors;

use crate::ranks::{MirrorLinks, Ranks};
use crate::{Error, Trainer};
use copy::{Draft, ShardCopy};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_collective::Operation;
use temper_proto::{HeldShard, MirrorReport};

/// The copies that a rank holds, and the one that is under way.
#[derive(Debug)]
pub(crate) struct Mirror {
    links: Arc<MirrorLinks>,
    slots: Arc<Mutex<Slots>>,
    under_way: Option<JoinHandle<Result<Transferred, Error>>>,
}

/// At most two steps of each, the older one first.
#[derive(Debug, Default)]
struct Slots {
    /// Of this rank's shard.
    own: Vec<Arc<ShardCopy>>,
    /// Of the shard of the rank before.
    mirrored: Vec<Arc<ShardCopy>>,
    /// The step whose copies all ranks hold, where the ranks are still those that said so.
    confirmed: Option<u64>,
}

impl Slots {
    /// What every rank has: the next one of this rank's shard, and this one of the shard before.
    fn confirmed<'a>(&self, of: &'a [Arc<ShardCopy>]) -> Option<&'a Arc<ShardCopy>> {
        of.iter().rev().find(|copy| Some(copy.held().step) == self.confirmed)
    }

    fn find(&self, step: u64, shard: u32) -> Option<Arc<ShardCopy>> {
        let is_it = |copy: &&Arc<ShardCopy>| (copy.held().step, copy.held().shard) == (step, shard);
        self.own.iter().chain(&self.mirrored).find(is_it).cloned()
    }

    fn keep_only(&mut self, step: u64) {
        self.own.retain(|copy| copy.held().step == step);
        self.mirrored.retain(|copy| copy.held().step == step);
    }
}

/// Put in the copy of a step that may be there already.
fn put(slots: &mut Vec<Arc<ShardCopy>>, copy: &Arc<ShardCopy>) {
    slots.retain(|held| held.held().step != copy.held().step);
    slots.push(Arc::clone(copy));
}

fn lock(slots: &Mutex<Slots>) -> MutexGuard<'_, Slots> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a transfer cost.
#[derive(Debug, Clone, Copy, Default)]
struct Transferred {
    bytes_sent: u64,
    elapsed: Duration,
}

impl Mirror {
    fn new(ranks: &Ranks, slots: Arc<Mutex<Slots>>) -> Result<Self, Error> {
        Ok(Mirror { links: Arc::new(ranks.mirror_links()?), slots, under_way: None })
    }

    /// Wait for what is under way.
    fn settle(&mut self) -> Result<Transferred, Error> {
        let Some(thread) = self.under_way.take() else { return Ok(Transferred::default()) };
        let panicked = |_| Err(Error::Mirror { problem: "the thread that sends a shard panicked".to_owned() });
        thread.join().unwrap_or_else(panicked)
    }

    fn start(&mut self, draft: Draft) -> Result<(), Error> {
        let (links, slots) = (Arc::clone(&self.links), Arc::clone(&self.slots));
        let run = move || {
            let result = exchange(draft, &links, &slots);
            if result.as_ref().is_err_and(|error| !matches!(error, Error::Collective(_))) {
                // A rank that fails alone leaves no other one waiting.
                links.all.give_up(Operation::Mirror);
            }
            result
        };
        let refused = |e: std::io::Error| Error::Mirror { problem: format!("no thread to send a shard: {e}") };
        self.under_way = Some(std::thread::Builder::new().name("mirror".to_owned()).spawn(run).map_err(refused)?);
        Ok(())
    }
}

/// Hash this rank's copy, exchange copies, and let the step before go once all ranks have theirs.
fn exchange(draft: Draft, links: &MirrorLinks, slots: &Mutex<Slots>) -> Result<Transferred, Error> {
    let begin = Instant::now();
    let before = links.all.counts().of(Operation::Mirror);
    let own = Arc::new(draft.seal()?);
    let step = own.held().step;
    let (known_to_next, known) = {
        let mut slots = lock(slots);
        let pair = (slots.confirmed(&slots.own).cloned(), slots.confirmed(&slots.mirrored).cloned());
        put(&mut slots.own, &own);
        pair
    };
    if let Some((to_next, from_before)) = &links.ring {
        let mirrored = std::thread::scope(|scope| {
            let sender = scope.spawn(|| transfer::send(to_next, &own, known_to_next.as_deref()));
            let received = transfer::receive(from_before, known.as_deref());
            let panicked = |_| Err(Error::Mirror { problem: "the thread that sends a shard panicked".to_owned() });
            let sent = sender.join().unwrap_or_else(panicked);
            sent.and(received)
        })?;
        put(&mut lock(slots).mirrored, &Arc::new(mirrored));
    }
    links.all.meet()?;
    let mut slots = lock(slots);
    slots.keep_only(step);
    slots.confirmed = Some(step);
    let sent = links.all.counts().of(Operation::Mirror).bytes_sent - before.bytes_sent;
    Ok(Transferred { bytes_sent: sent, elapsed: begin.elapsed() })
}

impl Trainer {
    /// Keep the state after every step that [`Trainer::mirror`] is told of in the memory of two ranks.
    ///
    /// # Errors
    /// A trainer that is alone.
    pub fn keep_mirrors(&mut self) -> Result<(), Error> {
        let alone = || Error::invalid("mirrors", "need a second rank to hold them: this trainer is alone");
        let ranks = self.ranks.as_ref().filter(|ranks| ranks.world() > 1).ok_or_else(alone)?;
        self.mirror = Some(Mirror::new(ranks, Arc::default())?);
        Ok(())
    }

    /// Copy the state as it is after `step`, and begin to mirror it; all ranks together. What was under way is waited
    /// for.
    ///
    /// # Errors
    /// No mirrors are kept; a lost rank.
    pub fn mirror(&mut self, step: u64) -> Result<MirrorReport, Error> {
        let begin = Instant::now();
        let mut mirror = self.mirror.take().ok_or_else(unmirrored)?;
        let started = mirror.settle().and_then(|before| {
            let last = lock(&mirror.slots).own.last().cloned();
            let ranks = self.ranks.as_ref().ok_or_else(unmirrored)?;
            mirror.start(Draft::of(self, ranks, step, last.as_deref()))?;
            Ok(before)
        });
        self.mirror = Some(mirror);
        let before = started?;
        Ok(MirrorReport {
            bytes_sent: before.bytes_sent,
            wait_seconds: begin.elapsed().as_secs_f64(),
            transfer_seconds: before.elapsed.as_secs_f64(),
        })
    }

    /// The shards that this rank holds, once nothing is under way any more.
    ///
    /// # Errors
    /// No mirrors are kept.
    pub fn held_shards(&mut self) -> Result<Vec<HeldShard>, Error> {
        let mirror = self.mirror.as_mut().ok_or_else(unmirrored)?;
        // What failed has left what was there before, and the caller asks for that.
        let _is_lost = mirror.settle().is_err();
        let slots = lock(&mirror.slots);
        Ok(slots.own.iter().chain(&slots.mirrored).map(|copy| copy.held()).collect())
    }
}

fn unmirrored() -> Error {
    Error::invalid("mirrors", "are not kept by this trainer")
}
