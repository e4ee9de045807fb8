use crate::{RIGHT, WRONG, Want, check};

fn check_math(cases: &[(&'static str, &'static str, Want)]) {
    let cases: Vec<_> = cases.iter().map(|&(response, truth, want)| (response, Some(truth), want)).collect();
    check("\"math\"", &cases);
}

#[test]
fn spellings_of_one_value_agree() {
    check_math(&[
        ("\\boxed{\\frac{1}{2}}", "0.5", RIGHT),
        ("\\boxed{\\dfrac12}", "\\frac{1}{2}", RIGHT),
        ("\\boxed{1/2}", "\\tfrac{2}{4}", RIGHT),
        ("\\boxed{-\\frac{3}{4}}", "\\frac{-3}{4}", RIGHT),
        ("\\boxed{\u{2212}3}", "-3", RIGHT),
        ("\\boxed{-7}", "7", WRONG),
        ("\\boxed{0.333}", "1/3", WRONG),
        ("\\boxed{1\\frac{1}{2}}", "3/2", RIGHT),
        ("\\boxed{1 1/2}", "3/2", RIGHT),
        ("\\boxed{2\\sqrt{3}}", "\\sqrt{12}", RIGHT),
        ("\\boxed{\\frac{2}{\\sqrt{2}}}", "\\sqrt{2}", RIGHT),
        ("\\boxed{\\frac{1}{1+\\sqrt{2}}}", "\\sqrt2 - 1", RIGHT),
        ("\\boxed{\\sqrt{2}+\\sqrt{3}}", "\\sqrt{5}", WRONG),
        ("\\boxed{\\sqrt[3]{-8}}", "-2", RIGHT),
        ("\\boxed{\\sqrt{\\frac{9}{4}}}", "1.5", RIGHT),
        ("\\boxed{4^{1/2}}", "2", RIGHT),
        ("\\boxed{2^{10}}", "1024", RIGHT),
        ("\\boxed{2^{-1}}", "0.5", RIGHT),
        ("\\boxed{-2^2}", "-4", RIGHT),
        ("\\boxed{(-2)^2}", "4", RIGHT),
        ("\\boxed{2^10}", "1024", RIGHT),
        ("\\boxed{3 + 4 \\cdot 5}", "23", RIGHT),
        ("\\boxed{6 \\div 4}", "3/2", RIGHT),
        ("\\boxed{2(3+4)}", "14", RIGHT),
        ("\\boxed{\\frac{\\pi}{2}}", "\\pi/2", RIGHT),
        ("\\boxed{2\\pi r}", "2r\\pi", RIGHT),
        ("\\boxed{x(x+1)}", "x^2+x", RIGHT),
        ("\\boxed{(a+b)^2}", "a^2+2ab+b^2", RIGHT),
        ("\\boxed{(a+b)^2}", "a^2+b^2", WRONG),
        ("\\boxed{x}", "y", WRONG),
        ("\\boxed{1,234}", "1234", RIGHT),
        ("\\boxed{50\\%}", "1/2", RIGHT),
        ("\\boxed{\\$5}", "5", RIGHT),
        (
            "\\boxed{123456789012345678901234567890123456789012345}",
            "1234567890123456789012345678901234567890.12345e5",
            RIGHT,
        ),
    ]);
}

#[test]
fn units_definitions_and_dressing_are_left_out() {
    check_math(&[
        ("\\boxed{5\\text{ cm}}", "5", RIGHT),
        ("\\boxed{5\\text{ cm}^2}", "5", RIGHT),
        ("\\boxed{5\\text{ cm}^2}", "25", WRONG),
        ("\\boxed{5\\ \\mathrm{m}}", "5", RIGHT),
        ("\\boxed{30^\\circ}", "30", RIGHT),
        ("\\boxed{30^{\\circ}}", "30 degrees", RIGHT),
        ("\\boxed{12 dollars}", "12", RIGHT),
        ("\\boxed{16 square feet}", "16", RIGHT),
        ("\\boxed{x = 5}", "5", RIGHT),
        ("\\boxed{5}", "x=5", RIGHT),
        ("\\boxed{f(x) = x+1}", "1+x", RIGHT),
        ("\\boxed{2x = 10}", "10", WRONG),
        ("$\\boxed{\\left(\\frac{1}{2}\\right)}$", "0.5", RIGHT),
        ("\\[ \\boxed{ 7 } \\]", "7", RIGHT),
        ("2 + 3 = 5", "5", RIGHT),
        ("So we add.\n\\(2 + 3 = 5\\)", "5", RIGHT),
        ("The answer is $\\frac{1}{2}$.", "0.5", RIGHT),
        ("Answer: 7\nI am sure.", "7", RIGHT),
        ("The answer is not 42", "42", WRONG),
        ("#### 7", "7", RIGHT),
        ("**7**", "7", RIGHT),
    ]);
}

#[test]
fn lists_tuples_sets_and_texts() {
    check_math(&[
        ("\\boxed{(1, 2)}", "(1,2)", RIGHT),
        ("\\boxed{(2, 1)}", "(1,2)", WRONG),
        ("\\boxed{(0.5, \\sqrt{4})}", "(1/2, 2)", RIGHT),
        ("\\boxed{(1,234)}", "(1, 234)", RIGHT),
        ("\\boxed{[1, 2)}", "[1,2)", RIGHT),
        ("\\boxed{[1, 2]}", "[1,2)", WRONG),
        ("\\boxed{(-\\infty, 3]}", "(-\\infty,3]", RIGHT),
        ("\\boxed{\\{1, 2\\}}", "\\{2,1\\}", RIGHT),
        ("\\boxed{\\{1, 2, 2\\}}", "\\{2,1\\}", WRONG),
        ("\\boxed{\\{1, 1\\}}", "\\{2,1\\}", WRONG),
        ("\\boxed{-2, 1}", "1, -2", RIGHT),
        ("\\boxed{(1)(2)}", "2", RIGHT),
        ("\\boxed{\\text{Monday}}", "Monday", RIGHT),
        ("\\boxed{Monday}", "\\text{Monday}", RIGHT),
        ("\\boxed{dayMon}", "Monday", WRONG),
        ("\\boxed{Tuesday}", "Monday", WRONG),
        ("\\boxed{\\text{(A)}}", "(A)", RIGHT),
        ("\\boxed{B}", "A", WRONG),
        ("\\boxed{1 \\pm 2}", "1\\pm2", RIGHT),
        ("\\boxed{the tenth of ten}", "10", WRONG),
        ("\\boxed{10^{99} is big}", "10", WRONG),
        ("", "10", WRONG),
    ]);
}

#[test]
fn what_cannot_be_decided_is_a_failure() {
    check_math(&[
        ("\\boxed{9^{200}}", "42", Want::Failure("rationals of 128 bits")),
        ("\\boxed{42}", "9^{200}", Want::Failure("rationals of 128 bits")),
        ("\\boxed{9^{200}}", "9^{200}", RIGHT),
        ("\\boxed{\\sqrt{x+1}}", "2", Want::Failure("sums of square roots")),
        ("\\boxed{\\frac{x}{x+1}}", "\\frac{x}{x+1}", RIGHT),
        ("\\boxed{\\frac{x}{1+x}}", "\\frac{x}{x+1}", Want::Failure("sums of square roots")),
        ("\\boxed{1/0}", "0", WRONG),
        ("\\boxed{0}", "1/0", Want::Failure("divides by zero")),
        ("\\boxed{0}", " ", Want::Failure("ground truth")),
        ("nothing", "1/(2-2)", Want::Failure("divides by zero")),
    ]);
    check("\"math\"", &[("\\boxed{1}", None, Want::Failure("no ground truth"))]);
}
