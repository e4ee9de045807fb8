//! Layouts of weights over ranks, and the plans that turn one into another.
//!
//! Weights are a list of flat [`Unit`]s. A [`Layout`] says which ranges of which unit each rank holds; [`plan`] says
//! what one receiver asks of which source. Both are functions of their arguments alone, so that both ends know the same
//! plan without a word.

mod layout;
mod plan;

pub use layout::{Layout, LayoutError, Split, Tensor, Unit};
pub use plan::{Receiver, Transfer, plan};
