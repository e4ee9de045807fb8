//! Laws of the planner over random clusters, works and measurements. No clock: the measurement is made up.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use super::cluster::{Device, Host, Place};
use super::cost::{Estimate, Inputs};
use super::layout::{Layout, Mode};
use super::memory::{MemoryNeed, activation_bytes};
use super::{Calibration, Cluster, Divisions, Expected, Link, ModelSizes, Point, Workload, search};
use crate::planned::{Lengths, Planned};
use crate::recipe::{Placement, Recipe, Source, check};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use temper_actor::{InitConfig, ModelConfig, TensorPart, sequence_parallel_problem};
use temper_controller::{PolicyStage, Stage};
use temper_rollout::EngineConfig;
use temper_trainer::{Memory, Passes, Sharding, exchange_bytes_sent};
use temper_types::DType;

fn model() -> ModelConfig {
    model_of("hidden_size = 64\nintermediate_size = 160\nnum_attention_heads = 4\nnum_key_value_heads = 2", 3)
}

fn model_of(sizes: &str, num_layers: usize) -> ModelConfig {
    let rest = format!("num_hidden_layers = {num_layers}\nmax_position_embeddings = 256\nalphabet = \" 0123456789\"");
    let init: InitConfig = toml::from_str(&format!("{sizes}\n{rest}")).unwrap();
    init.model_config().unwrap()
}

fn divisions(model: &ModelConfig) -> Divisions {
    let tensor_parallel = crate::rollout_ranks::NUM_RANKS.into_iter();
    Divisions {
        tensor_parallel: tensor_parallel.filter(|n| TensorPart::check(model, *n).is_ok()).collect(),
        sequence_parallel: (1..=64).filter(|n| sequence_parallel_problem(model, *n).is_none()).collect(),
    }
}

fn workload(prompts: usize, samples: usize, mini_batches: usize) -> Workload {
    workload_of(&model(), (prompts, samples, mini_batches))
}

fn workload_of(model: &ModelConfig, (prompts, samples, mini_batches): (usize, usize, usize)) -> Workload {
    let stage = PolicyStage {
        prompts_per_step: prompts,
        num_generations: samples,
        mini_batches,
        sampling: temper_types::SamplingParams { max_new_tokens: 64, ..Default::default() },
        ..PolicyStage::default()
    };
    let expected = Expected { prompt_tokens: 20.0, response_tokens: 40.0 };
    let (engine, placement) = (EngineConfig::default(), Placement::default());
    let stage = Stage::Policy(Box::new(stage));
    Workload::new(&stage, (model, DType::F32), divisions(model), (&engine, &placement), expected).unwrap()
}

fn table(per: f64) -> Vec<Point> {
    [1.0, 16.0, 256.0].map(|size| Point { size, seconds: 1e-4 + per * size }).to_vec()
}

fn calibration(per_token: f64) -> Calibration {
    Calibration {
        format: super::FORMAT,
        machine: "made up".to_owned(),
        cores: 2,
        dtype: DType::F32,
        model: ModelSizes::of(&model()),
        group_size: 4,
        prompt_tokens: 20,
        response_tokens: 40,
        peak_gflops: 100.0,
        memory_bytes_per_second: 1e10,
        process_bytes: 30 << 20,
        start: table(per_token * 4.0),
        decode: table(per_token),
        forward: table(per_token),
        train: table(3.0 * per_token),
        train_recompute: table(4.0 * per_token),
        update_seconds: 2e-3,
        hash_seconds: 1e-3,
        pull_seconds: 3e-3,
        sample_seconds: 1e-5,
        remote_sample_seconds: 2e-5,
        message_seconds: 1e-5,
        threads: Link { bytes_per_second: 2e9, latency_seconds: 5e-6 },
        sockets: Link { bytes_per_second: 1e9, latency_seconds: 5e-5 },
        tensor_threads: Link { bytes_per_second: 1e9, latency_seconds: 1e-5 },
        tensor_sockets: Link { bytes_per_second: 5e8, latency_seconds: 5e-5 },
        engine_crowding: 1.1,
        trainer_crowding: 1.05,
        thread_crowding: 1.02,
    }
}

fn cluster(hosts: usize, cores: usize, memory_mib: u64, gbit: f64) -> Cluster {
    let host = |index| Host {
        name: format!("host-{index}"),
        cores,
        core_speed: 1.0,
        memory_bytes: memory_mib << 20,
        network_bytes_per_second: gbit * 1.25e8,
        network_latency_seconds: 1e-4,
    };
    Cluster {
        name: "made up".to_owned(),
        hosts: (0..hosts).map(host).collect(),
        places: (0..hosts).map(|host| Place { host, device: None }).collect(),
    }
}

fn works() -> impl Strategy<Value = Workload> {
    (prop::sample::select(vec![1usize, 2, 4, 8, 12]), 1usize..6, 1usize..3).prop_map(|(prompts, samples, parts)| {
        workload(prompts, samples, if prompts.is_multiple_of(parts) { parts } else { 1 })
    })
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn more_bandwidth_is_never_slower(
        work in works(), hosts in 1usize..4, gbit in 0.01f64..50.0, more in 1.0f64..10.0,
    ) {
        let cal = calibration(1e-5);
        let (slow, fast) = (cluster(hosts, 2, 4096, gbit), cluster(hosts, 2, 4096, gbit * more));
        for choice in search(&work, &cal, &slow).choices {
            let quick = Inputs { work: &work, cal: &cal, cluster: &fast }.estimate(&choice.layout);
            prop_assert!(quick.seconds.step <= choice.estimate.seconds.step, "{:?}", choice.layout);
        }
    }

    #[test]
    fn more_memory_never_leaves_fewer_choices(
        work in works(), hosts in 1usize..3, mib in 1u64..400, more in 0u64..400,
    ) {
        let cal = calibration(1e-5);
        let layouts = |mib| -> Vec<Layout> {
            let mut all: Vec<Layout> =
                search(&work, &cal, &cluster(hosts, 2, mib, 10.0)).choices.iter().map(|c| c.layout).collect();
            all.sort_by_key(|layout| format!("{layout:?}"));
            all
        };
        let (few, many) = (layouts(mib), layouts(mib + more));
        prop_assert!(few.iter().all(|layout| many.contains(layout)));
    }

    #[test]
    fn what_is_listed_fits_and_what_is_not_is_counted(work in works(), hosts in 1usize..3, mib in 1u64..200) {
        let cal = calibration(1e-5);
        let cluster = cluster(hosts, 2, mib, 10.0);
        let found = search(&work, &cal, &cluster);
        for choice in &found.choices {
            let mut hosts = vec![0; cluster.hosts.len()];
            let needs = cluster.places.iter().zip(&choice.estimate.memory.places);
            needs.for_each(|(place, need)| hosts[place.host] += need);
            prop_assert!(hosts.iter().zip(&cluster.hosts).all(|(need, host)| *need <= host.memory_bytes));
            prop_assert!(choice.layout.engines <= work.prompts);
            prop_assert!(choice.layout.row_groups() <= work.num_rows() / work.mini_batches);
        }
        let dropped: usize = found.dropped.iter().map(|d| d.count).sum();
        prop_assert_eq!(found.choices.len() + dropped, super::layout::layouts(&work, &cluster).len());
    }

    #[test]
    fn choices_come_best_first_and_always_in_the_same_order(work in works(), hosts in 1usize..4) {
        let (cal, cluster) = (calibration(1e-5), cluster(hosts, 3, 4096, 10.0));
        let found = search(&work, &cal, &cluster);
        prop_assert!(found.choices.is_sorted_by(|a, b| a.estimate.seconds.step <= b.estimate.seconds.step));
        prop_assert_eq!(&found, &search(&work, &cal, &cluster));
        let kinds = found.kinds();
        prop_assert!(kinds.iter().all(|kind| kind.estimate.idle >= 0.0 && kind.estimate.idle < 1.0));
    }

    #[test]
    fn a_slower_machine_is_never_faster(work in works(), hosts in 1usize..4, times in 1.0f64..20.0) {
        let cluster = cluster(hosts, 2, 4096, 10.0);
        let (quick, slow) = (calibration(1e-5), calibration(1e-5 * times));
        for choice in search(&work, &quick, &cluster).choices {
            let other = Inputs { work: &work, cal: &slow, cluster: &cluster }.estimate(&choice.layout);
            prop_assert!(other.seconds.step >= choice.estimate.seconds.step);
        }
    }
}

/// Masters, gradients and moments are the trainer's own figures, for every sharding and world.
#[test]
fn state_is_what_the_trainer_predicts() {
    let (work, cal, cluster) = (workload(8, 4, 1), calibration(1e-5), cluster(2, 4, 4096, 10.0));
    let found = search(&work, &cal, &cluster);
    let mut seen = 0;
    for choice in &found.choices {
        let Layout { sharding, ranks, .. } = choice.layout;
        let expected = Memory::predict(&work.shapes, sharding, (0, ranks));
        assert_eq!(choice.estimate.memory.rank, expected, "{sharding:?} of {ranks}");
        seen += usize::from(matches!(sharding, Sharding::Hybrid { .. }));
    }
    assert!(seen > 0, "hybrid is tried where there are four ranks");
}

/// Mirrors cost a rank four times its masters and moments; where ranks cannot have them the flags turn them off.
#[test]
fn mirrors_are_counted_where_ranks_can_have_them() {
    let (work, cal, cluster) = (workload(8, 4, 1), calibration(1e-5), cluster(2, 4, 4096, 10.0));
    let mut mirrored = work.clone();
    mirrored.placement.mirror_shards = true;
    let mut seen = [0; 2];
    for choice in search(&work, &cal, &cluster).choices {
        let (layout, before) = (&choice.layout, &choice.estimate.memory);
        let more = MemoryNeed::new(&mirrored, &cal, &cluster, layout).trainer - before.trainer;
        let shard = before.rank.moments + before.rank.moments / 2;
        let has_replicas = layout.ranks > layout.sharding.num_shards(layout.ranks);
        let has_mirrors = layout.mode != Mode::Embedded && layout.ranks > 1;
        let copies = if has_replicas { 2 } else { 4 };
        assert_eq!(more, if has_mirrors { copies * shard } else { 0 }, "{layout:?}");
        let off = layout.assignments(&mirrored, &cluster).contains(&"placement.mirror_shards=false".to_owned());
        assert_eq!(off, !has_mirrors, "{layout:?}");
        seen[usize::from(has_mirrors)] += 1;
    }
    assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
}

/// Ranks that send changes keep their masters twice more; one process sends none.
#[test]
fn published_versions_are_counted_where_changes_are_sent() {
    let (work, cal, cluster) = (workload(8, 4, 1), calibration(1e-5), cluster(2, 4, 4096, 10.0));
    let mut delta = work.clone();
    delta.placement.weight_transport = temper_rollout::WeightTransport::Delta;
    for choice in search(&work, &cal, &cluster).choices {
        let (layout, before) = (&choice.layout, &choice.estimate.memory);
        let more = MemoryNeed::new(&delta, &cal, &cluster, layout).trainer - before.trainer;
        let expected = if layout.mode == Mode::Embedded { 0 } else { 2 * before.rank.masters };
        assert_eq!(more, expected, "{layout:?}");
    }
}

/// The cores of one host are one: a second process adds no compute, and staleness fills only waits.
#[test]
fn processes_of_one_host_share_its_cores() {
    let (work, mut cal) = (workload(8, 4, 1), calibration(1e-5));
    (cal.engine_crowding, cal.trainer_crowding) = (1.0, 1.0);
    let cluster = cluster(1, 2, 4096, 10.0);
    let found = search(&work, &cal, &cluster);
    let best = &found.choices[0];
    assert_eq!(best.layout.mode, Mode::Embedded, "messages and copies cost, and bring nothing");
}

/// With a host for each part and equal halves, running them side by side takes about half.
#[test]
fn two_hosts_with_staleness_beat_one_after_the_other() {
    let (work, cal) = (workload(8, 4, 1), calibration(1e-5));
    let cluster = cluster(2, 2, 4096, 100.0);
    let found = search(&work, &cal, &cluster);
    let of = |staleness| {
        let is = |l: &Layout| l.mode == Mode::Disaggregated { trainer_places: 1 } && l.staleness == staleness;
        let choice = found.choices.iter().find(|c| is(&c.layout) && c.layout.ranks == 1 && c.layout.engines == 1);
        choice.unwrap().estimate.clone()
    };
    let (synchronous, overlapped) = (of(0), of(1));
    let s = synchronous.seconds;
    let expected = s.generation.max(s.training + s.around) + s.sync;
    assert!((overlapped.seconds.step - expected).abs() < 1e-9);
    assert!(overlapped.idle < synchronous.idle);
}

fn devices(count: usize, memory_bytes: u64, (flops, memory_bytes_per_second): (f64, f64)) -> Cluster {
    let link_bytes_per_second = 1e11;
    let device =
        Device { name: "paper".to_owned(), memory_bytes, flops, memory_bytes_per_second, link_bytes_per_second };
    let mut cluster = cluster(1, 8, 4096, 10.0);
    cluster.places = vec![Place { host: 0, device: Some(device) }; count];
    cluster
}

#[test]
fn a_device_is_bound_by_what_it_lacks() {
    let (work, cal) = (workload(8, 4, 1), calibration(1e-5));
    let with = |flops: f64, memory: f64| {
        let found = search(&work, &cal, &devices(1, 1 << 34, (flops, memory)));
        assert!(found.choices.iter().all(|choice| choice.estimate.on_paper));
        found.choices[0].estimate.seconds.step
    };
    assert!(with(1e13, 1e12) < with(1e12, 1e12));
    assert!(with(1e12, 1e12) < with(1e12, 1e9));
}

/// Where an engine does not fit a device whole, it is divided over devices of its host; where it fits, both are listed.
#[test]
fn an_engine_too_large_for_a_device_is_divided() {
    let sizes = "hidden_size = 512\nintermediate_size = 1408\nnum_attention_heads = 8\nnum_key_value_heads = 8";
    let model = model_of(sizes, 8);
    let (work, cal) = (workload_of(&model, (8, 4, 1)), calibration(1e-5));
    // Packed layers are 103 MB, of which two ranks have half each; the pool of keys and values takes 537 MB on every
    // rank, the f32 copy 103 MB on rank 0.
    let found = |bytes| search(&work, &cal, &devices(8, bytes, (1e12, 1e12)));
    let degrees = |bytes| {
        let mut all: Vec<usize> = found(bytes).choices.iter().map(|choice| choice.layout.tensor_parallel).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    assert_eq!(degrees(1_000_000_000), [1, 2, 4, 8]);
    assert_eq!(degrees(790_000_000), [2, 4, 8]);
    for choice in found(790_000_000).choices {
        let ranks: usize = choice.layout.engines_at(&devices(8, 0, (1.0, 1.0))).iter().map(|share| share.ranks).sum();
        assert_eq!(ranks, choice.layout.engines * choice.layout.tensor_parallel, "{:?}", choice.layout);
    }
    // The ranks of an engine share the memory of a host's cores: dividing it there saves none.
    assert!(search(&work, &cal, &cluster(4, 8, 600, 10.0)).choices.is_empty());
}

/// Eight layers more cost a rank of an engine as many bytes as it holds of them, and rank 0 their f32 copy beside.
#[test]
fn ranks_of_an_engine_hold_their_parts() {
    let sizes = "hidden_size = 512\nintermediate_size = 1408\nnum_attention_heads = 8\nnum_key_value_heads = 8";
    let (cal, cluster) = (calibration(1e-5), cluster(1, 8, 1 << 20, 10.0));
    for num_ranks in [2, 4, 8] {
        let of = |num_layers| {
            let model = model_of(sizes, num_layers);
            let mut work = workload_of(&model, (8, 4, 1));
            work.engine.kv_cache_bytes = 1 << 20;
            let find = |l: &&Layout| l.tensor_parallel == num_ranks && l.mode == Mode::Colocated;
            let need = MemoryNeed::new(
                &work,
                &cal,
                &cluster,
                super::layout::layouts(&work, &cluster).iter().find(find).unwrap(),
            );
            let part = TensorPart::new(&model, 1, num_ranks).unwrap();
            let whole: usize = (0..work.shapes.num_units()).map(|unit| work.shapes.unit_len(unit)).sum();
            let held: usize = (0..part.num_units()).map(|unit| part.num_values(unit)).sum();
            [need.follower as f64, need.engine as f64, 4.0 * held as f64, 4.0 * (held + whole) as f64]
        };
        let (few, many) = (of(8), of(16));
        let more: Vec<f64> = few.iter().zip(many).map(|(few, many)| many - few).collect();
        assert!((more[0] / more[2] - 1.0).abs() < 0.01, "{num_ranks}: {more:?}");
        assert!((more[1] / more[3] - 1.0).abs() < 0.01, "{num_ranks}: {more:?}");
    }
}

/// A divided engine on the cores of a host has no more of them, and exchanges beside: whole ones are never worse.
#[test]
fn on_the_cores_of_a_host_whole_engines_win() {
    let (work, cal) = (workload(8, 4, 1), calibration(1e-5));
    for cluster in [Cluster::this_machine(2, 1 << 32), cluster(2, 8, 4096, 10.0)] {
        let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
        let found = search(&work, &cal, &cluster);
        assert_eq!(found.choices[0].layout.tensor_parallel, 1);
        let divided: Vec<_> = found.choices.iter().filter(|choice| choice.layout.tensor_parallel > 1).collect();
        assert!(!divided.is_empty());
        for choice in divided {
            let whole = inputs.estimate(&Layout { tensor_parallel: 1, ..choice.layout });
            assert!(whole.seconds.generation < choice.estimate.seconds.generation, "{:?}", choice.layout);
            let bytes = |estimate: &Estimate| estimate.memory.places.iter().sum::<u64>();
            assert!(bytes(&whole) < bytes(&choice.estimate), "{:?}", choice.layout);
        }
    }
}

/// Ranks that share a process's threads take what a whole engine does, and in every layer two rounds of their sums.
#[test]
fn ranks_of_an_engine_exchange_their_sums() {
    let (work, mut cal, cluster) = (workload(8, 4, 1), calibration(1e-5), cluster(1, 4, 4096, 10.0));
    cal.tensor_threads = Link { bytes_per_second: 1e8, latency_seconds: 1e-4 };
    let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
    let layouts = super::layout::layouts(&work, &cluster);
    let divided = layouts.iter().find(|l| l.mode == Mode::Embedded && l.tensor_parallel == 2).unwrap();
    let seconds = |tensor_parallel| inputs.estimate(&Layout { tensor_parallel, ..*divided }).seconds.generation;
    // Eight prompts of 20 tokens in one step, then 32 samples of 40 tokens, the longest of them of 64.
    let (rounds, rows, steps) = (2.0 * 3.0, 8.0 * 20.0 + 32.0 * 39.0, 1.0 + 63.0);
    let expected = rounds * rows * 4.0 * 64.0 / 1e8 + (rounds + 1.0) * steps * 1e-4;
    let got = seconds(2) - seconds(1);
    assert!((got / expected - 1.0).abs() < 1e-9, "{got}, not {expected}");
}

/// Where a rank has fewer threads than its host has cores, more ranks take more of them, but for the exchanges.
#[test]
fn ranks_with_threads_of_their_own_divide_the_layers() {
    let (mut work, mut cal, cluster) = (workload(8, 4, 1), calibration(1e-3), cluster(1, 8, 4096, 10.0));
    work.placement.threads = 2;
    cal.tensor_sockets = Link { bytes_per_second: 1e15, latency_seconds: 0.0 };
    let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
    let layouts = super::layout::layouts(&work, &cluster);
    let find =
        |l: &&Layout| (l.mode, l.engines, l.tensor_parallel, l.ranks, l.staleness) == (Mode::Colocated, 1, 2, 1, 0);
    let layout = layouts.iter().find(find).unwrap();
    let divided = inputs.estimate(layout).seconds.generation;
    let whole = inputs.estimate(&Layout { tensor_parallel: 1, ..*layout }).seconds.generation;
    let (layers, head) = (work.model.layer_weights(), work.model.head_weights());
    let expected = (layers / 2.0 + head) / (layers + head);
    assert!((divided / whole - expected).abs() < 1e-6, "{divided} of {whole}, not {expected}");
}

/// Two rows for eight hosts: ranks beyond the second have something to do only where they share rows, which pays where
/// the network is fast.
#[test]
fn ranks_share_long_rows_where_there_are_fewer_of_them() {
    let (mut work, cal) = (workload(2, 1, 1), calibration(1e-4));
    work.expected.response_tokens = 4000.0;
    work.max_response_tokens = 4000;
    work.config.max_position_embeddings = 8192;
    let best = |gbit| search(&work, &cal, &cluster(8, 1, 8192, gbit)).choices[0].layout;
    let fast = best(100.0);
    assert!(fast.row_groups() == 2 && fast.sequence_parallel > 1, "{fast:?}");
    assert_eq!(best(0.001).sequence_parallel, 1);
    // With a row for every rank nothing is gained.
    let mut many = work.clone();
    many.prompts = 64;
    let found = search(&many, &cal, &cluster(8, 1, 8192, 100.0));
    assert_eq!(found.choices[0].layout.sequence_parallel, 1);
}

/// What `trainer/tests/sequence.rs` measures of the widths of SmolLM2-135M, four layers, one response of 1,984 tokens:
/// MiB on one rank and on each of three, without and with recomputation.
#[test]
fn activations_are_about_those_that_ranks_allocate() {
    let sizes = "hidden_size = 576\nintermediate_size = 1536\nnum_attention_heads = 9\nnum_key_value_heads = 3";
    let mut work = workload_of(&model_of(sizes, 4), (3, 1, 1));
    work.expected = Expected { prompt_tokens: 1.0, response_tokens: 1984.0 };
    work.max_response_tokens = 1984;
    work.config.max_position_embeddings = 2048;
    let cluster = cluster(3, 1, 8192, 10.0);
    for (ranks, recompute, measured) in [(1, false, 323.7), (3, false, 122.2), (1, true, 202.0), (3, true, 77.1)] {
        let find = |l: &&Layout| (l.ranks, l.sequence_parallel, l.recompute) == (ranks, ranks, recompute);
        let layouts = super::layout::layouts(&work, &cluster);
        let layout = Layout { max_micro_batch_tokens: 1, ..*layouts.iter().find(find).unwrap() };
        let predicted = activation_bytes(&work, &layout) as f64 / f64::from(1 << 20);
        assert!((predicted / measured - 1.0).abs() < 0.1, "{ranks} ranks, recompute {recompute}: {predicted} MiB");
    }
}

/// Groups exchange what the trainer counts: here two pairs at once, over a link that takes bytes alone.
#[test]
fn groups_exchange_what_the_trainer_predicts() {
    let (work, mut cal, cluster) = (workload(8, 4, 1), calibration(1e-5), cluster(1, 4, 4096, 10.0));
    cal.sockets = Link { bytes_per_second: 1e9, latency_seconds: 0.0 };
    let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
    let layouts = super::layout::layouts(&work, &cluster);
    for recompute in [false, true] {
        let find = |l: &&Layout| (l.mode, l.ranks, l.recompute) == (Mode::Colocated, 4, recompute);
        let alone = Layout { max_micro_batch_tokens: 16384, ..*layouts.iter().find(find).unwrap() };
        let seconds = |sequence_parallel| {
            let estimate = inputs.estimate(&Layout { sequence_parallel, ..alone });
            assert_eq!(estimate.micro_batches, 1);
            estimate.seconds.communication
        };
        let rows = (work.prompts as f64 * work.group_tokens()) as usize;
        let passes = Passes { forwards: 1 + u64::from(recompute), backwards: 1 };
        let before = Passes { forwards: 1, backwards: 0 };
        let bytes = |passes| exchange_bytes_sent(&work.config, (0, 4), rows, passes) as f64;
        let expected = 2.0 * (bytes(passes) + work.forwards * bytes(before)) / 1e9;
        let got = seconds(4) - seconds(1);
        assert!(got > expected && got < 1.1 * expected, "{got}, not {expected} and what is said of targets");
    }
}

/// A limit that is not listed gives what a listed one does: nothing is lost.
#[test]
fn limits_that_hold_all_rows_are_one_choice() {
    let (work, cal, cluster) = (workload(8, 4, 2), calibration(1e-5), cluster(2, 4, 4096, 10.0));
    let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
    let layouts = super::layout::layouts(&work, &cluster);
    let mut dropped = 0;
    for layout in layouts.iter().filter(|l| l.max_micro_batch_tokens == 4096 && l.staleness == 0) {
        for max_micro_batch_tokens in [1024, 2048, 8192, 16384] {
            let other = Layout { max_micro_batch_tokens, ..*layout };
            if !layouts.contains(&other) {
                assert_eq!(inputs.estimate(&other), inputs.estimate(layout), "{other:?}");
                dropped += 1;
            }
        }
    }
    assert!(dropped > 0);
}

/// Rows that exceed the limit of a micro-batch go alone, each once; ranks that share rows have as many times the limit.
#[test]
fn long_rows_go_alone() {
    let (mut work, cal, cluster) = (workload(2, 4, 1), calibration(1e-5), cluster(4, 1, 8192, 10.0));
    work.expected.response_tokens = 4000.0;
    work.max_response_tokens = 4000;
    work.config.max_position_embeddings = 8192;
    let inputs = Inputs { work: &work, cal: &cal, cluster: &cluster };
    let layouts = super::layout::layouts(&work, &cluster);
    for (sequence_parallel, limit, expected) in [(1, 1024, 2), (1, 4096, 2), (1, 8192, 1), (4, 1024, 8), (4, 4096, 2)] {
        let find = |l: &&Layout| l.mode == Mode::Colocated && l.ranks == 4 && l.sequence_parallel == sequence_parallel;
        let layout = Layout { max_micro_batch_tokens: limit, ..*layouts.iter().find(find).unwrap() };
        let found = inputs.estimate(&layout);
        let per_rank = found.micro_batches as f64 * found.micro_batch_tokens;
        assert_eq!(found.micro_batches, expected, "{layout:?}");
        // A rank's part of two groups of four rows, prompts once for each group or row.
        assert!((8000.0..8100.0).contains(&per_rank), "{layout:?}: {per_rank}");
    }
}

/// The recipe of the command's tests.
fn recipe_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/plan/recipe.toml")
}

fn planned(set: &[String]) -> Planned {
    let lengths = Lengths { prompt_tokens: Some(9.0), response_tokens: Some(6.0) };
    Planned::load((&recipe_path(), set), None, &lengths).unwrap()
}

fn is_accepted(set: &[String]) -> bool {
    let source = Source::read(&recipe_path(), set).unwrap();
    check(&Recipe::from_source(&source).unwrap(), &source).is_ok()
}

/// A plan's flags, put after those that the recipe was planned with, make a recipe that `temper check` accepts and of
/// which the same layout needs no flag.
#[test]
fn flags_give_their_layout() {
    let divided = ["mode=\"processes\"", "rollout_tensor_parallel=2", "trainer_ranks=4", "sequence_parallel=2"];
    let divided = divided.map(|key| format!("placement.{key}"));
    let cluster = Cluster::this_machine(4, 1 << 32);
    let mut seen = [0; 2];
    for before in [&[][..], &divided[..]] {
        let planned_before = planned(before).work;
        let as_told = |l: &Layout| l.max_micro_batch_tokens == 4096 && !l.recompute && l.staleness < 2;
        for layout in super::layout::layouts(&planned_before, &cluster).into_iter().filter(as_told) {
            let set = [before, &layout.assignments(&planned_before, &cluster)[..]].concat();
            let after = planned(&set).work;
            assert_eq!(layout.assignments(&after, &cluster), Vec::<String>::new(), "{set:?}");
            let now = &after.placement;
            let got = (now.rollout_workers, now.rollout_tensor_parallel, now.trainer_ranks, now.sequence_parallel);
            let Layout { engines, tensor_parallel, ranks, sequence_parallel, .. } = layout;
            assert_eq!(got, (engines, tensor_parallel, ranks, sequence_parallel), "{set:?}");
            assert!(is_accepted(&set), "{set:?}");
            seen[0] += usize::from(tensor_parallel > 1);
            seen[1] += usize::from(sequence_parallel > 1);
        }
    }
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
}

/// What is tried is what `temper check` accepts, of models with all sorts of heads.
#[test]
fn divisions_are_those_that_a_recipe_may_have() {
    for (heads, kv_heads, ffn) in [(4, 4, 160), (6, 2, 192), (8, 8, 160), (12, 4, 100), (3, 1, 64)] {
        let heads = [("num_attention_heads", heads), ("num_key_value_heads", kv_heads), ("intermediate_size", ffn)];
        let mut model: Vec<String> = heads.map(|(key, value)| format!("model.init.{key}={value}")).to_vec();
        model.push(format!("model.init.hidden_size={}", 16 * heads[0].1));
        let Divisions { tensor_parallel, sequence_parallel } = planned(&model).work.divisions;
        for n in 1..=12 {
            let with = |keys: &[&str]| {
                let set = keys.iter().map(|key| format!("placement.{key}={n}"));
                is_accepted(&model.iter().cloned().chain(set).collect::<Vec<_>>())
            };
            assert_eq!(tensor_parallel.contains(&n), with(&["rollout_tensor_parallel"]), "{n}: {model:?}");
            assert_eq!(sequence_parallel.contains(&n), with(&["trainer_ranks", "sequence_parallel"]), "{n}: {model:?}");
        }
    }
}

/// Ranks that share sequences share a teacher's too: its heads count.
#[test]
fn a_teacher_has_to_be_divided_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let teacher = dir.path().join("teacher");
    std::fs::create_dir(&teacher).unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96, "vocab_size": 19,
        "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#;
    std::fs::write(teacher.join("config.json"), config).unwrap();
    let stage = format!(
        "[[stage]]\nkind = \"distill\"\ndata = \"demonstrations\"\nsteps = 1\nteacher = {{ path = {teacher:?} }}\n"
    );
    let path = dir.path().join("recipe.toml");
    std::fs::write(&path, std::fs::read_to_string(recipe_path()).unwrap() + &stage).unwrap();
    let lengths = Lengths { prompt_tokens: Some(9.0), response_tokens: Some(6.0) };
    let planned = Planned::load((&path, &[]), None, &lengths).unwrap();
    // The policy has four heads, the teacher six and two.
    assert_eq!(planned.work.divisions.sequence_parallel, [1, 2]);
    assert_eq!(planned.work.divisions.tensor_parallel, [1, 2, 4]);
}

#[test]
fn tables_are_read_between_and_beyond_their_points() {
    use super::calibration::look_up;
    let table = [Point { size: 2.0, seconds: 1.0 }, Point { size: 4.0, seconds: 2.0 }];
    let cases = [(1.0, 1.0), (2.0, 1.0), (3.0, 1.5), (4.0, 2.0), (8.0, 4.0)];
    for (size, seconds) in cases {
        assert_eq!(look_up(&table, size), seconds, "at {size}");
    }
}
