//! Logits processors of transformers and optimizers of torch.

use super::case::{Case, Results};
use crate::optim::{
    AdamConfig, Decay, Lookahead, OptimizerConfig, OptimizerState, RmspropConfig, SecondMoment, SgdConfig,
    clip_grad_norm, total_norm,
};
use crate::{Error, logits_processors as processors};

/// One of transformers' logits processors, named by the case.
pub(super) fn logits(case: &Case<'_>) -> Result<Results, Error> {
    let mut scores = case.grid("scores")?;
    let history = case.opt_grid("input_ids")?;
    if history.as_ref().is_some_and(|h| h.rows != scores.rows) {
        return Err(case.bad("input_ids", format!("expected {} rows", scores.rows)));
    }
    for row in 0..scores.rows {
        let ids: Vec<usize> =
            history.as_ref().map(|h| h.row(row).iter().map(|v| *v as usize).collect()).unwrap_or_default();
        let range = row * scores.cols..(row + 1) * scores.cols;
        let slot = &mut scores.data[range];
        match case.name.split('/').next().unwrap_or("") {
            "TemperatureLogitsWarper" => processors::temperature(slot, case.num("temperature", 1.0)?),
            "TopKLogitsWarper" => processors::top_k(slot, case.num("top_k", 0.0)? as usize),
            "TopPLogitsWarper" => processors::top_p(slot, case.num("top_p", 1.0)?),
            "MinPLogitsWarper" => processors::min_p(slot, case.num("min_p", 0.0)?),
            "TypicalLogitsWarper" => processors::typical(slot, case.num("mass", 0.9)?),
            "RepetitionPenaltyLogitsProcessor" => {
                processors::repetition_penalty(slot, &ids, case.num("penalty", 1.0)?);
            }
            "NoRepeatNGramLogitsProcessor" => {
                processors::no_repeat_ngram(slot, &ids, case.num("ngram_size", 0.0)? as usize);
            }
            other => return Err(case.bad("name", format!("no logits processor `{other}` is known"))),
        }
    }
    Ok(Results::default().grid("scores", scores.cols, &scores.data))
}

fn optimizer(case: &Case<'_>) -> Result<OptimizerConfig, Error> {
    let name = case.text("optimizer", "AdamW")?;
    let lr = case.num("lr", if name == "RMSprop" { 0.01 } else { 1e-3 })?;
    Ok(match name {
        "AdamW" | "Adam" => {
            let betas = case.two("betas")?.unwrap_or((0.9, 0.999));
            let decoupled = name == "AdamW";
            OptimizerConfig::Adam(AdamConfig {
                lr,
                betas,
                eps: case.num("eps", 1e-8)?,
                weight_decay: case.num("weight_decay", if decoupled { 0.01 } else { 0.0 })?,
                decay: if decoupled { Decay::Decoupled } else { Decay::L2 },
                second_moment: if case.flag("amsgrad", false)? { SecondMoment::Largest } else { SecondMoment::Running },
            })
        }
        "SGD" => OptimizerConfig::Sgd(SgdConfig {
            lr,
            momentum: case.num("momentum", 0.0)?,
            weight_decay: case.num("weight_decay", 0.0)?,
            lookahead: if case.flag("nesterov", false)? { Lookahead::Nesterov } else { Lookahead::Plain },
        }),
        "RMSprop" => OptimizerConfig::Rmsprop(RmspropConfig {
            lr,
            alpha: case.num("alpha", 0.99)?,
            eps: case.num("eps", 1e-8)?,
            weight_decay: case.num("weight_decay", 0.0)?,
        }),
        other => return Err(case.bad("optimizer", format!("no optimizer `{other}` is known"))),
    })
}

/// Steps of one of torch's optimizers, gradients clipped before each.
pub(super) fn optim(case: &Case<'_>) -> Result<Results, Error> {
    let config = optimizer(case)?;
    let mut params = case.vector("p0")?;
    let gradients = case.grid("g")?;
    let max_norm = case.opt_num("max_norm")?;
    let mut state = OptimizerState::new(params.len());
    let (mut after, mut norms) = (Vec::new(), Vec::new());
    for step in 0..gradients.rows {
        let mut g = gradients.row(step).to_vec();
        norms.push(match max_norm {
            Some(max_norm) => clip_grad_norm(&mut g, max_norm),
            None => total_norm(&g),
        });
        state.step(&config, &mut params, &g)?;
        after.extend_from_slice(&params);
    }
    Ok(Results::default().grid("params_after", params.len(), &after).vector("total_norms", &norms))
}
