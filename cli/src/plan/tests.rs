//! Laws of the planner over random clusters, works and measurements. No clock: the measurement is made up.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use super::cluster::{Device, Host, Place};
use super::cost::Inputs;
use super::layout::{Layout, Mode};
use super::memory::MemoryNeed;
use super::{Calibration, Cluster, Expected, Link, ModelSizes, Point, Workload, search};
use crate::recipe::Placement;
use proptest::prelude::*;
use temper_actor::{InitConfig, ModelConfig};
use temper_controller::{PolicyStage, Stage};
use temper_rollout::EngineConfig;
use temper_trainer::{Memory, Sharding};
use temper_types::DType;

fn model() -> ModelConfig {
    let init: InitConfig = toml::from_str(
        "hidden_size = 64\nintermediate_size = 160\nnum_hidden_layers = 3\nnum_attention_heads = 4\n\
         num_key_value_heads = 2\nmax_position_embeddings = 256\nalphabet = \" 0123456789\"",
    )
    .unwrap();
    init.model_config().unwrap()
}

fn workload(prompts: usize, samples: usize, mini_batches: usize) -> Workload {
    let stage = PolicyStage {
        prompts_per_step: prompts,
        num_generations: samples,
        mini_batches,
        sampling: temper_types::SamplingParams { max_new_tokens: 64, ..Default::default() },
        ..PolicyStage::default()
    };
    let expected = Expected { prompt_tokens: 20.0, response_tokens: 40.0 };
    let (engine, placement) = (EngineConfig::default(), Placement::default());
    Workload::new(&Stage::Policy(Box::new(stage)), (&model(), DType::F32), (&engine, &placement), expected).unwrap()
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
        engine_crowding: 1.1,
        trainer_crowding: 1.05,
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
            prop_assert!(choice.layout.ranks <= work.num_rows() / work.mini_batches);
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

#[test]
fn a_device_is_bound_by_what_it_lacks() {
    let (work, cal) = (workload(8, 4, 1), calibration(1e-5));
    let with = |flops: f64, memory: f64| {
        let device = Device {
            name: "paper".to_owned(),
            memory_bytes: 1 << 34,
            flops,
            memory_bytes_per_second: memory,
            link_bytes_per_second: 1e11,
        };
        let mut cluster = cluster(1, 2, 4096, 10.0);
        cluster.places = vec![Place { host: 0, device: Some(device) }];
        let found = search(&work, &cal, &cluster);
        assert!(found.choices.iter().all(|choice| choice.estimate.on_paper));
        found.choices[0].estimate.seconds.step
    };
    assert!(with(1e13, 1e12) < with(1e12, 1e12));
    assert!(with(1e12, 1e12) < with(1e12, 1e9));
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
