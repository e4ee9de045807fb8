//! Packed weights of linear layers.

use crate::cpu::Panels;
use temper_types::{DType, WeightFormat};

/// Shape of a weight `[n, k]` (outputs, inputs), as Hugging Face stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinearShape {
    /// Outputs.
    pub n: usize,
    /// Inputs, the dimension that is summed over.
    pub k: usize,
}

impl LinearShape {
    /// Number of weights.
    pub const fn len(&self) -> usize {
        self.n * self.k
    }

    /// True where there is no weight.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// In which order an output sums over its inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// One chain of fused multiply-adds over ascending k.
    Chain,
    /// Eight chains over eight equal parts of k (each part a multiple of 2, the last may be shorter), joined by a
    /// binary tree, so that 1, 2, 4 or 8 tensor-parallel ranks give the same bits. For row-parallel matrices.
    Groups8,
    /// The half of [`Reduction::Groups8`] that one of 2 tensor-parallel ranks sums: a subtree over four of its parts.
    Groups4,
    /// The quarter of [`Reduction::Groups8`] that one of 4 tensor-parallel ranks sums: a subtree over two of its parts.
    Groups2,
}

impl Reduction {
    /// What one of `num_ranks` ranks, which hold consecutive inputs in equal shares, sums of [`Reduction::Groups8`];
    /// [`crate::Device::add_joined`] does the rest. The bits are those of the whole where the inputs are a multiple of
    /// 16. `None` where the ranks do not divide the eight parts.
    pub const fn of_rank(num_ranks: usize) -> Option<Reduction> {
        match num_ranks {
            1 => Some(Reduction::Groups8),
            2 => Some(Reduction::Groups4),
            4 => Some(Reduction::Groups2),
            8 => Some(Reduction::Chain),
            _ => None,
        }
    }
}

/// Whether a result replaces the destination or is added to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// `out = result`.
    Write,
    /// `out = out + result`, one rounding of the sum.
    Add,
}

/// A weight in the layout that the device's matrix kernels read. Packed once per weight update.
pub struct PackedLinear {
    pub(crate) shape: LinearShape,
    pub(crate) dtype: DType,
    pub(crate) reduction: Reduction,
    pub(crate) panels: Panels,
}

impl PackedLinear {
    /// Shape of the weight.
    pub fn shape(&self) -> LinearShape {
        self.shape
    }

    /// Format of the packed weight; of int8 weights, that of the inputs they are multiplied with, which is f32.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether these are the weights that were given, or bytes that stand for them.
    pub fn weights(&self) -> WeightFormat {
        match self.panels {
            Panels::Words(_) => WeightFormat::Exact,
            Panels::Int8(_) => WeightFormat::Int8,
        }
    }

    /// Bytes of memory that it takes. A weight in f32 takes half where all of its numbers are ones of bf16.
    pub fn size_bytes(&self) -> usize {
        match &self.panels {
            Panels::Words(panels) => panels.size_bytes(),
            Panels::Int8(panels) => panels.size_bytes(),
        }
    }

    /// Order of summation.
    pub fn reduction(&self) -> Reduction {
        self.reduction
    }
}

impl std::fmt::Debug for PackedLinear {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedLinear([{}, {}] {} {:?})", self.shape.n, self.shape.k, self.dtype, self.reduction)
    }
}
