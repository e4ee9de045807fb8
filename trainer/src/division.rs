//! Which rank works on which row of a batch: a rule of the batch and the number of ranks alone.
//!
//! Rows, or groups of consecutive rows with one prompt, go longest first to the rank that has the fewest tokens so far.
//! Groups stay together, as their prompt runs once then, unless single rows give the busiest rank less to do.

use temper_proto::TokenSequence;

/// Indices of each rank's rows, ascending.
pub(crate) fn divide<'a>(sequences: impl Iterator<Item = &'a TokenSequence>, world: usize) -> Vec<Vec<usize>> {
    let all: Vec<&TokenSequence> = sequences.collect();
    if world <= 1 {
        return vec![(0..all.len()).collect()];
    }
    let mut start = 0;
    let groups: Vec<Vec<usize>> = all
        .chunk_by(|a, b| a.prompt_token_ids == b.prompt_token_ids)
        .map(|group| {
            start += group.len();
            (start - group.len()..start).collect()
        })
        .collect();
    let rows = (0..all.len()).map(|row| vec![row]).collect();
    let (by_group, by_row) = (deal(&all, groups, world), deal(&all, rows, world));
    if busiest(&all, &by_group) <= busiest(&all, &by_row) { by_group } else { by_row }
}

/// Longest first, each to the rank with the fewest tokens; the first of equals.
fn deal(all: &[&TokenSequence], mut items: Vec<Vec<usize>>, world: usize) -> Vec<Vec<usize>> {
    items.sort_by_key(|rows| std::cmp::Reverse(num_tokens(all, rows)));
    let mut ranks = vec![(0, Vec::new()); world];
    for rows in items {
        let tokens = num_tokens(all, &rows);
        if let Some((sum, own)) = ranks.iter_mut().min_by_key(|(sum, _)| *sum) {
            *sum += tokens;
            own.extend(rows);
        }
    }
    let sorted = |(_, mut rows): (usize, Vec<usize>)| {
        rows.sort_unstable();
        rows
    };
    ranks.into_iter().map(sorted).collect()
}

/// Tokens that pass through the model for these rows: neighbours with one prompt run it once.
fn num_tokens(all: &[&TokenSequence], rows: &[usize]) -> usize {
    let prompts = rows.chunk_by(|a, b| all[*a].prompt_token_ids == all[*b].prompt_token_ids);
    let prompts: usize = prompts.map(|chunk| all[chunk[0]].prompt_token_ids.len()).sum();
    prompts + rows.iter().map(|row| all[*row].response_token_ids.len()).sum::<usize>()
}

fn busiest(all: &[&TokenSequence], ranks: &[Vec<usize>]) -> usize {
    ranks.iter().map(|rows| num_tokens(all, rows)).max().unwrap_or(0)
}

/// Values of some rows at their places among `len` rows.
pub(crate) fn spread<T: Clone + Default>(own: &[usize], values: Vec<T>, len: usize) -> Vec<T> {
    let mut all = vec![T::default(); len];
    for (row, value) in own.iter().zip(values) {
        all[*row] = value;
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sequence(prompt: u32, response: usize) -> TokenSequence {
        TokenSequence {
            prompt_token_ids: vec![prompt; 5],
            response_token_ids: vec![1; response],
            response_mask: vec![1; response],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn every_row_has_one_rank_and_no_rank_has_much_more(
            lengths in prop::collection::vec((0..6u32, 0..40usize), 0..40), world in 1..6usize,
        ) {
            let sequences: Vec<TokenSequence> = lengths.iter().map(|(p, r)| sequence(*p, *r)).collect();
            let ranks = divide(sequences.iter(), world);
            prop_assert_eq!(ranks.len(), world);
            let mut rows: Vec<usize> = ranks.concat();
            rows.sort_unstable();
            prop_assert_eq!(rows, (0..sequences.len()).collect::<Vec<_>>());
            prop_assert!(ranks.iter().all(|rows| rows.is_sorted()));
            let all: Vec<&TokenSequence> = sequences.iter().collect();
            let longest = sequences.iter().map(|s| s.response_token_ids.len() + 5).max().unwrap_or(0);
            let total: usize = sequences.iter().map(|s| s.response_token_ids.len() + 5).sum();
            // Longest first: never worse than the mean and the longest together.
            prop_assert!(busiest(&all, &ranks) <= total / world + longest);
        }
    }

    #[test]
    fn groups_stay_together_where_that_does_not_hurt() {
        let rows: Vec<TokenSequence> = [0, 0, 1, 1, 2, 2, 3, 3].iter().map(|p| sequence(*p, 4)).collect();
        for rank in divide(rows.iter(), 2) {
            assert!(rank.chunks(2).all(|pair| pair[0] / 2 == pair[1] / 2), "{rank:?}");
        }
        let one_group: Vec<TokenSequence> = (0..4).map(|_| sequence(0, 10)).collect();
        assert_eq!(divide(one_group.iter(), 2).iter().map(Vec::len).collect::<Vec<_>>(), [2, 2]);
    }
}
