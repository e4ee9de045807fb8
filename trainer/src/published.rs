//! What was published last and before that, for engines that ask how weights changed.
//!
//! An engine that holds the version before the last is sent changes alone. That takes both versions here: an update
//! changes the masters before the next publication.

use crate::store::Store;
use crate::{LocalTrainerService, Trainer};
use temper_tensor::Device;
use temper_types::ContentHash;

/// A version of this rank's masters.
#[derive(Debug)]
struct Kept {
    hash: ContentHash,
    masters: Store,
}

/// The last two published versions that differ.
#[derive(Debug, Default)]
pub(crate) struct Published {
    last: Option<Kept>,
    before: Option<Kept>,
}

impl Published {
    /// The masters are published under this hash.
    pub(crate) fn keep(&mut self, dev: &dyn Device, hash: ContentHash, masters: &Store) {
        if self.last.as_ref().is_some_and(|last| last.hash == hash) {
            return;
        }
        let spare = std::mem::replace(&mut self.before, self.last.take());
        let masters = match spare {
            Some(Kept { masters: mut spare, .. }) => {
                spare.copy_from(dev, masters);
                spare
            }
            None => masters.duplicate(dev),
        };
        self.last = Some(Kept { hash, masters });
    }

    /// The masters that hash to `base`, where they are what was published before the last.
    pub(crate) fn before(&self, base: ContentHash) -> Option<&Store> {
        self.before.as_ref().filter(|before| before.hash == base).map(|before| &before.masters)
    }
}

impl Trainer {
    /// Keep what is published, from now on, so that engines can be sent changes alone: twice the rank's masters.
    pub fn keep_published(&mut self) {
        let mut published = Published::default();
        published.keep(&*self.device, self.version().hash, &self.weights.masters);
        self.weights.published = Some(published);
    }
}

impl LocalTrainerService {
    /// As [`Trainer::keep_published`].
    pub fn keep_published(&self) {
        self.lock().keep_published();
    }
}
