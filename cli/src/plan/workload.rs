//! What a step of a recipe has to do, in samples, tokens and bytes.

use super::ModelSizes;
use crate::recipe::Placement;
use temper_actor::{ModelConfig, UnitShapes};
use temper_algos::Scope;
use temper_controller::{PolicyStage, Stage};
use temper_proto::Backbone;
use temper_rollout::EngineConfig;
use temper_types::DType;

/// Tokens that are expected, on average.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expected {
    /// Of a prompt.
    pub prompt_tokens: f64,
    /// Of a response.
    pub response_tokens: f64,
}

/// Numbers of ranks over which the recipe's models can be divided, ascending, 1 among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divisions {
    /// Of an engine's model.
    pub tensor_parallel: Vec<usize>,
    /// Of the rows of a micro-batch; only those that divide the number of trainer ranks can be said of them.
    pub sequence_parallel: Vec<usize>,
}

/// A step of a stage that learns from samples.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Name of the stage.
    pub stage: String,
    /// The model's sizes.
    pub model: ModelSizes,
    /// All that is said of it.
    pub config: ModelConfig,
    /// How it can be divided.
    pub divisions: Divisions,
    /// Its tensors, as trainer ranks divide them.
    pub shapes: UnitShapes,
    /// Number format of matrix products and of the cache.
    pub dtype: DType,
    /// Prompts of a step.
    pub prompts: usize,
    /// Samples of a prompt, a greedy one included where the algorithm needs it.
    pub samples: usize,
    /// Samples of a prompt that are trained on.
    pub trained_samples: usize,
    /// Longest response.
    pub max_response_tokens: usize,
    /// Expected lengths.
    pub expected: Expected,
    /// Optimizer steps into which a step's prompts are split.
    pub mini_batches: usize,
    /// Passes over a step's samples.
    pub epochs: usize,
    /// Share of the samples whose log-probs are computed by a forward of its own, the reference's counted too.
    pub forwards: f64,
    /// Updates of a model of the policy's size besides each of the policy's.
    pub critic_updates: f64,
    /// Whether the logits of an update are computed once for the loss and once for its gradient, on one rank too.
    pub logits_twice: bool,
    /// Whether a reference policy is kept.
    pub has_reference: bool,
    /// Whether a critic of the policy's size is kept.
    pub has_critic: bool,
    /// Limits of the engine.
    pub engine: EngineConfig,
    /// Tokens of a micro-batch as the recipe has it.
    pub max_micro_batch_tokens: usize,
    /// Whether the recipe recomputes activations.
    pub recompute: bool,
    /// Where the recipe places things now.
    pub placement: Placement,
    /// Steps that the recipe's generation is ahead of its training now.
    pub staleness: usize,
}

impl Workload {
    /// The step of `stage`, or nothing where it does not learn from samples.
    pub fn new(
        stage: &Stage,
        (model, dtype): (&ModelConfig, DType),
        divisions: Divisions,
        (engine, placement): (&EngineConfig, &Placement),
        expected: Expected,
    ) -> Option<Self> {
        let policy = stage.policy()?;
        let plan = policy.algorithm.plan();
        let has_critic = policy.critic.as_ref().is_some_and(|critic| critic.backbone != Backbone::Shared);
        let critic_epochs = policy.critic.as_ref().filter(|_| has_critic).map_or(0, |critic| critic.epochs);
        let later = (policy.mini_batches - 1) as f64 / policy.mini_batches as f64;
        let old = match (plan.old_log_probs_first, plan.old_log_probs) {
            (true, _) => 1.0,
            (false, true) => later,
            (false, false) => 0.0,
        };
        let counted = |condition| if condition { 1.0 } else { 0.0 };
        let kept = policy.algorithm.best_of_n.num_kept();
        Some(Workload {
            stage: policy.name.clone(),
            model: ModelSizes::of(model),
            config: model.clone(),
            divisions,
            shapes: UnitShapes::new(model),
            dtype,
            prompts: policy.prompts_per_step,
            samples: policy.num_generations + usize::from(plan.greedy_baseline),
            trained_samples: if kept == 0 { policy.num_generations } else { kept },
            max_response_tokens: policy.sampling.max_new_tokens as usize,
            expected,
            mini_batches: policy.mini_batches,
            epochs: policy.epochs,
            forwards: old + counted(plan.ref_log_probs) + counted(has_critic),
            critic_updates: critic_epochs as f64 / policy.epochs as f64,
            logits_twice: !is_fused(stage, policy),
            has_reference: plan.ref_log_probs,
            has_critic,
            engine: engine.clone(),
            max_micro_batch_tokens: policy.memory.max_micro_batch_tokens,
            recompute: policy.memory.recompute_activations,
            placement: placement.clone(),
            staleness: staleness(placement),
        })
    }

    /// Samples of a step.
    pub fn num_samples(&self) -> usize {
        self.prompts * self.samples
    }

    /// Rows of a step that are trained on.
    pub fn num_rows(&self) -> usize {
        self.prompts * self.trained_samples
    }

    /// Longest text of the model.
    pub fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Tokens of the longest sequence: one that exceeds the limit of a micro-batch goes alone.
    pub fn longest(&self) -> usize {
        (self.expected.prompt_tokens.ceil() as usize + self.max_response_tokens).min(self.max_positions())
    }

    /// Most tokens of one update of one of `owners` that the rows are divided over.
    pub fn most_tokens(&self, owners: usize) -> usize {
        let groups = self.prompts.div_ceil(self.mini_batches).div_ceil(owners);
        groups * (self.longest() + (self.trained_samples - 1) * self.max_response_tokens)
    }

    /// Share of a group's tokens that have a target, whose logits are computed.
    pub fn target_share(&self) -> f64 {
        self.trained_samples as f64 * self.expected.response_tokens / self.group_tokens()
    }

    /// Tokens that pass through the model for the samples of one prompt, which runs once.
    pub fn group_tokens(&self) -> f64 {
        self.expected.prompt_tokens + self.trained_samples as f64 * self.expected.response_tokens
    }
}

/// Whether a rank of its own computes every logit of an update once: where the gradient at a token depends on no other
/// token, and no value head stands on the trunk.
fn is_fused(stage: &Stage, policy: &PolicyStage) -> bool {
    let of_tokens = matches!(stage, Stage::Policy(_)) && policy.algorithm.policy_loss.scope() == Scope::Token;
    of_tokens && policy.critic.as_ref().is_none_or(|critic| critic.backbone != Backbone::Shared)
}

/// The value of `placement.staleness`; 0 where there is none.
fn staleness(placement: &Placement) -> usize {
    let table = toml::Value::try_from(placement).ok();
    let value = table.as_ref().and_then(|table| table.get("staleness")?.as_integer());
    value.and_then(|value| usize::try_from(value).ok()).unwrap_or(0)
}
