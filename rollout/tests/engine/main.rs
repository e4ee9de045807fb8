//! The engine over small random policies: what it says does not depend on its limits, its drafters or its batch.

mod beam;
mod bitwise;
mod draft_model;
mod lenient;
mod rounds;
mod speculation;
mod support;
mod tensor_parallel;
