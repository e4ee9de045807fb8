//! Seconds of a step under a placement.
//!
//! ```text
//! generation = of the place that takes longest: start(samples) + decode steps, its engines one after the other
//!              (tensor-parallel ranks: the layers divided, logits whole, and sums exchanged in every layer)
//! training   = log-probs before the update + updates x (micro-batches + optimizer + what ranks exchange)
//!              (ranks that share rows: micro-batches divided, rows and heads exchanged in every layer)
//! sync       = hash, then every engine pulls what changed
//! loop       = text, scores, advantages, and messages between processes
//! step       = generation + training + sync + loop                    staleness 0
//!            = of the place that is busy longest, + sync              else: generation runs beside the rest
//! ```
//! Processes that share the cores of a host take their turns: their times add up, times the measured crowding.

use super::cluster::Place;
use super::layout::{EngineShare, Layout, Mode};
use super::memory::{MemoryNeed, concurrency};
use super::time::{RankKind, Timer, pairs};
use super::{Calibration, Cluster, Link, Workload};
use temper_trainer::{Passes, exchange_bytes_sent, update_bytes_sent};

const F32: f64 = 4.0;
/// Log-prob, entropy and sum of squares of a target, as ranks that share rows tell each other.
const TARGET_BYTES: f64 = 24.0;

/// Seconds of a step, by what they are spent on.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Seconds {
    /// From the prompts to the last response.
    pub generation: f64,
    /// Log-probs, forwards, backwards and updates, waits for other ranks included.
    pub training: f64,
    /// The part of it that ranks spend on each other.
    pub communication: f64,
    /// New weights: hashed, pulled, proved.
    pub sync: f64,
    /// Text, scores, advantages, messages.
    pub around: f64,
    /// The whole step.
    pub step: f64,
}

/// What a layout is predicted to cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// Time.
    pub seconds: Seconds,
    /// Memory.
    pub memory: MemoryNeed,
    /// Share of the step that a place has nothing to do, mean over the places.
    pub idle: f64,
    /// Sequences that decode together in an engine.
    pub concurrency: usize,
    /// Micro-batches of one update of the busiest rank.
    pub micro_batches: usize,
    /// Tokens of one of them.
    pub micro_batch_tokens: f64,
    /// Whether something of it cannot be run by this binary, or was not measured: a device, another model.
    pub on_paper: bool,
}

/// Everything that decides.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// What is to be done.
    pub work: &'a Workload,
    /// How fast.
    pub cal: &'a Calibration,
    /// Where.
    pub cluster: &'a Cluster,
}

/// Rows of one update on the busiest rank, of those that it shares its part.
#[derive(Debug, Clone, Copy)]
struct Update {
    micro_batches: usize,
    tokens: f64,
}

impl Inputs<'_> {
    /// Predict a layout that has at least one engine and one rank.
    pub fn estimate(&self, layout: &Layout) -> Estimate {
        let update = self.split(layout);
        let engines = self.engine_seconds(layout);
        let (compute, communication) = self.train_seconds(layout, update);
        let longest = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
        let (generation, training) = (longest(&engines), longest(&compute) + communication);
        let sync = self.sync_seconds(layout);
        let around = self.around_seconds(layout);
        let busy: Vec<f64> = engines.iter().zip(&compute).map(|(engine, train)| engine + train).collect();
        let step = match layout.staleness {
            0 => generation + training + sync + around,
            // Generation fills the waits of the rest; a place that does both does one after the other.
            _ => generation.max(training + around).max(longest(&busy)) + sync,
        };
        let share = busy.iter().sum::<f64>() / (step * busy.len() as f64);
        Estimate {
            seconds: Seconds { generation, training, communication, sync, around, step },
            memory: MemoryNeed::new(self.work, self.cal, self.cluster, layout),
            idle: (1.0 - share).max(0.0),
            concurrency: concurrency(self.work, layout.tensor_parallel, self.engine_groups(layout) * self.work.samples),
            micro_batches: update.micro_batches,
            micro_batch_tokens: update.tokens,
            on_paper: self.cluster.places.iter().any(|place| place.device.is_some())
                || self.cal.model != self.work.model,
        }
    }

    fn timer<'a>(&'a self, place: &'a Place) -> Timer<'a> {
        Timer::new(self.work, self.cal, self.cluster, place)
    }

    /// Of an engine that has ranks on a place.
    fn engine_timer<'a>(&'a self, layout: &Layout, place: &'a Place) -> Timer<'a> {
        let (link, kind) = match layout.mode {
            Mode::Embedded => (self.cal.tensor_threads, RankKind::Threads),
            Mode::Colocated | Mode::Disaggregated { .. } => (self.cal.tensor_sockets, RankKind::Processes),
        };
        let on = (&self.cluster.hosts[place.host], near(link, place));
        self.timer(place).over_ranks((layout.tensor_parallel, kind), on)
    }

    /// Between processes of one host, or threads of one process.
    fn local_link(&self, layout: &Layout) -> Link {
        if layout.mode == Mode::Embedded { self.cal.threads } else { self.cal.sockets }
    }

    /// What trainer ranks that share a host's cores take longer than one after the other.
    fn trainer_crowding(&self, layout: &Layout) -> f64 {
        if layout.mode == Mode::Embedded { self.cal.thread_crowding } else { self.cal.trainer_crowding }
    }

    /// Groups of the busiest engine: groups stay whole.
    fn engine_groups(&self, layout: &Layout) -> usize {
        self.work.prompts.div_ceil(layout.engines)
    }

    /// Seconds of generation on every place.
    fn engine_seconds(&self, layout: &Layout) -> Vec<f64> {
        let samples = self.engine_groups(layout) * self.work.samples;
        let at = layout.engines_at(self.cluster);
        let seconds = |(place, share): (&Place, &EngineShare)| {
            let count = share.engines;
            if count == 0 {
                return 0.0;
            }
            let alone = self.one_engine(&self.engine_timer(layout, place), layout.tensor_parallel, samples);
            // The last engine may have fewer groups than the busiest; together they have them all.
            let share = (self.work.prompts as f64 / layout.engines as f64) / self.engine_groups(layout) as f64;
            let share = if count > 1 { share } else { 1.0 };
            together((count, self.cal.engine_crowding), alone * share)
        };
        self.cluster.places.iter().zip(&at).map(seconds).collect()
    }

    /// Seconds of one engine for `samples` responses: a stream at full width, then a tail in which sequences end.
    fn one_engine(&self, timer: &Timer<'_>, num_ranks: usize, samples: usize) -> f64 {
        let width = concurrency(self.work, num_ranks, samples) as f64;
        let mean = (self.work.expected.response_tokens - 1.0).max(0.0);
        let longest = (self.work.max_response_tokens as f64 - 1.0).max(mean).max(1.0);
        let waiting = samples as f64 - width;
        let stream = waiting * mean / width * timer.decode(width);
        let tail = longest * timer.decode(width * mean / longest);
        timer.start(width) * (samples as f64 / width) + stream + tail
    }

    /// How the busiest rank's rows of one update are cut into micro-batches. Ranks that share rows have the same ones,
    /// as many times larger, and each its part of their tokens.
    fn split(&self, layout: &Layout) -> Update {
        let work = self.work;
        let groups = work.prompts as f64 / work.mini_batches as f64;
        let (prompt, response) = (work.expected.prompt_tokens, work.expected.response_tokens);
        let (owners, sharing) = (layout.row_groups() as f64, layout.sequence_parallel as f64);
        // Whole groups where there are enough of them, single rows else.
        let samples = work.trained_samples as f64;
        let (items, item, rows) = match groups >= owners {
            true => ((groups / owners).ceil(), work.group_tokens(), samples),
            false => ((groups * samples / owners).ceil(), prompt + response, 1.0),
        };
        let limit = layout.max_micro_batch_tokens as f64 * sharing;
        let micro_batches = match item <= limit {
            true => (items / (limit / item).floor()).ceil(),
            // A group that does not fit is cut between its rows; a row that does not fit goes alone.
            false => {
                let rows_of_one = ((limit - prompt) / response).floor().max(1.0);
                items * (rows / rows_of_one).ceil()
            }
        };
        Update { micro_batches: micro_batches as usize, tokens: items * item / micro_batches / sharing }
    }

    /// Seconds of every place's own work in training, and of what ranks exchange.
    fn train_seconds(&self, layout: &Layout, update: Update) -> (Vec<f64>, f64) {
        let work = self.work;
        let num_shards = layout.sharding.num_shards(layout.ranks) as f64;
        let passes = (work.epochs * work.mini_batches) as f64 * (1.0 + work.critic_updates);
        let rounds = update.micro_batches as f64;
        let logits_twice = work.logits_twice || layout.sequence_parallel > 1;
        let seconds = |(place, count): (&Place, &usize)| {
            if *count == 0 {
                return 0.0;
            }
            let timer = self.timer(place);
            let again = if logits_twice { timer.logits(update.tokens) } else { 0.0 };
            let micro_batch = timer.train(update.tokens, layout.recompute) + again;
            let one = rounds * micro_batch + timer.update(1.0 / num_shards);
            let forwards = work.forwards * work.mini_batches as f64 * rounds * timer.forward(update.tokens);
            together((*count, self.trainer_crowding(layout)), passes * one + forwards)
        };
        let compute = self.cluster.places.iter().zip(&layout.ranks_at(self.cluster)).map(seconds).collect();
        let gradients = passes * self.exchange_seconds(layout, update.micro_batches as u64);
        (compute, gradients + self.turn_seconds(layout, update, passes))
    }

    /// Seconds in a step of what ranks that share rows send each other: in every layer rows turn into heads and back,
    /// and every rank is told what the model says of all targets.
    fn turn_seconds(&self, layout: &Layout, update: Update, updates: f64) -> f64 {
        let (work, size) = (self.work, layout.sequence_parallel);
        if size == 1 {
            return 0.0;
        }
        let (link, crowd) = self.row_link(layout);
        let others = (size - 1) as f64;
        let tokens = update.tokens * size as f64;
        let of = |passes: Passes| {
            let bytes = exchange_bytes_sent(&work.config, (0, size), tokens.ceil() as usize, passes) as f64;
            let said = TARGET_BYTES * update.tokens * work.target_share() * others;
            let turns = 2 * work.model.num_hidden_layers as u64 * (passes.forwards + passes.backwards);
            link.seconds((bytes + said) * crowd, (turns + 1) as f64 * others)
        };
        let forwards = 1 + u64::from(layout.recompute);
        let rounds = update.micro_batches as f64;
        let before = work.forwards * work.mini_batches as f64;
        rounds * (updates * of(Passes { forwards, backwards: 1 }) + before * of(Passes { forwards: 1, backwards: 0 }))
    }

    /// The slowest link within a group that shares rows, and how many others are on their way at once. Consecutive
    /// ranks lie side by side.
    fn row_link(&self, layout: &Layout) -> (Link, f64) {
        let at = layout.ranks_at(self.cluster);
        let places = at.iter().enumerate().flat_map(|(place, count)| std::iter::repeat_n(place, *count));
        let hosts: Vec<usize> = places.map(|place| self.cluster.places[place].host).collect();
        let mut crossing = hosts.chunks(layout.sequence_parallel).filter(|group| group[0] != group[group.len() - 1]);
        let most = at.iter().copied().max().unwrap_or(1);
        match crossing.next() {
            Some(_) => (self.rank_link(layout, &at), most as f64),
            None => (self.host_link(layout, &at), pairs(most)),
        }
    }

    /// Seconds of what the ranks send each other in one update.
    fn exchange_seconds(&self, layout: &Layout, rounds: u64) -> f64 {
        if layout.ranks == 1 {
            return 0.0;
        }
        let bytes = update_bytes_sent(&self.work.shapes, layout.sharding, (0, layout.ranks), rounds) as f64;
        let operations = (self.work.shapes.num_units() as u64 * (2 * rounds + 1)) as f64;
        let at = layout.ranks_at(self.cluster);
        let link = self.rank_link(layout, &at);
        // Ranks of one place share its memory bus or its way out.
        let crowd = at.iter().copied().max().unwrap_or(1) as f64;
        link.seconds(bytes * crowd, operations * (layout.ranks - 1) as f64)
    }

    /// The slowest link between two ranks of one host.
    fn host_link(&self, layout: &Layout, at: &[usize]) -> Link {
        let used = self.cluster.places.iter().zip(at).filter(|(_, count)| **count > 0);
        let mut link = self.local_link(layout);
        let devices = used.filter_map(|(place, _)| place.device.as_ref());
        if let Some(slowest) = devices.map(|d| d.link_bytes_per_second).min_by(f64::total_cmp) {
            link.bytes_per_second = slowest;
        }
        link
    }

    /// The slowest link between two ranks.
    fn rank_link(&self, layout: &Layout, at: &[usize]) -> Link {
        let used = self.cluster.places.iter().zip(at).filter(|(_, count)| **count > 0);
        let mut link = self.host_link(layout, at);
        let mut hosts: Vec<usize> = used.map(|(place, _)| place.host).collect();
        hosts.dedup();
        if hosts.len() > 1 {
            for host in hosts.iter().map(|host| &self.cluster.hosts[*host]) {
                link.bytes_per_second = link.bytes_per_second.min(host.network_bytes_per_second);
                link.latency_seconds = link.latency_seconds.max(host.network_latency_seconds);
            }
        }
        link
    }

    /// Seconds from the new masters to the last engine that serves them.
    fn sync_seconds(&self, layout: &Layout) -> f64 {
        let ranks = layout.ranks_at(self.cluster);
        let places = || self.cluster.places.iter();
        let hash = places().zip(&ranks).filter(|(_, n)| **n > 0).map(|(p, _)| self.timer(p).hash());
        let hash = hash.fold(0.0, f64::max);
        if layout.mode == Mode::Embedded && layout.tensor_parallel == 1 {
            return hash;
        }
        let engines: Vec<usize> = layout.engines_at(self.cluster).iter().map(|share| share.leaders).collect();
        let pull = |(place, count): (&Place, &usize)| {
            let link = near(self.local_link(layout), place);
            let alone = self.engine_timer(layout, place).pull(link);
            together((*count, self.cal.engine_crowding), alone)
        };
        let pulls = places().zip(&engines).filter(|(_, n)| **n > 0).map(pull).fold(0.0, f64::max);
        hash + pulls + self.network_seconds(&ranks, &engines)
    }

    /// Seconds of weights on the wire: what leaves the trainers' hosts for engines on others.
    fn network_seconds(&self, ranks: &[usize], engines: &[usize]) -> f64 {
        let hosts = self.cluster.hosts.len();
        let count = |at: &[usize]| {
            let mut by_host = vec![0usize; hosts];
            self.cluster.places.iter().zip(at).for_each(|(place, n)| by_host[place.host] += n);
            by_host
        };
        let (ranks, engines) = (count(ranks), count(engines));
        let sources = ranks.iter().filter(|n| **n > 0).count().max(1) as f64;
        let bytes = F32 * self.work.model.parameters();
        let mut seconds: f64 = 0.0;
        for (index, host) in self.cluster.hosts.iter().enumerate() {
            let remote: usize = engines.iter().enumerate().filter(|(other, _)| *other != index).map(|(_, n)| n).sum();
            let out = if ranks[index] > 0 { remote as f64 * bytes / sources } else { 0.0 };
            let other_sources = sources - if ranks[index] > 0 { 1.0 } else { 0.0 };
            let into = engines[index] as f64 * bytes * other_sources / sources;
            if out + into > 0.0 {
                seconds = seconds.max(out.max(into) / host.network_bytes_per_second + host.network_latency_seconds);
            }
        }
        seconds
    }

    /// Seconds of the loop itself: its work for every sample, and messages to other processes.
    fn around_seconds(&self, layout: &Layout) -> f64 {
        let (samples, rows) = (self.work.num_samples() as f64, self.work.num_rows() as f64);
        if layout.mode == Mode::Embedded {
            return samples * self.cal.sample_seconds;
        }
        let own = samples * self.cal.remote_sample_seconds;
        let passes = self.work.epochs as f64 * (1.0 + self.work.critic_updates) + self.work.forwards;
        // Every rank is told all rows.
        own + (samples + rows * passes * layout.ranks as f64) * self.cal.message_seconds
    }
}

/// Time of `count` processes or ranks on one place that each take `seconds` alone.
fn together((count, crowding): (usize, f64), seconds: f64) -> f64 {
    count as f64 * seconds * if count > 1 { crowding } else { 1.0 }
}

/// A link between ranks at one place, which may be a device among those of its host.
fn near(link: Link, place: &Place) -> Link {
    let between_devices = place.device.as_ref().map(|device| device.link_bytes_per_second);
    Link { bytes_per_second: between_devices.unwrap_or(link.bytes_per_second), ..link }
}
