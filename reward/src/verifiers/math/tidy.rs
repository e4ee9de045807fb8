//! One spelling for an answer, and its parts where it is a list.

/// Units that may follow a value and are left out. One-letter units are not among them: they read as symbols.
const UNITS: [&str; 42] = [
    "cm", "mm", "km", "kg", "mg", "ml", "lb", "lbs", "oz", "ft", "mi", "mph", "meters", "metres", "meter", "inches",
    "inch", "feet", "foot", "miles", "mile", "yards", "seconds", "second", "minutes", "minute", "hours", "hour",
    "days", "day", "weeks", "week", "years", "year", "dollars", "dollar", "cents", "degrees", "degree", "units",
    "square", "cubic",
];

/// LaTeX that carries no meaning for the value, and what takes its place.
const COMMANDS: [(&str, &str); 18] = [
    ("\\left", ""),
    ("\\right", ""),
    ("\\(", ""),
    ("\\)", ""),
    ("\\[", ""),
    ("\\]", ""),
    ("\\displaystyle", ""),
    ("\\quad", " "),
    ("^{\\circ}", ""),
    ("^\\circ", ""),
    ("\\degree", ""),
    ("\u{B0}", ""),
    ("\\cdot", "*"),
    ("\\times", "*"),
    ("\\div", "/"),
    ("\u{F7}", "/"),
    ("**", "^"),
    ("\u{3C0}", "\\pi "),
];

/// Bring `text` (normalised before) to the spelling that is evaluated.
pub(super) fn tidy(text: &str) -> String {
    let text = text.trim_matches(|c: char| c.is_whitespace() || c == '*').replace(['$', '`'], "");
    let text = COMMANDS.iter().fold(text, |text, (from, to)| replace_command(text, from, to));
    let text = text.trim().trim_end_matches(['.', ';', ',']);
    let text = unwrap_text_commands(text.trim());
    let text = strip_units(&text);
    value_of_definition(text).trim().to_owned()
}

/// `\left` is not a part of `\leftarrow`: a command in letters ends where no letter follows.
fn replace_command(text: String, from: &str, to: &str) -> String {
    if !text.contains(from) {
        return text;
    }
    if !from.ends_with(|c: char| c.is_ascii_alphabetic()) {
        return text.replace(from, to);
    }
    let mut replaced = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find(from) {
        let after = &rest[at + from.len()..];
        replaced.push_str(&rest[..at]);
        replaced.push_str(if after.starts_with(|c: char| c.is_ascii_alphabetic()) { from } else { to });
        rest = after;
    }
    replaced.push_str(rest);
    replaced
}

/// `\text{Monday}` alone is its content; `\text{...}` beside a value is a unit, which is left out with its exponent.
fn unwrap_text_commands(text: &str) -> String {
    const OPENINGS: [&str; 4] = ["\\text{", "\\textbf{", "\\mathrm{", "\\mbox{"];
    let (mut kept, mut contents, mut rest) = (String::new(), String::new(), text);
    while let Some((at, open)) = OPENINGS.iter().filter_map(|o| Some((rest.find(o)?, *o))).min() {
        let inside = &rest[at + open.len()..];
        let Some(length) = inside.find('}') else {
            break;
        };
        kept.push_str(&rest[..at]);
        contents.push_str(&inside[..length]);
        rest = skip_exponent(&inside[length + 1..]);
    }
    kept.push_str(rest);
    if kept.trim().is_empty() { contents.trim().to_owned() } else { kept.trim().to_owned() }
}

fn skip_exponent(text: &str) -> &str {
    ["^2", "^3", "^{2}", "^{3}", "\u{B2}", "\u{B3}"].iter().find_map(|e| text.strip_prefix(e)).unwrap_or(text)
}

/// The text without the units that end it, where a value stands before them.
fn strip_units(text: &str) -> &str {
    let mut rest = text;
    loop {
        let plain = ["^2", "^3", "^{2}", "^{3}"].iter().find_map(|e| rest.strip_suffix(e)).unwrap_or(rest);
        let start = plain.rfind(|c: char| !c.is_ascii_alphabetic()).map_or(0, |at| at + 1);
        let is_ascii_cut = plain.is_char_boundary(start);
        if start == 0 || !is_ascii_cut || !UNITS.contains(&&plain[start..]) {
            return rest;
        }
        rest = plain[..start].trim_end();
    }
}

/// The right side of `x = 5` and `f(x) = 5`, and the result of `2 + 3 = 5`; any other equation stays as it is.
fn value_of_definition(text: &str) -> &str {
    let Some((left, right)) = text.rsplit_once('=') else {
        return text;
    };
    let left = left.trim();
    let is_name = left.len() == 1 && left.starts_with(|c: char| c.is_ascii_alphabetic());
    let is_function = left.len() == 4 && left.ends_with(')') && left[..left.len() - 1].contains('(');
    let is_arithmetic = left.ends_with(|c: char| c.is_ascii_digit() || c == ')')
        && !left.contains(|c: char| c.is_alphabetic() || "=<>!\\".contains(c));
    if is_name || is_function || is_arithmetic { right } else { text }
}

/// An answer as one expression or a list of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// The brackets around a list; none around a bare list or a single expression.
    pub(super) brackets: Option<(char, char)>,
    /// The expressions.
    pub(super) items: Vec<String>,
}

impl Answer {
    /// True for tuples and intervals; a set and a bare list have no order.
    pub(super) fn is_ordered(&self) -> bool {
        self.items.len() == 1 || matches!(self.brackets, Some((open, _)) if open != '{')
    }
}

/// Split at the commas outside all brackets. A comma within a bare number that groups thousands does not split it.
pub(super) fn split(text: &str) -> Answer {
    let (brackets, inner) = match outer_brackets(text) {
        Some((pair, inner)) => (Some(pair), inner),
        None => (None, text),
    };
    let items = split_at_commas(inner, brackets.is_none());
    let is_list = items.len() > 1 || brackets.is_some_and(|(open, _)| open == '{');
    if is_list {
        return Answer { brackets, items };
    }
    Answer { brackets: None, items: vec![text.trim().to_owned()] }
}

fn outer_brackets(text: &str) -> Option<((char, char), &str)> {
    if let Some(inner) = text.strip_prefix("\\{").and_then(|rest| rest.strip_suffix("\\}")) {
        return Some((('{', '}'), inner));
    }
    let (open, close) = (text.chars().next()?, text.chars().next_back()?);
    let is_pair = matches!(open, '(' | '[') && matches!(close, ')' | ']') && text.len() > 1;
    let inner = is_pair.then(|| &text[1..text.len() - 1])?;
    closes_at_end(inner).then_some(((open, close), inner))
}

/// True where no bracket inside closes the one before `inner`.
fn closes_at_end(inner: &str) -> bool {
    let mut depth = 0i32;
    for c in inner.chars() {
        match c {
            '(' | '[' => depth += 1,
            ')' | ']' => depth -= 1,
            _ => {}
        }
        if depth < 0 {
            return false;
        }
    }
    depth == 0
}

fn split_at_commas(text: &str, keeps_thousands: bool) -> Vec<String> {
    let bytes = text.as_bytes();
    let (mut items, mut start, mut depth) = (Vec::new(), 0, 0i32);
    for (at, &byte) in bytes.iter().enumerate() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth -= 1,
            b',' if depth == 0 && !(keeps_thousands && groups_thousands(bytes, at)) => {
                items.push(text[start..at].trim().to_owned());
                start = at + 1;
            }
            _ => {}
        }
    }
    items.push(text[start..].trim().to_owned());
    items
}

fn groups_thousands(bytes: &[u8], comma: usize) -> bool {
    let digits_after = bytes[comma + 1..].iter().take_while(|b| b.is_ascii_digit()).count();
    let digits_before = bytes[..comma].iter().rev().take(4).take_while(|b| b.is_ascii_digit()).count();
    digits_after == 3 && (1..=3).contains(&digits_before)
}
