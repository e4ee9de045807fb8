//! The books refuse what cannot be, and name what is left.

use super::*;
use temper_proto::{BegunResponse, GeneratedSample};
use temper_types::{FinishReason, SampleTimings, SamplingParams};

/// Answers what it was asked, and counts calls to settle.
#[derive(Default)]
struct Engine {
    asked: Mutex<Vec<GroupRequest>>,
    repeats: bool,
    settled: Mutex<Vec<(u64, usize)>>,
    stats: Mutex<RolloutStats>,
}

fn result(request: &GroupRequest) -> GroupResult {
    let sample = |(index, seed): (usize, &u64)| GeneratedSample {
        sample_index: SampleIndex(index as u32),
        seed: *seed,
        num_begun: 0,
        num_kept: 0,
        token_ids: vec![1],
        reused: vec![],
        log_probs: vec![0.0],
        sampled_log_probs: vec![],
        surviving_mass: vec![],
        policy_versions: vec![],
        finish_reason: FinishReason::Stop,
        num_drafted: 0,
        num_accepted: 0,
        timings: SampleTimings::default(),
    };
    let samples = request.seeds.iter().enumerate().map(sample).collect();
    GroupResult { group_id: request.group_id, prompt_id: request.prompt_id, worker: "e".to_owned(), samples }
}

impl RolloutService for Engine {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.asked.lock().unwrap().extend(groups);
        Ok(())
    }
    fn next_group(&self, _timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        let mut asked = self.asked.lock().unwrap();
        Ok(if self.repeats { asked.last().map(result) } else { asked.pop().map(|request| result(&request)) })
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        Ok(std::mem::take(&mut *self.asked.lock().unwrap()).len())
    }
    fn set_version(&self, _version: PolicyVersion) -> ServiceResult<()> {
        Ok(())
    }
    fn stats(&self) -> RolloutStats {
        *self.stats.lock().unwrap()
    }
    fn settle(&self, step: u64, samples: &[Settled]) -> ServiceResult<()> {
        self.settled.lock().unwrap().push((step, samples.len()));
        Ok(())
    }
}

fn request(group: u64) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(group),
        prompt_id: PromptId(10 + group),
        epoch: 0,
        prompt_token_ids: vec![1],
        seeds: vec![5, 6],
        sampling: SamplingParams::default(),
        ..GroupRequest::default()
    }
}

fn accounts(repeats: bool) -> (Arc<Engine>, Accounts) {
    let engine = Arc::new(Engine { repeats, ..Engine::default() });
    let accounts = Accounts::new(engine.clone());
    accounts.submit(vec![request(1), request(2)]).unwrap();
    (engine, accounts)
}

fn fate(group: u64, index: u32, fate: Fate) -> Settled {
    Settled { group_id: GroupId(group), sample_index: SampleIndex(index), fate }
}

fn columns(accounts: &Accounts) -> Vec<(String, f64)> {
    let mut row = MetricsRow::new(1, "s");
    accounts.columns(&mut row);
    let names = ["issued", "trained", "dropped/filtered", "dropped/aborted"];
    names.iter().filter_map(|name| Some(((*name).to_owned(), row.get(&format!("ledger/{name}"))?))).collect()
}

#[test]
fn what_is_trained_and_dropped_makes_up_what_was_issued() {
    let (engine, accounts) = accounts(false);
    while accounts.next_group(Duration::ZERO).unwrap().is_some() {}
    accounts.settle(3, &[fate(1, 0, Fate::Trained), fate(1, 1, Fate::Dropped(Unused::Filtered))]).unwrap();
    let waiting = [(GroupId(2), SampleIndex(0)), (GroupId(2), SampleIndex(1))].into_iter().collect();
    accounts.check(3, &waiting).unwrap();
    let lost = accounts.check(3, &BTreeSet::new()).unwrap_err().to_string();
    assert!(lost.contains("step 3: 2 issued samples") && lost.contains("(prompt 12, group 2, sample 1)"), "{lost}");
    accounts.settle(3, &[fate(2, 0, Fate::Trained), fate(2, 1, Fate::Trained)]).unwrap();
    accounts.check(3, &BTreeSet::new()).unwrap();
    let expected = [("issued", 4.0), ("trained", 3.0), ("dropped/filtered", 1.0)];
    assert_eq!(columns(&accounts), expected.map(|(name, n)| (name.to_owned(), n)));
    assert_eq!(columns(&accounts), [], "a row counts what is new");
    assert_eq!(*engine.settled.lock().unwrap(), [(3, 2), (3, 2)], "whoever is behind hears it too");
}

#[test]
fn nothing_is_trained_twice_delivered_twice_or_settled_unasked() {
    let (_, books) = accounts(false);
    let early = books.settle(1, &[fate(1, 0, Fate::Trained)]).unwrap_err();
    assert!(early.message.contains("sample 0 of group 1 ends as Trained"), "{early}");
    while books.next_group(Duration::ZERO).unwrap().is_some() {}
    books.settle(1, &[fate(1, 0, Fate::Trained)]).unwrap();
    assert!(books.settle(2, &[fate(1, 0, Fate::Trained)]).is_err(), "twice");
    assert!(books.settle(2, &[fate(1, 2, Fate::Trained)]).is_err(), "there is no third sample");
    let again = books.submit(vec![request(1)]).unwrap_err();
    assert!(again.message.contains("1 samples of it (prompt 11) are not settled"), "{again}");
    let (_, repeating) = accounts(true);
    repeating.next_group(Duration::ZERO).unwrap();
    let twice = repeating.next_group(Duration::ZERO).unwrap_err();
    assert!(twice.message.contains("group 2 (prompt 12) was delivered before"), "{twice}");
}

#[test]
fn what_is_aborted_is_dropped_and_what_was_delivered_is_not() {
    let (_, accounts) = accounts(false);
    accounts.next_group(Duration::ZERO).unwrap();
    assert_eq!(accounts.abort_all(), Ok(1));
    let lost = accounts.check(1, &BTreeSet::new()).unwrap_err().to_string();
    assert!(lost.contains("2 issued samples") && lost.contains("group 2"), "{lost}");
    let expected = [("issued", 4.0), ("trained", 0.0), ("dropped/aborted", 2.0)];
    assert_eq!(columns(&accounts), expected.map(|(name, n)| (name.to_owned(), n)));
}

fn going_on(group: u64, begun: [&[u32]; 2]) -> GroupRequest {
    let begun = begun.map(|ids| BegunResponse { token_ids: ids.to_vec(), is_complete: false }).into();
    GroupRequest { begun, ..request(group) }
}

/// A sample that goes on is issued once; one that begins anew was dropped before, and is issued again.
#[test]
fn what_goes_on_is_counted_once() {
    let (engine, accounts) = accounts(false);
    let early = accounts.submit(vec![going_on(2, [&[1], &[1]])]).unwrap_err();
    assert!(early.message.contains("group 2 (prompt 12) goes on before its last round is over"), "{early}");
    while accounts.next_group(Duration::ZERO).unwrap().is_some() {}
    accounts.submit(vec![going_on(1, [&[1], &[1]])]).unwrap();
    accounts.next_group(Duration::ZERO).unwrap();
    let ended = accounts.submit(vec![going_on(1, [&[1], &[]])]).unwrap_err();
    assert!(ended.message.contains("sample 1 of group 1 (prompt 11)"), "{ended}");
    accounts.settle(0, &[fate(2, 1, Fate::Dropped(Unused::Filtered))]).unwrap();
    accounts.submit(vec![going_on(2, [&[1], &[]])]).unwrap();
    accounts.next_group(Duration::ZERO).unwrap();
    let all: Vec<Settled> = [0, 1].map(|index| fate(2, index, Fate::Trained)).into();
    accounts.settle(1, &all).unwrap();
    let expected = [("issued", 5.0), ("trained", 2.0), ("dropped/filtered", 1.0)];
    assert_eq!(columns(&accounts), expected.map(|(name, n)| (name.to_owned(), n)));
    assert_eq!(engine.settled.lock().unwrap().len(), 2);
}

/// A row has what was counted since the row before, and nothing where the engine did nothing.
#[test]
fn a_row_says_what_the_engine_did_since_the_last() {
    let (engine, accounts) = accounts(false);
    let row = || {
        let mut row = MetricsRow::new(1, "s");
        accounts.columns(&mut row);
        row
    };
    assert_eq!(row().get("engine/rows_per_step"), None);
    let first = RolloutStats { num_steps: 4, num_rows: 8, kv_blocks: 10, peak_kv_blocks: 5, ..RolloutStats::default() };
    *engine.stats.lock().unwrap() = first;
    assert_eq!(row().get("engine/rows_per_step"), Some(2.0));
    assert_eq!(row().get("engine/rows_per_step"), None, "nothing since");
    let mut second = RolloutStats { num_steps: 6, num_rows: 18, num_preemptions: 3, tail_micros: 250_000, ..first };
    second.speculation.suffix[2].num_draft_tokens = 7;
    *engine.stats.lock().unwrap() = second;
    let row = row();
    for (name, expected) in [
        ("engine/rows_per_step", 5.0),
        ("engine/kv_cache_peak_usage_perc", 0.5),
        ("engine/num_preemptions", 3.0),
        ("engine/prefill_tokens", 0.0),
        ("engine/tail_seconds", 0.25),
        ("engine/spec_decode_num_draft_tokens", 7.0),
    ] {
        assert_eq!(row.get(name), Some(expected), "{name}");
    }
}
