//! Rows of one prompt, and their statistics.

use std::collections::HashMap;

/// Rows by group: each inner vector holds the rows of one group, in row order; groups in order of appearance.
pub(crate) fn group_rows(group_ids: &[u64]) -> Vec<Vec<usize>> {
    let mut places: HashMap<u64, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (row, id) in group_ids.iter().enumerate() {
        let place = *places.entry(*id).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        groups[place].push(row);
    }
    groups
}

/// Mean of `values` at `rows`.
pub(crate) fn mean_of(values: &[f64], rows: &[usize]) -> f64 {
    // A group of equal values has exactly that value as its mean, whatever the rounding of the sum.
    let first = values[rows[0]];
    if rows.iter().all(|r| values[*r] == first) {
        return first;
    }
    rows.iter().map(|r| values[*r]).sum::<f64>() / rows.len() as f64
}

/// Sample standard deviation (n - 1) of `values` at `rows`; 0 for fewer than two rows.
pub(crate) fn std_of(values: &[f64], rows: &[usize]) -> f64 {
    if rows.len() < 2 {
        return 0.0;
    }
    let mean = mean_of(values, rows);
    let squares: f64 = rows.iter().map(|r| (values[*r] - mean).powi(2)).sum();
    (squares / (rows.len() - 1) as f64).sqrt()
}
