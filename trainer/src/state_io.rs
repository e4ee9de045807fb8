//! The trainer's part of a checkpoint: `trainer.json`, and moments and reference as tensors under their weights' names.

use crate::optimizer::Moments;
use crate::store::Store;
use crate::trainer::Trainer;
use crate::weights::{load_store, master_ranks};
use crate::{Error, Ranks, scalar_state};
use serde::{Deserialize, Serialize};
use std::path::Path;
use temper_actor::weights_io::WriteOptions;

const FILE: &str = "trainer.json";
const FORMAT: u32 = 1;
const FIRST: &str = "exp_avg";
const SECOND: &str = "exp_avg_sq";
const REFERENCE: &str = "reference";

/// What is stored beside the tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    format: u32,
    /// Updates that the moments have seen; absent before the first of the stage.
    num_updates: Option<u64>,
    /// Hashes of the tensors of each directory, as text.
    hashes: std::collections::BTreeMap<String, String>,
}

/// Write the state into an existing directory.
pub(crate) fn save(trainer: &Trainer, dir: &Path) -> Result<(), Error> {
    let mut file = StateFile { format: FORMAT, num_updates: None, hashes: Default::default() };
    if let Some(moments) = &trainer.weights.moments {
        file.num_updates = Some(moments.num_updates);
        save_store(trainer, dir, (FIRST, &moments.first), &mut file)?;
        save_store(trainer, dir, (SECOND, &moments.second), &mut file)?;
    }
    if let Some(reference) = &trainer.reference {
        save_store(trainer, dir, (REFERENCE, &reference.masters), &mut file)?;
    }
    scalar_state::save(trainer, dir)?;
    if trainer.ranks.as_ref().is_some_and(|ranks| ranks.rank() > 0) {
        return Ok(());
    }
    let path = dir.join(FILE);
    let text = serde_json::to_string_pretty(&file).expect("a state is plain data");
    std::fs::write(&path, text + "\n").map_err(Error::io("write", &path))
}

/// Read the state back; weights are loaded already.
pub(crate) fn restore(trainer: &mut Trainer, dir: &Path) -> Result<(), Error> {
    let path = dir.join(FILE);
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let fail = |problem: String| Error::State { path: path.clone(), problem };
    let file: StateFile = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if file.format != FORMAT {
        return Err(fail(format!("format {}: this binary reads format {FORMAT}", file.format)));
    }
    let ranks = trainer.ranks.as_ref();
    trainer.weights.moments = match file.num_updates {
        Some(num_updates) => {
            let first = load_part(trainer, dir, (FIRST, ranks), &file)?;
            let second = load_part(trainer, dir, (SECOND, ranks), &file)?;
            Some(Moments { first, second, num_updates })
        }
        None => None,
    };
    if trainer.reference.is_some() {
        let masters = load_part(trainer, dir, (REFERENCE, master_ranks(ranks)), &file)?;
        trainer.set_reference(masters)?;
    }
    scalar_state::restore(trainer, dir)
}

/// Written by the first rank; the others take part in gathering it where it is sharded.
fn save_store(trainer: &Trainer, dir: &Path, (name, store): (&str, &Store), file: &mut StateFile) -> Result<(), Error> {
    let (device, config, ranks) = (&*trainer.device, &trainer.config, trainer.ranks.as_ref());
    let hash = store.on_first(device, ranks, |store| {
        store.save(device, &dir.join(name), config, &WriteOptions::default())?;
        Ok(store.content_hash(device).to_string())
    })?;
    file.hashes.extend(hash.map(|hash| (name.to_owned(), hash)));
    Ok(())
}

/// Read a directory, of which this rank keeps its shard where there are `ranks`.
fn load_part(
    trainer: &Trainer,
    dir: &Path,
    (name, ranks): (&str, Option<&Ranks>),
    file: &StateFile,
) -> Result<Store, Error> {
    let path = dir.join(name);
    let (store, got) = load_store(&*trainer.device, &trainer.config, &path, ranks)?;
    match file.hashes.get(name) {
        Some(expected) if *expected == got.to_string() => Ok(store),
        Some(expected) => {
            let problem = format!("the tensors hash to {got}: {FILE} says {expected}");
            Err(Error::State { path, problem })
        }
        None => Err(Error::State { path: dir.join(FILE), problem: format!("has no `{name}`") }),
    }
}
