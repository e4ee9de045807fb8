//! Finding the answer in a response: boxes, markers, lines, and one spelling for signs that have many.

/// The spellings that answers vary in, brought to one: minus signs, spaces, percent and currency signs, LaTeX thin
/// spaces and fraction commands.
pub(crate) fn normalise(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| match c {
            '\u{2212}' | '\u{2010}' | '\u{2011}' | '\u{2012}' | '\u{2013}' | '\u{FE63}' | '\u{FF0D}' => '-',
            '\u{FF0B}' => '+',
            '\u{FF05}' => '%',
            '\u{A3}' | '\u{20AC}' | '\u{A5}' | '\u{FF04}' => '$',
            '\u{A0}' | '\u{2007}' | '\u{2009}' | '\u{200A}' | '\u{202F}' | '\u{3000}' => ' ',
            other => other,
        })
        .collect();
    const SPELLINGS: [(&str, &str); 12] = [
        ("{,}", ","),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", " "),
        ("\\ ", " "),
        ("~", " "),
        ("\\%", "%"),
        ("\\$", "$"),
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\cfrac", "\\frac"),
        ("\u{D7}", "\\times "),
    ];
    SPELLINGS.iter().fold(plain, |text, (from, to)| if text.contains(from) { text.replace(from, to) } else { text })
}

/// True where the text opens a box, closed or not.
pub(crate) fn has_box(text: &str) -> bool {
    text.contains("\\boxed{") || text.contains("\\fbox{")
}

/// The content of the last `\boxed{...}` (or `\fbox{...}`), braces balanced; `None` where there is none or the last
/// one is not closed.
pub(crate) fn last_boxed(text: &str) -> Option<&str> {
    let start = ["\\boxed{", "\\fbox{"].iter().filter_map(|open| Some(text.rfind(open)? + open.len())).max()?;
    let length = braced_len(&text.as_bytes()[start..])?;
    Some(&text[start..start + length])
}

/// Length of what stands before the brace that closes a group opened just before `text`.
pub(crate) fn braced_len(text: &[u8]) -> Option<usize> {
    let (mut depth, mut escaped) = (0usize, false);
    for (at, &byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(at),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// What stands between the last `marker` and the end of its line.
pub(crate) fn after_last<'a>(text: &'a str, marker: &str) -> Option<&'a str> {
    let rest = &text[text.rfind(marker)? + marker.len()..];
    rest.lines().next().or(Some(""))
}

/// The last line that is not white space.
pub(crate) fn last_line(text: &str) -> Option<&str> {
    text.lines().rev().find(|line| !line.trim().is_empty())
}

/// The content of the last `<tag>...</tag>`.
pub(crate) fn last_tag<'a>(text: &'a str, tag: &str) -> Option<&'a str> {
    let close = text.rfind(&format!("</{tag}>"))?;
    let open = format!("<{tag}>");
    let start = text[..close].rfind(&open)? + open.len();
    Some(&text[start..close])
}

/// The content of the last closed block fenced by three back-quotes, without its language line.
pub(crate) fn last_code_block(text: &str) -> Option<&str> {
    const FENCE: &str = "```";
    let fences: Vec<usize> = text.match_indices(FENCE).map(|(at, _)| at).collect();
    let pair = fences.chunks_exact(2).next_back()?;
    let block = &text[pair[0] + FENCE.len()..pair[1]];
    Some(block.split_once('\n').map_or(block, |(_, content)| content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_box_is_found_with_its_braces() {
        for (text, content) in [
            (r"so \boxed{42}.", Some("42")),
            (r"\boxed{1} then \boxed{\frac{1}{2}}", Some(r"\frac{1}{2}")),
            (r"\boxed{\{1, 2\}}", Some(r"\{1, 2\}")),
            (r"\boxed{\boxed{7}}", Some("7")),
            (r"\boxed{3} and \boxed{4", None),
            ("no box", None),
        ] {
            assert_eq!(last_boxed(text), content, "{text}");
        }
    }

    #[test]
    fn markers_tags_lines_and_blocks() {
        assert_eq!(after_last("a #### 1\nb #### 2\nend", "####"), Some(" 2"));
        assert_eq!(after_last("tail ####", "####"), Some(""));
        assert_eq!(after_last("none", "####"), None);
        assert_eq!(last_line("a\nb\n \n"), Some("b"));
        assert_eq!(last_tag("<a>1</a><a>2</a></b>", "a"), Some("2"));
        assert_eq!(last_tag("</a><a>", "a"), None);
        assert_eq!(last_code_block("x\n```json\n{}\n```\n"), Some("{}\n"));
        assert_eq!(last_code_block("``` one ``` and ```open"), Some(" one "));
    }
}
