//! How weights changed since the version before, on ranks that keep what they publish.

mod publishing;

use publishing::{begin, ranks, together, update};
use temper_proto::{ServiceResult, TrainerService, WeightRange, WeightService};
use temper_trainer::{LocalTrainerService, Sharding};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};

/// What a rank holds of the unit `index`, by its shared length.
fn held(rank: &LocalTrainerService, version: PolicyVersion, index: u32, of: (u64, u64)) -> Option<WeightRange> {
    let range = WeightRange { unit: index, start: of.0, len: of.1 };
    rank.pull(version, &[range], &mut |_| Ok(())).is_ok().then_some(range)
}

/// All ranges that a rank gives: whole units, or the thirds that lie inside of its part.
fn ranges(rank: &LocalTrainerService) -> Vec<WeightRange> {
    let manifest = rank.manifest().expect("a manifest");
    let mut all = Vec::new();
    for (index, len) in manifest.unit_lens.iter().enumerate() {
        let third = len / 3;
        let parts = [(0, *len), (0, third), (third, third), (2 * third, len - 2 * third)];
        all.extend(parts.into_iter().filter_map(|part| held(rank, manifest.version, index as u32, part)));
    }
    assert!(!all.is_empty());
    all
}

fn collect(mut give: impl FnMut(&mut (dyn FnMut(&[f32]) -> ServiceResult<()> + Send))) -> Vec<u32> {
    let mut bits = Vec::new();
    give(&mut |values| {
        bits.extend(values.iter().map(|x| x.to_bits()));
        Ok(())
    });
    bits
}

fn pulled(rank: &LocalTrainerService, version: PolicyVersion, ranges: &[WeightRange]) -> Vec<u32> {
    collect(|sink| rank.pull(version, ranges, sink).expect("held"))
}

fn changes(
    rank: &LocalTrainerService,
    base: ContentHash,
    version: PolicyVersion,
    ranges: &[WeightRange],
) -> Option<Vec<u32>> {
    let mut kept = false;
    let bits = collect(|sink| kept = rank.changes(base, version, ranges, sink).expect("an answer"));
    assert!(kept || bits.is_empty());
    kept.then_some(bits)
}

#[test]
fn every_rank_tells_how_its_weights_changed_since_the_version_before() {
    for (world, sharding) in [(1, Sharding::Zero2), (2, Sharding::Zero2), (2, Sharding::Zero3)] {
        let ranks = ranks(world, sharding);
        let trainer = together(&ranks);
        begin(&trainer);
        ranks.iter().for_each(|rank| rank.keep_published());
        let ranges: Vec<Vec<WeightRange>> = ranks.iter().map(|rank| ranges(rank)).collect();
        let first = ranks[0].manifest().expect("a manifest").version;
        let mut versions = vec![first];
        let mut values = vec![ranks.iter().zip(&ranges).map(|(r, of)| pulled(r, first, of)).collect::<Vec<_>>()];
        for step in 1..=3u64 {
            update(&trainer, step as u32);
            // The same weights under another number are no version of their own.
            for number in [2 * step, 2 * step + 1] {
                let version = trainer.publish(number).expect("published");
                let now: Vec<Vec<u32>> = ranks.iter().zip(&ranges).map(|(r, of)| pulled(r, version, of)).collect();
                let before = versions[step as usize - 1].hash;
                for (index, (rank, of)) in ranks.iter().zip(&ranges).enumerate() {
                    let got = changes(rank, before, version, of).expect("the version before is kept");
                    let old = &values[step as usize - 1][index];
                    let expected: Vec<u32> = now[index].iter().zip(old).map(|(a, b)| a ^ b).collect();
                    assert!(got == expected && got.iter().any(|bits| *bits != 0), "{world} {sharding:?} step {step}");
                    // Neither what is held now nor what was held long ago.
                    assert_eq!(changes(rank, version.hash, version, of), None);
                    if step > 1 {
                        assert_eq!(changes(rank, first.hash, version, of), None);
                    }
                    let error = rank.changes(before, first, of, &mut |_| Ok(())).expect_err("another version");
                    assert_eq!(error.code, ErrorCode::VersionMismatch);
                }
                if number % 2 == 0 {
                    versions.push(version);
                    values.push(now);
                }
            }
        }
    }
}

#[test]
fn a_rank_that_keeps_nothing_has_no_changes() {
    let ranks = ranks(1, Sharding::Zero2);
    let version = ranks[0].manifest().expect("a manifest").version;
    assert_eq!(changes(&ranks[0], version.hash, version, &ranges(&ranks[0])), None);
}
