//! The operations of a group of ranks.
//!
//! Every operation is a direct exchange: each rank sends each other rank what that rank needs, and waits for each of
//! them in rank order. So every rank waits for every other one itself, and names it when nothing comes; a loss is also
//! told to the whole world, for ranks that wait for somebody who waited for the lost one. The bytes that leave a rank
//! are those of a ring.

use crate::counters::{Counter, Counters, Counts};
use crate::mailbox::Missing;
use crate::message::{Element, Message, Operation, Place, Sum};
use crate::shard::shard_ranges;
use crate::transport::{SendFailure, Transport};
use crate::{Error, Loss, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Longest that telling one rank of a loss may take.
const ABORT_TIMEOUT: Duration = Duration::from_millis(500);

/// One rank's handle of a group of ranks. All ranks of a group call the same operations in the same order.
#[derive(Debug)]
pub struct Collective {
    core: Arc<Core>,
    /// World ranks of the group's ranks.
    members: Vec<usize>,
    rank: usize,
    group: u64,
    /// Number of the next operation.
    next: AtomicU64,
}

/// A gather of which this rank's part is on its way and the others' are not read yet.
#[derive(Debug)]
#[must_use = "the others' parts are read by `end_all_gather`"]
pub struct Gathering {
    sequence: u64,
}

/// Ends waits for a rank that others know to be lost, as one that is stopped and closes no connection.
#[derive(Debug, Clone)]
pub struct AbortHandle(Weak<Core>);

impl AbortHandle {
    /// World rank `rank` is lost: operations that wait for it or send to it fail, now and later, as they do when its
    /// process ends. What came from it before can still be read. Does nothing once the rank's groups are all dropped.
    pub fn lose(&self, rank: usize) {
        if let Some(core) = self.0.upgrade().filter(|core| rank < core.world && rank != core.rank) {
            core.transport.cut(rank);
        }
    }
}

/// What all groups of a rank share.
#[derive(Debug)]
struct Core {
    transport: Arc<dyn Transport>,
    rank: usize,
    world: usize,
    timeout: Duration,
    counters: Counters,
    /// Why nothing works any more.
    broken: Mutex<Option<Error>>,
}

/// One operation under way.
struct Turn<'a> {
    group: &'a Collective,
    place: Place,
    start: Instant,
    deadline: Instant,
    counter: Counter,
}

impl Collective {
    pub(crate) fn over(transport: Arc<dyn Transport>, (rank, world): (usize, usize), timeout: Duration) -> Self {
        let (counters, broken) = (Counters::default(), Mutex::new(None));
        let core = Arc::new(Core { transport, rank, world, timeout, counters, broken });
        Collective { core, members: (0..world).collect(), rank, group: 0, next: AtomicU64::new(0) }
    }

    /// This rank's number in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks in the group.
    pub fn world(&self) -> usize {
        self.members.len()
    }

    /// World rank of the group's rank `rank`, as errors name it.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn world_rank(&self, rank: usize) -> usize {
        self.members[rank]
    }

    /// Longest that an operation takes.
    pub fn timeout(&self) -> Duration {
        self.core.timeout
    }

    /// What this rank has sent and received in all its groups.
    pub fn counts(&self) -> Counts {
        self.core.counters.read()
    }

    /// The group of some of this group's ranks, ascending, of which this rank is one. `channel` tells groups of the
    /// same ranks apart; operations of different groups may overlap in time. Nothing is sent.
    ///
    /// # Errors
    /// Ranks out of order or out of range, or without this rank.
    pub fn subgroup(&self, ranks: &[usize], channel: u32) -> Result<Collective> {
        let invalid = |problem: String| Error::invalid(Operation::Barrier, problem);
        if !ranks.is_sorted_by(|a, b| a < b) || ranks.last().is_some_and(|last| *last >= self.world()) {
            let problem = format!("a subgroup of {ranks:?}: expected ascending ranks below {}", self.world());
            return Err(invalid(problem));
        }
        let outside = || invalid(format!("a subgroup of {ranks:?}: expected rank {} to be in it", self.rank));
        let rank = ranks.iter().position(|rank| *rank == self.rank).ok_or_else(outside)?;
        let members: Vec<usize> = ranks.iter().map(|rank| self.members[*rank]).collect();
        let group = group_id(self.group, &members, channel);
        Ok(Collective { core: Arc::clone(&self.core), members, rank, group, next: AtomicU64::new(0) })
    }

    /// Fill `buffer` with everyone's part: rank r holds `ranges[r]` already.
    ///
    /// # Errors
    /// A lost rank, ranks that disagree, or ranges that do not fit.
    pub fn all_gather<T: Element>(&self, buffer: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        self.run(Operation::AllGather, |turn| {
            turn.check_ranges(buffer.len(), ranges)?;
            turn.gather_ranges(buffer, ranges)
        })
    }

    /// Begin an [`Collective::all_gather`] of which `own` is this rank's part, and do not wait for the others: what
    /// they send arrives while something else is done. Operations of this group go on between this and
    /// [`Collective::end_all_gather`] only if they are other gathers, which end in the order in which they began.
    ///
    /// # Errors
    /// A lost rank.
    pub fn begin_all_gather<T: Element>(&self, own: &[T]) -> Result<Gathering> {
        let sequence = self.next_sequence();
        self.run_at(sequence, Operation::AllGather, |turn| turn.send_to_others(|_| own.to_vec()))?;
        Ok(Gathering { sequence })
    }

    /// Fill `buffer` with everyone's part: rank r gave `ranges[r]`, and this rank's is there already.
    ///
    /// # Errors
    /// As [`Collective::all_gather`].
    pub fn end_all_gather<T: Element>(
        &self,
        begun: Gathering,
        buffer: &mut [T],
        ranges: &[Range<usize>],
    ) -> Result<()> {
        self.run_at(begun.sequence, Operation::AllGather, |turn| {
            turn.counter.num_calls = 0;
            turn.check_ranges(buffer.len(), ranges)?;
            turn.receive_ranges(buffer, ranges)
        })
    }

    /// What every rank gave, in rank order; lengths may differ.
    ///
    /// # Errors
    /// A lost rank, or ranks that disagree.
    pub fn all_gather_lists<T: Element>(&self, own: &[T]) -> Result<Vec<Vec<T>>> {
        self.run(Operation::AllGather, |turn| {
            turn.send_to_others(|_| own.to_vec())?;
            let list = |peer| if peer == self.rank { Ok(own.to_vec()) } else { turn.receive(peer, None) };
            (0..self.world()).map(list).collect()
        })
    }

    /// Give `parts[r]` to rank r; what every rank gave this one, in rank order, `lens[r]` elements of rank r.
    ///
    /// # Errors
    /// A lost rank, ranks that disagree about a length, or not one part and one length per rank.
    pub fn all_to_all<T: Element>(&self, mut parts: Vec<Vec<T>>, lens: &[usize]) -> Result<Vec<Vec<T>>> {
        self.run(Operation::AllToAll, |turn| {
            let (world, own) = (self.world(), self.rank);
            if parts.len() != world || lens.len() != world || parts[own].len() != lens[own] {
                let (given, asked) = (parts.len(), lens.len());
                let problem = format!("{given} parts and {asked} lengths: expected {world} each, this rank's alike");
                return Err(Error::invalid(Operation::AllToAll, problem));
            }
            turn.for_others(|turn, peer| turn.send(peer, std::mem::take(&mut parts[peer])))?;
            turn.for_others(|turn, peer| {
                parts[peer] = turn.receive(peer, Some(lens[peer]))?;
                Ok(())
            })?;
            Ok(parts)
        })
    }

    /// Leave in `buffer[ranges[rank]]` the sum over all ranks, added in rank order; the rest of `buffer` stays.
    ///
    /// # Errors
    /// As [`Collective::all_gather`].
    pub fn reduce_scatter<T: Sum>(&self, buffer: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        self.run(Operation::ReduceScatter, |turn| {
            turn.check_ranges(buffer.len(), ranges)?;
            turn.reduce_ranges(buffer, ranges, None)
        })
    }

    /// As [`Collective::reduce_scatter`], where this rank's part of the sum begins with `carry`: what other groups have
    /// added up before, so that the order of all contributions is that of their ranks.
    ///
    /// # Errors
    /// As [`Collective::all_gather`]; a `carry` of another length than this rank's range.
    pub fn reduce_scatter_onto<T: Sum>(&self, carry: &[T], buffer: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        self.run(Operation::ReduceScatter, |turn| {
            turn.check_ranges(buffer.len(), ranges)?;
            turn.reduce_ranges(buffer, ranges, Some(carry))
        })
    }

    /// Replace `buffer` by its sum over all ranks, added in rank order.
    ///
    /// # Errors
    /// A lost rank, or ranks that disagree.
    pub fn all_reduce<T: Sum>(&self, buffer: &mut [T]) -> Result<()> {
        let ranges = shard_ranges(buffer.len(), self.world());
        self.run(Operation::AllReduce, |turn| {
            turn.reduce_ranges(buffer, &ranges, None)?;
            turn.gather_ranges(buffer, &ranges)
        })
    }

    /// Replace `buffer` by that of rank `root`.
    ///
    /// # Errors
    /// A lost rank, ranks that disagree, or no such root.
    pub fn broadcast<T: Element>(&self, buffer: &mut [T], root: usize) -> Result<()> {
        self.run(Operation::Broadcast, |turn| {
            if root >= self.world() {
                let problem = format!("root {root}: expected a rank below {}", self.world());
                return Err(Error::invalid(Operation::Broadcast, problem));
            }
            if root == self.rank {
                return turn.send_to_others(|_| buffer.to_vec());
            }
            let values = turn.receive(root, Some(buffer.len()))?;
            buffer.copy_from_slice(&values);
            Ok(())
        })
    }

    /// Give every other rank `values`, of a length that this one alone knows: they take them by
    /// [`Collective::take_list`].
    ///
    /// # Errors
    /// A lost rank, or ranks that disagree.
    pub fn give_list<T: Element>(&self, values: &[T]) -> Result<()> {
        self.run(Operation::Broadcast, |turn| turn.send_to_others(|_| values.to_vec()))
    }

    /// What rank `root` gives by [`Collective::give_list`].
    ///
    /// # Errors
    /// A lost rank, ranks that disagree, or no such other rank.
    pub fn take_list<T: Element>(&self, root: usize) -> Result<Vec<T>> {
        self.run(Operation::Broadcast, |turn| {
            turn.check_other(root)?;
            turn.receive(root, None)
        })
    }

    /// Give rank `to` `values`, of a length that this one alone knows: it takes them by [`Collective::take_from`].
    /// Counted as [`Operation::Mirror`], beside what the ranks compute. In a group of two each such pair is one
    /// operation.
    ///
    /// # Errors
    /// A lost rank, or no such other rank.
    pub fn give_to<T: Element>(&self, to: usize, values: Vec<T>) -> Result<()> {
        self.run(Operation::Mirror, |turn| {
            turn.check_other(to)?;
            turn.send(to, values)
        })
    }

    /// What rank `from` gives by [`Collective::give_to`].
    ///
    /// # Errors
    /// A lost rank, ranks that disagree, or no such other rank.
    pub fn take_from<T: Element>(&self, from: usize) -> Result<Vec<T>> {
        self.run(Operation::Mirror, |turn| {
            turn.check_other(from)?;
            turn.receive(from, None)
        })
    }

    /// As [`Collective::barrier`], counted as [`Operation::Mirror`].
    ///
    /// # Errors
    /// As there.
    pub fn meet(&self) -> Result<()> {
        self.run(Operation::Mirror, |turn| turn.meet())
    }

    /// Wait until every rank is here.
    ///
    /// # Errors
    /// A lost rank, or ranks that disagree.
    pub fn barrier(&self) -> Result<()> {
        self.run(Operation::Barrier, |turn| turn.meet())
    }

    /// Pass `given` on along a chain: rank 0 begins; every other rank gets what its predecessor gave on. `work` turns
    /// what came (nothing on rank 0) into what is given on; the last rank's result goes back to all.
    ///
    /// # Errors
    /// A lost rank, ranks that disagree, or an error of `work`.
    pub fn chain<T: Element, E: From<Error>>(
        &self,
        len: usize,
        work: impl FnOnce(Option<Vec<T>>) -> std::result::Result<Vec<T>, E>,
    ) -> std::result::Result<Vec<T>, E> {
        let last = self.world() - 1;
        let (link, back) = (self.next_sequence(), self.next_sequence());
        let arrived = match self.rank.checked_sub(1) {
            None => None,
            Some(before) => self.run_at(link, Operation::PointToPoint, |turn| {
                turn.wait_longer();
                turn.receive(before, Some(len)).map(Some)
            })?,
        };
        let given = work(arrived)?;
        if self.rank < last {
            self.run_at(link, Operation::PointToPoint, |turn| turn.send(self.rank + 1, given.clone()))?;
        }
        Ok(self.run_at(back, Operation::Broadcast, |turn| {
            turn.wait_longer();
            if self.rank == last {
                turn.send_to_others(|_| given.clone())?;
                return Ok(given);
            }
            turn.receive(last, Some(len))
        })?)
    }

    /// For whoever hears of lost ranks elsewhere; keeps no connection open.
    pub fn abort_handle(&self) -> AbortHandle {
        AbortHandle(Arc::downgrade(&self.core))
    }

    /// Tell all ranks of the world that this one gives up, so that none waits for it.
    pub fn give_up(&self, operation: Operation) {
        let rank = self.core.rank;
        self.core.fail(&Error::RankLost { rank, operation, loss: Loss::Gone });
    }

    fn next_sequence(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn run<R>(&self, operation: Operation, body: impl FnOnce(&mut Turn<'_>) -> Result<R>) -> Result<R> {
        self.run_at(self.next_sequence(), operation, body)
    }

    fn run_at<R>(
        &self,
        sequence: u64,
        operation: Operation,
        body: impl FnOnce(&mut Turn<'_>) -> Result<R>,
    ) -> Result<R> {
        if let Some(error) = self.core.broken.lock().unwrap_or_else(PoisonError::into_inner).clone() {
            return Err(error);
        }
        let place = Place { sequence, operation };
        let start = Instant::now();
        let counter = Counter { num_calls: 1, ..Counter::default() };
        let mut turn = Turn { group: self, place, start, deadline: start + self.core.timeout, counter };
        let result = body(&mut turn);
        let counter = Counter { elapsed: start.elapsed(), ..turn.counter };
        self.core.counters.add(operation, &counter);
        result.inspect_err(|error| self.core.fail(error))
    }
}

impl Core {
    /// Remember an error that ends all operations, and tell everyone.
    fn fail(&self, error: &Error) {
        let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
        if broken.is_some() {
            return;
        }
        *broken = Some(error.clone());
        drop(broken);
        let (lost, operation) = match error {
            Error::RankLost { rank, operation, .. } => (*rank, *operation),
            Error::Disagreement { rank, .. } => (*rank, Operation::Barrier),
            Error::Invalid { operation, .. } => (self.rank, *operation),
            Error::Connect { .. } => (self.rank, Operation::Barrier),
        };
        // The lost rank last: it may take nothing.
        let others = (0..self.world).filter(|rank| *rank != self.rank && *rank != lost);
        for rank in others.chain((lost != self.rank).then_some(lost)) {
            let message = Message::Abort { rank: lost, operation };
            // A rank that cannot be told learns of it by its own deadline.
            let _unreachable = self.transport.send(rank, message, Instant::now() + ABORT_TIMEOUT).is_err();
        }
    }
}

impl Turn<'_> {
    /// Wait half as long again: for a rank that itself may be waiting for a lost one, and will say so.
    fn wait_longer(&mut self) {
        self.deadline += self.group.core.timeout / 2;
    }

    fn send<T: Element>(&mut self, to: usize, values: Vec<T>) -> Result<()> {
        let rank = self.group.members[to];
        let payload = T::wrap(values);
        self.counter.bytes_sent += payload.num_bytes() as u64;
        let message = Message::Data { group: self.group.group, place: self.place, payload };
        let sent = self.group.core.transport.send(rank, message, self.deadline);
        sent.map_err(|failure| {
            let missing = match failure {
                SendFailure::Gone => self.group.core.transport.mailbox().why_gone(rank, Instant::now() + ABORT_TIMEOUT),
                SendFailure::Late => Missing::Late,
            };
            missing.into_error(rank, self.place.operation, self.start)
        })
    }

    /// Values of the group's rank `from`; `len` of them, where it is known.
    fn receive<T: Element>(&mut self, from: usize, len: Option<usize>) -> Result<Vec<T>> {
        let (rank, place) = (self.group.members[from], self.place);
        let mailbox = self.group.core.transport.mailbox();
        let taken = mailbox.take(rank, self.group.group, self.deadline);
        let (got, payload) = taken.map_err(|missing| missing.into_error(rank, place.operation, self.start))?;
        self.counter.bytes_received += payload.num_bytes() as u64;
        let described = format!("operation {} ({}) of {}", got.sequence, got.operation, payload.describe());
        let disagreement = |wanted: String| Error::Disagreement {
            rank,
            expected: format!("operation {} ({}) of {wanted}", place.sequence, place.operation),
            got: described.clone(),
        };
        let wanted = T::wrap(vec![T::default(); len.unwrap_or(0)]).describe();
        let values = T::unwrap(payload).map_err(|_| disagreement(wanted.clone()))?;
        let fits = got == place && len.is_none_or(|len| len == values.len());
        if fits { Ok(values) } else { Err(disagreement(wanted)) }
    }

    fn for_others(&mut self, mut f: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<()> {
        let own = self.group.rank;
        (0..self.group.world()).filter(|peer| *peer != own).try_for_each(|peer| f(self, peer))
    }

    fn send_to_others<T: Element>(&mut self, values: impl Fn(usize) -> Vec<T>) -> Result<()> {
        self.for_others(|turn, peer| turn.send(peer, values(peer)))
    }

    fn meet(&mut self) -> Result<()> {
        self.send_to_others(|_| Vec::<u8>::new())?;
        self.for_others(|turn, peer| turn.receive::<u8>(peer, Some(0)).map(drop))
    }

    fn check_other(&self, rank: usize) -> Result<()> {
        if rank < self.group.world() && rank != self.group.rank {
            return Ok(());
        }
        let problem = format!("rank {rank}: expected another rank below {}", self.group.world());
        Err(Error::invalid(self.place.operation, problem))
    }

    fn check_ranges(&self, len: usize, ranges: &[Range<usize>]) -> Result<()> {
        let world = self.group.world();
        if ranges.len() != world {
            let problem = format!("{} ranges: expected one for each of {world} ranks", ranges.len());
            return Err(Error::invalid(self.place.operation, problem));
        }
        match ranges.iter().find(|range| range.start > range.end || range.end > len) {
            Some(range) => {
                let problem = format!("range {range:?}: expected one within {len} elements");
                Err(Error::invalid(self.place.operation, problem))
            }
            None => Ok(()),
        }
    }

    fn gather_ranges<T: Element>(&mut self, buffer: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        let own = &buffer[ranges[self.group.rank].clone()];
        self.send_to_others(|_| own.to_vec())?;
        self.receive_ranges(buffer, ranges)
    }

    fn receive_ranges<T: Element>(&mut self, buffer: &mut [T], ranges: &[Range<usize>]) -> Result<()> {
        self.for_others(|turn, peer| {
            let part = &mut buffer[ranges[peer].clone()];
            part.copy_from_slice(&turn.receive(peer, Some(part.len()))?);
            Ok(())
        })
    }

    fn reduce_ranges<T: Sum>(&mut self, buffer: &mut [T], ranges: &[Range<usize>], carry: Option<&[T]>) -> Result<()> {
        self.send_to_others(|peer| buffer[ranges[peer].clone()].to_vec())?;
        let own_range = ranges[self.group.rank].clone();
        if let Some(carry) = carry.filter(|carry| carry.len() != own_range.len()) {
            let problem = format!("a carry of {}: expected {} elements", carry.len(), own_range.len());
            return Err(Error::invalid(self.place.operation, problem));
        }
        let mut sum = carry.map(<[T]>::to_vec);
        for peer in 0..self.group.world() {
            let part = match peer == self.group.rank {
                true => buffer[own_range.clone()].to_vec(),
                false => self.receive(peer, Some(own_range.len()))?,
            };
            match &mut sum {
                Some(sum) => sum.iter_mut().zip(&part).for_each(|(sum, x)| *sum += *x),
                None => sum = Some(part),
            }
        }
        buffer[own_range].copy_from_slice(&sum.unwrap_or_default());
        Ok(())
    }
}

/// FNV-1a over what tells a group from others.
fn group_id(parent: u64, members: &[usize], channel: u32) -> u64 {
    let numbers = [parent, u64::from(channel)].into_iter().chain(members.iter().map(|rank| *rank as u64));
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    numbers.flat_map(u64::to_le_bytes).fold(0xcbf2_9ce4_8422_2325, mix)
}
