//! A tensor-parallel rank's part of a model.
//!
//! Owns: which rows and columns of which tensor a rank holds, and the way from masters to its packed weights. Knows
//! nothing of how ranks are joined.
//!
//! # What is cut
//! Query, key, value, gate and up projections and their biases by rows: a rank holds whole heads. Output and down
//! projections by columns: their inputs are what the rank computed. Norms, the embedding and the biases of output and
//! down projections are on every rank; the LM head is on rank 0, which alone draws.
//!
//! # Invariants
//! A part is the model of a configuration with fewer heads and a narrower feed-forward layer, so that all kernels see
//! ordinary shapes · a rank sums a subtree of [`Reduction::Groups8`], so that the joined sums have the bits of the
//! whole model.

use super::layout::{Layout, TensorSlot};
use super::packed::PackedPolicy;
use super::params::{ParamStore, Unit, new_unit};
use crate::{Error, Head, ModelConfig, Result};
use std::convert::Infallible;
use std::sync::Arc;
use temper_tensor::{DType, Device, Reduction};

/// Sums over a multiple of this many inputs have eight parts of equal, even length.
const MIN_SUM: usize = 16;

/// The part of a model that one of several tensor-parallel ranks holds.
#[derive(Debug)]
pub struct TensorPart {
    rank: usize,
    num_ranks: usize,
    reduction: Reduction,
    whole: Arc<Layout>,
    /// The model that the rank computes; it is written nowhere.
    config: ModelConfig,
    own: Arc<Layout>,
}

impl TensorPart {
    /// The part of rank `rank`.
    ///
    /// # Errors
    /// As [`TensorPart::check`].
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn new(config: &ModelConfig, rank: usize, num_ranks: usize) -> Result<Self> {
        let reduction = Self::check(config, num_ranks)?;
        assert!(rank < num_ranks, "rank {rank} of {num_ranks} tensor-parallel ranks");
        let mut own = config.clone();
        own.num_attention_heads /= num_ranks;
        own.num_key_value_heads /= num_ranks;
        own.intermediate_size /= num_ranks;
        // Without a head of its own there is none: a tied one is part of the embedding.
        own.tie_word_embeddings |= rank > 0;
        let (whole, layout) = (Arc::new(Layout::new(config)), Arc::new(Layout::new(&own)));
        Ok(TensorPart { rank, num_ranks, reduction, whole, config: own, own: layout })
    }

    /// Whether a model can be divided over so many ranks with the bits of the whole one; gives what each of them sums
    /// of an output or down projection.
    ///
    /// # Errors
    /// The first key of the configuration that does not fit, with what would.
    pub fn check(config: &ModelConfig, num_ranks: usize) -> Result<Reduction> {
        let fail = |key: &str, got: usize, expected: String| Err(Error::config(config.file(), key, got, expected));
        let Some(reduction) = Reduction::of_rank(num_ranks) else {
            return fail("tensor-parallel ranks", num_ranks, "1, 2, 4 or 8".to_owned());
        };
        if config.head != Head::CausalLm {
            let expected = "a language model, which alone generates";
            return Err(Error::config(config.file(), "architectures", config.head.class_suffix(), expected));
        }
        if num_ranks == 1 {
            return Ok(reduction);
        }
        let heads =
            [("num_attention_heads", config.num_attention_heads), ("num_key_value_heads", config.num_key_value_heads)];
        if let Some((key, got)) = heads.into_iter().find(|(_, number)| !number.is_multiple_of(num_ranks)) {
            let expected = format!("a multiple of {num_ranks}, so that each tensor-parallel rank holds whole heads");
            return fail(key, got, expected);
        }
        let sums =
            [("num_attention_heads * head_dim", config.q_size()), ("intermediate_size", config.intermediate_size)];
        match sums.into_iter().find(|(_, len)| !len.is_multiple_of(MIN_SUM)) {
            Some((key, got)) => {
                let why = "so that tensor-parallel ranks sum eight parts of equal, even length";
                fail(key, got, format!("a multiple of {MIN_SUM}, {why}"))
            }
            None => Ok(reduction),
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Number of units, as of the whole model.
    pub fn num_units(&self) -> usize {
        self.own.units.len()
    }

    /// Number of values that the rank holds of unit `index`; padding is not counted.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn num_values(&self, index: usize) -> usize {
        self.own.units[index].slots.iter().map(|slot| slot.range.len()).sum()
    }

    /// What the rank holds of `unit`, tensor after tensor.
    ///
    /// # Panics
    /// If it is a unit of another model.
    pub fn values(&self, dev: &dyn Device, unit: &Unit) -> Vec<f32> {
        let slots = &self.whole.units[unit.index].slots;
        assert_eq!(unit.slots(), slots, "a unit of another model");
        let mut values = vec![0.0; self.num_values(unit.index)];
        let mut rest = &mut values[..];
        for own in &self.own.units[unit.index].slots {
            let (to, later) = rest.split_at_mut(own.range.len());
            let whole = slots.iter().find(|slot| slot.name == own.name).expect("a part has tensors of the whole");
            self.read(dev, unit, (whole, own), to);
            rest = later;
        }
        values
    }

    /// The rank's share of one tensor: the shapes say along which dimension it is cut, if any.
    fn read(&self, dev: &dyn Device, unit: &Unit, (whole, own): (&TensorSlot, &TensorSlot), to: &mut [f32]) {
        let begin = whole.range.start;
        match (&whole.shape[..], &own.shape[..]) {
            (from, into) if from == into => dev.read(unit.view(&whole.range), to),
            ([rows, columns], [own_rows, width]) if rows == own_rows => {
                for (row, to) in to.chunks_mut(*width).enumerate() {
                    let start = begin + row * columns + self.rank * width;
                    dev.read(unit.view(&(start..start + width)), to);
                }
            }
            _ => {
                let start = begin + self.rank * to.len();
                dev.read(unit.view(&(start..start + to.len())), to);
            }
        }
    }

    /// The rank's unit `index` of these values, as [`TensorPart::values`] gives them.
    fn unit(&self, dev: &dyn Device, index: usize, values: &[f32]) -> Unit {
        let expected = self.num_values(index);
        assert_eq!(values.len(), expected, "values of unit {index} of tensor-parallel rank {}", self.rank);
        let mut unit = new_unit(dev, &self.own, index);
        let mut rest = values;
        for slot in &self.own.units[index].slots {
            let (now, later) = rest.split_at(slot.range.len());
            dev.write(unit.view_mut(&slot.range), now);
            rest = later;
        }
        unit
    }

    /// What the rank sums of an output or down projection.
    pub(super) fn reduction(&self) -> Reduction {
        self.reduction
    }

    /// True where the rank draws.
    pub(super) fn has_head(&self) -> bool {
        self.rank == 0
    }

    /// The tensors of the whole model.
    pub(super) fn whole(&self) -> &Layout {
        &self.whole
    }
}

impl PackedPolicy {
    /// Pack a rank's part of masters.
    ///
    /// # Panics
    /// If `params` is a store of another model.
    pub fn new_part(dev: &Arc<dyn Device>, params: &ParamStore, part: &Arc<TensorPart>, dtype: DType) -> Self {
        let values = params.units.iter().map(|unit| Ok::<_, Infallible>(part.values(&**dev, unit)));
        match Self::from_part(dev, part, dtype, values) {
            Ok(policy) => policy,
            Err(never) => match never {},
        }
    }

    /// Pack what [`TensorPart::values`] gave of each unit, in order.
    ///
    /// # Errors
    /// The first that could not be had.
    ///
    /// # Panics
    /// If there are too few, or values of another model.
    pub fn from_part<E>(
        dev: &Arc<dyn Device>,
        part: &Arc<TensorPart>,
        dtype: DType,
        values: impl Iterator<Item = std::result::Result<Vec<f32>, E>>,
    ) -> std::result::Result<Self, E> {
        let units = values.enumerate().map(|(index, values)| Ok(part.unit(&**dev, index, &values?)));
        Self::assemble_part(dev, (&part.config, dtype.into()), Some(part), (Arc::clone(&part.own), units))
    }

    /// Take new values of unit `index`, as [`TensorPart::values`] gives them. The version is left to the caller.
    ///
    /// # Panics
    /// If this is no rank's part, or they are values of another model.
    pub fn repack_part(&mut self, index: usize, values: &[f32]) {
        let part = self.part.as_ref().expect("a rank's part of a policy");
        let unit = part.unit(&*self.dev, index, values);
        self.repack_own_unit(&unit);
    }

    /// Which part of the model this is; nothing where it is whole.
    pub fn part(&self) -> Option<&Arc<TensorPart>> {
        self.part.as_ref()
    }
}
