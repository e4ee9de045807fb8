//! Rank 0's way to the others.

use super::command::{Order, StepCommand};
use super::exchange::{Exchange, PIECE, SliceHash, lost};
use super::follower::follow;
use crate::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_actor::{ModelConfig, ParamStore, TensorPart};
use temper_collective::{Collective, Counts, connect_threads};
use temper_tensor::{DType, Device};
use temper_types::ContentHash;

/// The tensor-parallel ranks of one engine, as rank 0 sees them. They end with it.
pub struct RankGroup {
    shared: Arc<Shared>,
    part: Arc<TensorPart>,
    /// Says that rank 0 is there while nothing is computed.
    herald: Option<JoinHandle<()>>,
    /// Ranks that are threads of this process.
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Held during a step, and while weights are handed out.
    ranks: Mutex<Ranks>,
    /// Why nothing works any more.
    lost: OnceLock<Error>,
    is_ending: AtomicBool,
}

struct Ranks {
    all: Collective,
    /// What each of the others holds, and the two of us alone.
    others: Vec<(TensorPart, Collective)>,
    told_at: Instant,
}

impl RankGroup {
    /// Lead `ranks`, of which this process has rank 0: the others [`follow`]. They have no weights yet: see
    /// [`RankGroup::hand_out`].
    ///
    /// # Errors
    /// A model that cannot be divided over so many ranks, or a thread that cannot be started.
    pub fn lead(config: &ModelConfig, ranks: Collective) -> Result<Self, Error> {
        let world = ranks.world();
        let part = |rank| TensorPart::new(config, rank, world).map_err(|e| Error::Model(e.to_string()));
        let other = |rank| Ok((part(rank)?, ranks.subgroup(&[0, rank], 0).map_err(lost)?));
        let (own, others) = (Arc::new(part(0)?), (1..world).map(other).collect::<Result<Vec<_>, Error>>()?);
        let period = ranks.timeout() / 4;
        let ranks = Mutex::new(Ranks { all: ranks, others, told_at: Instant::now() });
        let shared = Arc::new(Shared { ranks, lost: OnceLock::new(), is_ending: AtomicBool::new(false) });
        let said = Arc::clone(&shared);
        let herald = std::thread::Builder::new().name("still-here".to_owned()).spawn(move || said.herald(period));
        let herald = Some(herald.map_err(|e| Error::Ranks(format!("starting a thread: {e}")))?);
        Ok(RankGroup { shared, part: own, herald, threads: Vec::new() })
    }

    /// Lead ranks that are threads of this process and share its device; `timeout` bounds every wait between them.
    ///
    /// # Errors
    /// As [`RankGroup::lead`].
    pub fn of_threads(
        device: &Arc<dyn Device>,
        (config, dtype): (&ModelConfig, DType),
        num_ranks: usize,
        timeout: Duration,
    ) -> Result<Self, Error> {
        TensorPart::check(config, num_ranks).map_err(|e| Error::Model(e.to_string()))?;
        let mut ranks = connect_threads(num_ranks.max(1), timeout).into_iter();
        let leader = ranks.next().ok_or_else(|| Error::Ranks("there is no rank: expected at least one".to_owned()))?;
        let mut group = RankGroup::lead(config, leader)?;
        for rank in ranks {
            let (device, config, number) = (Arc::clone(device), config.clone(), rank.rank());
            let run = move || {
                if let Err(error) = follow(&device, &config, dtype, rank) {
                    tracing::error!(rank = number, %error, "a tensor-parallel rank ended");
                }
            };
            let thread = std::thread::Builder::new().name(format!("tensor-rank-{number}")).spawn(run);
            group.threads.push(thread.map_err(|e| Error::Ranks(format!("starting rank {number}: {e}")))?);
        }
        Ok(group)
    }

    /// Rank 0's part of the model.
    pub fn part(&self) -> &Arc<TensorPart> {
        &self.part
    }

    /// Why the group is of no use any more, where it is.
    pub fn lost(&self) -> Option<&Error> {
        self.shared.lost.get()
    }

    /// What rank 0 has sent and received.
    pub fn counts(&self) -> Counts {
        self.shared.lock().all.counts()
    }

    /// Give every other rank what it holds of `params`, which hash to `hash`, and wait until all have it.
    ///
    /// # Errors
    /// A rank that is lost, or holds something else than what was sent.
    pub fn hand_out(&self, device: &dyn Device, params: &ParamStore, hash: ContentHash) -> Result<(), Error> {
        let mut ranks = self.begin()?;
        let sent = ranks.tell(&Order::Weights(hash).encode()).and_then(|()| ranks.send(device, params));
        drop(ranks);
        sent.map_err(|error| self.fail(error))
    }

    /// Tell the others to give the memory of their K/V back.
    pub(crate) fn release_kv(&self) {
        let told = self.begin().and_then(|mut ranks| ranks.tell(&Order::ReleaseKv.encode()));
        if let Err(error) = told {
            // The next step fails with it.
            tracing::error!(error = %self.fail(error), "tensor-parallel ranks");
        }
    }

    /// Tell a step, and run rank 0's part of it.
    pub(crate) fn step<R>(
        &self,
        step: &StepCommand<'_>,
        run: impl FnOnce(&mut Exchange<'_>) -> Result<R, Error>,
    ) -> Result<R, Error> {
        let mut ranks = self.begin()?;
        let told = ranks.tell(&step.encode());
        let ran = told.and_then(|()| run(&mut Exchange(&ranks.all)));
        drop(ranks);
        ran.map_err(|error| self.fail(error))
    }

    /// The ranks, while none is lost.
    fn begin(&self) -> Result<MutexGuard<'_, Ranks>, Error> {
        match self.shared.lost.get() {
            Some(error) => Err(error.clone()),
            None => Ok(self.shared.lock()),
        }
    }

    fn fail(&self, error: Error) -> Error {
        self.shared.lost.get_or_init(|| error).clone()
    }
}

impl Ranks {
    fn tell(&mut self, command: &[u8]) -> Result<(), Error> {
        self.told_at = Instant::now();
        self.all.give_list(command).map_err(lost)
    }

    /// Send every rank its values, unit after unit, then the hash of them all.
    fn send(&self, device: &dyn Device, params: &ParamStore) -> Result<(), Error> {
        let mut hashes: Vec<SliceHash> = self.others.iter().map(|_| SliceHash::default()).collect();
        for unit in params.units() {
            for ((part, link), hash) in self.others.iter().zip(&mut hashes) {
                let values = part.values(device, unit);
                hash.update(&values);
                values.chunks(PIECE).try_for_each(|piece| link.give_list(piece)).map_err(lost)?;
            }
        }
        for ((_, link), hash) in self.others.iter().zip(&hashes) {
            link.give_list(&hash.finish()[..]).map_err(lost)?;
        }
        self.all.barrier().map_err(lost)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ranks> {
        // What a panic left behind is a collective that the other ranks no longer agree with, and name.
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Say that rank 0 is there whenever it has said nothing for `period`, until the group ends.
    fn herald(&self, period: Duration) {
        while !self.is_ending.load(Ordering::Acquire) && self.lost.get().is_none() {
            std::thread::park_timeout(period);
            let mut ranks = match self.ranks.try_lock() {
                Ok(ranks) => ranks,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // A step is under way.
                Err(TryLockError::WouldBlock) => continue,
            };
            if self.is_ending.load(Ordering::Acquire) || ranks.told_at.elapsed() < period {
                continue;
            }
            if let Err(error) = ranks.tell(&Order::StillHere.encode()) {
                tracing::error!(%error, "tensor-parallel ranks");
                self.lost.get_or_init(|| error);
            }
        }
    }
}

impl std::fmt::Debug for RankGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RankGroup({} ranks)", self.part.num_ranks())
    }
}

impl Drop for RankGroup {
    fn drop(&mut self) {
        self.shared.is_ending.store(true, Ordering::Release);
        if self.shared.lost.get().is_none() {
            // Ranks that are gone need not be told.
            let _gone = self.shared.lock().tell(&Order::End.encode());
        }
        for thread in self.herald.take().into_iter().chain(self.threads.drain(..)) {
            thread.thread().unpark();
            // A thread that panicked has said so.
            let _panicked = thread.join();
        }
    }
}
