//! Whether a checkpoint is of the run that would go on with it, and what differs where it is not.

use crate::recipe::{Recipe, Source, differences};
use anyhow::{Result, bail};
use std::path::Path;
use temper_controller::CheckpointInfo;

/// What the parts of a run's identity stand for, in their order; they are joined by `-`.
const PARTS: [&str; 4] = ["recipe", "number format", "initial weights", "teacher"];
/// Most differing keys that are named.
const MAX_NAMED: usize = 8;

/// Refuse a checkpoint of another run than `identity`, which may be the first parts of an identity; `saved` is the
/// resolved recipe in its run directory.
///
/// # Errors
/// The keys that differ, with both values, or what else does.
pub fn require_same_run(checkpoint: &CheckpointInfo, identity: &str, (recipe, saved): (&Recipe, &Path)) -> Result<()> {
    let Some((part, there, here)) = differing_part(&checkpoint.state.identity, identity) else { return Ok(()) };
    let what = match part {
        0 => recipe_difference(recipe, saved),
        1 => format!("its number format is {there}, not {here}"),
        part => format!("its {} is not the same", PARTS[part]).replace("weights is", "weights are"),
    };
    bail!(
        "{}: it is of another recipe, seed, dtype, data or teacher: {what}; resume with the run's own recipe.toml, or \
         start in a new directory",
        checkpoint.path.display()
    )
}

/// Index of the first part that is not the same in both, and what it is. The number of trainer ranks may differ.
fn differing_part<'a>(there: &'a str, here: &'a str) -> Option<(usize, &'a str, &'a str)> {
    let parts = |identity: &'a str| {
        let own = identity.rsplit_once("-ranks").map_or(identity, |(own, _ranks)| own);
        own.splitn(PARTS.len(), '-').collect::<Vec<_>>()
    };
    let pairs = parts(there).into_iter().zip(parts(here)).enumerate();
    pairs.map(|(index, (there, here))| (index, there, here)).find(|(_, there, here)| there != here)
}

fn recipe_difference(recipe: &Recipe, saved: &Path) -> String {
    let read = || -> Result<Recipe> {
        let text = std::fs::read_to_string(saved)?;
        Ok(Recipe::from_source(&Source::from_text(saved, &text)?)?)
    };
    let names = match read() {
        Ok(there) => differences(&there, recipe),
        Err(cause) => return format!("what differs cannot be told ({}: {cause:#})", saved.display()),
    };
    match names.len() {
        0 => "no key differs, so its data files had other rows".to_owned(),
        1..=MAX_NAMED => names.join(", "),
        count => format!("{}, and {} more", names[..MAX_NAMED].join(", "), count - MAX_NAMED),
    }
}

#[cfg(test)]
mod tests {
    use super::differing_part;

    #[test]
    fn the_first_part_that_differs_is_told() {
        let there = "aa-f32-w1-t1-ranks2/sequence2";
        for (here, expected) in [
            ("aa", None),
            ("ab", Some((0, "aa", "ab"))),
            ("aa-f32-w1-t1", None),
            ("aa-f32-w1-t1-ranks4", None),
            ("aa-bf16-w1-t1", Some((1, "f32", "bf16"))),
            ("aa-f32-w2-t2", Some((2, "w1", "w2"))),
            ("aa-f32-w1-t2", Some((3, "t1", "t2"))),
        ] {
            assert_eq!(differing_part(there, here), expected, "{here}");
        }
    }
}
