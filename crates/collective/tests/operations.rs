//! Every operation against a plain loop, over threads and over sockets; what is counted; who is named when a rank is
//! lost.

use proptest::prelude::*;
use std::net::{SocketAddr, TcpListener};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use temper_collective::{
    Collective, Counter, Error, Loss, Operation, SocketConfig, connect, connect_threads, shard_ranges,
};

const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Threads,
    Sockets,
}

fn connect_sockets(world: usize, timeout: Duration) -> Vec<Collective> {
    let listener = |_| TcpListener::bind("127.0.0.1:0").expect("a free port");
    let listeners: Vec<TcpListener> = (0..world).map(listener).collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(|l| l.local_addr().expect("bound")).collect();
    std::thread::scope(|scope| {
        let join = |(rank, listener): (usize, TcpListener)| {
            let addresses = addresses.clone();
            scope.spawn(move || {
                let config = SocketConfig { rank, addresses, token: 7, tls: None, connect_timeout: TIMEOUT, timeout };
                connect(&config, &listener).expect("connected")
            })
        };
        let handles: Vec<_> = listeners.into_iter().enumerate().map(join).collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
    })
}

/// Run `body` on every rank; what they give, in rank order.
fn on_all<R: Send>(kind: Kind, world: usize, timeout: Duration, body: impl Fn(Collective) -> R + Sync) -> Vec<R> {
    let ranks = match kind {
        Kind::Threads => connect_threads(world, timeout),
        Kind::Sockets => connect_sockets(world, timeout),
    };
    std::thread::scope(|scope| {
        let body = &body;
        let handles: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || body(rank))).collect();
        handles.into_iter().map(|handle| handle.join().expect("no panic")).collect()
    })
}

/// Values whose sum depends on the order.
fn contribution(rank: usize, len: usize) -> Vec<f32> {
    let value = |i: usize| ((i * 37 + rank * 101) % 89) as f32 * 1.1f32.powi((rank as i32 * 7 + i as i32) % 40 - 20);
    (0..len).map(value).collect()
}

fn plain_sum(world: usize, len: usize) -> Vec<f32> {
    let mut sum = contribution(0, len);
    for rank in 1..world {
        sum.iter_mut().zip(contribution(rank, len)).for_each(|(sum, x)| *sum += x);
    }
    sum
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Contiguous ranges of any sizes.
fn cuts(len: usize, world: usize, seed: usize) -> Vec<Range<usize>> {
    let mut ends: Vec<usize> = (1..world).map(|i| (seed * (2 * i + 1)) % (len + 1)).collect();
    ends.sort_unstable();
    ends.push(len);
    let starts = std::iter::once(0).chain(ends.clone());
    starts.zip(ends.clone()).map(|(start, end)| start..end).collect()
}

fn check(kind: Kind, world: usize, len: usize, seed: usize) {
    let ranges = &cuts(len, world, seed);
    let expected = &plain_sum(world, len);
    let root = seed % world;
    on_all(kind, world, TIMEOUT, |ranks| {
        let rank = ranks.rank();
        let mut sum = contribution(rank, len);
        ranks.all_reduce(&mut sum).expect("reduced");
        assert_eq!(bits(&sum), bits(expected));

        let mut part = contribution(rank, len);
        ranks.reduce_scatter(&mut part, ranges).expect("reduced");
        assert_eq!(bits(&part[ranges[rank].clone()]), bits(&expected[ranges[rank].clone()]));

        ranks.all_gather(&mut part, ranges).expect("gathered");
        assert_eq!(bits(&part), bits(expected));

        let ahead = ranks.subgroup(&(0..world).collect::<Vec<_>>(), 9).expect("a group of all");
        let begun = [0, 1].map(|_| ahead.begin_all_gather(&part[ranges[rank].clone()]).expect("sent"));
        let mut meanwhile = contribution(rank, len);
        ranks.all_reduce(&mut meanwhile).expect("reduced while gathers are under way");
        assert_eq!(bits(&meanwhile), bits(expected));
        for gathering in begun {
            let mut gathered = vec![f32::NAN; len];
            gathered[ranges[rank].clone()].copy_from_slice(&part[ranges[rank].clone()]);
            ahead.end_all_gather(gathering, &mut gathered, ranges).expect("gathered");
            assert_eq!(bits(&gathered), bits(expected));
        }

        let mut one = contribution(rank, len);
        ranks.broadcast(&mut one, root).expect("sent");
        assert_eq!(bits(&one), bits(&contribution(root, len)));
        let list = contribution(root, root * len % 13);
        if rank == root {
            ranks.give_list(&list).expect("sent");
        } else {
            assert_eq!(bits(&ranks.take_list(root).expect("sent")), bits(&list));
        }

        let lists = ranks.all_gather_lists(&contribution(rank, rank * len % 13)).expect("gathered");
        (0..world).for_each(|peer| assert_eq!(bits(&lists[peer]), bits(&contribution(peer, peer * len % 13))));

        // Rank r gives rank p a list of (r + 2p) * len % 11 numbers.
        let list = |from: usize, to: usize| contribution(from + 10 * to, (from + 2 * to) * len % 11);
        let parts = (0..world).map(|peer| list(rank, peer)).collect();
        let lens: Vec<usize> = (0..world).map(|peer| list(peer, rank).len()).collect();
        let given = ranks.all_to_all(parts, &lens).expect("exchanged");
        (0..world).for_each(|peer| assert_eq!(bits(&given[peer]), bits(&list(peer, rank))));

        let mut wide: Vec<f64> = contribution(rank, len).iter().map(|x| f64::from(*x)).collect();
        ranks.all_reduce(&mut wide).expect("reduced");
        let all: Vec<Vec<f32>> = (0..world).map(|r| contribution(r, len)).collect();
        let plain = |i: usize| all.iter().map(|values| f64::from(values[i])).reduce(|a, b| a + b);
        (0..len).for_each(|i| assert_eq!(Some(wide[i]), plain(i)));
        ranks.barrier().expect("all are here");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn results_are_those_of_a_plain_loop(world in 1..=5usize, len in 0..3000usize, seed in 0..100_000usize) {
        check(Kind::Threads, world, len, seed);
    }
}

#[test]
fn sockets_give_the_same_bits() {
    for (world, len, seed) in [(1, 5, 3), (2, 0, 1), (2, 1025, 77), (3, 2900, 12_345), (5, 7, 5), (4, 300_000, 99)] {
        check(Kind::Sockets, world, len, seed);
    }
}

/// The sum over a world, as subgroups compute it that pass their parts along, has the bits of the whole world's sum.
#[test]
fn a_chain_of_subgroups_adds_in_the_order_of_the_world() {
    for (world, shards, len) in [(4, 2, 5000), (6, 3, 2049), (6, 2, 100), (4, 1, 1500), (3, 3, 4096)] {
        let expected = &plain_sum(world, len);
        on_all(Kind::Threads, world, TIMEOUT, |ranks| {
            let first = ranks.rank() / shards * shards;
            let inner = ranks.subgroup(&(first..first + shards).collect::<Vec<_>>(), 0).expect("a subgroup");
            let position = ranks.rank() - first;
            let across: Vec<usize> = (position..world).step_by(shards).collect();
            let across = ranks.subgroup(&across, 0).expect("a subgroup");
            let ranges = shard_ranges(len, shards);
            let own = ranges[position].clone();
            let sum = across.chain(own.len(), |carry| {
                let mut values = contribution(ranks.rank(), len);
                match carry {
                    None => inner.reduce_scatter(&mut values, &ranges)?,
                    Some(carry) => inner.reduce_scatter_onto(&carry, &mut values, &ranges)?,
                }
                Ok::<_, Error>(values[own.clone()].to_vec())
            });
            assert_eq!(bits(&sum.expect("summed")), bits(&expected[own]));
        });
    }
}

#[test]
fn the_bytes_counted_are_those_of_the_formula() {
    for kind in [Kind::Threads, Kind::Sockets] {
        for (world, len, seed) in [(1, 100, 3), (2, 1000, 17), (4, 4097, 1234), (5, 3, 8)] {
            let ranges = &cuts(len, world, seed);
            on_all(kind, world, TIMEOUT, |ranks| {
                let (rank, before) = (ranks.rank(), ranks.counts());
                let own = ranges[rank].len();
                let (others, rest) = (world - 1, len - own);
                let mut values = contribution(rank, len);
                ranks.reduce_scatter(&mut values, ranges).expect("reduced");
                ranks.all_gather(&mut values, ranges).expect("gathered");
                ranks.all_reduce(&mut values).expect("reduced");
                ranks.broadcast(&mut values, 0).expect("sent");
                ranks.barrier().expect("all are here");
                let parts = ranges.iter().map(|range| values[range.clone()].to_vec()).collect();
                ranks.all_to_all(parts, &vec![own; world]).expect("exchanged");
                let counts = ranks.counts().since(&before);
                let moved = |operation| {
                    let counter = counts.of(operation);
                    assert_eq!(counter.num_calls, 1, "{operation}");
                    (counter.bytes_sent as usize / 4, counter.bytes_received as usize / 4)
                };
                assert_eq!(moved(Operation::ReduceScatter), (rest, others * own));
                assert_eq!(moved(Operation::AllGather), (others * own, rest));
                let even = shard_ranges(len, world)[rank].len();
                let both = (len - even) + others * even;
                assert_eq!(moved(Operation::AllReduce), (both, both));
                assert_eq!(moved(Operation::Broadcast), if rank == 0 { (others * len, 0) } else { (0, len) });
                assert_eq!(moved(Operation::Barrier), (0, 0));
                assert_eq!(moved(Operation::AllToAll), (rest, others * own));
                let before = ranks.counts();
                let begun = ranks.begin_all_gather(&values[ranges[rank].clone()]).expect("sent");
                ranks.end_all_gather(begun, &mut values, ranges).expect("gathered");
                let in_two_halves = ranks.counts().since(&before).of(Operation::AllGather);
                assert_eq!(
                    in_two_halves,
                    Counter { elapsed: in_two_halves.elapsed, ..counts.of(Operation::AllGather) }
                );
            });
        }
    }
}

/// Rank 2 leaves before its third operation: everybody else says so, without waiting for the deadline.
#[test]
fn a_rank_that_dies_is_named_on_all_others() {
    for kind in [Kind::Threads, Kind::Sockets] {
        let start = Instant::now();
        let errors = on_all(kind, 4, TIMEOUT, |ranks| {
            for step in 0.. {
                if ranks.rank() == 2 && step == 2 {
                    return None;
                }
                let mut values = contribution(ranks.rank(), 5000);
                if let Err(error) = ranks.all_reduce(&mut values) {
                    assert_eq!(ranks.barrier().expect_err("it stays broken"), error);
                    return Some(error);
                }
            }
            None
        });
        for (rank, error) in errors.into_iter().enumerate().filter(|(rank, _)| *rank != 2) {
            let Some(Error::RankLost { rank: lost, operation, loss }) = error else {
                panic!("{kind:?} {rank}: {error:?}")
            };
            assert_eq!((lost, operation), (2, Operation::AllReduce), "{kind:?} {rank}");
            assert!(matches!(loss, Loss::Gone | Loss::Reported { .. }), "{loss:?}");
        }
        assert!(start.elapsed() < TIMEOUT / 2);
    }
}

/// Rank 1 is there but does nothing: the others name it when the deadline has passed.
#[test]
fn a_rank_that_stalls_is_named_on_all_others_in_time() {
    let timeout = Duration::from_millis(300);
    for kind in [Kind::Threads, Kind::Sockets] {
        let release = Arc::new(std::sync::Barrier::new(3));
        let errors = on_all(kind, 3, timeout, |ranks| {
            if ranks.rank() == 1 {
                release.wait();
                return None;
            }
            let start = Instant::now();
            let error = ranks.barrier().expect_err("rank 1 does not come");
            assert!(start.elapsed() < 4 * timeout, "{:?}", start.elapsed());
            release.wait();
            Some(error)
        });
        for error in [&errors[0], &errors[2]] {
            let Some(Error::RankLost { rank: 1, operation: Operation::Barrier, loss }) = error else {
                panic!("{kind:?}: {error:?}")
            };
            assert!(matches!(loss, Loss::Late { .. } | Loss::Reported { .. }), "{loss:?}");
        }
        let text = errors[0].as_ref().expect("an error").to_string();
        assert!(text.starts_with("rank 1 was lost in barrier: "), "{text}");
    }
}

/// A rank that stands still closes no connection: others wait for it until somebody tells them that it is lost.
#[test]
fn a_rank_that_is_declared_lost_is_waited_for_no_longer() {
    for kind in [Kind::Threads, Kind::Sockets] {
        let (start, release) = (Instant::now(), Arc::new(std::sync::Barrier::new(3)));
        let errors = on_all(kind, 3, TIMEOUT, |ranks| {
            let error = (ranks.rank() != 1).then(|| {
                let handle = ranks.abort_handle();
                // Nobody is who it is not.
                handle.lose(3);
                handle.lose(ranks.rank());
                std::thread::scope(|scope| {
                    let waits = scope.spawn(|| ranks.barrier().expect_err("rank 1 does not come"));
                    if ranks.rank() == 0 {
                        handle.lose(1);
                    }
                    waits.join().expect("no panic")
                })
            });
            release.wait();
            let handle = ranks.abort_handle();
            drop(ranks);
            handle.lose(1);
            error
        });
        for (error, is_told) in [(&errors[0], true), (&errors[2], false)] {
            let Some(Error::RankLost { rank: 1, operation: Operation::Barrier, loss }) = error else {
                panic!("{kind:?}: {error:?}")
            };
            assert_eq!(matches!(loss, Loss::Gone), is_told, "{loss:?}");
        }
        assert!(start.elapsed() < TIMEOUT / 2);
    }
}

/// In hybrid sharding rank 0 waits for rank 1, which waits for the lost rank 3: all name rank 3.
#[test]
fn a_loss_in_another_subgroup_is_named_too() {
    let errors = on_all(Kind::Threads, 4, TIMEOUT, |ranks| {
        if ranks.rank() == 3 {
            return None;
        }
        let first = ranks.rank() / 2 * 2;
        let inner = ranks.subgroup(&[first, first + 1], 0).expect("a subgroup");
        let across = ranks.subgroup(&[ranks.rank() % 2, ranks.rank() % 2 + 2], 0).expect("a subgroup");
        inner.barrier().and_then(|()| across.barrier()).err()
    });
    for error in &errors[..3] {
        assert!(matches!(error, Some(Error::RankLost { rank: 3, .. })), "{error:?}");
    }
}

#[test]
fn ranks_that_disagree_are_told() {
    for kind in [Kind::Threads, Kind::Sockets] {
        let errors = on_all(kind, 2, TIMEOUT, |ranks| match ranks.rank() {
            0 => ranks.all_reduce(&mut [1.0f32; 4]).expect_err("another operation"),
            _ => ranks.broadcast(&mut [1.0f32; 4], 0).expect_err("another operation"),
        });
        let text = errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        assert!(text.contains("expected operation 0 (broadcast)") || text.contains("(all_reduce)"), "{text}");
        let told = |error: &Error| matches!(error, Error::Disagreement { .. } | Error::RankLost { .. });
        assert!(errors.iter().all(told) && errors.iter().any(|e| matches!(e, Error::Disagreement { .. })), "{text}");
    }
    let errors = on_all(Kind::Threads, 2, TIMEOUT, |ranks| {
        let mut values = vec![1.0f32; 3 + ranks.rank()];
        ranks.broadcast(&mut values, 0).and_then(|()| ranks.barrier()).expect_err("other lengths")
    });
    assert!(errors[1].to_string().contains("got") || errors[1].to_string().contains("sent"), "{}", errors[1]);
    // Rank 0 gives rank 1 three numbers, of which that one expects four.
    let errors = on_all(Kind::Threads, 2, TIMEOUT, |ranks| {
        let lens = [3 + ranks.rank(); 2];
        let parts = lens.map(|len| vec![1.0f32; len]).to_vec();
        ranks.all_to_all(parts, &lens).and_then(|_| ranks.barrier()).expect_err("other lengths")
    });
    let text = errors[1].to_string();
    assert!(text.contains("(all_to_all) of 3 x f32: expected operation 0 (all_to_all) of 4 x f32"), "{text}");
}

#[test]
fn arguments_that_cannot_be_right_are_refused() {
    let ranks = connect_threads(1, TIMEOUT).remove(0);
    let error = ranks.subgroup(&[0, 0], 0).expect_err("twice the same");
    assert!(error.to_string().contains("ascending ranks below 1"), "{error}");
    assert!(ranks.subgroup(&[], 0).expect_err("empty").to_string().contains("rank 0 to be in it"));
    let alone = connect_threads(1, TIMEOUT).remove(0);
    let error = alone.all_to_all(vec![vec![0.0f32]; 2], &[1]).expect_err("two parts");
    assert!(error.to_string().contains("2 parts and 1 lengths: expected 1 each"), "{error}");
    let error = ranks.all_gather(&mut [0.0f32; 4], std::slice::from_ref(&(0..5))).expect_err("too long");
    assert!(error.to_string().contains("within 4 elements"), "{error}");
    assert!(ranks.barrier().is_err(), "it gave up");
}

#[test]
fn a_rank_of_another_world_is_turned_away() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addresses = vec![listener.local_addr().expect("bound"); 2];
    let short = Duration::from_millis(400);
    let config = |rank, token| SocketConfig {
        rank,
        addresses: addresses.clone(),
        token,
        tls: None,
        connect_timeout: short,
        timeout: short,
    };
    std::thread::scope(|scope| {
        let lower = scope.spawn(|| connect(&config(0, 1), &listener).expect_err("nobody right came"));
        let higher = connect(&config(1, 2), &listener).expect_err("another token");
        assert!(higher.to_string().contains("another world"), "{higher}");
        let lower = lower.join().expect("no panic");
        assert!(lower.to_string().contains("did not connect in time"), "{lower}");
    });
}
