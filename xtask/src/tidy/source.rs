//! A light reading of Rust source: which characters are code, where functions and test modules begin and end.

use regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;

/// Stands in the code view for each character inside a string or character literal.
pub const LITERAL: char = '\u{1}';

static FUNCTION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\bfn\s+([A-Za-z_]\w*)").expect("the pattern is a constant"));
static TEST_MODULE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"#\[cfg\((?:test|all\(test[^\]]*)\)\](?:\s*#\[[^\]]*\])*\s*(?:pub(?:\([^)]*\))?\s+)?mod\s+\w+\s*\{")
        .expect("the pattern is a constant")
});

/// One file in two views of the same lines: as written, and with comments blanked and literals masked.
pub struct Source<'a> {
    /// Path from the root of the repository.
    pub path: &'a str,
    /// Lines as written.
    pub lines: Vec<&'a str>,
    /// The code view.
    pub code: String,
}

/// A function with a body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Line of its `fn`, from 0.
    pub line: usize,
    /// Lines of code inside its braces.
    pub num_lines: usize,
}

/// True where the first lines say that the file is generated.
pub fn is_generated(content: &str) -> bool {
    content.lines().take(5).any(|line| line.contains(concat!("@", "generated")))
}

impl<'a> Source<'a> {
    /// Read `content`.
    pub fn new(path: &'a str, content: &'a str) -> Self {
        Source { path, lines: content.lines().collect(), code: code_view(content) }
    }

    /// True for files that hold nothing but tests.
    pub fn is_test_file(&self) -> bool {
        let stem = self.path.rsplit('/').next().unwrap_or_default().trim_end_matches(".rs");
        self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || stem == "tests"
            || stem.ends_with("_tests")
            || stem.ends_with("_test")
    }

    /// Line of the byte `offset` of the code view, from 0.
    pub fn line_of(&self, offset: usize) -> usize {
        self.code[..offset].matches('\n').count()
    }

    /// Lines of the test modules written inside the file.
    pub fn test_modules(&self) -> Vec<Range<usize>> {
        let mut modules: Vec<Range<usize>> = Vec::new();
        for found in TEST_MODULE.find_iter(&self.code) {
            let end = self.matching_brace(found.end() - 1);
            modules.push(self.line_of(found.start())..self.line_of(end) + 1);
        }
        modules
    }

    /// All functions that have a body.
    pub fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        for found in FUNCTION.captures_iter(&self.code) {
            let whole = found.get(0).expect("group 0 is the match");
            let Some(open) = self.body_start(whole.end()) else {
                continue;
            };
            let close = self.matching_brace(open);
            let inside = self.code.get(open + 1..close).unwrap_or_default();
            let num_lines = inside.lines().filter(|line| !line.trim().is_empty()).count();
            functions.push(Function { name: found[1].to_owned(), line: self.line_of(whole.start()), num_lines });
        }
        functions
    }

    /// Offset of the brace that opens a body after a signature; `None` where a semicolon comes first.
    fn body_start(&self, from: usize) -> Option<usize> {
        let mut depth = 0i32;
        for (at, byte) in self.code.bytes().enumerate().skip(from) {
            match byte {
                b'(' | b'[' => depth += 1,
                b')' | b']' => depth -= 1,
                b'{' if depth <= 0 => return Some(at),
                b';' if depth <= 0 => return None,
                _ => {}
            }
            if depth < 0 {
                return None;
            }
        }
        None
    }

    /// Offset of the brace that closes the one at `open`; the end of the file where none does.
    fn matching_brace(&self, open: usize) -> usize {
        let mut depth = 0i32;
        for (at, byte) in self.code.bytes().enumerate().skip(open) {
            match byte {
                b'{' => depth += 1,
                b'}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return at;
            }
        }
        self.code.len()
    }
}

/// The text with the inside of comments blanked and the inside of literals masked; lines stay where they are.
fn code_view(content: &str) -> String {
    let mut view = String::with_capacity(content.len());
    let mut rest = content;
    let mut previous = ' ';
    while let Some(c) = rest.chars().next() {
        let (length, mask) = token(rest, previous);
        let (token, after) = rest.split_at(length);
        match mask {
            Mask::Code => view.push_str(token),
            Mask::Comment => view.extend(token.chars().map(|c| if c == '\n' { '\n' } else { ' ' })),
            Mask::Literal => view.extend(token.chars().map(|c| if c == '\n' { '\n' } else { LITERAL })),
        }
        previous = token.chars().next_back().unwrap_or(c);
        rest = after;
    }
    view
}

enum Mask {
    Code,
    Comment,
    Literal,
}

/// Length in bytes of the token that `rest` starts with, and what it is.
fn token(rest: &str, previous: char) -> (usize, Mask) {
    let first = rest.chars().next().map_or(1, char::len_utf8);
    if rest.starts_with("//") {
        return (rest.find('\n').unwrap_or(rest.len()), Mask::Comment);
    }
    if rest.starts_with("/*") {
        return (block_comment_length(rest), Mask::Comment);
    }
    if let Some(inside) = rest.strip_prefix('"') {
        return (1 + quoted_length(inside, '"'), Mask::Literal);
    }
    if !(previous.is_alphanumeric() || previous == '_')
        && let Some(length) = raw_string_length(rest)
    {
        return (length, Mask::Literal);
    }
    if let Some(inside) = rest.strip_prefix('\'') {
        let mut chars = inside.chars();
        let is_escape = inside.starts_with('\\');
        let is_char = chars.next().is_some_and(|c| c != '\'') && chars.next() == Some('\'');
        if is_escape || is_char {
            return (1 + quoted_length(inside, '\''), Mask::Literal);
        }
    }
    (first, Mask::Code)
}

/// Bytes up to and including the closing quote, escapes passed over.
fn quoted_length(inside: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, c) in inside.char_indices() {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            c if c == quote => return at + c.len_utf8(),
            _ => {}
        }
    }
    inside.len()
}

fn raw_string_length(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix('r').or_else(|| rest.strip_prefix("br")).or_else(|| rest.strip_prefix("cr"))?;
    let inside = body.trim_start_matches('#');
    let hashes = body.len() - inside.len();
    let inside = inside.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    Some(rest.len() - inside.len() + length)
}

fn block_comment_length(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}
