//! Lines from a process that may write anything: bounded in length.

use std::io::BufRead;

/// Longest line that is read, in bytes.
pub(crate) const MAX_LINE_BYTES: usize = 1 << 20;

/// What a reader found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line without its end, invalid UTF-8 replaced.
    Text(String),
    /// More than [`MAX_LINE_BYTES`] without an end of line. Nothing behind it is read.
    TooLong,
    /// The stream ended; a last line without an end counts as a line before that.
    End,
}

/// Read the next line. An error of the stream counts as its end.
pub(crate) fn read_line(reader: &mut impl BufRead) -> Line {
    let mut line = Vec::new();
    loop {
        let Ok(chunk) = reader.fill_buf() else { return Line::End };
        if chunk.is_empty() {
            return if line.is_empty() { Line::End } else { text(&line) };
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if line.len() + taken > MAX_LINE_BYTES {
            return Line::TooLong;
        }
        line.extend_from_slice(&chunk[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            return text(&line);
        }
    }
}

fn text(line: &[u8]) -> Line {
    Line::Text(String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufReader;

    #[test]
    fn lines_their_ends_and_their_bound() {
        let long = "x".repeat(MAX_LINE_BYTES);
        let input = format!("a\r\n\n{long}\nlast");
        let mut reader = BufReader::with_capacity(7, input.as_bytes());
        let lines: Vec<Line> = (0..5).map(|_| read_line(&mut reader)).collect();
        let text = |t: &str| Line::Text(t.to_owned());
        assert_eq!(lines, [text("a"), text(""), text(&long), text("last"), Line::End]);
        let input = format!("{long}x\nb\n");
        assert_eq!(read_line(&mut input.as_bytes()), Line::TooLong);
        assert_eq!(read_line(&mut &b"\xff\n"[..]), text("\u{fffd}"));
    }
}
