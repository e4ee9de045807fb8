use super::*;
use proptest::prelude::*;
use temper_types::{ChatMessage, PromptContent};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn text(content: &str) -> PromptContent {
    PromptContent::Text(content.to_owned())
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

/// The rows of a file with this name and content.
fn read(name: &str, content: &[u8]) -> Result<Vec<PromptRow>, Error> {
    let dir = tempfile::tempdir().expect("the system gives a temporary directory");
    let path = dir.path().join(name);
    std::fs::write(&path, content).expect("writable");
    read_prompts(&[path])
}

fn read_line(line: &str) -> PromptRow {
    read("rows.jsonl", line.as_bytes()).expect(line).remove(0)
}

#[test]
fn verl_rows_are_the_same_from_every_format() {
    let from_json = read_prompts(&[fixture("chain_sum.jsonl")]).expect("a whole file");
    assert_eq!(from_json.len(), 20);
    let first = &from_json[0];
    assert_eq!(first.data_source, "reasoning_gym/chain_sum");
    assert!(matches!(&first.prompt, PromptContent::Messages(m) if m.len() == 1 && m[0].role == "user"));
    assert_eq!(first.ability.as_deref(), Some("reasoning"));
    assert!(first.ground_truth.as_deref().is_some_and(|truth| truth.parse::<i64>().is_ok()));
    assert!(first.extra_info.as_deref().is_some_and(|info| info.starts_with("{\"split\":\"test\",\"index\":1000,")));
    for other in ["chain_sum.parquet", "chain_sum.arrow"] {
        assert_eq!(read_prompts(&[fixture(other)]).expect(other), from_json, "{other}");
    }
}

#[test]
fn files_follow_each_other_and_rows_are_numbered_over_all() {
    let rows = read_prompts(&[fixture("chain_sum.jsonl"), fixture("chain_sum.parquet")]).expect("whole files");
    assert_eq!(rows.iter().map(|row| row.prompt_id.0).collect::<Vec<_>>(), (0..40).collect::<Vec<_>>());
    assert_eq!(rows[20].prompt, rows[0].prompt);
}

#[test]
fn the_first_bytes_tell_where_the_name_does_not() {
    for name in ["chain_sum.jsonl", "chain_sum.parquet", "chain_sum.arrow"] {
        let bytes = std::fs::read(fixture(name)).expect("a fixture");
        assert_eq!(read("prompts", &bytes).expect(name).len(), 20, "{name}");
    }
}

#[test]
fn a_saved_dataset_directory_is_read_by_its_state() {
    let samples = [crate::trajectories::fixtures::full()];
    let dir = tempfile::tempdir().expect("the system gives a temporary directory");
    let mut writer = crate::trajectories::DatasetWriter::open(dir.path(), "r").expect("writable");
    writer.write_step(temper_types::Step(1), &samples).expect("writable");
    let rows = read_prompts(&[dir.path()]).expect("a whole dataset");
    assert_eq!(rows[0].ground_truth.as_deref(), Some("2568"));
    assert_eq!(rows[0].prompt, PromptContent::TokenIds(vec![1, 2]));
}

#[test]
fn trl_rows_are_read_in_all_their_forms() {
    let row = read_line(r#"{"prompt":"a","completion":"b","chosen":"c","rejected":"d","margin":2}"#);
    assert_eq!(row.margin, Some(2.0));
    assert_eq!((row.prompt, row.completion), (text("a"), Some(text("b"))));
    assert_eq!((row.chosen, row.rejected), (Some(text("c")), Some(text("d"))));
    assert_eq!(row.data_source, "rows");

    let row = read_line(
        r#"{"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"b","name":null}]}"#,
    );
    assert_eq!(row.completion, Some(PromptContent::Messages(vec![message("assistant", "b")])));

    let row = read_line(
        r#"{"chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"c"}],
            "rejected":[{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}"#
            .replace('\n', " ")
            .as_str(),
    );
    assert_eq!(row.prompt, PromptContent::Messages(vec![message("user", "q")]));
    assert_eq!(row.chosen, Some(PromptContent::Messages(vec![message("assistant", "c")])));
    assert_eq!(row.rejected, Some(PromptContent::Messages(vec![message("assistant", "r")])));
}

#[test]
fn token_ids_win_over_text() {
    let row = read_line(r#"{"prompt":"a","prompt_token_ids":[5,0,4294967295]}"#);
    assert_eq!(row.prompt, PromptContent::TokenIds(vec![5, 0, u32::MAX]));
}

#[test]
fn ground_truth_comes_from_the_nearest_column_as_text() {
    for (columns, expected) in [
        (r#""reward_model":{"style":"rule","ground_truth":"7"},"answer":"8""#, Some("7")),
        (r#""reward_model":{"style":"rule","ground_truth":null},"ground_truth":9,"answer":"8""#, Some("9")),
        (r#""answer":{"target":[1,2.5],"ok":true}"#, Some(r#"{"target":[1,2.5],"ok":true}"#)),
        (r#""reward_model":null"#, None),
    ] {
        let row = read_line(&format!("{{\"prompt\":\"p\",{columns}}}"));
        assert_eq!(row.ground_truth.as_deref(), expected, "{columns}");
    }
}

#[test]
fn extra_info_is_json_text_and_never_encoded_twice() {
    for (given, expected) in
        [(r#"{"a":1}"#, r#"{"a":1}"#), (r#""{\"a\": 1}""#, r#"{"a": 1}"#), (r#""plain""#, r#""plain""#), ("3", "3")]
    {
        let row = read_line(&format!("{{\"prompt\":\"p\",\"extra_info\":{given}}}"));
        assert_eq!(row.extra_info.as_deref(), Some(expected), "{given}");
    }
}

#[test]
fn blank_lines_carriage_returns_and_a_byte_order_mark_are_no_rows() {
    let rows = read("p.jsonl", b"\xef\xbb\xbf{\"prompt\":\"a\"}\r\n\r\n  \n{\"prompt\":\"b\"}").expect("two rows");
    assert_eq!(rows.iter().map(|row| row.prompt.clone()).collect::<Vec<_>>(), [text("a"), text("b")]);
}

#[test]
fn errors_name_file_place_column_and_what_would_be_right() {
    let cases: [(&str, &str, &[&str]); 17] = [
        ("a.jsonl", "", &["a.jsonl", "holds no prompt", "at least one row"]),
        ("a.jsonl", "\n\n", &["a.jsonl", "holds no prompt"]),
        ("a.parquet", "", &["a.parquet", "empty", "expected Parquet"]),
        ("a.arrow", "", &["a.arrow", "empty", "expected an Arrow IPC"]),
        ("a.parquet", "{\"prompt\":\"a\"}", &["a.parquet", "not readable as Parquet"]),
        ("a.arrow", "{\"prompt\":\"a\"}", &["a.arrow", "no Arrow IPC data"]),
        (
            "a.jsonl",
            "{\"prompt\":\"a\"}\n{\"prompt\":",
            &["a.jsonl, line 2", "bad JSON at character", "one JSON object a line"],
        ),
        ("a.jsonl", "[1]", &["a.jsonl, line 1", "a list: expected one JSON object"]),
        ("a.jsonl", "{\"question\":\"a\"}", &["line 1, column `prompt`", "missing: expected `prompt`"]),
        ("a.jsonl", "{\"prompt\":3}", &["column `prompt`: a number where text or a list of chat messages"]),
        ("a.jsonl", "{\"prompt\":[]}", &["column `prompt`: an empty list"]),
        ("a.jsonl", "{\"prompt\":[\"a\"]}", &["column `prompt[0]`: a string where a chat message"]),
        ("a.jsonl", "{\"prompt\":[{\"role\":\"user\"}]}", &["`prompt[0].content`: missing"]),
        ("a.jsonl", "{\"prompt\":[{\"role\":\"u\",\"content\":[]}]}", &["`prompt[0].content`: a list where a string"]),
        (
            "a.jsonl",
            "{\"prompt\":[{\"role\":\"u\",\"content\":\"\",\"tool_calls\":[]}]}",
            &["`prompt[0].tool_calls`", "not supported"],
        ),
        ("a.jsonl", "{\"prompt_token_ids\":[1,-1]}", &["`prompt_token_ids[1]`: -1: expected a token id"]),
        ("a.jsonl", "{\"prompt\":\"p\",\"reward_model\":\"7\"}", &["`reward_model`: a string where an object"]),
    ];
    for (name, content, expected) in cases {
        let error = read(name, content.as_bytes()).expect_err(content).to_string();
        for part in expected {
            assert!(error.contains(part), "{content:?}: {error:?} does not say {part:?}");
        }
    }
    let error = read_prompts(&[Path::new("no/such/file.jsonl")]).expect_err("no file").to_string();
    assert!(error.starts_with("cannot read no/such/file.jsonl: "), "{error}");
}

/// A table without a prompt column is named with the columns that it has.
#[test]
fn a_table_of_other_columns_is_refused() {
    let dir = tempfile::tempdir().expect("the system gives a temporary directory");
    let path = dir.path().join("q.arrow");
    let column: arrow_array::ArrayRef = std::sync::Arc::new(arrow_array::StringArray::from(vec!["x"]));
    let batch = arrow_array::RecordBatch::try_from_iter([("question", column)]).expect("one column");
    let file = std::fs::File::create(&path).expect("writable");
    let mut writer = arrow_ipc::writer::StreamWriter::try_new(file, &batch.schema()).expect("writable");
    writer.write(&batch).and_then(|()| writer.finish()).expect("writable");
    let error = read_prompts(&[path]).expect_err("no prompt").to_string();
    assert!(error.contains("q.arrow: no prompt column among [question]"), "{error}");
}

/// Files that pyarrow wrote: what cannot be decoded is said to be that, and not damaged.
#[test]
fn a_compression_is_read_or_named() {
    for name in ["zstd.feather", "lz4.feather", "gzip.parquet", "lz4.parquet"] {
        let rows = read_prompts(&[fixture(name)]).expect(name);
        assert_eq!(rows[0].prompt, text(&"2 + 2 = ".repeat(20)), "{name}");
    }
    let error = read_prompts(&[fixture("brotli.parquet")]).expect_err("an unknown compression").to_string();
    assert!(error.contains("brotli.parquet") && error.contains("compressed with BROTLI"), "{error}");
    assert!(error.contains("not supported") && !error.contains("damaged"), "{error}");
}

/// A buffer that claims to hold 2^62 bytes is refused before memory is asked for.
#[test]
fn a_compressed_buffer_that_claims_too_much_is_refused() {
    let mut bytes = std::fs::read(fixture("zstd.feather")).expect("a fixture");
    // The length stands before the frame, which begins with its magic number.
    let claim = [&160_i64.to_le_bytes()[..], &[0x28, 0xb5, 0x2f, 0xfd]].concat();
    let at = bytes.windows(12).position(|window| window == claim).expect("the length of 20 times 8 characters");
    bytes[at..at + 8].copy_from_slice(&(1_i64 << 62).to_le_bytes());
    let error = read("claim.feather", &bytes).expect_err("too much").to_string();
    assert!(error.contains("claim.feather") && error.contains("claims to hold 4611686018427387904"), "{error}");
}

/// No cut of a binary file is taken for a whole one.
#[test]
fn truncated_tables_are_errors() {
    for name in ["chain_sum.parquet", "chain_sum.arrow"] {
        let bytes = std::fs::read(fixture(name)).expect("a fixture");
        for length in (0..bytes.len()).step_by(37) {
            let error = read(name, &bytes[..length]).expect_err("a cut file").to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Changed bytes give rows or an error that names the file, never a panic.
    #[test]
    fn mutated_files_never_panic(
        which in 0usize..6,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<Option<prop::sample::Index>>(),
    ) {
        let plain = ["chain_sum.jsonl", "chain_sum.parquet", "chain_sum.arrow"];
        let name = [&plain[..], &["zstd.feather", "lz4.feather", "gzip.parquet"]].concat()[which];
        let mut bytes = std::fs::read(fixture(name)).expect("a fixture");
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Err(error) = read(name, &bytes) {
            prop_assert!(error.to_string().contains(name), "{}", error);
        }
    }

    /// Any text is rows or an error.
    #[test]
    fn any_bytes_as_jsonl_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Err(error) = read("any.jsonl", &bytes) {
            prop_assert!(error.to_string().contains("any.jsonl"), "{}", error);
        }
    }
}
