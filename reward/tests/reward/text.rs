use crate::{RIGHT, WRONG, Want, check, input, scorer};
use temper_types::{FinishReason, RewardOutcome};

#[test]
fn exact_match_strips_as_told() {
    check(
        "\"exact_match\"",
        &[
            (" 2568\n", Some("2568"), RIGHT),
            ("2568", Some("8526"), WRONG),
            ("25681", Some("2568"), WRONG),
            ("42.0", Some("42"), WRONG),
            ("Paris", Some("paris"), WRONG),
            ("\"Paris\"", Some("Paris"), WRONG),
            ("", Some("Paris"), WRONG),
            ("Paris", None, Want::Failure("reward `exact_match` failed: the sample has no ground truth")),
        ],
    );
    let strict = "{ components = [{ kind = \"exact_match\", strip = \"none\" }] }";
    check(strict, &[(" a", Some("a"), WRONG), ("a ", Some("a "), RIGHT)]);
    let loose = "{ components = [{ kind = \"exact_match\", strip = \"punctuation\", ignore_case = true }] }";
    check(loose, &[("**\"Paris.\"**", Some("paris"), RIGHT), ("\u{C9}T\u{C9}!", Some("\u{E9}t\u{E9}"), RIGHT)]);
}

#[test]
fn contains_and_regex() {
    check(
        "\"contains\"",
        &[
            ("it is Paris, I think", Some("Paris"), RIGHT),
            ("it is paris", Some("Paris"), WRONG),
            ("anything", Some("  "), Want::Failure("every response contains the empty text")),
            ("anything", None, Want::Failure("no ground truth")),
        ],
    );
    let own_text = "{ components = [{ kind = \"contains\", text = \"Therefore\", ignore_case = true }] }";
    check(own_text, &[("and therefore", None, RIGHT), ("hence", None, WRONG)]);
    let anywhere = "{ components = [{ kind = \"regex\", pattern = '\\d+' }] }";
    check(anywhere, &[("a 1 b", None, RIGHT), ("a b", None, WRONG)]);
    let whole = "{ components = [{ kind = \"regex\", pattern = 'a|b', scope = \"whole\" }] }";
    check(whole, &[("a", None, RIGHT), ("b", None, RIGHT), ("ab", None, WRONG), ("a\n", None, WRONG)]);
    let verbose = "{ components = [{ kind = \"regex\", pattern = '(?x) a # letter', scope = \"whole\" }] }";
    check(verbose, &[("a", None, RIGHT), ("ab", None, WRONG)]);
}

#[test]
fn a_pattern_that_makes_backtracking_engines_hang_is_linear() {
    let response = "a".repeat(100_000) + "b";
    let catastrophic = "{ components = [{ kind = \"regex\", pattern = '(a+)+$', scope = \"whole\" }] }";
    check(catastrophic, &[(&response, None, WRONG)]);
}

#[test]
fn format_wants_each_tag_once_in_order() {
    check(
        "\"format\"",
        &[
            ("<think>a</think><answer>b</answer>", None, RIGHT),
            ("\n<think>\na\n</think>\n\n<answer>b</answer>\n", None, RIGHT),
            ("<answer>b</answer><think>a</think>", None, WRONG),
            ("<think>a</think>", None, WRONG),
            ("<think>a</think><answer>b", None, WRONG),
            ("<think>a</think><answer></answer>", None, WRONG),
            ("<think>a</think> so <answer>b</answer>", None, WRONG),
            ("<think>a</think><answer>b</answer> bye", None, WRONG),
            ("<think>a</think><answer>b</answer><answer>c</answer>", None, WRONG),
            ("<think>a<think>b</think></think><answer>c</answer>", None, WRONG),
            ("<think>a<answer>b</answer></think>", None, WRONG),
            ("</think><think><answer>b</answer>", None, WRONG),
            ("", None, WRONG),
        ],
    );
    let loose = "{ components = [{ kind = \"format\", tags = [\"a\"], outside = \"allowed\" }] }";
    check(loose, &[("x <a>1</a> y", None, RIGHT), ("x <a>1</a> <a>2</a>", None, WRONG)]);
}

#[test]
fn json_parses_and_has_its_keys() {
    check("\"json\"", &[("{}", None, RIGHT), (" [1] ", None, RIGHT), ("{a: 1}", None, WRONG), ("", None, WRONG)]);
    let nested = "[".repeat(100_000);
    check("\"json\"", &[(&nested, None, WRONG)]);
    let keys =
        "{ components = [{ kind = \"json\", required = [\"a.b\"], types = { n = \"integer\", s = \"string\" } }] }";
    check(
        keys,
        &[
            (r#"{"a": {"b": null}, "n": 3, "s": "x"}"#, None, RIGHT),
            (r#"{"a": {}, "n": 3, "s": "x"}"#, None, WRONG),
            (r#"{"a": {"b": 1}, "n": 3.5, "s": "x"}"#, None, WRONG),
            (r#"{"a": {"b": 1}, "n": 3}"#, None, WRONG),
            ("[]", None, WRONG),
        ],
    );
}

#[test]
fn length_falls_with_the_distance_from_its_target() {
    let reward = "{ components = [{ kind = \"length\", target_tokens = 10, tolerance_tokens = 2 }] }";
    let of = |length: usize| "x".repeat(length);
    let cases = [(10, 1.0), (12, 1.0), (8, 1.0), (13, 0.9), (17, 0.5), (22, 0.0), (500, 0.0), (0, 0.2)];
    for (length, wanted) in cases {
        check(reward, &[(&of(length), None, Want::Reward(wanted))]);
    }
}

#[test]
fn overlong_costs_nothing_before_its_buffer() {
    let reward =
        "{ components = [{ kind = \"overlong\", max_tokens = 20, buffer_tokens = 10, truncated_penalty = 0.5 }] }";
    for (length, wanted) in [(0, 0.0), (10, 0.0), (15, -0.5), (20, -1.0), (25, -1.5)] {
        check(reward, &[(&"x".repeat(length), None, Want::Reward(wanted))]);
    }
    let cut_off = temper_reward::ScoreInput { finish_reason: FinishReason::Length, ..input("x", None) };
    assert_eq!(scorer(reward).score(cut_off).reward(), Some(-0.5));
}

#[test]
fn the_answer_is_looked_for_where_the_recipe_says() {
    let with = |extract: &str| format!("{{ components = [{{ kind = \"exact_match\", extract = {extract} }}] }}");
    check(&with("\"boxed\""), &[("a \\boxed{b} c", Some("b"), RIGHT), ("b", Some("b"), WRONG)]);
    check(&with("\"last_line\""), &[("a\nb\n", Some("b"), RIGHT), ("", Some(""), WRONG)]);
    check(&with("\"code_block\""), &[("```py\nx\n```", Some("x"), RIGHT), ("```py\nx\n", Some("x"), WRONG)]);
    check(&with("{ after = \"####\" }"), &[("x #### b\nc", Some("b"), RIGHT), ("b", Some("b"), WRONG)]);
    check(&with("{ tag = \"answer\" }"), &[("<answer>b</answer>", Some("b"), RIGHT), ("<answer>b", Some("b"), WRONG)]);
    let pattern = with("{ regex = { pattern = 'is (\\w+)' } }");
    check(&pattern, &[("x is a, y is b", Some("b"), RIGHT), ("b", Some("b"), WRONG)]);
    check(&with("{ tag = \"answer\" }"), &[("no tag", None, Want::Failure("no ground truth"))]);
}

#[test]
fn components_are_weighted_and_reported_in_order() {
    let reward = "{ components = [{ kind = \"number\", weight = 2.0 }, { kind = \"contains\", name = \"polite\", text = \"please\", weight = -0.5 }] }";
    let RewardOutcome::Scored { reward, components } = scorer(reward).score(input("please: 42", Some("42"))) else {
        panic!("both components can be computed");
    };
    assert_eq!(reward, 1.5);
    let parts: Vec<_> = components.iter().map(|c| (c.name.as_str(), c.value)).collect();
    assert_eq!(parts, [("number", 1.0), ("polite", 1.0)]);
}

#[test]
fn one_failed_component_fails_the_sample() {
    let reward = "{ components = [{ kind = \"format\" }, { kind = \"number\", name = \"answer\" }] }";
    check(reward, &[("<think>a</think><answer>1</answer>", Some("one"), Want::Failure("reward `answer` failed"))]);
    let overflowing =
        "{ components = [{ kind = \"json\", weight = 1e308 }, { kind = \"regex\", pattern = '', weight = 1e308 }] }";
    check(overflowing, &[("{}", None, Want::Failure("not finite"))]);
}
