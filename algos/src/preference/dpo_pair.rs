//! The DPO family on one pair: a loss of the two rows' scores.
//!
//! With `c`, `j` the scores of chosen and rejected (f-divergence of the log-ratios; the log-ratios
//! themselves in nca_pair, bco_pair, sppo_hard, apo_zero, apo_down), `D = c - j`, `x = beta D`, `e` = label_smoothing:
//! sigmoid `-logsig(x)`; cdpo `-(1-e) logsig(x) - e logsig(-x)`; robust `(cdpo with -e) / (1 - 2e)`; hinge
//! `max(1 - x, 0)`; ipo `(D - 1 / (2 beta))^2` on length-averaged scores; sigmoid_norm: sigmoid on those; exo_pair
//! `q (log q - log(1-e)) + (1-q)(log(1-q) - log e)`, `q = sig(x)`; nca_pair `-logsig(bc) - (logsig(-bc) + logsig(-bj))
//! / 2`;
//! bco_pair `-logsig(bc) - logsig(-bj)`; sppo_hard `(c - 1/(2b))^2 + (j + 1/(2b))^2`; apo_zero `1 - sig(bc) + sig(bj)`;
//! apo_down `sig(bc) + 1 - sig(x)`; discopop `(1-w)(-logsig(x)) + w e^-x`, `w = sig(x / tau)`.
//!
//! # Source
//! DPO 2305.18290, cDPO, rDPO 2403.00409, SLiC 2305.10425, IPO 2310.12036, EXO 2402.00856, NCA 2402.05369, BCO
//! 2404.04656,
//! SPPO 2405.00675, APO 2408.06266, DiscoPOP 2406.08414; forms as in TRL. f-divergences: 2309.16240.

use super::PairTerm;
use super::dpo::DpoConfig;
use crate::kl::Dual;
use crate::math::{log_sigmoid, sigmoid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which loss of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DpoLossType {
    /// Negative log-sigmoid of the difference (DPO). Ignores label_smoothing, as in TRL.
    #[default]
    Sigmoid,
    /// DPO with smoothed labels.
    Cdpo,
    /// DPO corrected for noisy labels.
    Robust,
    /// Hinge (SLiC).
    Hinge,
    /// Squared distance from a target margin, length-averaged.
    Ipo,
    /// Squared distance from a target margin on sums (OpenRLHF's form).
    IpoSum,
    /// DPO on length-averaged scores.
    SigmoidNorm,
    /// Exact optimisation; needs label_smoothing above 0.
    ExoPair,
    /// Noise-contrastive alignment.
    NcaPair,
    /// Binary classifier without a running shift.
    BcoPair,
    /// Self-play with hard targets.
    SppoHard,
    /// Optimal transport between sorted margins; needs the whole mini-batch.
    Aot,
    /// The same between sorted scores.
    AotUnpaired,
    /// Anchored: chosen up, rejected down.
    ApoZero,
    /// Anchored: chosen down, rejected further down.
    ApoDown,
    /// The discovered mixture of logistic and exponential.
    Discopop,
    /// Likelihood of the chosen responses alone.
    Sft,
}

/// How a log-ratio becomes a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FDivergence {
    /// `x`.
    #[default]
    ReverseKl,
    /// `1 - e^-x`.
    ForwardKl,
    /// `log 2 + logsig(x)`.
    JsDivergence,
    /// `(e^((a-1) x) - 1) / (a - 1)`.
    AlphaDivergence,
}

impl FDivergence {
    /// Score of a log-ratio and its derivative; `alpha` is that of the alpha divergence.
    pub(crate) fn score(self, x: f64, alpha: f64) -> Dual {
        match self {
            FDivergence::ReverseKl => Dual { value: x, d: 1.0 },
            FDivergence::ForwardKl => Dual { value: 1.0 - (-x).exp(), d: (-x).exp() },
            FDivergence::JsDivergence => Dual { value: std::f64::consts::LN_2 + log_sigmoid(x), d: sigmoid(-x) },
            FDivergence::AlphaDivergence if (alpha - 1.0).abs() < 1e-6 => Dual { value: x, d: 1.0 },
            FDivergence::AlphaDivergence => {
                let exponent = (alpha - 1.0) * x;
                let power = exponent.min(80.0).exp();
                let d = if exponent <= 80.0 { power } else { 0.0 };
                Dual { value: (power - 1.0) / (alpha - 1.0), d }
            }
        }
    }
}

impl DpoLossType {
    /// True where scores are divided by the number of tokens first.
    pub(crate) fn is_length_averaged(self) -> bool {
        matches!(self, DpoLossType::Ipo | DpoLossType::SigmoidNorm)
    }

    /// True where the loss reads log-ratios as they are, whatever the f-divergence.
    pub(crate) fn reads_log_ratios(self) -> bool {
        use DpoLossType::{ApoDown, ApoZero, BcoPair, NcaPair, SppoHard};
        matches!(self, NcaPair | BcoPair | SppoHard | ApoZero | ApoDown)
    }

    /// True where the whole mini-batch has to be seen at once.
    pub(crate) fn sorts(self) -> bool {
        matches!(self, DpoLossType::Aot | DpoLossType::AotUnpaired)
    }
}

/// `-(1-e) logsig(x) - e logsig(-x)` and its derivative.
pub(crate) fn smoothed(x: f64, e: f64) -> Dual {
    Dual { value: -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x), d: -(1.0 - e) * sigmoid(-x) + e * sigmoid(x) }
}

/// Loss of one pair; the sorting types and sft are computed elsewhere and give 0 here.
pub(crate) fn term(kind: DpoLossType, config: &DpoConfig, c: f64, j: f64) -> PairTerm {
    let (beta, e) = (config.beta, config.label_smoothing);
    let x = beta * (c - j);
    let of_x = |loss: Dual| PairTerm::of_difference(loss.value, beta * loss.d);
    match kind {
        DpoLossType::Sigmoid | DpoLossType::SigmoidNorm => of_x(smoothed(x, 0.0)),
        DpoLossType::Cdpo => of_x(smoothed(x, e)),
        DpoLossType::Robust => {
            // The smoothed form with weights 1 - e and -e, over 1 - 2e.
            let value = (-(1.0 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1.0 - 2.0 * e);
            of_x(Dual { value, d: (-(1.0 - e) * sigmoid(-x) - e * sigmoid(x)) / (1.0 - 2.0 * e) })
        }
        DpoLossType::Hinge => of_x(Dual { value: (1.0 - x).max(0.0), d: if x < 1.0 { -1.0 } else { 0.0 } }),
        DpoLossType::Ipo | DpoLossType::IpoSum => {
            let gap = c - j - 0.5 / beta;
            PairTerm::of_difference(gap * gap, 2.0 * gap)
        }
        DpoLossType::ExoPair => of_x(exo(x, e)),
        DpoLossType::NcaPair => PairTerm {
            loss: -log_sigmoid(beta * c) - 0.5 * log_sigmoid(-beta * c) - 0.5 * log_sigmoid(-beta * j),
            d_chosen: beta * (-sigmoid(-beta * c) + 0.5 * sigmoid(beta * c)),
            d_rejected: 0.5 * beta * sigmoid(beta * j),
        },
        DpoLossType::BcoPair => PairTerm {
            loss: -log_sigmoid(beta * c) - log_sigmoid(-beta * j),
            d_chosen: -beta * sigmoid(-beta * c),
            d_rejected: beta * sigmoid(beta * j),
        },
        DpoLossType::SppoHard => {
            let (up, down) = (c - 0.5 / beta, j + 0.5 / beta);
            PairTerm { loss: up * up + down * down, d_chosen: 2.0 * up, d_rejected: 2.0 * down }
        }
        DpoLossType::ApoZero => PairTerm {
            loss: sigmoid(-beta * c) + sigmoid(beta * j),
            d_chosen: -beta * slope(beta * c),
            d_rejected: beta * slope(beta * j),
        },
        DpoLossType::ApoDown => PairTerm {
            loss: sigmoid(beta * c) + sigmoid(-x),
            d_chosen: beta * (slope(beta * c) - slope(x)),
            d_rejected: beta * slope(x),
        },
        DpoLossType::Discopop => of_x(discopop(x, config.discopop_tau)),
        DpoLossType::Aot | DpoLossType::AotUnpaired | DpoLossType::Sft => PairTerm::default(),
    }
}

fn slope(x: f64) -> f64 {
    sigmoid(x) * sigmoid(-x)
}

fn exo(x: f64, e: f64) -> Dual {
    let (q, r) = (sigmoid(x), sigmoid(-x));
    let (up, down) = (log_sigmoid(x) - (1.0 - e).ln(), log_sigmoid(-x) - e.ln());
    Dual { value: q * up + r * down, d: q * r * (up - down) }
}

fn discopop(x: f64, tau: f64) -> Dual {
    let w = sigmoid(x / tau);
    let d_w = slope(x / tau) / tau;
    let (logistic, exponential) = (-log_sigmoid(x), (-x).exp());
    Dual {
        value: (1.0 - w) * logistic + w * exponential,
        d: d_w * (exponential - logistic) - (1.0 - w) * sigmoid(-x) - w * exponential,
    }
}
