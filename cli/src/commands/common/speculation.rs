//! Flags of speculative decoding.

use anyhow::Result;
use std::path::PathBuf;
use temper_rollout::{EngineConfig, Speculative};

/// Drafters of speculative decoding on the command line. Drafts are verified: no choice changes a token or a log-prob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SpeculativeArg {
    /// No drafts.
    Off,
    /// Continuations of the same tokens in the prompt, its other responses and earlier ones.
    Suffix,
    /// The same sample's earlier response to the same prompt.
    Replay,
    /// The draft model.
    Model,
    /// All of them, as far as measured step times say that they pay.
    Auto,
}

impl From<SpeculativeArg> for Speculative {
    fn from(arg: SpeculativeArg) -> Speculative {
        match arg {
            SpeculativeArg::Off => Speculative::Off,
            SpeculativeArg::Suffix => Speculative::Suffix,
            SpeculativeArg::Replay => Speculative::Replay,
            SpeculativeArg::Model => Speculative::Model,
            SpeculativeArg::Auto => Speculative::Auto,
        }
    }
}

/// Who drafts.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct SpeculationArgs {
    /// Drafter of speculative decoding; changes how long it takes, and no token or log-prob. Default: off, or model
    /// where --draft-model is given.
    #[arg(long, value_enum)]
    speculative: Option<SpeculativeArg>,
    /// Hugging Face directory of a smaller model of the same vocabulary, which drafts with the same noise.
    #[arg(long, value_name = "DIR")]
    draft_model: Option<PathBuf>,
}

impl SpeculationArgs {
    /// The engine's configuration with these drafters.
    ///
    /// # Errors
    /// Flags that contradict each other (exit code 2).
    pub fn engine(&self) -> Result<EngineConfig> {
        let default = if self.draft_model.is_some() { SpeculativeArg::Model } else { SpeculativeArg::Off };
        let speculative = self.speculative.unwrap_or(default);
        let draft_model = self.draft_model.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default();
        match (speculative, self.draft_model.is_some()) {
            (SpeculativeArg::Model, false) => Err(crate::usage("--speculative model: expected --draft-model DIR")),
            (SpeculativeArg::Off | SpeculativeArg::Suffix | SpeculativeArg::Replay, true) => {
                Err(crate::usage("--draft-model: expected --speculative model or auto, or none"))
            }
            _ => Ok(EngineConfig { speculative: speculative.into(), draft_model, ..EngineConfig::default() }),
        }
    }
}
