//! "Did you mean": the nearest known name to a misspelt one.

/// The candidate nearest to `given`, where one is near enough to be worth naming.
pub fn did_you_mean<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|c| (strsim::damerau_levenshtein(given, c), c))
        .filter(|(distance, c)| *distance <= 1 + given.len().max(c.len()) / 4)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::did_you_mean;

    #[test]
    fn names_the_nearest_and_stays_silent_when_nothing_is_near() {
        let keys = ["learning_rate", "num_generations", "temperature"];
        assert_eq!(did_you_mean("lerning_rate", keys), Some("learning_rate"));
        assert_eq!(did_you_mean("tempreature", keys), Some("temperature"));
        assert_eq!(did_you_mean("zzz", keys), None);
    }
}
