//! Collective operations between the ranks of a trainer, and what moves when a layout of weights becomes another.
//!
//! Owns: the operations ([`Collective`]) over threads of one process and over sockets between processes
//! (under TLS where they have certificates), the rule that cuts a flat unit into shards ([`shard_ranges`]), and layouts
//! with their plans ([`reshard`]). Knows nothing of models, devices or optimizers: it moves slices of host memory.
//!
//! Invariants: a sum adds contributions in rank order, so that timing reaches no bit, and both transports give the same
//! bits · every wait has a deadline, and ends sooner where an [`AbortHandle`] is told of a loss · a rank that is gone
//! or late is named in the error on all others · ranks that disagree about the operation get an error that says so ·
//! every byte sent and received is counted.

mod collective;
mod counters;
mod error;
mod link;
mod mailbox;
mod message;
pub mod reshard;
mod shard;
mod socket;
mod threads;
mod transport;

pub use collective::{AbortHandle, Collective, Gathering};
pub use counters::{Counter, Counts};
pub use error::{Error, Loss, Result};
pub use link::LinkTls;
pub use message::{Element, Operation, Sum};
pub use shard::{SHARD_ALIGNMENT, shard_ranges};
pub use socket::{SocketConfig, connect};
pub use threads::connect_threads;
