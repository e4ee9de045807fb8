//! How long the responses to a prompt were, for what admission sets aside the next time.

use std::collections::{HashMap, VecDeque};
use temper_proto::{GeneratedSample, GroupRequest};
use temper_types::FinishReason;

/// Prompts that are remembered.
const MAX_PROMPTS: usize = 1 << 16;

/// Longest response of the last pass over each prompt; the prompts heard of least recently are forgotten first.
#[derive(Debug, Default)]
pub(super) struct LengthHistory {
    /// Length, and when it was noted.
    longest: HashMap<[u8; 16], (u32, u64)>,
    order: VecDeque<([u8; 16], u64)>,
    now: u64,
}

fn key(prompt: &[u32]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for id in prompt {
        hasher.update(&id.to_le_bytes());
    }
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

impl LengthHistory {
    /// Tokens to set aside for a response to `prompt`; `None` where nothing is known.
    pub fn reserve(&self, prompt: &[u32]) -> Option<usize> {
        if self.longest.is_empty() {
            return None;
        }
        self.longest.get(&key(prompt)).map(|(longest, _)| *longest as usize)
    }

    /// A group ended. Aborted responses say nothing.
    pub fn note(&mut self, request: &GroupRequest, samples: &[GeneratedSample]) {
        let ended = samples.iter().filter(|sample| sample.finish_reason != FinishReason::Abort);
        let Some(longest) = ended.map(|sample| sample.token_ids.len() as u32).max() else { return };
        let key = key(&request.prompt_token_ids);
        self.now += 1;
        self.longest.insert(key, (longest, self.now));
        self.order.push_back((key, self.now));
        while self.longest.len() > MAX_PROMPTS || self.order.len() > 2 * MAX_PROMPTS {
            let Some((oldest, noted)) = self.order.pop_front() else { return };
            if self.longest.get(&oldest).is_some_and(|(_, last)| *last == noted) {
                self.longest.remove(&oldest);
            }
        }
    }
}
