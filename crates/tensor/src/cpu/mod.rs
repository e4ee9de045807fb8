//! The CPU device: AVX-512, AVX2+FMA and portable kernels from one source, chosen at run time.
//!
//! Every kernel is written once over `simd::Simd`, a vector of 16 virtual lanes; reductions join the lanes by one
//! fixed tree, transcendental functions are our own, and products are fused, so the f32 bits agree on every path.

// Kernels read and write through raw pointers inside bounds that their callers check.
#![allow(unsafe_code, reason = "micro-kernels, aligned memory and the worker pool")]

mod activation;
mod adamw;
mod aligned;
mod attention;
mod attention_grad;
mod device;
mod distill;
mod elementwise;
mod embed;
mod expected;
mod gemm;
mod join;
mod kv;
mod lm_head;
mod math;
mod norm;
mod parallel;
mod pool;
mod read_probe;
mod reused;
mod rope;
mod sample;
mod simd;
mod value_hash;

pub use device::{CpuConfig, CpuDevice};
pub use simd::Isa;
pub use value_hash::ValueHasher;

pub(crate) use aligned::AlignedVec;
#[cfg(target_os = "linux")]
pub(crate) use aligned::HUGE_PAGE_BYTES;
pub(crate) use gemm::{Panels, peak_probe};
pub(crate) use kv::CpuKvPool;
pub(crate) use read_probe::read_probe;
pub(crate) use rope::CpuRopeTable;
