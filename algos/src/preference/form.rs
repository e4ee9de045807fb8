//! What a preference objective asks of its rows, and the reward that it implies: for loops that name no algorithm.

use crate::Objective;
use crate::preference::CpoConfig;

/// How the rows of a preference mini-batch hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferenceForm {
    /// Row `2 i` is the chosen response of pair `i`, row `2 i + 1` the rejected one.
    Pairs,
    /// Rows with an advantage above or below 0 for desirable and undesirable.
    Labels {
        /// Mismatched rows (a prompt with another row's response, advantage 0) stand beside the labelled ones.
        mismatched: bool,
    },
    /// Pairs of answers under a belief, each with its belief and the classes of beliefs: see
    /// [`Objective`](crate::Objective) for what tells the rows apart.
    Beliefs,
}

impl PreferenceForm {
    /// The form of held-out rows, on which chosen and rejected responses are compared.
    pub fn held_out(self) -> PreferenceForm {
        match self {
            PreferenceForm::Pairs | PreferenceForm::Labels { .. } => PreferenceForm::Pairs,
            PreferenceForm::Beliefs => PreferenceForm::Beliefs,
        }
    }
}

/// One response's log-probs, summed over its unmasked tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResponseLogProb {
    /// Under the policy.
    pub policy: f64,
    /// Under the reference; 0 where the objective reads none.
    pub reference: f64,
    /// Number of tokens summed over.
    pub num_tokens: usize,
}

impl Objective {
    /// The rows that this objective takes, where it is one over preferences.
    pub fn preference_form(&self) -> Option<PreferenceForm> {
        match self {
            Objective::Sft(_) | Objective::Policy(_) => None,
            Objective::Dpo(_) | Objective::Cpo(_) | Objective::Orpo(_) => Some(PreferenceForm::Pairs),
            Objective::Kto(config) => Some(PreferenceForm::Labels { mismatched: config.reads_mismatched() }),
            Objective::Gdpo(_) => Some(PreferenceForm::Beliefs),
        }
    }

    /// The reward that the policy implies for a response: what the objective pulls apart. With a reference,
    /// `beta (log p - log p_ref)`; without, `beta` times the (for simpo, ipo and orpo length-averaged) log-prob, as the
    /// loss has it. `None` for objectives that are not over preferences.
    pub fn implicit_reward(&self, response: &ResponseLogProb) -> Option<f64> {
        let ratio = response.policy - response.reference;
        let mean = response.policy / response.num_tokens.max(1) as f64;
        match self {
            Objective::Sft(_) | Objective::Policy(_) => None,
            Objective::Dpo(config) => Some(config.beta * ratio),
            Objective::Kto(config) => Some(config.beta * ratio),
            Objective::Gdpo(config) => Some(config.beta * ratio),
            Objective::Orpo(config) => Some(config.beta * mean),
            Objective::Cpo(config) => Some(cpo_reward(config, response.policy, mean)),
        }
    }
}

fn cpo_reward(config: &CpoConfig, sum: f64, mean: f64) -> f64 {
    let log_prob = if config.is_length_averaged() { mean } else { sum };
    config.beta * config.reward(log_prob).value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preference::{CpoLossType, DpoConfig, KtoConfig, KtoLossType, OrpoConfig};

    #[test]
    fn the_implied_reward_is_what_the_loss_compares() {
        let response = ResponseLogProb { policy: -6.0, reference: -8.0, num_tokens: 3 };
        let reward = |objective: Objective| objective.implicit_reward(&response).expect("one over preferences");
        assert_eq!(reward(Objective::Dpo(DpoConfig { beta: 0.5, ..DpoConfig::default() })), 1.0);
        assert_eq!(reward(Objective::Kto(KtoConfig { beta: 0.25, ..KtoConfig::default() })), 0.5);
        assert_eq!(reward(Objective::Orpo(OrpoConfig { beta: 0.5 })), -1.0);
        let cpo = |loss_type| CpoConfig { loss_type, beta: 0.5, ..CpoConfig::default() };
        assert_eq!(reward(Objective::Cpo(cpo(CpoLossType::Sigmoid))), -3.0);
        assert_eq!(reward(Objective::Cpo(cpo(CpoLossType::Simpo))), -1.0);
        assert_eq!(Objective::Sft(crate::SftLossType::Nll).implicit_reward(&response), None);
    }

    #[test]
    fn only_the_loss_with_a_reference_point_asks_for_mismatched_rows() {
        let form = |loss_type| Objective::Kto(KtoConfig { loss_type, ..KtoConfig::default() }).preference_form();
        assert_eq!(form(KtoLossType::Kto), Some(PreferenceForm::Labels { mismatched: true }));
        assert_eq!(form(KtoLossType::ApoZeroUnpaired), Some(PreferenceForm::Labels { mismatched: false }));
    }
}
