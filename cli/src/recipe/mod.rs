//! Recipes: from TOML text to a run that can start, each step its own type.
//!
//! ```text
//! file(s), --set  ->  Source (merged table, origin of every value)
//!                 ->  Recipe (typed, every key known)
//!                 ->  Recipe checked against itself, its data and its model (check)
//! ```

mod check;
mod check_distill;
mod check_partial;
mod check_replay;
mod check_reward_model;
mod check_texts;
mod check_weights;
mod differences;
mod error;
mod idle_keys;
mod preference_stage;
mod render;
mod source;
mod stage;
mod typed;

pub use check::{CheckReport, MAX_WAIT_SECONDS, check, config_error, config_error_at};
pub use check_distill::check_teachers;
pub use differences::differences;
pub use error::RecipeError;
pub use render::render;
pub use source::Source;
pub use typed::ModelSource;
pub use typed::{Placement, PlacementMode, Recipe, ShardingKind, typed};
