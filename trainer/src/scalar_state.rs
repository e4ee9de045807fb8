//! Models with a scalar head in a checkpoint: `scalar.json`, the critic as a Hugging Face directory, and moments as
//! tensors under their weights' names. (The reward model itself is written where users look for it.)

use crate::Error;
use crate::optimizer::Moments;
use crate::scalar_model::ScalarModel;
use crate::store::Store;
use crate::trainer::Trainer;
use crate::weights::{content_hash, load_store, master_ranks};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use temper_actor::ModelConfig;
use temper_actor::weights_io::WriteOptions;
use temper_proto::ScalarRole;

const FILE: &str = "scalar.json";
const FORMAT: u32 = 1;
const CRITIC: &str = "critic";
const REWARD_MODEL: &str = "reward_model";

/// What is stored beside the tensors.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScalarFile {
    format: u32,
    /// By name of the model.
    models: BTreeMap<String, ModelState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelState {
    /// Hash of its weights, as text.
    hash: String,
    /// Updates that its moments have seen; absent where there are none.
    num_updates: Option<u64>,
}

/// Write what there is into an existing directory; nothing where there is no such model.
pub(crate) fn save(trainer: &Trainer, dir: &Path) -> Result<(), Error> {
    let is_first = trainer.ranks.as_ref().is_none_or(|ranks| ranks.rank() == 0);
    if let Some(head) = trainer.shared_head.as_ref().filter(|_| is_first) {
        head.save(dir)?;
    }
    let mut file = ScalarFile { format: FORMAT, models: BTreeMap::new() };
    let ranks = trainer.ranks.as_ref();
    let models = [(CRITIC, &trainer.critic), (REWARD_MODEL, &trainer.reward_model)];
    for (name, model) in models.into_iter().filter_map(|(name, model)| Some((name, model.as_ref()?))) {
        let device = &*trainer.device;
        let write = |store: &Store, part: &str| {
            store.on_first(device, ranks, |store| {
                Ok(store.save(device, &dir.join(part), &model.config, &WriteOptions::default())?)
            })
        };
        if name == CRITIC {
            write(&model.weights.masters, CRITIC)?;
        }
        if let Some(moments) = &model.weights.moments {
            write(&moments.first, &format!("{name}_exp_avg"))?;
            write(&moments.second, &format!("{name}_exp_avg_sq"))?;
        }
        let hash = content_hash(device, ranks, &model.weights.masters)?.to_string();
        let num_updates = model.weights.moments.as_ref().map(|moments| moments.num_updates);
        file.models.insert(name.to_owned(), ModelState { hash, num_updates });
    }
    if file.models.is_empty() || ranks.is_some_and(|ranks| ranks.rank() > 0) {
        return Ok(());
    }
    let path = dir.join(FILE);
    let text = serde_json::to_string_pretty(&file).expect("a state is plain data");
    std::fs::write(&path, text + "\n").map_err(Error::io("write", &path))
}

/// Read it back. A reward model was loaded before; it is proven here.
pub(crate) fn restore(trainer: &mut Trainer, dir: &Path) -> Result<(), Error> {
    let path = dir.join(FILE);
    trainer.critic = None;
    if let Some(head) = &mut trainer.shared_head {
        head.restore(dir)?;
    }
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let fail = |problem: String| Error::State { path: path.clone(), problem };
    let file: ScalarFile = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    if file.format != FORMAT {
        return Err(fail(format!("format {}: this binary reads format {FORMAT}", file.format)));
    }
    for (name, state) in &file.models {
        let mut model = match (name.as_str(), trainer.reward_model.take()) {
            (CRITIC, reward_model) => {
                trainer.reward_model = reward_model;
                load_model(trainer, ScalarRole::Critic, &dir.join(CRITIC))?
            }
            (REWARD_MODEL, Some(model)) => model,
            (REWARD_MODEL, None) => return Err(fail("the checkpoint has no reward_model directory".to_owned())),
            (other, _) => return Err(fail(format!("unknown model `{other}`"))),
        };
        let got = content_hash(&*trainer.device, trainer.ranks.as_ref(), &model.weights.masters)?.to_string();
        if got != state.hash {
            return Err(fail(format!("the weights of `{name}` hash to {got}: expected {}", state.hash)));
        }
        model.weights.moments = load_moments(trainer, dir, (name, &model.config), state.num_updates)?;
        let place = if name == CRITIC { &mut trainer.critic } else { &mut trainer.reward_model };
        *place = Some(model);
    }
    Ok(())
}

/// A model of `role` in a Hugging Face directory, on this trainer's backbone.
pub(crate) fn load_model(trainer: &Trainer, role: ScalarRole, dir: &Path) -> Result<ScalarModel, Error> {
    let config = trainer.scalar_config(role)?;
    let ranks = trainer.ranks.as_ref();
    let (masters, _) = load_store(&*trainer.device, &config, dir, master_ranks(ranks))?;
    ScalarModel::new((&trainer.device, ranks), masters, config, trainer.dtype)
}

fn load_moments(
    trainer: &Trainer,
    dir: &Path,
    (name, config): (&str, &ModelConfig),
    num_updates: Option<u64>,
) -> Result<Option<Moments>, Error> {
    let Some(num_updates) = num_updates else { return Ok(None) };
    let load = |part: String| load_store(&*trainer.device, config, &dir.join(part), trainer.ranks.as_ref());
    let (first, _) = load(format!("{name}_exp_avg"))?;
    let (second, _) = load(format!("{name}_exp_avg_sq"))?;
    Ok(Some(Moments { first, second, num_updates }))
}
