//! Ranks that stand still: their connections stay open, so that only the controller knows that they are lost.
//!
//! A rank that outlives others keeps what it holds, but may wait in an operation for one that was given up. Its
//! watchdog asks the controller which ranks there are, and ends waits for those that are gone: the operation fails as
//! if their processes had ended.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use temper_collective::AbortHandle;
use temper_proto::{ServiceResult, WorkerId, WorkerRegistry};
use temper_types::ErrorCode;

/// The world that a rank has met last, as its watchdog knows it.
#[derive(Debug, Clone, Default)]
pub struct MetRanks(Arc<Mutex<Option<World>>>);

#[derive(Debug)]
struct World {
    /// Where each rank listened when they met.
    addresses: Vec<String>,
    abort: AbortHandle,
}

impl World {
    /// Ranks that are not where they were.
    fn lost<'a>(&'a self, now: &'a [String]) -> impl Iterator<Item = usize> + 'a {
        let is_lost = |(rank, address): (usize, &String)| (now.get(rank) != Some(address)).then_some(rank);
        self.addresses.iter().enumerate().filter_map(is_lost)
    }
}

fn lock(world: &Mutex<Option<World>>) -> MutexGuard<'_, Option<World>> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MetRanks {
    /// The ranks have met at `addresses`; `abort` ends waits for one of them.
    pub fn set(&self, addresses: Vec<String>, abort: AbortHandle) {
        *lock(&self.0) = Some(World { addresses, abort });
    }

    /// Ask every `pause` which ranks there are, in a thread that ends with the last copy of this, or with the life
    /// `id`.
    ///
    /// # Errors
    /// Where the system refuses a thread.
    pub fn watch(&self, registry: Arc<dyn WorkerRegistry>, id: WorkerId, pause: Duration) -> std::io::Result<()> {
        let world = Arc::downgrade(&self.0);
        let watch = move || {
            loop {
                std::thread::sleep(pause);
                if look(&world, registry.ranks(&id)).is_none() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(watch).map(drop)
    }
}

/// Let go of ranks that are not among those that there are `now`; nothing where nobody watches any more.
fn look(world: &Weak<Mutex<Option<World>>>, now: ServiceResult<Vec<String>>) -> Option<()> {
    let world = world.upgrade()?;
    let (now, is_over) = match now {
        Ok(now) => (now, false),
        // This rank is the one that was given up: it waits for nobody.
        Err(error) if error.code == ErrorCode::Cancelled => (Vec::new(), true),
        // The heartbeats find out whether the controller is gone.
        Err(_) => return Some(()),
    };
    if let Some(world) = &*lock(&world) {
        for rank in world.lost(&now) {
            tracing::debug!(rank, "a rank is waited for no longer");
            world.abort.lose(rank);
        }
    }
    (!is_over).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use temper_collective::{Loss, connect_threads};
    use temper_proto::ServiceError;

    fn addresses(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn whoever_is_not_where_it_was_is_waited_for_no_longer() {
        let refusal = |code| ServiceError::new(code, "controller", "ranks", "no");
        let met = addresses(&["a:1", "b:1", "c:1"]);
        let cases = [
            ("all are there", Ok(met.clone()), None, true),
            ("the controller says nothing", Err(refusal(ErrorCode::Unavailable)), None, true),
            ("one is lost", Ok(addresses(&["a:1", "", "c:1"])), Some(1), true),
            ("one is in another life", Ok(addresses(&["a:1", "b:1", "c:2"])), Some(2), true),
            ("this one is given up", Err(refusal(ErrorCode::Cancelled)), Some(1), false),
        ];
        for (what, now, lost, goes_on) in cases {
            let ranks = connect_threads(3, Duration::from_millis(200));
            let watched = MetRanks::default();
            watched.set(met.clone(), ranks[0].abort_handle());
            assert_eq!(look(&Arc::downgrade(&watched.0), now).is_some(), goes_on, "{what}");
            let is_gone = |rank: usize| {
                let pair = ranks[0].subgroup(&[0, rank], rank as u32).expect("a pair");
                let error = pair.take_from::<u8>(1).expect_err("nobody sends");
                matches!(error, temper_collective::Error::RankLost { loss: Loss::Gone, .. })
            };
            match lost {
                Some(rank) => assert!(is_gone(rank), "{what}"),
                None => assert!(!is_gone(1), "{what}"),
            }
        }
        assert!(look(&Weak::new(), Ok(Vec::new())).is_none(), "nobody watches");
    }
}
