//! Reward by step as an SVG: one colour a recipe, one line a seed, a legend beside the plot.

use super::Outcome;
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 220.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
/// Steps over which a point is averaged, half of them on either side.
const SMOOTHING: usize = 5;
/// Colours that can be told apart, also in print.
const COLOURS: [&str; 10] =
    ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"];

/// A line of the plot.
struct Line<'a> {
    recipe: &'a str,
    points: Vec<(f64, f64)>,
}

/// Where numbers lie on the page.
struct Scale {
    max_step: f64,
    min: f64,
    max: f64,
}

impl Scale {
    fn x(&self, step: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * step / self.max_step
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.min) / (self.max - self.min)
    }
}

/// The whole file.
pub(crate) fn render(outcomes: &[Outcome]) -> String {
    let lines: Vec<Line<'_>> = outcomes.iter().filter_map(line).collect();
    let mut recipes: Vec<&str> = lines.iter().map(|line| line.recipe).collect();
    recipes.dedup();
    let points = || lines.iter().flat_map(|line| &line.points);
    let scale = Scale {
        max_step: points().map(|p| p.0).fold(1.0, f64::max),
        min: points().map(|p| p.1).fold(0.0, f64::min),
        max: points().map(|p| p.1).fold(1.0, f64::max),
    };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<title>Mean reward by step of the policy stages</title>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    svg.push_str(&axes(&scale));
    for line in &lines {
        svg.push_str(&path(line, &scale, colour(&recipes, line.recipe)));
    }
    svg.push_str(&legend(&recipes));
    svg.push_str("</svg>\n");
    svg
}

fn line(outcome: &Outcome) -> Option<Line<'_>> {
    let curve = outcome.result.as_ref().ok().filter(|curve| !curve.rewards.is_empty())?;
    let smooth = |index: usize| {
        let half = SMOOTHING / 2;
        let near = &curve.rewards[index.saturating_sub(half)..(index + half + 1).min(curve.rewards.len())];
        near.iter().map(|(_, reward)| reward).sum::<f64>() / near.len() as f64
    };
    let points = curve.rewards.iter().enumerate().map(|(index, (step, _))| (*step as f64, smooth(index))).collect();
    Some(Line { recipe: &outcome.recipe, points })
}

fn colour(recipes: &[&str], recipe: &str) -> &'static str {
    let index = recipes.iter().position(|name| *name == recipe).unwrap_or(0);
    COLOURS[index % COLOURS.len()]
}

/// Frame, grid, numbers and names of the axes.
fn axes(scale: &Scale) -> String {
    let mut svg = String::new();
    let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for tick in 0..=5 {
        let value = scale.min + (scale.max - scale.min) * f64::from(tick) / 5.0;
        let step = scale.max_step * f64::from(tick) / 5.0;
        let (x, y) = (scale.x(step), scale.y(value));
        // Writing to a String cannot fail.
        let _infallible = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.1}</text>\n\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{step:.0}</text>",
            LEFT - 8.0,
            y + 4.0,
            bottom + 18.0
        );
    }
    let middle = (LEFT + right) / 2.0;
    let _infallible = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{}\" height=\"{}\" fill=\"none\" stroke=\"#444444\"/>\n\
         <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">step of the policy stages</text>\n\
         <text x=\"{LEFT}\" y=\"{}\">mean reward, averaged over {SMOOTHING} steps</text>",
        right - LEFT,
        bottom - TOP,
        bottom + 38.0,
        TOP - 14.0
    );
    svg
}

fn path(line: &Line<'_>, scale: &Scale, colour: &str) -> String {
    let point = |(step, value): &(f64, f64)| format!("{:.1},{:.1}", scale.x(*step), scale.y(*value));
    let points: Vec<String> = line.points.iter().map(point).collect();
    format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"><title>{}</title></polyline>\n",
        points.join(" "),
        escape(line.recipe)
    )
}

fn legend(recipes: &[&str]) -> String {
    let mut svg = String::new();
    let x = WIDTH - RIGHT + 20.0;
    for (index, recipe) in recipes.iter().enumerate() {
        let y = TOP + 12.0 + 22.0 * index as f64;
        let _infallible = writeln!(
            svg,
            "<line x1=\"{x}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke=\"{}\" stroke-width=\"3\"/>\n\
             <text x=\"{}\" y=\"{}\">{}</text>",
            x + 26.0,
            colour(recipes, recipe),
            x + 34.0,
            y + 4.0,
            escape(recipe)
        );
    }
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::learning::curve::Curve;

    fn outcome(recipe: &str, rewards: &[f64]) -> Outcome {
        let rewards = rewards.iter().enumerate().map(|(i, r)| (i as u64 + 1, *r)).collect();
        Outcome { recipe: recipe.to_owned(), seed: 1, result: Ok(Curve { rewards, ..Curve::default() }) }
    }

    #[test]
    fn a_line_a_seed_and_a_colour_a_recipe_within_the_frame() {
        let svg = render(&[
            outcome("a", &[0.0, 0.5, 1.0]),
            outcome("a", &[0.2; 4]),
            outcome("b<", &[-2.0, 3.0]),
            outcome("no curve", &[]),
        ]);
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert_eq!(svg.matches(COLOURS[0]).count(), 3, "two lines and an entry of the legend");
        assert!(svg.contains("b&lt;") && !svg.contains("no curve"));
        let points = svg.split("points=\"").skip(1).filter_map(|rest| rest.split_once('"'));
        for pair in points.flat_map(|(points, _)| points.split(' ')) {
            let (x, y) = pair.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((LEFT..=WIDTH - RIGHT).contains(&x) && (TOP..=HEIGHT - BOTTOM).contains(&y), "{pair}");
        }
    }

    #[test]
    fn a_curve_is_averaged_over_its_neighbours() {
        let outcome = outcome("a", &[0.0, 1.0, 0.0, 1.0, 0.0]);
        let line = line(&outcome).unwrap();
        assert_eq!(line.points[2], (3.0, 0.4));
        assert_eq!(line.points[0], (1.0, 1.0 / 3.0));
    }
}
