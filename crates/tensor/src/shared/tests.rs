//! Memory that two mappings of one file show, and what is refused.

use super::{SharedPlace, SharedReader, os};
use crate::{CpuConfig, CpuDevice, Device};
use std::fs::OpenOptions;
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;

/// The second is empty, the third larger than a huge page.
const LENS: [usize; 4] = [5, 0, 700_000, 33];

fn device() -> CpuDevice {
    CpuDevice::new(CpuConfig { num_threads: 1, isa: None })
}

#[test]
fn a_reader_sees_what_the_owner_writes_and_nothing_outside() {
    let dev = device();
    let mut shared = dev.shared_zeros(&LENS).unwrap();
    let reader = SharedReader::open(&shared.place).unwrap();
    for round in 0..2 {
        for (index, buffer) in shared.buffers.iter_mut().enumerate() {
            let value = |i: usize| (round * 10 + index) as f32 + i as f32 * 0.5;
            assert_eq!((buffer.len(), buffer.data.as_ptr() as usize % 64), (LENS[index], 0));
            if round == 0 {
                assert!(buffer.data.iter().all(|x| *x == 0.0), "new memory is zero");
            }
            let written: Vec<f32> = (0..LENS[index]).map(value).collect();
            dev.write(buffer.all_mut(), &written);
            let mut read = vec![-1.0; LENS[index]];
            reader.values(shared.offsets[index], LENS[index] as u64).unwrap().copy_to(&mut read);
            assert_eq!(read, written);
        }
    }
    let end = shared.offsets[3] + 4 * 33;
    let problem = reader.values(end.next_multiple_of(64) - 4, 2).unwrap_err().to_string();
    assert!(problem.contains("has no 2 elements from byte"), "{problem}");
    assert!(reader.values(u64::MAX - 2, 2).is_err() && reader.values(64, u64::MAX / 4).is_err());
}

#[test]
fn what_was_opened_outlives_its_owner_and_cannot_be_opened_any_more() {
    let dev = device();
    let mut shared = dev.shared_zeros(&[3]).unwrap();
    dev.write(shared.buffers[0].all_mut(), &[1.0, 2.0, 3.0]);
    let (place, offset) = (shared.place, shared.offsets[0]);
    let reader = SharedReader::open(&place).unwrap();
    drop(shared);
    let mut read = [0.0; 3];
    reader.values(offset, 3).unwrap().copy_to(&mut read);
    assert_eq!(read, [1.0, 2.0, 3.0]);
    SharedReader::open(&place).unwrap_err();
}

#[test]
fn what_was_not_meant_is_refused() {
    let dev = device();
    let shared = dev.shared_zeros(&[3]).unwrap();
    let place = shared.place;
    let problem = |place: SharedPlace| SharedReader::open(&place).unwrap_err().to_string();
    let of_other_memory = problem(SharedPlace { nonce: [7; 16], ..place });
    assert!(of_other_memory.contains("not the one that was meant"), "{of_other_memory}");
    problem(SharedPlace { process_id: u32::MAX, ..place });
    let file = tempfile::tempfile().unwrap();
    let of_a_file = problem(SharedPlace { descriptor: file.as_raw_fd() as u32, ..place });
    assert!(of_a_file.contains("expected /memfd:temper-buffers"), "{of_a_file}");
    let unsealed = os::anonymous_file(8192).unwrap();
    let of_unsealed = problem(SharedPlace { descriptor: os::descriptor(&unsealed), ..place });
    assert!(of_unsealed.contains("has the seals"), "{of_unsealed}");
}

#[test]
fn nobody_else_can_write_or_cut() {
    let dev = device();
    let shared = dev.shared_zeros(&[3]).unwrap();
    let path = format!("/proc/self/fd/{}", shared.place.descriptor);
    // Its mode keeps out every user but root, and the seals root too.
    let Ok(mut file) = OpenOptions::new().read(true).write(true).open(path) else { return };
    file.rewind().unwrap();
    file.write_all(&[1]).unwrap_err();
    file.set_len(0).unwrap_err();
    SharedReader::open(&shared.place).unwrap();
}
