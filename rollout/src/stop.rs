//! Stop strings, matched over the bytes of tokens.
//!
//! Owns: the automaton of a group's stop strings (Aho-Corasick, as a table over bytes). A string may begin and end
//! inside a token and span many; since bytes are matched, a character cut by a token boundary is found all the same.
//! Knows no tokenizer: the bytes of a token come from [`TokenBytes`], which the edge of the engine supplies.

/// Bytes that each token stands for.
pub trait TokenBytes: Send + Sync {
    /// Bytes of `token_id`; empty where it stands for none (special tokens).
    fn token_bytes(&self, token_id: u32) -> &[u8];
}

/// Token bytes as a table by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenByteTable(pub Vec<Vec<u8>>);

impl TokenBytes for TokenByteTable {
    fn token_bytes(&self, token_id: u32) -> &[u8] {
        self.0.get(token_id as usize).map_or(&[], Vec::as_slice)
    }
}

/// Progress of a match; starts at `Default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StopState(u32);

/// An automaton that finds the first completed stop string.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    /// State after reading a byte in a state; state 0 is the root.
    next: Vec<[u32; 256]>,
    /// True for states that complete a string.
    is_match: Vec<bool>,
}

impl StopMatcher {
    /// An automaton for `stops`; empty strings are left out.
    pub fn new<'a>(stops: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut matcher = StopMatcher { next: vec![[0; 256]], is_match: vec![false] };
        for stop in stops.into_iter().filter(|stop| !stop.is_empty()) {
            matcher.insert(stop);
        }
        matcher.link();
        matcher
    }

    /// Read bytes; true where a stop string was completed among them.
    pub fn feed(&self, state: &mut StopState, bytes: &[u8]) -> bool {
        let mut found = false;
        for &byte in bytes {
            state.0 = self.next[state.0 as usize][usize::from(byte)];
            found |= self.is_match[state.0 as usize];
        }
        found
    }

    fn insert(&mut self, stop: &[u8]) {
        let mut state = 0;
        for &byte in stop {
            if self.next[state][usize::from(byte)] == 0 {
                self.next[state][usize::from(byte)] = self.next.len() as u32;
                self.next.push([0; 256]);
                self.is_match.push(false);
            }
            state = self.next[state][usize::from(byte)] as usize;
        }
        self.is_match[state] = true;
    }

    /// Turn the trie into an automaton: in breadth-first order, a missing edge follows the longest proper suffix.
    fn link(&mut self) {
        let mut suffix = vec![0usize; self.next.len()];
        let mut queue: Vec<usize> = self.next[0].iter().filter(|&&child| child != 0).map(|&c| c as usize).collect();
        let mut at = 0;
        while at < queue.len() {
            let state = queue[at];
            let fallback = suffix[state];
            self.is_match[state] |= self.is_match[fallback];
            for byte in 0..256 {
                let child = self.next[state][byte] as usize;
                if child == 0 {
                    self.next[state][byte] = self.next[fallback][byte];
                } else {
                    suffix[child] = self.next[fallback][byte] as usize;
                    queue.push(child);
                }
            }
            at += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ends_at(stops: &[&[u8]], text: &[u8]) -> Option<usize> {
        let matcher = StopMatcher::new(stops.iter().copied());
        let mut state = StopState::default();
        text.iter().position(|byte| matcher.feed(&mut state, std::slice::from_ref(byte)))
    }

    #[test]
    fn a_character_cut_by_a_token_boundary_is_found() {
        let matcher = StopMatcher::new(["fin é.".as_bytes()]);
        let mut state = StopState::default();
        let text = "la fin é. plus".as_bytes();
        let cut = text.iter().position(|&b| b == 0xc3).unwrap() + 1;
        assert!(!matcher.feed(&mut state, &text[..cut]));
        assert!(matcher.feed(&mut state, &text[cut..]));
    }

    #[test]
    fn a_string_inside_another_is_found_through_its_suffix() {
        assert_eq!(ends_at(&[b"abcd", b"bc"], b"xabce"), Some(3));
        assert_eq!(ends_at(&[b"aab"], b"aaab"), Some(3));
        assert_eq!(ends_at(&[b""], b"anything"), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// The automaton finds what a search in all prefixes finds, over an alphabet that provokes overlaps.
        #[test]
        fn matches_a_naive_search(
            stops in prop::collection::vec(prop::collection::vec(0u8..3, 1..5), 1..4),
            text in prop::collection::vec(0u8..3, 0..40),
        ) {
            let stops: Vec<&[u8]> = stops.iter().map(Vec::as_slice).collect();
            let naive = (0..text.len()).find(|&end| stops.iter().any(|stop| text[..=end].ends_with(stop)));
            prop_assert_eq!(ends_at(&stops, &text), naive);
        }
    }
}
