//! What a rank has sent and received.

use crate::Operation;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Totals of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counter {
    /// Calls.
    pub num_calls: u64,
    /// Bytes of values sent to other ranks.
    pub bytes_sent: u64,
    /// Bytes of values received from other ranks.
    pub bytes_received: u64,
    /// Time within the operation, waits included.
    pub elapsed: Duration,
}

impl Counter {
    fn add(&mut self, other: &Counter) {
        self.num_calls += other.num_calls;
        self.bytes_sent += other.bytes_sent;
        self.bytes_received += other.bytes_received;
        self.elapsed += other.elapsed;
    }
}

/// Totals by operation.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counts([Counter; Operation::ALL.len()]);

impl Counts {
    /// Those of one operation.
    pub fn of(&self, operation: Operation) -> Counter {
        self.0[usize::from(operation.code())]
    }

    /// Those of all operations together.
    pub fn total(&self) -> Counter {
        self.0.iter().fold(Counter::default(), |mut sum, one| {
            sum.add(one);
            sum
        })
    }

    /// What has been added since `earlier`.
    pub fn since(&self, earlier: &Counts) -> Counts {
        let difference = |index: usize| {
            let (now, then) = (self.0[index], earlier.0[index]);
            Counter {
                num_calls: now.num_calls - then.num_calls,
                bytes_sent: now.bytes_sent - then.bytes_sent,
                bytes_received: now.bytes_received - then.bytes_received,
                elapsed: now.elapsed.saturating_sub(then.elapsed),
            }
        };
        Counts(std::array::from_fn(difference))
    }
}

/// Shared by all groups of a rank.
#[derive(Debug, Default)]
pub(crate) struct Counters(Mutex<Counts>);

impl Counters {
    pub(crate) fn add(&self, operation: Operation, counter: &Counter) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.0[usize::from(operation.code())].add(counter);
    }

    pub(crate) fn read(&self) -> Counts {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
