//! Rules for Rust files.

use super::source::{LITERAL, Source};
use regex::Regex;
use std::ops::Range;
use std::sync::LazyLock;

const MAX_FILE_LINES: usize = 800;
const MAX_LIB_LINES: usize = 150;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_INLINE_TEST_LINES: usize = 150;
const MAX_WIDTH: usize = 120;
/// Lines before a function in which its attributes stand.
const ATTRIBUTE_LINES: usize = 8;

/// Crates that talk to a terminal or read flags and the environment; no other may.
const PROGRAMS: [&str; 5] = ["cli/", "xtask/", "tests/", "benches/", "crates/testkit/"];
/// The crate that owns log lines and progress bars.
const TELEMETRY: &str = "crates/telemetry/";

static STUB: LazyLock<Regex> = LazyLock::new(|| pattern(r"\b(todo|unimplemented|dbg)!"));
static IGNORED: LazyLock<Regex> = LazyLock::new(|| pattern(r"#\[ignore\b"));
static SILENCED: LazyLock<Regex> = LazyLock::new(|| pattern(r"#!?\[(allow|expect)\("));
static DEAD_CODE: LazyLock<Regex> = LazyLock::new(|| pattern(r"#!?\[(allow|expect)\([^\]]*\bdead_code\b"));
static PRINT: LazyLock<Regex> = LazyLock::new(|| pattern(r"\be?print(ln)?!"));
static ENVIRONMENT: LazyLock<Regex> = LazyLock::new(|| pattern(r"\benv::(var|vars|var_os|vars_os|args|args_os)\b"));

fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the pattern is a constant")
}

/// Check one file.
pub fn check(source: &Source<'_>) -> Vec<String> {
    let tests = source.test_modules();
    let mut findings = sizes(source, &tests);
    findings.extend(functions(source));
    findings.extend(widths(source));
    findings.extend(silenced(source));
    let everywhere = [
        (&*STUB, "a stub or a debugging aid"),
        (&*IGNORED, "an ignored test: delete it or make it run"),
        (&*DEAD_CODE, "dead code is deleted, not silenced"),
    ];
    for (pattern, what) in everywhere {
        findings.extend(matches(source, pattern, what, &[]));
    }
    let is_library = !PROGRAMS.iter().any(|program| source.path.starts_with(program));
    if is_library && !source.is_test_file() && !source.path.contains("/examples/") {
        findings.extend(matches(source, &ENVIRONMENT, "only the command line reads flags and the environment", &tests));
        if !source.path.starts_with(TELEMETRY) {
            findings.extend(matches(source, &PRINT, "a library does not print", &tests));
        }
    }
    findings
}

fn sizes(source: &Source<'_>, tests: &[Range<usize>]) -> Vec<String> {
    let mut findings = Vec::new();
    let inline: usize = tests.iter().map(ExactSizeIterator::len).sum();
    if !source.is_test_file() && inline > MAX_INLINE_TEST_LINES {
        let at = tests[0].start + 1;
        findings.push(finding(
            source,
            at,
            format!("{inline} lines of tests; over {MAX_INLINE_TEST_LINES} go to their own file"),
        ));
    }
    let num_lines = source.lines.len() - inline;
    let is_lib = source.path.ends_with("src/lib.rs");
    let limit = if is_lib { MAX_LIB_LINES } else { MAX_FILE_LINES };
    if !source.is_test_file() && num_lines > limit {
        findings.push(finding(source, limit, format!("{num_lines} lines without tests; at most {limit}")));
    }
    findings
}

fn functions(source: &Source<'_>) -> Vec<String> {
    let is_excused = |line: usize| {
        let before = &source.lines[line.saturating_sub(ATTRIBUTE_LINES)..line];
        before.iter().any(|l| l.contains("expect(clippy::too_many_lines"))
    };
    let is_long = |f: &super::source::Function| f.num_lines > MAX_FUNCTION_LINES && !is_excused(f.line);
    let describe = |f: super::source::Function| {
        finding(source, f.line + 1, format!("fn {} has {} lines; at most {MAX_FUNCTION_LINES}", f.name, f.num_lines))
    };
    source.functions().into_iter().filter(is_long).map(describe).collect()
}

/// Lines too wide; the inside of a string does not count, since it cannot be broken without changing it.
fn widths(source: &Source<'_>) -> Vec<String> {
    let mut findings = Vec::new();
    for (number, (line, code)) in source.lines.iter().zip(source.code.lines()).enumerate() {
        let masked = code.chars().filter(|c| *c == LITERAL).count();
        let width = line.chars().count() - masked;
        if width > MAX_WIDTH {
            findings.push(finding(source, number + 1, format!("{width} columns; at most {MAX_WIDTH}")));
        }
    }
    findings
}

/// Lints silenced without a reason, in the attribute or in a comment beside it.
fn silenced(source: &Source<'_>) -> Vec<String> {
    let mut findings = Vec::new();
    for found in SILENCED.find_iter(&source.code) {
        let first = source.line_of(found.start());
        let length = source.code[found.start()..].find(']').unwrap_or(0);
        let last = source.line_of(found.start() + length);
        let has_reason = source.lines[first..=last].iter().any(|line| line.contains("reason =") || line.contains("//"));
        let has_comment = first > 0 && source.lines[first - 1].trim_start().starts_with("// ");
        if !has_reason && !has_comment {
            findings.push(finding(source, first + 1, "a lint is silenced without a reason".to_owned()));
        }
    }
    findings
}

fn matches(source: &Source<'_>, pattern: &Regex, what: &str, except: &[Range<usize>]) -> Vec<String> {
    let lines = pattern.find_iter(&source.code).map(|found| source.line_of(found.start()));
    let counted = lines.filter(|line| !except.iter().any(|range| range.contains(line)));
    counted.map(|line| finding(source, line + 1, format!("{what}: `{}`", source.lines[line].trim()))).collect()
}

fn finding(source: &Source<'_>, line: usize, what: String) -> String {
    format!("{}:{line}: {what}", source.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, content: &str) -> Vec<String> {
        check(&Source::new(path, content))
    }

    /// One finding, at this line, with this text.
    fn check_one(path: &str, content: &str, line: usize, part: &str) {
        let found = findings(path, content);
        assert_eq!(found.len(), 1, "{path}: {found:?}");
        assert!(found[0].starts_with(&format!("{path}:{line}: ")) && found[0].contains(part), "{found:?}");
    }

    fn lines(number: usize) -> String {
        "static X: u8 = 1;\n".repeat(number)
    }

    fn function(body_lines: usize) -> String {
        format!(
            "fn long<const N: usize>(x: [u8; 3]) -> u8 {{\n{}    1\n}}\n",
            "    call('{', \"}\");\n".repeat(body_lines - 1)
        )
    }

    #[test]
    fn sizes_are_limited_without_the_tests() {
        assert_eq!(findings("a/src/x.rs", &lines(800)), Vec::<String>::new());
        check_one("a/src/x.rs", &lines(801), 800, "801 lines");
        assert_eq!(findings("a/tests/x.rs", &lines(900)), Vec::<String>::new());
        check_one("a/src/lib.rs", &lines(151), 150, "151 lines");
        let with_tests = |number| format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", lines(700), lines(number));
        assert_eq!(findings("a/src/x.rs", &with_tests(140)), Vec::<String>::new());
        check_one("a/src/x.rs", &with_tests(160), 701, "163 lines of tests");
    }

    #[test]
    fn functions_are_limited_in_lines_of_code() {
        assert_eq!(findings("a/src/x.rs", &function(70)), Vec::<String>::new());
        check_one("a/src/x.rs", &function(71), 1, "fn long has 71 lines");
        let commented = function(70).replacen('\n', "\n    // why\n\n    /* { */\n", 1);
        assert_eq!(findings("a/src/x.rs", &commented), Vec::<String>::new());
        let excused = format!("#[expect(clippy::too_many_lines, reason = \"a table\")]\n{}", function(90));
        assert_eq!(findings("a/src/x.rs", &excused), Vec::<String>::new());
    }

    #[test]
    fn stubs_and_silenced_checks_are_found_in_code_only() {
        for stub in ["todo!()", "unimplemented!()", "dbg!(x)"] {
            check_one("a/src/x.rs", &format!("fn f() {{\n    {stub};\n}}\n"), 2, "a stub");
            let harmless = format!("// {stub}\nconst A: &str = r#\"{stub}\"#;\n/* {stub} */\n");
            assert_eq!(findings("a/src/x.rs", &harmless), Vec::<String>::new());
        }
        check_one("a/tests/x.rs", "#[test]\n#[ignore]\nfn f() {}\n", 2, "ignored");
        check_one("a/src/x.rs", "#[allow(unused)]\nfn f() {}\n", 1, "without a reason");
        check_one("a/src/x.rs", "#[allow(dead_code, reason = \"later\")]\nfn f() {}\n", 1, "dead code");
        for fine in [
            "#[allow(unused, reason = \"r\")]\n",
            "#[expect(\n    unused,\n    reason = \"r\"\n)]\n",
            "// Why.\n#[allow(unused)]\n",
        ] {
            assert_eq!(findings("a/src/x.rs", &format!("{fine}fn f() {{}}\n")), Vec::<String>::new());
        }
    }

    #[test]
    fn libraries_neither_print_nor_read_the_environment() {
        check_one("actor/src/x.rs", "fn f() {\n    println!();\n}\n", 2, "does not print");
        check_one("actor/src/x.rs", "fn f() {\n    std::env::var(\"A\");\n}\n", 2, "environment");
        let in_tests = "#[cfg(test)]\nmod tests {\n    fn f() {\n        println!();\n    }\n}\n";
        assert_eq!(findings("actor/src/x.rs", in_tests), Vec::<String>::new());
        assert_eq!(findings("cli/src/x.rs", "fn f() {\n    println!();\n}\n"), Vec::<String>::new());
    }

    #[test]
    fn width_counts_code_and_comments_but_no_string() {
        check_one("a/src/x.rs", &format!("// {}\n", "x".repeat(118)), 1, "121 columns");
        let text = format!("const A: &str = \"{}\";\n", "x".repeat(200));
        assert_eq!(findings("a/src/x.rs", &text), Vec::<String>::new());
        let lifetimes = format!("fn f<'a>(x: &'a str, y: char) -> &'a str {{ {} }}\n", "x ".repeat(50));
        check_one("a/src/x.rs", &lifetimes, 1, "columns");
    }
}
