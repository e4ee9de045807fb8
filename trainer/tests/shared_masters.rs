//! Masters in shared memory: the bits of masters in private memory, seen in place by who reads them.

mod publishing;

use publishing::{begin, device, model_dir, ranks, together, update};
use temper_proto::{SharedWeights, TrainerService, WeightRange, WeightService};
use temper_tensor::{SharedPlace, SharedReader};
use temper_trainer::{LocalTrainerService, Sharding, Trainer};
use temper_types::{DType, ErrorCode, PolicyVersion};

fn alone() -> LocalTrainerService {
    LocalTrainerService::new(Trainer::load(device(), &model_dir(), DType::F32, Vec::new()).expect("it loads"))
}

fn place(shared: &SharedWeights) -> SharedPlace {
    SharedPlace { process_id: shared.process_id, descriptor: shared.descriptor, nonce: shared.nonce }
}

/// Everything that a rank shares is what it gives when it is asked for it; the number of elements.
fn check_shared(rank: &LocalTrainerService, version: PolicyVersion) -> usize {
    let shared = rank.shared(version).expect("the version is held").expect("the masters are shared");
    let reader = SharedReader::open(&place(&shared)).expect("this host");
    let check = |(index, unit): (usize, &temper_proto::SharedUnit)| {
        let mut expected = Vec::new();
        let range = WeightRange { unit: index as u32, start: unit.start, len: unit.len };
        let mut keep = |values: &[f32]| {
            expected.extend_from_slice(values);
            Ok(())
        };
        rank.pull(version, &[range], &mut keep).expect("what is shared is held");
        let mut read = vec![0.0; unit.len as usize];
        reader.values(unit.offset_bytes, unit.len).expect("it is all there").copy_to(&mut read);
        assert_eq!(read, expected, "unit {index}");
        read.len()
    };
    shared.units.iter().enumerate().map(check).sum()
}

#[test]
fn shared_masters_train_publish_and_restore_as_private_ones_do() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, state) = (dir.path().join("model"), dir.path().join("optimizer"));
    std::fs::create_dir_all(&state).expect("writable");
    let (private, sharing) = (alone(), alone());
    assert_eq!(private.shared(private.version()), Ok(None));
    for service in [&private, &sharing] {
        begin(service);
        update(service, 0);
    }
    sharing.share_masters().expect("this system shares memory");
    let first = sharing.publish(1).expect("a version");
    assert_eq!(private.publish(1).expect("a version"), first);
    let num_elements = check_shared(&sharing, first);
    assert_eq!(num_elements as u64, sharing.manifest().expect("it answers").unit_lens.iter().sum::<u64>());
    let before = sharing.shared(first).expect("held");
    sharing.save_model(&model).expect("saved");
    sharing.save_state(&state).expect("saved");
    for service in [&private, &sharing] {
        update(service, 1);
    }
    let second = sharing.publish(2).expect("a version");
    assert_eq!(private.publish(2).expect("a version"), second);
    assert_ne!(second.hash, first.hash);
    check_shared(&sharing, second);
    assert_eq!(sharing.shared(first).expect_err("it is gone").code, ErrorCode::VersionMismatch);
    for service in [&private, &sharing] {
        service.restore(&model, &state, first).expect("restored");
    }
    check_shared(&sharing, first);
    assert_eq!(sharing.shared(first), Ok(before), "readers keep what they opened");
    for service in [&private, &sharing] {
        update(service, 1);
    }
    assert_eq!([private.publish(2), sharing.publish(2)], [Ok(second), Ok(second)]);
}

#[test]
fn every_rank_shares_what_it_holds() {
    let whole: u64 = alone().manifest().expect("it answers").unit_lens.iter().sum();
    for (sharding, expected) in [(Sharding::Zero2, 2 * whole), (Sharding::Zero3, whole)] {
        let (private, sharing) = (ranks(2, sharding), ranks(2, sharding));
        sharing.iter().for_each(|rank| rank.share_masters().expect("this system shares memory"));
        let versions = [&private, &sharing].map(|ranks| {
            let group = together(ranks);
            begin(&group);
            update(&group, 0);
            group.publish(1).expect("a version")
        });
        assert_eq!(versions[0], versions[1], "{sharding:?}");
        let shared: usize = sharing.iter().map(|rank| check_shared(rank, versions[1])).sum();
        assert_eq!(shared as u64, expected, "{sharding:?}");
    }
}
