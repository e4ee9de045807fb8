//! Tests of the control plane: by hand, in simulation, and at scale.

mod by_hand;
mod fakes;
mod reward;
mod rollout;
mod scale;
mod simulation;
