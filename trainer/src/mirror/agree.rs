//! Which state all ranks can go back to, and from whom those that lost theirs get it. A pure function.

use crate::Error;
use std::collections::{BTreeMap, BTreeSet};
use temper_proto::{HeldShard, MirrorPlan, ShardSource};
use temper_types::ContentHash;

/// Who holds which shard after which step.
type Holders = BTreeMap<(u64, u32), BTreeMap<ContentHash, BTreeSet<u32>>>;

/// The last step that `is_known` to whoever goes on from it, and of which every rank's shard is held by somebody with
/// one hash. `held` is what each rank holds, in rank order: nothing for a rank that is lost. Ranks `num_shards` apart
/// have the same shard.
///
/// # Errors
/// That there is no such step: what is missing of the last one that is known.
pub fn agree_on_mirrors(
    num_shards: usize,
    held: &[Vec<HeldShard>],
    is_known: impl Fn(u64) -> bool,
) -> Result<MirrorPlan, Error> {
    let mut holders = Holders::new();
    for (rank, shards) in held.iter().enumerate() {
        for HeldShard { step, shard, hash } in shards {
            holders.entry((*step, *shard)).or_default().entry(*hash).or_default().insert(rank as u32);
        }
    }
    let steps: BTreeSet<u64> = holders.keys().map(|(step, _)| *step).filter(|step| is_known(*step)).collect();
    let mut last_problem = None;
    for step in steps.iter().rev() {
        match plan(*step, (num_shards, held.len()), &holders) {
            Ok(plan) => return Ok(plan),
            Err(problem) => last_problem = last_problem.or(Some(problem)),
        }
    }
    let problem = last_problem.unwrap_or_else(|| "no rank holds a state that the run can go on from".to_owned());
    Err(Error::Mirror { problem })
}

fn plan(step: u64, (num_shards, world): (usize, usize), holders: &Holders) -> Result<MirrorPlan, String> {
    let mut sources = Vec::new();
    for rank in 0..world as u32 {
        let shard = rank % num_shards as u32;
        let by_hash = holders.get(&(step, shard));
        let owners: Vec<u32> = (shard..world as u32).step_by(num_shards).collect();
        let missing = || {
            let owners: Vec<String> = owners.iter().map(u32::to_string).collect();
            let mirrored = if owners.len() > 1 { "all its replicas are lost" } else { "its mirror is lost with it" };
            format!("shard {shard} of step {step}, of rank {}, is held by no rank: {mirrored}", owners.join(" and "))
        };
        let by_hash = by_hash.ok_or_else(missing)?;
        let (1, Some(ranks)) = (by_hash.len(), by_hash.values().next()) else {
            return Err(format!("ranks hold shard {shard} of step {step} with different hashes"));
        };
        if !ranks.contains(&rank) {
            let from = *ranks.first().ok_or_else(missing)?;
            sources.push(ShardSource { rank, from });
        }
    }
    Ok(MirrorPlan { step, sources })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(step: u64, shard: u32) -> ContentHash {
        let mut hash = ContentHash([7; 16]);
        hash.0[..8].copy_from_slice(&step.to_le_bytes());
        hash.0[8] = shard as u8;
        hash
    }

    fn shard(step: u64, shard: u32) -> HeldShard {
        HeldShard { step, shard, hash: hash(step, shard) }
    }

    /// What `world` ranks hold when each has its own shard of `steps` and mirrors that of the rank before it.
    fn ring(world: u32, steps: &[u64]) -> Vec<Vec<HeldShard>> {
        let of = |rank: u32| {
            let before = (rank + world - 1) % world;
            steps.iter().flat_map(|step| [shard(*step, rank), shard(*step, before)]).collect()
        };
        (0..world).map(of).collect()
    }

    #[test]
    fn a_lost_rank_gets_its_shard_from_the_next_one() {
        let mut held = ring(3, &[4, 5]);
        held[1].clear();
        let plan = agree_on_mirrors(3, &held, |_| true).expect("it is held");
        assert_eq!(plan, MirrorPlan { step: 5, sources: vec![ShardSource { rank: 1, from: 2 }] });
    }

    #[test]
    fn a_mirror_that_did_not_arrive_takes_all_back_one_step() {
        let mut held = ring(2, &[4]);
        // Rank 1 dies with its shard of step 5 on the way.
        held[0].push(shard(5, 0));
        held[1].clear();
        let plan = agree_on_mirrors(2, &held, |_| true).expect("step 4 is held");
        assert_eq!(plan, MirrorPlan { step: 4, sources: vec![ShardSource { rank: 1, from: 0 }] });
    }

    #[test]
    fn a_rank_that_is_lost_with_its_mirror_is_named() {
        let mut held = ring(4, &[6]);
        held[1].clear();
        held[2].clear();
        let error = agree_on_mirrors(4, &held, |_| true).unwrap_err().to_string();
        assert!(error.contains("shard 1 of step 6, of rank 1, is held by no rank"), "{error}");
    }

    #[test]
    fn replicas_serve_each_other_and_must_agree() {
        // Two copies of two shards, no mirrors.
        let mut held: Vec<Vec<HeldShard>> = (0..4).map(|rank| vec![shard(3, rank % 2)]).collect();
        held[0].clear();
        let plan = agree_on_mirrors(2, &held, |_| true).expect("rank 2 has it");
        assert_eq!(plan.sources, [ShardSource { rank: 0, from: 2 }]);
        held[0] = vec![HeldShard { hash: hash(9, 9), ..shard(3, 0) }];
        let error = agree_on_mirrors(2, &held, |_| true).unwrap_err().to_string();
        assert!(error.contains("different hashes"), "{error}");
        held[0].clear();
        held[2].clear();
        let error = agree_on_mirrors(2, &held, |_| true).unwrap_err().to_string();
        assert!(error.contains("of rank 0 and 2") && error.contains("all its replicas are lost"), "{error}");
    }

    #[test]
    fn a_step_that_the_run_does_not_remember_is_none() {
        let held = ring(2, &[4, 5]);
        assert_eq!(agree_on_mirrors(2, &held, |step| step < 5).expect("step 4").step, 4);
        let error = agree_on_mirrors(2, &held, |step| step > 5).unwrap_err().to_string();
        assert!(error.contains("no rank holds a state"), "{error}");
    }

    proptest! {
        /// Whoever is lost, and whichever mirrors of the last step arrived: the step is the last one of which every
        /// shard is held, and every source holds what it is asked for.
        #[test]
        fn what_is_agreed_on_is_held_and_nothing_later_is(
            world in 2u32..7, lost: u8, arrived: u8, first in 0u64..5,
        ) {
            let mut held = ring(world, &[first]);
            for rank in 0..world {
                held[rank as usize].push(shard(first + 1, rank));
                if arrived & (1 << rank) != 0 {
                    held[((rank + 1) % world) as usize].push(shard(first + 1, rank));
                }
            }
            (0..world).filter(|rank| lost & (1 << rank) != 0).for_each(|rank| held[rank as usize].clear());
            let is_held = |step: u64, shard: u32| held.iter().flatten().any(|h| (h.step, h.shard) == (step, shard));
            let best = [first + 1, first].into_iter().find(|step| (0..world).all(|rank| is_held(*step, rank)));
            match (agree_on_mirrors(world as usize, &held, |_| true), best) {
                (Ok(plan), Some(best)) => {
                    prop_assert_eq!(plan.step, best);
                    let has = |rank: u32, of: u32| held[rank as usize].contains(&shard(best, of));
                    for rank in 0..world {
                        match plan.sources.iter().find(|source| source.rank == rank) {
                            Some(source) => prop_assert!(!has(rank, rank) && has(source.from, rank)),
                            None => prop_assert!(has(rank, rank)),
                        }
                    }
                }
                (Err(_), None) => {}
                (got, best) => prop_assert!(false, "{:?}, expected {:?}", got, best),
            }
        }
    }
}
