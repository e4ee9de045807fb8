//! What holds for every input: no panic, finite values, and the same outcome for the same sample.

use crate::{input, scorer};
use proptest::prelude::*;
use temper_reward::Scorer;
use temper_types::RewardOutcome;

fn all_kinds() -> Vec<Scorer> {
    [
        "\"exact_match\"",
        "\"number\"",
        "{ components = [{ kind = \"number\", tolerance = 0.5, relative_tolerance = 0.1 }] }",
        "\"math\"",
        "\"format\"",
        "\"json\"",
        "\"contains\"",
        "{ components = [{ kind = \"regex\", pattern = '(\\w+)+$' }] }",
        "{ components = [{ kind = \"length\", target_tokens = 7 }] }",
        "{ components = [{ kind = \"overlong\", max_tokens = 9, buffer_tokens = 4 }] }",
        "{ components = [{ kind = \"math\", extract = \"boxed\" }] }",
        "{ components = [{ kind = \"math\", extract = \"code_block\" }] }",
        "{ components = [{ kind = \"number\", extract = { tag = \"answer\" } }] }",
        "{ components = [{ kind = \"number\", extract = { after = \"=\" } }] }",
        "{ components = [{ kind = \"json\", extract = { regex = { pattern = '(.)', group = 1 } } }] }",
    ]
    .into_iter()
    .map(scorer)
    .collect()
}

/// Texts made of the pieces that the verifiers look for.
fn answer_like() -> impl Strategy<Value = String> {
    const PIECES: &[&str] = &[
        "\\boxed{",
        "\\frac",
        "\\frac{1}{2}",
        "\\sqrt",
        "\\sqrt[3]",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "\\{",
        "\\}",
        "1",
        "0",
        "9",
        "23",
        ",",
        ".",
        "-",
        "+",
        "*",
        "/",
        "^",
        "%",
        "$",
        "=",
        " ",
        "\n",
        "x",
        "pi",
        "\\pi",
        "e5",
        "e-99",
        "####",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "```",
        "\\text{",
        "cm",
        "^2",
        "\u{2212}",
        "\u{D7}",
        "\u{E9}",
        "\u{1F600}",
        "not ",
        "\\times 10^{",
        "1e999999999",
        "340282366920938463463374607431768211456",
        "\"a\":",
    ];
    prop::collection::vec(prop::sample::select(PIECES), 0..24).prop_map(|pieces| pieces.concat())
}

fn check_outcome(outcome: &RewardOutcome) -> Result<(), TestCaseError> {
    match outcome {
        RewardOutcome::Scored { reward, components } => {
            prop_assert!(reward.is_finite() && components.iter().all(|c| c.value.is_finite()));
        }
        RewardOutcome::Failed(failure) => prop_assert!(!failure.scorer.is_empty() && !failure.cause.is_empty()),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(600) })]

    #[test]
    fn no_verifier_panics_on_any_text(response in ".*", truth in proptest::option::of(".*")) {
        for scorer in all_kinds_once() {
            check_outcome(&scorer.score(input(&response, truth.as_deref())))?;
        }
    }

    #[test]
    fn no_verifier_panics_on_texts_like_answers(response in answer_like(), truth in answer_like()) {
        for scorer in all_kinds_once() {
            let outcome = scorer.score(input(&response, Some(&truth)));
            check_outcome(&outcome)?;
            prop_assert_eq!(scorer.score(input(&response, Some(&truth))), outcome);
        }
    }

    #[test]
    fn integers_agree_with_themselves_and_no_other(a in any::<i64>(), b in any::<i64>()) {
        for kind in ["\"number\"", "\"math\""] {
            let scorer = scorer(kind);
            let response = format!("So the result is\n\\boxed{{{a}}}");
            prop_assert_eq!(scorer.score(input(&response, Some(&a.to_string()))).reward(), Some(1.0));
            let equal = f64::from(u8::from(a == b));
            prop_assert_eq!(scorer.score(input(&response, Some(&b.to_string()))).reward(), Some(equal));
        }
    }

    #[test]
    fn fractions_agree_where_their_cross_products_do(a in -50i64..50, b in 1i64..50, c in -50i64..50, d in 1i64..50) {
        let equal = Some(f64::from(u8::from(a * d == c * b)));
        let (response, truth) = (format!("\\boxed{{\\frac{{{a}}}{{{b}}}}}"), format!("{c}/{d}"));
        for kind in ["\"number\"", "\"math\""] {
            prop_assert_eq!(scorer(kind).score(input(&response, Some(&truth))).reward(), equal, "{}", kind);
        }
    }
}

fn all_kinds_once() -> &'static [Scorer] {
    static SCORERS: std::sync::OnceLock<Vec<Scorer>> = std::sync::OnceLock::new();
    SCORERS.get_or_init(all_kinds)
}

/// Inputs of 200 kB that make careless scanners quadratic or worse. Every verifier handles every one of them in the
/// time of the whole test; a quadratic scan of one of them alone takes minutes.
#[test]
fn long_adversarial_responses_end_in_time() {
    let pieces = [
        "1",
        "9,999",
        "\\boxed{",
        "\\frac{",
        "\\text{a}",
        "((((",
        "----",
        "1/",
        "1 1/2",
        "```",
        "\\sqrt{2}+",
        "e9",
        "####",
        "<answer>",
        "{\"a\":",
        "not ",
        "\u{2212}",
        "1.1.",
    ];
    for piece in pieces {
        let response = piece.repeat(200_000 / piece.len());
        for scorer in all_kinds_once() {
            let outcome = scorer.score(input(&response, Some("1/3")));
            assert!(matches!(outcome, RewardOutcome::Scored { .. } | RewardOutcome::Failed(_)));
        }
    }
}
