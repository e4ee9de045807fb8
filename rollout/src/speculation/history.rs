//! Responses of earlier passes over a prompt, by the prompt's ids.
//!
//! Bounded, in memory or in a file ([`super::history_file`]) that survives the process and is read when a prompt is
//! scheduled. Losing any of it costs time and changes no bit.

use super::history_file::{Found, HistoryFile, PromptKey, Span, prompt_key};
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::Arc;
use temper_proto::GeneratedSample;

/// One earlier response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastResponse {
    /// Index in its group.
    pub sample_index: usize,
    /// Ids, the stop token included.
    pub token_ids: Arc<[u32]>,
}

/// The responses of one pass over a prompt.
#[derive(Debug)]
struct Pass {
    num_tokens: usize,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Memory(Vec<PastResponse>),
    Disk(Span),
}

/// Earlier responses of all prompts.
#[derive(Debug)]
pub(super) struct History {
    max_epochs: usize,
    max_tokens: usize,
    num_tokens: usize,
    /// Passes over each prompt, latest first.
    passes: HashMap<PromptKey, VecDeque<Pass>>,
    /// Prompts in the order of their passes, one entry for each.
    order: VecDeque<PromptKey>,
    file: Option<HistoryFile>,
}

impl History {
    /// Keep the last `max_epochs` passes over each prompt, and at most `max_tokens` tokens in all.
    pub fn new(max_epochs: usize, max_tokens: usize) -> Self {
        History { max_epochs, max_tokens, num_tokens: 0, passes: HashMap::new(), order: VecDeque::new(), file: None }
    }

    /// Keep it in the file at `path` from now on, and know what stands there; `vocabulary` is what ids mean. Where the
    /// file cannot be used, a warning says so and the history stays in memory.
    pub fn open(&mut self, path: &Path, vocabulary: &str) {
        let mut found = Vec::new();
        match HistoryFile::open(path, vocabulary, |record| found.push(record)) {
            Ok(file) => self.file = Some(file),
            Err(error) => tracing::warn!(path = %path.display(), %error, "no history on disk: it stays in memory"),
        }
        for Found { key, span, num_tokens } in found {
            self.insert(key, Pass { num_tokens, content: Content::Disk(span) });
        }
        self.compact();
    }

    /// Responses to `prompt`, latest pass first, ascending samples within.
    pub fn get(&mut self, prompt: &[u32]) -> Vec<PastResponse> {
        let mut out = Vec::new();
        for pass in self.passes.get(&prompt_key(prompt)).into_iter().flatten() {
            match (&pass.content, &mut self.file) {
                (Content::Memory(responses), _) => out.extend(responses.iter().cloned()),
                (Content::Disk(span), Some(file)) => match file.read(*span) {
                    Ok(responses) => out.extend(responses),
                    Err(error) => tracing::warn!(%error, "an earlier pass cannot be read back: it is left out"),
                },
                (Content::Disk(_), None) => {}
            }
        }
        out
    }

    /// Remember a pass over `prompt`.
    pub fn add(&mut self, prompt: &[u32], samples: &[GeneratedSample]) {
        if self.max_epochs == 0 || samples.is_empty() {
            return;
        }
        let pass = samples.iter().map(|sample| PastResponse {
            sample_index: sample.sample_index.0 as usize,
            token_ids: sample.token_ids.as_slice().into(),
        });
        let pass: Vec<PastResponse> = pass.collect();
        let num_tokens = pass.iter().map(|response| response.token_ids.len()).sum();
        let key = prompt_key(prompt);
        let content = self.write(key, pass);
        self.insert(key, Pass { num_tokens, content });
        self.compact();
    }

    /// Append a pass to the file, or keep it in memory where there is none or it fails.
    fn write(&mut self, key: PromptKey, pass: Vec<PastResponse>) -> Content {
        let Some(file) = &mut self.file else { return Content::Memory(pass) };
        match file.append(key, &pass) {
            Ok(span) => Content::Disk(span),
            Err(error) => {
                tracing::warn!(%error, "a pass cannot be written to the history: it stays in memory");
                Content::Memory(pass)
            }
        }
    }

    fn insert(&mut self, key: PromptKey, pass: Pass) {
        self.num_tokens += pass.num_tokens;
        self.order.push_back(key);
        self.passes.entry(key).or_default().push_front(pass);
        if self.passes[&key].len() > self.max_epochs {
            self.drop_oldest(&key);
            let first = self.order.iter().position(|other| *other == key);
            first.and_then(|at| self.order.remove(at)).expect("every pass stands in the order");
        }
        while self.num_tokens > self.max_tokens {
            let Some(oldest) = self.order.pop_front() else { return };
            self.drop_oldest(&oldest);
        }
    }

    fn drop_oldest(&mut self, key: &PromptKey) {
        let Some(passes) = self.passes.get_mut(key) else { return };
        self.num_tokens -= passes.pop_back().map_or(0, |pass| pass.num_tokens);
        if passes.is_empty() {
            self.passes.remove(key);
        }
    }

    /// Write the file anew, oldest pass first, where more than half of it is forgotten. So it takes at most about twice
    /// the bytes of what is kept.
    fn compact(&mut self) {
        let Some(file) = &mut self.file else { return };
        let kept_bytes = 4 * self.num_tokens as u64 + 64 * self.order.len() as u64;
        if file.num_bytes() <= 4096 + 2 * kept_bytes {
            return;
        }
        let spans = self.passes.iter_mut().flat_map(|(key, passes)| passes.iter_mut().map(move |pass| (*key, pass)));
        let mut spans: Vec<(PromptKey, &mut Span)> = spans
            .filter_map(|(key, pass)| match &mut pass.content {
                Content::Disk(span) => Some((key, span)),
                Content::Memory(_) => None,
            })
            .collect();
        spans.sort_by_key(|(_, span)| span.offset());
        if let Err(error) = file.compact(spans.into_iter()) {
            tracing::warn!(%error, "the history cannot be written anew: it grows");
        }
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
