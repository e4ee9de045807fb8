//! First, last and direction of every figure of a stage.

use serde_json::{Map, Value, json};
use std::fmt::Write;
use temper_telemetry::MetricsRow;

/// A figure over the steps of a stage.
pub struct Trend {
    name: String,
    first: f64,
    last: f64,
    min: f64,
    max: f64,
    /// Least-squares slope per row that has the figure; 0 of a single row.
    slope: f64,
}

/// The figures of one stage.
pub struct StageTrend {
    stage: String,
    first_step: u64,
    last_step: u64,
    num_rows: usize,
    trends: Vec<Trend>,
}

/// Trends by stage, stages in the order of the run.
pub fn by_stage(rows: &[MetricsRow]) -> Vec<StageTrend> {
    let stages = rows.chunk_by(|a, b| a.stage() == b.stage());
    stages.filter(|rows| !rows.is_empty()).map(stage_trend).collect()
}

fn stage_trend(rows: &[MetricsRow]) -> StageTrend {
    let mut names: Vec<String> = Vec::new();
    for row in rows {
        for name in row.to_json().keys().filter(|name| !matches!(name.as_str(), "step" | "stage")) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    let trend = |name: String| {
        let values: Vec<f64> = rows.iter().filter_map(|row| row.get(&name)).collect();
        let (first, last) = (*values.first()?, *values.last()?);
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Trend { name, first, last, min, max, slope: slope(&values) })
    };
    StageTrend {
        stage: rows[0].stage().to_owned(),
        first_step: rows[0].step(),
        last_step: rows[rows.len() - 1].step(),
        num_rows: rows.len(),
        trends: names.into_iter().filter_map(trend).collect(),
    }
}

/// Slope of the least-squares line through (0, v0), (1, v1), ...
fn slope(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let (mean_x, mean_y) = ((n - 1.0) / 2.0, values.iter().sum::<f64>() / n);
    let offsets = || values.iter().enumerate().map(|(x, y)| (x as f64 - mean_x, y - mean_y));
    let squares: f64 = offsets().map(|(x, _)| x * x).sum();
    if squares == 0.0 { 0.0 } else { offsets().map(|(x, y)| x * y).sum::<f64>() / squares }
}

impl StageTrend {
    /// The stage as JSON.
    pub fn to_json(&self) -> Value {
        let figure = |t: &Trend| {
            let value = json!({"first": t.first, "last": t.last, "min": t.min, "max": t.max, "slope": t.slope});
            (t.name.clone(), value)
        };
        let metrics: Map<String, Value> = self.trends.iter().map(figure).collect();
        json!({
            "stage": self.stage, "first_step": self.first_step, "last_step": self.last_step,
            "num_rows": self.num_rows, "metrics": metrics,
        })
    }

    /// The stage as a table.
    pub fn describe(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "stage {}: steps {} to {}", self.stage, self.first_step, self.last_step)?;
        writeln!(text, "  {:<36} {:>12} {:>12} {:>12} {:>12}  trend", "metric", "first", "last", "min", "max")?;
        for t in &self.trends {
            let direction = match t.slope {
                s if s > 0.0 => "up",
                s if s < 0.0 => "down",
                _ => "flat",
            };
            let [first, last, min, max] = [t.first, t.last, t.min, t.max].map(short);
            writeln!(text, "  {:<36} {first:>12} {last:>12} {min:>12} {max:>12}  {direction}", t.name)?;
        }
        Ok(())
    }
}

/// Five significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if (1e-3..1e6).contains(&size) => format!("{value:.4}"),
        _ => format!("{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trend_has_first_last_and_direction() {
        let row = |step, stage, reward| {
            let mut row = MetricsRow::new(step, stage);
            row.set("reward_mean", reward);
            row
        };
        let rows = [row(1, "sft", 0.0), row(2, "grpo", 0.1), row(3, "grpo", 0.5), row(4, "grpo", 0.3)];
        let stages = by_stage(&rows);
        assert_eq!(stages.iter().map(|s| s.stage.as_str()).collect::<Vec<_>>(), ["sft", "grpo"]);
        let trend = &stages[1].trends[0];
        assert_eq!((trend.first, trend.last, trend.min, trend.max), (0.1, 0.3, 0.1, 0.5));
        assert!((trend.slope - 0.1).abs() < 1e-12, "{}", trend.slope);
        assert_eq!(stages[0].trends[0].slope, 0.0);
    }
}
