//! A rank's shard of the state after a step: what belongs to it, in which order, and its hash.
//!
//! A shard has this rank's part of every unit of each store, whatever of that store the sharding lets a rank hold: two
//! ranks with the same part have the same shard, to the bit. What every rank has alike (counts of updates, a value head
//! on the policy's trunk, the published version) is in each.

use crate::optimizer::Moments;
use crate::store::Store;
use crate::{Error, Ranks, Trainer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use temper_proto::HeldShard;
use temper_tensor::Device;
use temper_types::{ContentHash, PolicyVersion};

/// Models of a trainer, by their names in a shard.
pub(super) const POLICY: &str = "policy";
pub(super) const CRITIC: &str = "critic";
pub(super) const REWARD_MODEL: &str = "reward_model";
/// Stores of a model.
pub(super) const MASTERS: &str = "masters";
pub(super) const FIRST: &str = "exp_avg";
pub(super) const SECOND: &str = "exp_avg_sq";
/// The masters of the reference.
pub(super) const REFERENCE: &str = "reference/masters";

/// Values that are made into bytes at once, to be hashed.
const HASHED_AT_ONCE: usize = 4096;

/// Name of a model's store.
pub(super) fn name_of(model: &str, store: &str) -> String {
    format!("{model}/{store}")
}

/// One store's part, unit after unit. Equal parts of two steps are the same memory.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) values: Arc<Vec<f32>>,
    pub(super) hash: ContentHash,
}

impl Part {
    pub(super) fn new(values: Arc<Vec<f32>>) -> Self {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::with_capacity(HASHED_AT_ONCE * size_of::<f32>());
        for piece in values.chunks(HASHED_AT_ONCE) {
            bytes.clear();
            piece.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
            hasher.update(&bytes);
        }
        Part { values, hash: first_bytes(&hasher.finalize()) }
    }
}

fn first_bytes(hash: &blake3::Hash) -> ContentHash {
    ContentHash(std::array::from_fn(|index| hash.as_bytes()[index]))
}

/// A part, as its shard names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PartInfo {
    pub(super) len: usize,
    /// As text.
    pub(super) hash: String,
}

/// All of a shard but the values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) step: u64,
    pub(super) shard: u32,
    /// The version last published.
    pub(super) version: PolicyVersion,
    /// Updates that a model's moments have seen; no entry where it has none.
    pub(super) num_updates: BTreeMap<String, u64>,
    /// The value head on the policy's trunk.
    pub(super) shared_head: Option<String>,
    /// By name.
    pub(super) parts: BTreeMap<String, PartInfo>,
}

impl Manifest {
    fn hash(&self) -> ContentHash {
        first_bytes(&blake3::hash(&serde_json::to_vec(self).expect("a manifest is plain data")))
    }
}

/// A shard of the state after a step.
#[derive(Debug)]
pub(super) struct ShardCopy {
    pub(super) manifest: Manifest,
    pub(super) parts: BTreeMap<String, Part>,
    /// Over the manifest, which has the hashes of the parts.
    hash: ContentHash,
}

impl ShardCopy {
    /// # Errors
    /// Parts that are not those of the manifest.
    pub(super) fn new(manifest: Manifest, parts: BTreeMap<String, Part>) -> Result<Self, Error> {
        let fits = |(name, info): (&String, &PartInfo)| {
            let part = parts.get(name);
            part.is_some_and(|part| part.values.len() == info.len && part.hash.to_string() == info.hash)
        };
        match manifest.parts.iter().find(|part| !fits(*part)) {
            Some((name, _)) => {
                let shard = format!("shard {} of step {}", manifest.shard, manifest.step);
                Err(Error::Mirror { problem: format!("`{name}` of {shard} is not what its hash says") })
            }
            None => Ok(ShardCopy { hash: manifest.hash(), manifest, parts }),
        }
    }

    pub(super) fn held(&self) -> HeldShard {
        HeldShard { step: self.manifest.step, shard: self.manifest.shard, hash: self.hash }
    }

    /// The part that `info` describes.
    pub(super) fn find(&self, name: &str, info: &PartInfo) -> Option<&Part> {
        self.parts.get(name).filter(|part| part.hash.to_string() == info.hash && part.values.len() == info.len)
    }
}

/// A copy whose hashes are not known yet.
pub(super) struct Draft {
    manifest: Manifest,
    /// With the hash where the values are those of the step before.
    values: BTreeMap<String, (Arc<Vec<f32>>, Option<Part>)>,
}

impl Draft {
    /// The state as it is; what did not change since `last` is not kept twice.
    pub(super) fn of(trainer: &Trainer, ranks: &Ranks, step: u64, last: Option<&ShardCopy>) -> Self {
        let mut draft = Draft {
            manifest: Manifest {
                step,
                shard: ranks.shard() as u32,
                version: trainer.version(),
                num_updates: BTreeMap::new(),
                shared_head: trainer.shared_head.as_ref().map(|head| head.to_text()),
                parts: BTreeMap::new(),
            },
            values: BTreeMap::new(),
        };
        let models = [
            (POLICY, Some(&trainer.weights)),
            (CRITIC, trainer.critic.as_ref().map(|model| &model.weights)),
            (REWARD_MODEL, trainer.reward_model.as_ref().map(|model| &model.weights)),
        ];
        let mut add = |name: String, store: &Store| {
            let values = read(&*trainer.device, ranks, store);
            let same = last.and_then(|last| last.parts.get(&name)).filter(|part| same_bits(&part.values, &values));
            let entry = match same {
                Some(part) => (Arc::clone(&part.values), Some(part.clone())),
                None => (Arc::new(values), None),
            };
            draft.values.insert(name, entry);
        };
        for (model, weights) in models.into_iter().filter_map(|(model, weights)| Some((model, weights?))) {
            add(name_of(model, MASTERS), &weights.masters);
            if let Some(Moments { first, second, num_updates }) = &weights.moments {
                add(name_of(model, FIRST), first);
                add(name_of(model, SECOND), second);
                draft.manifest.num_updates.insert(model.to_owned(), *num_updates);
            }
        }
        if let Some(reference) = &trainer.reference {
            add(REFERENCE.to_owned(), &reference.masters);
        }
        draft
    }

    /// The copy, hashed.
    pub(super) fn seal(self) -> Result<ShardCopy, Error> {
        let part = |(values, known): (Arc<Vec<f32>>, Option<Part>)| known.unwrap_or_else(|| Part::new(values));
        let parts: BTreeMap<String, Part> = self.values.into_iter().map(|(name, entry)| (name, part(entry))).collect();
        let info = |part: &Part| PartInfo { len: part.values.len(), hash: part.hash.to_string() };
        let mut manifest = self.manifest;
        manifest.parts = parts.iter().map(|(name, part)| (name.clone(), info(part))).collect();
        ShardCopy::new(manifest, parts)
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// This rank's part of every unit, and how many numbers they are.
fn own_parts(ranks: &Ranks, store: &Store) -> (Vec<Range<usize>>, usize) {
    let shapes = store.shapes();
    let parts: Vec<_> = (0..shapes.num_units()).map(|index| ranks.own(shapes.unit_len(index))).collect();
    let len = parts.iter().map(Range::len).sum();
    (parts, len)
}

/// This rank's part of every unit.
fn read(dev: &dyn Device, ranks: &Ranks, store: &Store) -> Vec<f32> {
    let (parts, len) = own_parts(ranks, store);
    let mut values = vec![0.0; len];
    let mut rest = &mut values[..];
    for (index, part) in parts.into_iter().enumerate() {
        let (own, tail) = rest.split_at_mut(part.len());
        dev.read(store.view(index, part), own);
        rest = tail;
    }
    values
}

/// Make this rank's part of every unit `values`, and the others' what they hold. All ranks together.
pub(super) fn write(
    (dev, ranks): (&dyn Device, &Ranks),
    (name, values): (&str, &[f32]),
    store: &mut Store,
) -> Result<(), Error> {
    let (parts, expected) = own_parts(ranks, store);
    if values.len() != expected {
        let problem = format!("`{name}` has {} numbers: this rank's part has {expected}", values.len());
        return Err(Error::Mirror { problem });
    }
    let mut rest = values;
    for (index, part) in parts.into_iter().enumerate() {
        let (own, tail) = rest.split_at(part.len());
        dev.write(store.view_mut(index, part), own);
        rest = tail;
    }
    store.gather_in_place(dev, ranks)
}
