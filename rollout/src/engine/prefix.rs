//! Names of full blocks: a hash chain over tokens, seeded with all else that K/V depend on.

use super::sample::OpenSample;
use crate::ModelLimits;
use crate::block_manager::BlockHash;
use temper_types::PolicyVersion;

/// Progress of a sample's chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Chain {
    last: u128,
    num_blocks: usize,
}

/// What names blocks under one version of the weights.
#[derive(Debug, Default)]
pub(super) struct BlockNamer {
    version: Option<PolicyVersion>,
    seed: u128,
    block_size: usize,
    tokens: Vec<u32>,
}

impl BlockNamer {
    pub fn new(block_size: usize) -> Self {
        BlockNamer { block_size, ..BlockNamer::default() }
    }

    /// Name blocks after `version` of the model behind `limits` from now on. False where it does already.
    pub fn follow(&mut self, version: PolicyVersion, limits: ModelLimits) -> bool {
        if self.version.replace(version) == Some(version) {
            return false;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&version.number.to_le_bytes()).update(&version.hash.0);
        hasher.update(&(limits.vocab_size as u64).to_le_bytes()).update(limits.kv_dtype.to_string().as_bytes());
        self.seed = cut(&hasher);
        true
    }

    /// The weights of the day, once they are known.
    pub fn version(&self) -> Option<PolicyVersion> {
        self.version
    }

    /// What names begin with under the weights of the day.
    pub fn seed(&self) -> u128 {
        self.seed
    }

    /// The chain behind the block `last`, the last of `num_blocks`: it goes on as it began, or, where other weights
    /// than those of the day stored that block (`is_old`), with the weights of the day in the name of the next.
    pub fn behind(&self, last: BlockHash, num_blocks: usize, is_old: bool) -> Chain {
        let with_seed = || cut(blake3::Hasher::new().update(&last.0.to_le_bytes()).update(&self.seed.to_le_bytes()));
        Chain { last: if is_old { with_seed() } else { last.0 }, num_blocks }
    }

    /// Hash of the tokens of the first `num_blocks` blocks of `sample`, whatever weights stored them.
    pub fn text(&mut self, sample: &OpenSample, num_blocks: usize) -> u128 {
        self.tokens.clear();
        sample.extend_with_tokens(0..num_blocks * self.block_size, &mut self.tokens);
        name(blake3::Hasher::new(), &self.tokens)
    }

    /// Name the full blocks of `sample` that have no name yet; none before a version is known.
    pub fn extend(&mut self, sample: &mut OpenSample, mut take: impl FnMut(BlockHash)) {
        if self.version.is_none() {
            return;
        }
        let num_full = sample.num_tokens() / self.block_size;
        while sample.chain.num_blocks < num_full {
            let Chain { last, num_blocks } = sample.chain;
            let parent = if num_blocks == 0 { self.seed } else { last };
            self.tokens.clear();
            sample
                .extend_with_tokens(num_blocks * self.block_size..(num_blocks + 1) * self.block_size, &mut self.tokens);
            let mut hasher = blake3::Hasher::new();
            hasher.update(&parent.to_le_bytes());
            sample.chain = Chain { last: name(hasher, &self.tokens), num_blocks: num_blocks + 1 };
            take(BlockHash(sample.chain.last));
        }
    }
}

/// Hash of `tokens` behind what `hasher` has seen.
fn name(mut hasher: blake3::Hasher, tokens: &[u32]) -> u128 {
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    cut(&hasher)
}

/// The first 128 bits of a hash.
fn cut(hasher: &blake3::Hasher) -> u128 {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(bytes)
}
