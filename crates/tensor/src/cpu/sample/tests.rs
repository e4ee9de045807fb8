use super::*;
use crate::CpuConfig;
use temper_types::{Philox, uniform53};

fn plain(uniform: f64) -> SampleRow<'static> {
    SampleRow::plain(1.0, uniform)
}

fn drawn_of(dev: &CpuDevice, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<Sampled> {
    let nothing = Sampled { token_id: 0, log_prob: 0.0, sampled_log_prob: 0.0, surviving_mass: 1.0 };
    let mut drawn = vec![nothing; rows.len()];
    sample_logits(dev, logits, rows, &mut drawn);
    drawn
}

fn device(num_threads: usize) -> CpuDevice {
    CpuDevice::new(CpuConfig { num_threads, isa: None })
}

fn random_logits(len: usize, seed: u64, spread: f32) -> Vec<f32> {
    let noise = Philox::new(seed);
    (0..len as u64).map(|i| (noise.uniform(i, 0) as f32 - 0.5) * 2.0 * spread).collect()
}

/// The law by the definitions in the module's docs, in f64 and by sorting everything.
fn naive_law(logits: &[f32], p: &SampleRow<'_>) -> Vec<f64> {
    let mut z: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
    for &(id, bias) in p.logit_bias {
        z[id as usize] += f64::from(bias);
    }
    for &(id, count) in p.seen {
        let z = &mut z[id as usize];
        let penalty = f64::from(p.repetition_penalty);
        *z = if *z < 0.0 { *z * penalty } else { *z / penalty };
        if count > 0 {
            *z -= f64::from(count) * f64::from(p.frequency_penalty) + f64::from(p.presence_penalty);
        }
    }
    for id in 0..z.len() as u32 {
        let is_allowed = p.allowed_ids.is_empty() || p.allowed_ids.contains(&id);
        if !is_allowed || p.banned_ids.contains(&id) {
            z[id as usize] = f64::NEG_INFINITY;
        }
    }
    z.iter_mut().for_each(|z| *z /= f64::from(p.temperature));
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut weights: Vec<f64> = z.iter().map(|z| (z - max).exp()).collect();
    weights.iter_mut().for_each(|w| {
        if *w < f64::from(p.min_p) {
            *w = 0.0;
        }
    });
    let mut order: Vec<usize> = (0..z.len()).collect();
    order.sort_by(|a, b| z[*b].total_cmp(&z[*a]).then(a.cmp(b)));
    if p.top_k > 0 {
        order[(p.top_k as usize).min(z.len())..].iter().for_each(|id| weights[*id] = 0.0);
    }
    let total: f64 = weights.iter().sum();
    let mut mass = 0.0;
    for id in order {
        if mass >= f64::from(p.top_p) * total {
            weights[id] = 0.0;
        }
        mass += weights[id];
    }
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

/// 99.99 % quantile of chi-square, by Wilson and Hilferty.
fn chi_square_limit(degrees: f64) -> f64 {
    let t = 2.0 / (9.0 * degrees);
    degrees * (1.0 - t + 3.719 * t.sqrt()).powi(3)
}

/// Draw `draws` tokens and compare counts with `law`; ids expected less than 10 times are pooled.
fn check_law(logits: &[f32], params: &SampleRow<'_>, draws: u64, seed: u64) {
    let (dev, law) = (device(1), naive_law(logits, params));
    let mut counts = vec![0u64; law.len()];
    let rows = 256;
    for start in (0..draws).step_by(rows) {
        let params: Vec<SampleRow<'_>> =
            (0..rows as u64).map(|i| SampleRow { uniform: uniform53(seed, start + i), ..*params }).collect();
        let repeated = logits.repeat(rows);
        for drawn in drawn_of(&dev, &repeated, &params) {
            counts[drawn.token_id as usize] += 1;
        }
    }
    let draws = counts.iter().sum::<u64>() as f64;
    let (mut chi, mut cells, mut pooled) = (0.0, 0.0, (0.0, 0.0));
    for (count, p) in counts.iter().zip(&law) {
        assert!(*p > 0.0 || *count == 0, "an id without mass was drawn");
        let (count, expected) = (*count as f64, p * draws);
        if expected < 10.0 {
            pooled = (pooled.0 + count, pooled.1 + expected);
        } else {
            chi += (count - expected).powi(2) / expected;
            cells += 1.0;
        }
    }
    if pooled.1 > 5.0 {
        chi += (pooled.0 - pooled.1).powi(2) / pooled.1;
        cells += 1.0;
    }
    assert!(chi < chi_square_limit(cells - 1.0), "chi-square {chi} over {cells} cells, seed {seed}");
}

#[test]
fn the_plain_law_is_drawn() {
    check_law(&random_logits(700, 1, 3.0), &plain(0.0), 60_000, 11);
    check_law(&random_logits(90, 2, 6.0), &SampleRow { temperature: 0.7, ..plain(0.0) }, 30_000, 12);
}

#[test]
fn truncated_and_penalised_laws_are_drawn() {
    let logits = random_logits(300, 3, 4.0);
    let seen = [(4, 0), (17, 3), (200, 1)];
    let base = plain(0.0);
    for (seed, params) in [
        SampleRow { top_k: 7, ..base },
        SampleRow { top_p: 0.6, ..base },
        SampleRow { min_p: 0.2, ..base },
        SampleRow { top_p: 0.9, top_k: 40, min_p: 0.05, temperature: 1.3, ..base },
        SampleRow { repetition_penalty: 1.8, presence_penalty: 0.5, frequency_penalty: 0.3, seen: &seen, ..base },
        SampleRow { banned_ids: &[1, 2, 3, 250], top_p: 0.8, ..base },
        SampleRow { logit_bias: &[(4, 6.0), (9, -8.0), (299, 5.5)], ..base },
        SampleRow { allowed_ids: &[0, 1, 17, 18, 60, 200, 299], banned_ids: &[1], ..base },
        SampleRow {
            logit_bias: &[(17, 4.0)],
            repetition_penalty: 1.4,
            seen: &seen,
            allowed_ids: &[4, 17, 250],
            ..base
        },
    ]
    .into_iter()
    .enumerate()
    {
        check_law(&logits, &params, 12_800, 20 + seed as u64);
    }
}

/// An id of p = 4e-7 owns an interval of uniforms of just that length, which counting draws could not show in
/// reasonable time: the ends are found by bisection.
#[test]
fn a_tail_id_owns_an_interval_of_its_mass() {
    let mut logits = vec![f32::NEG_INFINITY; 1024];
    logits[3] = 0.0;
    logits[700] = -(1e6f64.ln()) as f32;
    logits[900] = 0.5;
    let dev = device(1);
    let draw = |uniform| drawn_of(&dev, &logits, &[plain(uniform)])[0].token_id;
    let first_uniform_of = |id: u32| {
        let (mut below, mut above) = (0.0, 1.0);
        for _ in 0..60 {
            let middle = (below + above) / 2.0;
            (below, above) = if draw(middle) >= id { (below, middle) } else { (middle, above) };
        }
        above
    };
    let law = naive_law(&logits, &plain(0.0));
    let (start, end) = (first_uniform_of(700), first_uniform_of(900));
    assert!(law[700] > 3e-7 && law[700] < 1e-6);
    assert!(((end - start) / law[700] - 1.0).abs() < 1e-6, "{} for a mass of {}", end - start, law[700]);
    assert_eq!(draw((start + end) / 2.0), 700);
}

/// Chi-square over the tail itself: noise confined to a stretch of the unit interval that holds ids of mass 1e-6 beside
/// rarer and more frequent ones draws them by the law given that stretch.
#[test]
fn ids_of_mass_1e_6_are_drawn_as_often_as_the_law_says() {
    let mut logits = vec![f32::NEG_INFINITY; 1024];
    logits[10] = 0.0;
    logits[1000] = 0.3;
    let ratios = [1.0, 0.2, 3.0, 1.0, 0.05, 8.0, 1.0, 0.5, 1.0, 2.0];
    for (ratio, id) in ratios.iter().zip((300..).step_by(31)) {
        logits[id] = (2.35e-6f64 * ratio).ln() as f32;
    }
    for base in [plain(0.0), SampleRow { top_p: 0.999_999_99, banned_ids: &[5], ..plain(0.0) }] {
        let (dev, law) = (device(1), naive_law(&logits, &base));
        assert!((law[300] / 1e-6 - 1.0).abs() < 0.02, "{}", law[300]);
        let (start, tail) = (law[10], law[11..1000].iter().sum::<f64>());
        let num_draws = 20_000;
        let row = |i| SampleRow { uniform: start + tail * uniform53(77, i), ..base };
        let rows: Vec<SampleRow<'_>> = (0..num_draws).map(row).collect();
        let mut counts = vec![0u32; 1024];
        for rows in rows.chunks(100) {
            drawn_of(&dev, &logits.repeat(rows.len()), rows).iter().for_each(|d| counts[d.token_id as usize] += 1);
        }
        let expected = |id: usize| law[id] / tail * num_draws as f64;
        let cells = (300..).step_by(31).take(ratios.len());
        let chi: f64 = cells.map(|id| (f64::from(counts[id]) - expected(id)).powi(2) / expected(id)).sum();
        assert!(chi < chi_square_limit(ratios.len() as f64 - 1.0), "chi-square {chi}: {counts:?}");
    }
}

#[test]
fn extreme_uniforms_land_on_ids_with_mass() {
    let mut logits = random_logits(1000, 5, 2.0);
    logits[..300].fill(f32::NEG_INFINITY);
    logits[760..].fill(f32::NEG_INFINITY);
    logits[990] = -500.0;
    let dev = device(1);
    let (tiny, almost_one) = (0.5 / (1u64 << 53) as f64, 1.0 - f64::EPSILON / 2.0);
    for base in [plain(0.0), SampleRow { top_p: 0.999_999, ..plain(0.0) }] {
        let draw = |uniform| drawn_of(&dev, &logits, &[SampleRow { uniform, ..base }])[0].token_id;
        assert!(draw(tiny) >= 300 && draw(tiny) <= 305);
        assert!(draw(almost_one) >= 750 && draw(almost_one) < 760);
    }
    let draw = |uniform| drawn_of(&dev, &logits, &[plain(uniform)])[0].token_id;
    assert_eq!((draw(tiny), draw(almost_one)), (300, 759));
}

#[test]
fn greedy_takes_the_lowest_of_the_largest() {
    let mut logits = random_logits(600, 6, 1.0);
    (logits[40], logits[333]) = (2.5, 2.5);
    let greedy = SampleRow { temperature: 0.0, ..plain(0.5) };
    let dev = device(1);
    let drawn = drawn_of(&dev, &logits, &[greedy])[0];
    assert_eq!((drawn.token_id, drawn.surviving_mass), (40, 1.0));
    let law = naive_law(&logits, &plain(0.5));
    assert!((f64::from(drawn.log_prob) - law[40].ln()).abs() < 1e-6);
    assert_eq!(drawn.log_prob.to_bits(), drawn.sampled_log_prob.to_bits());
    let banned = drawn_of(&dev, &logits, &[SampleRow { banned_ids: &[40], ..greedy }])[0];
    assert_eq!(banned.token_id, 333);
    assert!((f64::from(banned.surviving_mass) - (1.0 - law[40])).abs() < 1e-6);
    let repelled = SampleRow { seen: &[(40, 1)], presence_penalty: 5.0, ..greedy };
    assert_eq!(drawn_of(&dev, &logits, &[repelled])[0].token_id, 333);
}

#[test]
fn reported_numbers_follow_their_definitions() {
    let logits = random_logits(900, 7, 3.0);
    let dev = device(1);
    let seen = [(5u32, 2u32), (6, 0)];
    for base in [
        SampleRow { top_k: 20, temperature: 0.8, ..plain(0.0) },
        SampleRow { top_p: 0.5, ..plain(0.0) },
        SampleRow { logit_bias: &[(5, 3.0), (800, -1.0)], allowed_ids: &[5, 6, 7, 800, 899], ..plain(0.0) },
        SampleRow { repetition_penalty: 1.5, frequency_penalty: 0.2, seen: &seen, top_p: 0.7, ..plain(0.0) },
    ] {
        let free = naive_law(&logits, &SampleRow { temperature: base.temperature, ..plain(0.0) });
        let law = naive_law(&logits, &base);
        let mass: f64 = free.iter().zip(&law).filter(|(_, l)| **l > 0.0).map(|(f, _)| f).sum();
        for i in 0..50 {
            let row = SampleRow { uniform: uniform53(3, i), ..base };
            let drawn = drawn_of(&dev, &logits, &[row])[0];
            let id = drawn.token_id as usize;
            assert!((f64::from(drawn.log_prob) - free[id].ln()).abs() < 2e-6);
            assert!((f64::from(drawn.sampled_log_prob) - law[id].ln()).abs() < 2e-6);
            assert!((f64::from(drawn.surviving_mass) - mass).abs() < 1e-6);
        }
    }
}

#[test]
fn filters_that_drop_nothing_change_nothing() {
    let logits = random_logits(500, 8, 2.0);
    let dev = device(1);
    for i in 0..200 {
        let row = plain(uniform53(4, i));
        let free = drawn_of(&dev, &logits, &[row])[0];
        let kept = drawn_of(&dev, &logits, &[SampleRow { top_k: 500, ..row }])[0];
        assert_eq!((free, free.sampled_log_prob.to_bits()), (kept, kept.log_prob.to_bits()));
    }
}

#[test]
fn rows_and_threads_do_not_reach_a_draw() {
    let rows = 37;
    let logits = random_logits(rows * 777, 9, 3.0);
    let params: Vec<SampleRow<'_>> = (0..rows as u64)
        .map(|i| SampleRow {
            top_k: (i % 3) as u32 * 10,
            temperature: 0.5 + (i % 4) as f32 * 0.3,
            ..plain(uniform53(5, i))
        })
        .collect();
    let all = drawn_of(&device(1), &logits, &params);
    for threads in [2, 3] {
        assert_eq!(drawn_of(&device(threads), &logits, &params), all);
    }
    for row in 0..rows {
        let alone = drawn_of(&device(1), &logits[row * 777..(row + 1) * 777], &params[row..=row]);
        assert_eq!(alone[0], all[row]);
    }
}

/// The nucleus is found by growing a sorted prefix; one that spans several growths equals sorting everything.
#[test]
fn a_wide_nucleus_equals_a_full_sort() {
    let logits = random_logits(3000, 10, 0.5);
    let row = SampleRow { top_p: 0.95, ..plain(0.3) };
    let law = naive_law(&logits, &row);
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f32> = logits.iter().map(|z| (z - max).exp()).collect();
    let mut kept = Vec::new();
    keep_ids(&row, &logits, &weights, &mut kept);
    let expected: Vec<u32> = (0..3000).filter(|id| law[*id as usize] > 0.0).collect();
    assert_eq!(kept, expected);
}

#[test]
fn broken_logits_are_reported_and_do_not_panic() {
    let dev = device(1);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let logits = vec![bad; 300];
        for row in [plain(0.5), SampleRow { top_p: 0.5, ..plain(0.5) }, SampleRow { temperature: 0.0, ..plain(0.5) }] {
            let drawn = drawn_of(&dev, &logits, &[row])[0];
            assert!(drawn.log_prob.is_nan() && drawn.token_id < 300, "{bad}: {drawn:?}");
        }
    }
}
