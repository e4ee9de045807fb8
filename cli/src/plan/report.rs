//! A plan in words and as JSON.

use super::cost::{Estimate, Seconds};
use super::layout::{Layout, Mode, sharding_name};
use super::search::Choice;
use super::{Calibration, Cluster, Search, Workload};
use serde_json::{Value, json};
use std::fmt::Write;
use temper_trainer::Sharding;

/// Which choices are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// The best of every kind of placement, at most so many.
    Kinds(usize),
    /// Every layout that fits.
    All,
}

/// What a report is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The recipe, as it was named.
    pub recipe: &'a str,
    /// The work.
    pub work: &'a Workload,
    /// The measurement.
    pub cal: &'a Calibration,
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The outcome.
    pub search: &'a Search,
}

/// For reading.
pub fn to_text(subject: &Subject<'_>, detail: Detail) -> String {
    let mut text = head(subject);
    let listed = listed(subject.search, detail);
    if !listed.is_empty() {
        let columns = ["step s", "gen s", "train s", "sync s", "loop s", "idle", "memory"];
        let [step, gen_s, train, sync, around, idle, memory] = columns;
        let _ = writeln!(
            text,
            "\n   # {step:>9} {gen_s:>9} {train:>9} {sync:>8} {around:>8} {idle:>5} {memory:>9}  placement"
        );
    }
    for (index, choice) in listed.iter().enumerate() {
        row(&mut text, index + 1, choice, subject);
    }
    let kinds = subject.search.kinds().len();
    if let (Detail::Kinds(most), all) = (detail, subject.search.choices.len())
        && all > listed.len()
    {
        let shown = kinds.min(most);
        let _ = writeln!(
            text,
            "\n{shown} of {kinds} kinds of placement, each with its best division of models and micro-batches; --all lists {all}"
        );
    }
    for line in reasons(subject) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn listed(search: &Search, detail: Detail) -> Vec<&Choice> {
    match detail {
        Detail::Kinds(most) => search.kinds().into_iter().take(most).collect(),
        Detail::All => search.choices.iter().collect(),
    }
}

fn head(subject: &Subject<'_>) -> String {
    let Subject { recipe, work, cal, cluster, .. } = subject;
    let mut text = format!("stage `{}` of {recipe} on {}: {}\n", work.stage, cluster.name, places(cluster));
    let _ = writeln!(
        text,
        "a step: {} prompts x {} samples, {:.1} + {:.1} tokens expected, {} update(s) of {} rows, {} epoch(s)",
        work.prompts,
        work.samples,
        work.expected.prompt_tokens,
        work.expected.response_tokens,
        work.mini_batches,
        work.num_rows() / work.mini_batches,
        work.epochs
    );
    let _ = writeln!(
        text,
        "measured on: {}, {}, {:.0} GFLOP/s, {:.1} GB/s from memory",
        cal.machine,
        cal.dtype,
        cal.peak_gflops,
        cal.memory_bytes_per_second / 1e9
    );
    if cal.model != work.model {
        let _ = writeln!(text, "measured with a model of other sizes: times are in proportion to the work, on paper");
    }
    text
}

fn places(cluster: &Cluster) -> String {
    let devices = cluster.places.iter().filter(|place| place.device.is_some()).count();
    let cores: usize = cluster.hosts.iter().map(|host| host.cores).sum();
    let memory: u64 = cluster.hosts.iter().map(|host| host.memory_bytes).sum();
    let hosts = match cluster.hosts.len() {
        1 => "1 host".to_owned(),
        n => format!("{n} hosts"),
    };
    let devices = if devices == 0 { String::new() } else { format!(", {devices} devices (on paper)") };
    format!("{hosts}, {cores} cores, {}{devices}", bytes(memory))
}

fn row(text: &mut String, number: usize, choice: &Choice, subject: &Subject<'_>) {
    let Estimate { seconds: s, memory, idle, .. } = &choice.estimate;
    let paper = if choice.estimate.on_paper { ", on paper" } else { "" };
    let _ = writeln!(
        text,
        "{number:>4} {:>9} {:>9} {:>9} {:>8} {:>8} {:>4.0}% {:>9}  {}{paper}",
        time(s.step),
        time(s.generation),
        time(s.training),
        time(s.sync),
        time(s.around),
        100.0 * idle,
        bytes(memory.largest()),
        name(&choice.layout)
    );
    let set = choice.layout.assignments(subject.work, subject.cluster);
    let flags: Vec<String> = set.iter().map(|assignment| format!("--set {assignment}")).collect();
    let flags = if flags.is_empty() { "as the recipe stands".to_owned() } else { flags.join(" ") };
    let _ = writeln!(text, "     {flags}");
}

/// A layout in words.
pub fn name(layout: &Layout) -> String {
    let mut words = vec![layout.mode.name().to_owned()];
    if layout.mode != Mode::Embedded {
        words.push(format!("{} rollout", layout.engines));
    }
    if layout.tensor_parallel > 1 {
        words.push(format!("engines over {} ranks", layout.tensor_parallel));
    }
    words.push(match (layout.ranks, layout.sharding) {
        (1, _) => "1 trainer rank".to_owned(),
        (n, Sharding::Hybrid { shard_size }) => format!("{n} trainer ranks hybrid({shard_size})"),
        (n, sharding) => format!("{n} trainer ranks {}", sharding_name(sharding)),
    });
    if layout.sequence_parallel > 1 {
        words.push(format!("{} of them sharing sequences", layout.sequence_parallel));
    }
    if let Mode::Disaggregated { trainer_places } = layout.mode {
        words.push(format!("trainers on the first {trainer_places} place(s)"));
    }
    words.push(format!("{} tokens a micro-batch", layout.max_micro_batch_tokens));
    if layout.recompute {
        words.push("recompute".to_owned());
    }
    if layout.staleness > 0 {
        words.push(format!("staleness {}", layout.staleness));
    }
    words.join(", ")
}

/// Why the best is the best, what the next would cost, what was dropped.
fn reasons(subject: &Subject<'_>) -> Vec<String> {
    let search = subject.search;
    let kinds = search.kinds();
    let mut lines = Vec::new();
    if let Some(best) = kinds.first() {
        lines.push(format!("\nbest: {}", why(best)));
    }
    if let [best, next, ..] = kinds[..] {
        lines.push(runner_up(best, next));
    }
    if let Some(best) = kinds.first().filter(|best| changes_numbers(&best.layout, subject.work)) {
        let synchronous = kinds.iter().find(|choice| !changes_numbers(&choice.layout, subject.work));
        let instead = synchronous.map_or_else(String::new, |choice| {
            format!(
                "; the best that changes none takes {} s: {}",
                time(choice.estimate.seconds.step),
                name(&choice.layout)
            )
        });
        let now = &subject.work.placement;
        let what = match best.layout {
            layout if layout.staleness != subject.work.staleness => "staleness",
            layout if layout.ranks != now.trainer_ranks => "another number of trainer ranks",
            _ => "another number of ranks that share sequences",
        };
        lines.push(format!("note: {what} changes the numbers of a run{instead}"));
    }
    for dropped in &search.dropped {
        let least = dropped.least.as_ref().map_or_else(String::new, |(place, need, has)| {
            format!(": the least of them needs {} on {place}, which has {}", bytes(*need), bytes(*has))
        });
        lines.push(format!("dropped {}: {}{least}", dropped.count, dropped.reason));
    }
    if search.choices.is_empty() {
        lines.push(
            "nothing fits: expected more memory, more hosts to divide the model over, or a smaller model".to_owned(),
        );
    }
    lines
}

/// Whether a run would get other numbers than by the recipe as it stands.
fn changes_numbers(layout: &Layout, work: &Workload) -> bool {
    let now = &work.placement;
    let ranks = (layout.ranks, layout.sequence_parallel);
    layout.staleness != work.staleness || ranks != (now.trainer_ranks, now.sequence_parallel)
}

fn parts(s: &Seconds) -> [(&'static str, f64); 4] {
    [
        ("generation", s.generation),
        ("training", s.training),
        ("weight sync", s.sync),
        ("the loop around them", s.around),
    ]
}

fn why(best: &Choice) -> String {
    let s = &best.estimate.seconds;
    let mut parts = parts(s);
    parts.sort_by(|a, b| b.1.total_cmp(&a.1));
    let (largest, seconds) = parts[0];
    let how = match best.layout.staleness {
        0 => format!("{largest} is most of it with {} s", time(seconds)),
        _ => format!("generation runs beside training; the longer of them is {largest} with {} s", time(seconds)),
    };
    format!(
        "{} takes {} s a step; {how}; {} sequences decode together, {} micro-batch(es) of {:.0} tokens an update",
        name(&best.layout),
        time(s.step),
        best.estimate.concurrency,
        best.estimate.micro_batches,
        best.estimate.micro_batch_tokens
    )
}

fn runner_up(best: &Choice, next: &Choice) -> String {
    let (a, b) = (&best.estimate.seconds, &next.estimate.seconds);
    let more = 100.0 * (b.step / a.step - 1.0);
    let mut differences: Vec<(&str, f64)> =
        parts(a).iter().zip(parts(b)).map(|((what, a), (_, b))| (*what, b - a)).collect();
    differences.sort_by(|x, y| y.1.total_cmp(&x.1));
    let (what, seconds) = differences[0];
    let because = if seconds > 0.0 {
        format!("{what} takes {} s more", time(seconds))
    } else {
        "its parts do not overlap as well".to_owned()
    };
    format!("runner-up: {} takes {} s, {more:.0} % more: {because}", name(&next.layout), time(b.step))
}

/// Seconds for reading.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0}"),
        s if s >= 1.0 => format!("{s:.2}"),
        s => format!("{s:.4}"),
    }
}

/// Bytes for reading.
pub fn bytes(n: u64) -> String {
    let mib = n as f64 / (1u64 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// For programs.
pub fn to_json(subject: &Subject<'_>, detail: Detail) -> Value {
    let Subject { recipe, work, cal, cluster, search } = subject;
    let dropped = |d: &super::search::Dropped| {
        let least =
            d.least.as_ref().map(|(place, need, has)| json!({"place": place, "needs_bytes": need, "has_bytes": has}));
        json!({"reason": d.reason, "count": d.count, "least": least})
    };
    let choices: Vec<Value> =
        listed(search, detail).iter().enumerate().map(|(i, c)| choice_json(i + 1, c, subject)).collect();
    json!({
        "recipe": recipe, "stage": work.stage, "cluster": cluster.name,
        "work": {
            "prompts": work.prompts, "samples": work.samples, "mini_batches": work.mini_batches,
            "epochs": work.epochs, "prompt_tokens": work.expected.prompt_tokens,
            "response_tokens": work.expected.response_tokens, "parameters": work.model.parameters(),
        },
        "calibration": {
            "machine": cal.machine, "cores": cal.cores, "dtype": cal.dtype, "same_model": cal.model == work.model,
        },
        "num_feasible": search.choices.len(),
        "choices": choices,
        "dropped": search.dropped.iter().map(dropped).collect::<Vec<_>>(),
        "advice": reasons(subject).iter().map(|line| line.trim().to_owned()).collect::<Vec<_>>(),
    })
}

fn choice_json(number: usize, choice: &Choice, subject: &Subject<'_>) -> Value {
    let Choice { layout, estimate } = choice;
    let (s, memory) = (&estimate.seconds, &estimate.memory);
    json!({
        "number": number, "placement": layout.mode.name(), "rollout_workers": layout.engines,
        "rollout_tensor_parallel": layout.tensor_parallel, "trainer_ranks": layout.ranks,
        "sequence_parallel": layout.sequence_parallel, "sharding": sharding_name(layout.sharding),
        "shard_size": layout.sharding.num_shards(layout.ranks),
        "max_micro_batch_tokens": layout.max_micro_batch_tokens, "recompute": layout.recompute,
        "staleness": layout.staleness, "on_paper": estimate.on_paper,
        "step_seconds": s.step, "generation_seconds": s.generation, "training_seconds": s.training,
        "communication_seconds": s.communication, "sync_seconds": s.sync, "loop_seconds": s.around,
        "idle_share": estimate.idle, "concurrency": estimate.concurrency,
        "micro_batches": estimate.micro_batches, "micro_batch_tokens": estimate.micro_batch_tokens,
        "memory": {
            "masters": memory.rank.masters, "gradients": memory.rank.gradients, "moments": memory.rank.moments,
            "trainer": memory.trainer, "engine": memory.engine, "engine_rank": memory.follower, "places": memory.places,
        },
        "set": layout.assignments(subject.work, subject.cluster),
    })
}
