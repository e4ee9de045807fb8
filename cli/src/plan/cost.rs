//! Seconds of a step under a placement.
//!
//! ```text
//! generation = of the place that takes longest: start(samples) + decode steps, its engines one after the other
//! training   = log-probs before the update + updates x (micro-batches + optimizer + what ranks exchange)
//! sync       = hash, then every engine pulls what changed
//! loop       = text, scores, advantages, and messages between processes
//! step       = generation + training + sync + loop                    staleness 0
//!            = of the place that is busy longest, + sync              else: generation runs beside the rest
//! ```
//! Processes that share the cores of a host take their turns: their times add up, times the measured crowding.

use super::cluster::Place;
use super::layout::{Layout, Mode};
use super::memory::{MemoryNeed, concurrency};
use super::time::Timer;
use super::{Calibration, Cluster, Link, Workload};
use temper_trainer::update_bytes_sent;

const F32: f64 = 4.0;

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

/// Rows of one update on the busiest rank.
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
            concurrency: concurrency(self.work, self.engine_groups(layout) * self.work.samples),
            micro_batches: update.micro_batches,
            micro_batch_tokens: update.tokens,
            on_paper: self.cluster.places.iter().any(|place| place.device.is_some())
                || self.cal.model != self.work.model,
        }
    }

    fn timer<'a>(&'a self, place: &'a Place) -> Timer<'a> {
        Timer::new(self.work, self.cal, self.cluster, place)
    }

    /// Time of `count` processes on one place that each take `seconds` alone.
    fn together(&self, layout: &Layout, (count, crowding): (usize, f64), seconds: f64) -> f64 {
        let crowding = if count > 1 && layout.mode != Mode::Embedded { crowding } else { 1.0 };
        count as f64 * seconds * crowding
    }

    /// Groups of the busiest engine: groups stay whole.
    fn engine_groups(&self, layout: &Layout) -> usize {
        self.work.prompts.div_ceil(layout.engines)
    }

    /// Seconds of generation on every place.
    fn engine_seconds(&self, layout: &Layout) -> Vec<f64> {
        let samples = self.engine_groups(layout) * self.work.samples;
        let at = layout.engines_at(self.cluster);
        let seconds = |(place, count): (&Place, &usize)| {
            let alone = self.one_engine(&self.timer(place), samples);
            // The last engine may have fewer groups than the busiest; together they have them all.
            let share = (self.work.prompts as f64 / layout.engines as f64) / self.engine_groups(layout) as f64;
            let share = if *count > 1 { share } else { 1.0 };
            if *count == 0 { 0.0 } else { self.together(layout, (*count, self.cal.engine_crowding), alone * share) }
        };
        self.cluster.places.iter().zip(&at).map(seconds).collect()
    }

    /// Seconds of one engine for `samples` responses: a stream at full width, then a tail in which sequences end.
    fn one_engine(&self, timer: &Timer<'_>, samples: usize) -> f64 {
        let width = concurrency(self.work, samples) as f64;
        let mean = (self.work.expected.response_tokens - 1.0).max(0.0);
        let longest = (self.work.max_response_tokens as f64 - 1.0).max(mean).max(1.0);
        let waiting = samples as f64 - width;
        let stream = waiting * mean / width * timer.decode(width);
        let tail = longest * timer.decode(width * mean / longest);
        timer.start(width) * (samples as f64 / width) + stream + tail
    }

    /// How the busiest rank's rows of one update are cut into micro-batches.
    fn split(&self, layout: &Layout) -> Update {
        let work = self.work;
        let groups = work.prompts as f64 / work.mini_batches as f64;
        let (prompt, response) = (work.expected.prompt_tokens, work.expected.response_tokens);
        let ranks = layout.ranks as f64;
        // Whole groups where there are enough of them, single rows else.
        let (items, item) = match groups >= ranks {
            true => ((groups / ranks).ceil(), work.group_tokens()),
            false => ((groups * work.trained_samples as f64 / ranks).ceil(), prompt + response),
        };
        let limit = layout.max_micro_batch_tokens as f64;
        let micro_batches = match item <= limit {
            true => (items / (limit / item).floor()).ceil(),
            // A group that does not fit is cut between its rows, and its prompt runs in every part.
            false => {
                let rows = ((limit - prompt) / response).floor().max(1.0);
                items * (work.trained_samples as f64 / rows).ceil()
            }
        };
        Update { micro_batches: micro_batches as usize, tokens: items * item / micro_batches }
    }

    /// Seconds of every place's own work in training, and of what ranks exchange.
    fn train_seconds(&self, layout: &Layout, update: Update) -> (Vec<f64>, f64) {
        let work = self.work;
        let num_shards = layout.sharding.num_shards(layout.ranks) as f64;
        let passes = (work.epochs * work.mini_batches) as f64 * (1.0 + work.critic_updates);
        let rounds = update.micro_batches as f64;
        let seconds = |(place, count): (&Place, &usize)| {
            if *count == 0 {
                return 0.0;
            }
            let timer = self.timer(place);
            let one = rounds * timer.train(update.tokens, layout.recompute) + timer.update(1.0 / num_shards);
            let forwards = work.forwards * work.mini_batches as f64 * rounds * timer.forward(update.tokens);
            self.together(layout, (*count, self.cal.trainer_crowding), passes * one + forwards)
        };
        let compute = self.cluster.places.iter().zip(&layout.ranks_at(self.cluster)).map(seconds).collect();
        (compute, passes * self.exchange_seconds(layout, update.micro_batches as u64))
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

    /// The slowest link between two ranks.
    fn rank_link(&self, layout: &Layout, at: &[usize]) -> Link {
        let used = || self.cluster.places.iter().zip(at).filter(|(_, count)| **count > 0);
        let mut link = if layout.mode == Mode::Embedded { self.cal.threads } else { self.cal.sockets };
        let devices = used().filter_map(|(place, _)| place.device.as_ref());
        if let Some(slowest) = devices.map(|d| d.link_bytes_per_second).min_by(f64::total_cmp) {
            link.bytes_per_second = slowest;
        }
        let mut hosts: Vec<usize> = used().map(|(place, _)| place.host).collect();
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
        if layout.mode == Mode::Embedded {
            return hash;
        }
        let engines = layout.engines_at(self.cluster);
        let pull = |(place, count): (&Place, &usize)| {
            self.together(layout, (*count, self.cal.engine_crowding), self.timer(place).pull())
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
