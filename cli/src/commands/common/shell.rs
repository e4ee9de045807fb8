//! Words that a shell reads as they are meant.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// `word` as one word of a shell, in quotes where it needs them. Bytes that are no UTF-8, and control characters, take
/// the form `$'\xff'`, which bash and zsh know.
pub fn quoted(word: impl AsRef<OsStr>) -> String {
    let word = word.as_ref();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    match word.to_str() {
        Some(text) if !text.is_empty() && text.chars().all(is_plain) => text.to_owned(),
        Some(text) if !text.chars().any(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => format!("$'{}'", word.as_bytes().iter().map(|byte| escaped(*byte)).collect::<String>()),
    }
}

fn escaped(byte: u8) -> String {
    match byte {
        b'\'' | b'\\' => format!("\\{}", char::from(byte)),
        b' '..=b'~' => char::from(byte).to_string(),
        _ => format!("\\x{byte:02x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_stays_one_word() {
        for (word, expected) in [
            ("runs/small-2", "runs/small-2"),
            ("seed=5", "seed=5"),
            ("", "''"),
            ("my runs/a", "'my runs/a'"),
            ("~/x", "'~/x'"),
            ("it's", r"'it'\''s'"),
            ("a={b=1, c=\"$d\"}", "'a={b=1, c=\"$d\"}'"),
            ("caf\u{e9}", "'caf\u{e9}'"),
            ("a\n'b\\", r"$'a\x0a\'b\\'"),
        ] {
            assert_eq!(quoted(word), expected, "{word:?}");
        }
        assert_eq!(quoted(OsStr::from_bytes(b"bad\xffdir")), r"$'bad\xffdir'");
    }
}
