use super::*;
use std::collections::HashSet;

const SORT: Task = Task::SortDigits { min_digits: 4, max_digits: 6 };
const REVERSE: Task = Task::ReverseDigits { min_digits: 3, max_digits: 5 };
const SUM: Task = Task::ChainSum { min_terms: 2, max_terms: 4, min_digits: 1, max_digits: 3 };

fn config(generator: Task, split: Split, num_rows: u64, seed: u64) -> TaskConfig {
    TaskConfig {
        generator,
        split,
        num_rows,
        seed,
        demonstration: Demonstration::None,
        preferences: false,
        unpaired: false,
        wrong_answer: WrongAnswer::NearMiss,
    }
}

fn text(content: &Option<PromptContent>) -> &str {
    match content {
        Some(PromptContent::Text(text)) => text,
        other => panic!("expected text, found {other:?}"),
    }
}

fn prompt(row: &PromptRow) -> &str {
    match &row.prompt {
        PromptContent::Text(text) => text,
        other => panic!("expected text, found {other:?}"),
    }
}

fn sorted(text: &str) -> String {
    let mut chars: Vec<char> = text.chars().collect();
    chars.sort_unstable();
    chars.into_iter().collect()
}

/// The answer, worked out from the prompt's text alone.
fn solve(task: Task, prompt: &str) -> String {
    let body = prompt.strip_suffix('=').expect("prompts end in =");
    match task {
        Task::SortDigits { .. } => sorted(body.strip_prefix("sort ").expect("names the task")),
        Task::ReverseDigits { .. } => body.strip_prefix("reverse ").expect("names the task").chars().rev().collect(),
        Task::ChainSum { .. } => {
            let spaced = body.replace('+', " ").replace('-', " -");
            spaced.split(' ').map(|term| term.parse::<i64>().expect("terms are numbers")).sum::<i64>().to_string()
        }
    }
}

#[test]
fn answers_are_right_and_written_in_the_alphabet() {
    for task in [SORT, REVERSE, SUM] {
        let alphabet: HashSet<char> = task.alphabet().into_iter().collect();
        for split in [Split::Train, Split::Test] {
            for row in config(task, split, 300, 5).rows().expect("the task is valid") {
                let answer = row.ground_truth.as_deref().expect("every row has an answer");
                assert_eq!(solve(task, prompt(&row)), answer, "{}", prompt(&row));
                assert!(prompt(&row).chars().chain(answer.chars()).all(|c| alphabet.contains(&c)));
                assert_eq!(row.data_source, format!("temper/{}", task.name()));
            }
        }
    }
}

#[test]
fn lengths_cover_the_whole_range() {
    let rows = config(SORT, Split::Train, 300, 0).rows().expect("the task is valid");
    let lengths: HashSet<usize> = rows.iter().map(|row| row.ground_truth.as_ref().map_or(0, String::len)).collect();
    assert_eq!(lengths, HashSet::from([4, 5, 6]));
}

/// Whatever the seeds, no list of the test split is in the train split, in any order.
#[test]
fn held_out_lists_are_never_seen_in_training() {
    let contents = |split, seed| -> HashSet<String> {
        let rows = config(SORT, split, 3000, seed).rows().expect("the task is valid");
        rows.into_iter().filter_map(|row| row.ground_truth).collect()
    };
    let train: HashSet<String> = contents(Split::Train, 1).union(&contents(Split::Train, 2)).cloned().collect();
    let test: HashSet<String> = contents(Split::Test, 1).union(&contents(Split::Test, 3)).cloned().collect();
    assert!(train.len() > 1500 && test.len() > 300, "{} and {}", train.len(), test.len());
    assert!(train.is_disjoint(&test));
}

#[test]
fn a_row_depends_on_its_index_and_seed_alone() {
    let few = config(SORT, Split::Train, 10, 7).rows().expect("the task is valid");
    let many = config(SORT, Split::Train, 20, 7);
    for (index, row) in few.iter().enumerate() {
        assert_eq!(&many.row(index as u64).expect("the task is valid"), row);
    }
    assert_ne!(few, config(SORT, Split::Train, 10, 8).rows().expect("the task is valid"));
}

/// The rows of recipes that are already out stay what they are.
#[test]
fn the_first_rows_are_frozen() {
    let rows = config(SORT, Split::Train, 3, 0).rows().expect("the task is valid");
    let found: Vec<&str> = rows.iter().map(prompt).collect();
    assert_eq!(found, ["sort 056878=", "sort 69755=", "sort 961507="]);
}

#[test]
fn permutations_show_the_format_without_the_skill() {
    let mut demonstrating = config(SORT, Split::Train, 500, 3);
    demonstrating.demonstration = Demonstration::RandomPermutation;
    let rows = demonstrating.rows().expect("the task is valid");
    let mut solved = 0;
    for row in &rows {
        let (shown, answer) = (text(&row.completion), row.ground_truth.as_deref().unwrap_or_default());
        assert_eq!(sorted(shown), answer);
        solved += usize::from(shown == answer);
    }
    assert!(solved < 50, "{solved} of 500 demonstrations happen to be right");
    demonstrating.demonstration = Demonstration::Solution;
    for row in demonstrating.rows().expect("the task is valid") {
        assert_eq!(Some(text(&row.completion)), row.ground_truth.as_deref());
    }
}

#[test]
fn rejected_responses_are_wrong_and_as_long() {
    for task in [SORT, REVERSE, SUM, Task::SortDigits { min_digits: 1, max_digits: 2 }] {
        for wrong_answer in [WrongAnswer::NearMiss, WrongAnswer::RandomPermutation, WrongAnswer::Mixed] {
            let preferring = TaskConfig { preferences: true, wrong_answer, ..config(task, Split::Train, 300, 4) };
            for row in preferring.rows().expect("the task is valid") {
                let (chosen, rejected) = (text(&row.chosen), text(&row.rejected));
                assert_eq!(Some(chosen), row.ground_truth.as_deref());
                assert_ne!(chosen, rejected, "{wrong_answer:?}");
                assert_eq!(chosen.len(), rejected.len());
            }
        }
    }
}

/// Four kinds in about equal parts but for the lengths: orders of the digits, other digits in order, other lengths.
#[test]
fn varied_wrong_answers_differ_in_order_in_digits_and_in_length() {
    let config =
        TaskConfig { preferences: true, wrong_answer: WrongAnswer::Varied, ..config(SORT, Split::Train, 400, 4) };
    let (mut orders, mut digits, mut lengths) = (0, 0, 0);
    for row in config.rows().expect("the task is valid") {
        let (chosen, rejected) = (text(&row.chosen), text(&row.rejected));
        assert_ne!(chosen, rejected);
        let sorted = |text: &str| {
            let mut bytes = text.as_bytes().to_vec();
            bytes.sort_unstable();
            bytes
        };
        let same_digits = sorted(rejected) == sorted(chosen);
        assert!(same_digits || sorted(rejected) == rejected.as_bytes(), "{rejected} is not in order");
        orders += usize::from(same_digits);
        lengths += usize::from(chosen.len() != rejected.len());
        digits += usize::from(!same_digits && chosen.len() == rejected.len());
    }
    assert!(orders > 150 && digits > 60 && lengths > 60, "{orders} {digits} {lengths}");
}

/// The unpaired form of a preference set: the same prompts, right and wrong answers in turn.
#[test]
fn unpaired_rows_carry_the_label_of_their_completion() {
    let pairs = TaskConfig { preferences: true, ..config(SORT, Split::Train, 200, 4) };
    let unpaired = TaskConfig { preferences: false, unpaired: true, ..pairs.clone() };
    let rows = unpaired.rows().expect("the task is valid");
    for (pair, row) in pairs.rows().expect("the task is valid").iter().zip(&rows) {
        let expected = if row.label == Some(true) { &pair.chosen } else { &pair.rejected };
        assert_eq!((prompt(row), &row.completion), (prompt(pair), expected));
        assert!(row.chosen.is_none() && row.rejected.is_none() && pair.label.is_none());
    }
    assert_eq!(rows.iter().filter(|row| row.label == Some(true)).count(), 100);
    let both = TaskConfig { demonstration: Demonstration::Solution, ..unpaired };
    let error = both.rows().expect_err("two writers of one column").to_string();
    assert!(error.contains("unpaired = true: expected no `demonstration`"), "{error}");
}

#[test]
fn bad_configurations_name_the_key() {
    let cases = [
        (Task::SortDigits { min_digits: 0, max_digits: 3 }, "min_digits = 0"),
        (Task::SortDigits { min_digits: 5, max_digits: 4 }, "min_digits = 5"),
        (Task::ReverseDigits { min_digits: 1, max_digits: 65 }, "max_digits = 65"),
        (Task::ChainSum { min_terms: 1, max_terms: 2, min_digits: 1, max_digits: 1 }, "min_terms = 1"),
        (Task::ChainSum { min_terms: 2, max_terms: 65, min_digits: 1, max_digits: 1 }, "max_terms = 65"),
        (Task::ChainSum { min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 10 }, "max_digits = 10"),
    ];
    for (task, expected) in cases {
        let error = config(task, Split::Train, 1, 0).rows().expect_err(expected).to_string();
        assert!(error.contains(expected) && error.contains(task.name()), "{error}");
    }
    let error = config(SORT, Split::Train, 0, 0).rows().expect_err("no rows").to_string();
    assert_eq!(error, "task `sort_digits`: num_rows = 0: expected at least 1");
}

#[test]
fn configurations_read_strictly() {
    let good = r#"{"generator":{"task":"sort_digits","min_digits":4,"max_digits":6},"num_rows":8}"#;
    assert_eq!(serde_json::from_str::<TaskConfig>(good).expect("well formed"), config(SORT, Split::Train, 8, 0));
    for bad in [
        r#"{"generator":{"task":"sort_digits","min_digits":4,"max_digits":6},"num_rows":8,"shuffle":1}"#,
        r#"{"generator":{"task":"sort_digits","min_digits":4,"max_digits":6,"x":1},"num_rows":8}"#,
        r#"{"generator":{"task":"sort_letters","min_digits":4,"max_digits":6},"num_rows":8}"#,
        r#"{"generator":{"task":"sort_digits","min_digits":4},"num_rows":8}"#,
    ] {
        assert!(serde_json::from_str::<TaskConfig>(bad).is_err(), "{bad}");
    }
}
