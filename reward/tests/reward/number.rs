use crate::{RIGHT, WRONG, Want, check};

fn check_number(cases: &[(&'static str, &'static str, Want)]) {
    check("\"number\"", &with_truth(cases));
}

fn with_truth(cases: &[(&'static str, &'static str, Want)]) -> Vec<(&'static str, Option<&'static str>, Want)> {
    cases.iter().map(|&(response, truth, want)| (response, Some(truth), want)).collect()
}

#[test]
fn the_answer_is_found_in_the_response() {
    check_number(&[
        ("42", "42", RIGHT),
        ("42.0", "42", RIGHT),
        ("The answer is 42.", "42", RIGHT),
        ("the answer is not 42", "42", WRONG),
        ("It isn't 42", "42", WRONG),
        ("it is not equal to 42", "42", WRONG),
        ("x \u{2260} 42", "42", WRONG),
        ("x != 42", "42", WRONG),
        ("it is not 41 but 42", "42", RIGHT),
        ("first 41, then 42", "42", RIGHT),
        ("42, or maybe 41", "42", WRONG),
        ("#### 42", "42", RIGHT),
        ("7 + 35\n#### 42\nThat took 3 steps.", "42", RIGHT),
        ("#### 41 or 42", "42", WRONG),
        ("#### none, though 42 came first\nthen 42", "42", RIGHT),
        ("42\n####", "42", WRONG),
        ("so \\boxed{42}, and 7 more", "42", RIGHT),
        ("42 but \\boxed{41}", "42", WRONG),
        ("\\boxed{41 or 42}", "42", WRONG),
        ("\\boxed{x = 42}", "42", RIGHT),
        ("\\boxed{}", "42", WRONG),
        ("\\boxed{42", "42", WRONG),
    ]);
}

#[test]
fn spellings_of_a_number_are_compared_exactly() {
    check_number(&[
        ("1/3", "0.333", WRONG),
        ("0.333", "1/3", WRONG),
        ("2/6", "1/3", RIGHT),
        ("0.25", "1/4", RIGHT),
        ("-7", "7", WRONG),
        ("7", "-7", WRONG),
        ("\u{2212}7", "-7", RIGHT),
        ("\u{2013}7", "-7", RIGHT),
        ("- 7", "7", RIGHT),
        ("10-7", "7", RIGHT),
        ("10-7", "-7", WRONG),
        ("-\\frac{1}{2}", "-0.5", RIGHT),
        ("\\dfrac{3}{4}", "0.75", RIGHT),
        ("\\frac12", "1/2", RIGHT),
        ("\\frac{-1}{2}", "-1/2", RIGHT),
        ("1 1/2", "1.5", RIGHT),
        ("1\\frac{1}{2}", "3/2", RIGHT),
        ("1,234", "1234", RIGHT),
        ("1{,}234", "1234", RIGHT),
        ("1234", "1,234", RIGHT),
        ("1,2345", "12345", WRONG),
        ("1,234,567.5", "1234567.5", RIGHT),
        ("$5", "5", RIGHT),
        ("\\$5.00", "5", RIGHT),
        ("-$5", "-5", RIGHT),
        ("$-5", "-5", RIGHT),
        ("\u{A3}5 in all", "5", RIGHT),
        ("50%", "0.5", RIGHT),
        ("50 %", "50%", RIGHT),
        ("50\\%", "1/2", RIGHT),
        ("50%", "50", WRONG),
        ("1e3", "1000", RIGHT),
        ("1.5E-3", "0.0015", RIGHT),
        ("6.02 \\times 10^{23}", "602000000000000000000000", RIGHT),
        ("3 \u{D7} 10^-2", "0.03", RIGHT),
        ("007", "7", RIGHT),
        (".5", "0.5", RIGHT),
        ("x2", "2", WRONG),
        ("H2O", "2", WRONG),
        ("5km", "5", RIGHT),
        ("1/0", "0", WRONG),
        ("", "42", WRONG),
        ("no number here", "42", WRONG),
        ("\u{7B54}\u{6848}\u{662F}42", "42", RIGHT),
        ("0", "-0", RIGHT),
        ("170141183460469231731687303715884105728", "170141183460469231731687303715884105727", WRONG),
        ("9007199254740993", "9007199254740992", WRONG),
        ("100000000000000000000000000000000000000000000000000", "1e50", RIGHT),
        ("0.1", "0.10000000000000000000000000000000000000001", WRONG),
    ]);
}

#[test]
fn a_ground_truth_that_cannot_be_read_is_a_failure() {
    check(
        "\"number\"",
        &[
            ("42", None, Want::Failure("reward `number` failed: the sample has no ground truth")),
            ("42", Some("forty-two"), Want::Failure("ground truth `forty-two` is no number")),
            ("42", Some(""), Want::Failure("is no number")),
            ("42", Some("41 or 42"), Want::Failure("is no number")),
            ("42", Some("42 apples"), Want::Failure("is no number")),
            ("42", Some("1/0"), Want::Failure("is no number")),
            ("no answer at all", Some("?"), Want::Failure("is no number")),
            ("42", Some("6 * 7 steps\n#### 42"), RIGHT),
            ("42", Some("\\boxed{42}"), RIGHT),
            ("42", Some("$42$"), RIGHT),
            ("42", Some(" 42. "), RIGHT),
        ],
    );
}

#[test]
fn tolerances_and_percent_are_chosen() {
    check(
        "{ components = [{ kind = \"number\", tolerance = 0.001 }] }",
        &with_truth(&[
            ("0.333", "1/3", RIGHT),
            ("0.33", "1/3", WRONG),
            ("42.0005", "42", RIGHT),
            ("1e999", "1", WRONG),
        ]),
    );
    check(
        "{ components = [{ kind = \"number\", relative_tolerance = 0.01 }] }",
        &with_truth(&[
            ("990", "1000", RIGHT),
            ("989", "1000", WRONG),
            ("0.0001", "0", WRONG),
            ("1e999", "1e999", RIGHT),
        ]),
    );
    check(
        "{ components = [{ kind = \"number\", percent = \"unit\" }] }",
        &with_truth(&[("50%", "50", RIGHT), ("50%", "0.5", WRONG)]),
    );
}
