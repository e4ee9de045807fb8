//! Every kernel but the matrix products against f64 references, finite differences, and itself bit by bit.

mod attention;
mod distill;
mod lm_head;
mod reference;
mod rows;
mod support;
mod updates;
