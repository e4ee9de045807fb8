//! Trainer ranks that come back without a checkpoint: survivors keep their state, agree on a step, and meet the ranks
//! that were started in place of the lost ones.

use super::cluster::{Cluster, Fleets, send_away};
use super::hub::{Member, Standing};
use super::{LEASE, START_TIMEOUT};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};
use temper_proto::{HeldShard, MirrorPlan, ServiceResult, TrainerService, WorkerRole};
use temper_trainer::agree_on_mirrors;

/// Pause between two looks at the workers.
const TICK: Duration = Duration::from_millis(20);
/// A rank that does not answer is about to be known as lost; so long it is waited for that.
const MOMENT: Duration = Duration::from_millis(200);
/// How often survivors are asked, as more of them may be lost meanwhile.
const MAX_ASKS: usize = 10;
/// How long a call has to end that an engine or reward worker is in once the ranks have met again.
const CALL_PATIENCE: Duration = Duration::from_secs(5);
/// Why workers begin anew that cannot go on as they are.
const NOT_AT_REST: &str = "a trainer rank was lost, the run goes back a step, and a call to the worker does not end";
const MOVED: &str = "a trainer rank was lost, and its successor is at an address that the worker was not told";

/// A trainer rank that the run speaks with.
#[derive(Clone)]
pub(super) struct RankHandle {
    pub(super) member: Member,
    pub(super) service: Arc<dyn TrainerService>,
}

/// Trainer ranks of which the lost ones were replaced.
pub struct MirroredRanks {
    /// All ranks as one.
    pub trainer: Arc<dyn TrainerService>,
    /// What they have to go back to.
    pub plan: MirrorPlan,
    /// Who was lost and why.
    pub lost: Vec<String>,
    /// Engines and reward workers that kept their processes and what they hold, by name.
    pub kept_workers: Vec<String>,
}

/// What survivors say.
struct Survivors {
    /// Of each rank what it holds; nothing of a lost one.
    held: Vec<Vec<HeldShard>>,
    /// Those that live.
    ranks: Vec<RankHandle>,
    lost: Vec<String>,
}

impl Cluster {
    /// The ranks again after one was lost, or why that cannot be without a checkpoint. `failed` is what failed first;
    /// `is_known` says which steps the run can go on from.
    ///
    /// # Errors
    /// Why the memory of the ranks is of no use, in words.
    pub fn recover_mirrored(
        &self,
        failed: FailedService,
        is_known: impl Fn(u64) -> bool,
    ) -> Result<MirroredRanks, String> {
        let num_shards = self.num_shards.ok_or_else(|| "placement.mirror_shards is off".to_owned())?;
        let survivors = self.survivors(failed)?;
        let plan = agree_on_mirrors(num_shards, &survivors.held, is_known).map_err(|e| e.to_string())?;
        tracing::info!(step = plan.step, lost = survivors.lost.join("; "), "the ranks hold the state of a step");
        let fleets = self.renew_fleets();
        fleets.retire();
        self.meet_again(&survivors.ranks)?;
        let trainer = self.trainer().map_err(|e| format!("{e:#}"))?;
        let kept_workers = self.take_over(&fleets);
        self.wait().map_err(|e| format!("{e:#}"))?;
        Ok(MirroredRanks { trainer, plan, lost: survivors.lost, kept_workers })
    }

    /// Let the fleets of now take in the workers that those of before had, as they are: their processes, connections
    /// and weights stay. Those that cannot begin anew. Gives the names of those that stay.
    fn take_over(&self, before: &Fleets) -> Vec<String> {
        let unfit = before.unfit(CALL_PATIENCE);
        let sources = self.hub.weight_sources();
        let is_at_rest = |member: &Member| member.standing != Standing::Ready || !unfit.contains(&member.id.name);
        let finds_weights = |member: &Member| member.weight_sources == sources;
        let killer = self.killer();
        let is_other = |member: &Member| member.hello.role != WorkerRole::Trainer;
        send_away(&self.hub, (killer.as_ref(), NOT_AT_REST), |member| is_other(member) && !is_at_rest(member));
        send_away(&self.hub, (killer.as_ref(), MOVED), |member| is_other(member) && !finds_weights(member));
        let mut members = self.hub.members();
        members.retain(|member| is_other(member) && member.standing == Standing::Ready);
        members.iter().for_each(|member| self.hub.present_again(&member.id));
        members.into_iter().map(|member| member.id.name).collect()
    }

    /// Which ranks live, and what they hold.
    fn survivors(&self, failed: FailedService) -> Result<Survivors, String> {
        let ranks = self.ranks.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let patience = match failed {
            // Its peers may know before its lease ends.
            FailedService::Trainer => LEASE + LEASE / 5,
            FailedService::Other => MOMENT,
        };
        let deadline = Instant::now() + patience;
        while self.losses(&ranks).iter().all(Option::is_none) && Instant::now() < deadline {
            std::thread::sleep(TICK);
        }
        for _ in 0..MAX_ASKS {
            let losses = self.losses(&ranks);
            let alive = ranks.iter().zip(&losses).map(|(rank, loss)| loss.is_none().then_some(rank));
            if let Some(held) = ask(alive) {
                let ranks = ranks.iter().zip(&losses).filter(|(_, loss)| loss.is_none());
                let ranks = ranks.map(|(rank, _)| rank.clone()).collect();
                return Ok(Survivors { held, ranks, lost: losses.into_iter().flatten().collect() });
            }
            std::thread::sleep(MOMENT);
        }
        Err("the ranks that are left do not say what they hold".to_owned())
    }

    /// Of each rank, who it is and why it is lost; nothing of one that lives.
    fn losses(&self, ranks: &[RankHandle]) -> Vec<Option<String>> {
        let members = self.hub.members();
        let loss = |rank: &RankHandle| {
            let name = &rank.member.id.name;
            let now = members.iter().find(|member| member.id.name == *name)?;
            let is_lost = now.standing == Standing::Lost || now.id != rank.member.id;
            is_lost.then(|| format!("{name}: {}", now.cause))
        };
        ranks.iter().map(loss).collect()
    }

    /// Let the survivors meet the others, until all ranks serve.
    fn meet_again(&self, survivors: &[RankHandle]) -> Result<(), String> {
        let answers = rejoin(survivors);
        let mut num_met = 0;
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            for (name, answer) in answers.try_iter() {
                answer.map_err(|error| format!("{name} does not meet the other ranks: {error}"))?;
                num_met += 1;
            }
            if let Some(loss) = self.losses(survivors).into_iter().flatten().next() {
                return Err(format!("another rank was lost meanwhile: {loss}"));
            }
            if num_met == survivors.len() && self.num_serving_ranks() == self.num_ranks() {
                return Ok(());
            }
            if let Some((name, cause)) = self.given_up().into_iter().next() {
                return Err(format!("{name} does not start: {cause}"));
            }
            if Instant::now() > deadline {
                return Err(format!("the ranks did not meet within {START_TIMEOUT:?}"));
            }
            std::thread::sleep(TICK);
        }
    }
}

/// Whose failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailedService {
    /// A trainer rank's.
    Trainer,
    /// Somebody else's.
    Other,
}

/// What every rank that lives holds, all asked at once; nothing where one does not answer.
fn ask<'a>(ranks: impl Iterator<Item = Option<&'a RankHandle>>) -> Option<Vec<Vec<HeldShard>>> {
    std::thread::scope(|scope| {
        let start = |rank: Option<&'a RankHandle>| rank.map(|rank| scope.spawn(|| rank.service.held_shards()));
        let threads: Vec<_> = ranks.map(start).collect();
        let answer = |thread: Option<std::thread::ScopedJoinHandle<'_, ServiceResult<_>>>| match thread {
            None => Some(Vec::new()),
            Some(thread) => match thread.join() {
                Ok(Ok(held)) => Some(held),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a rank does not say what it holds");
                    None
                }
                Err(_) => None,
            },
        };
        threads.into_iter().map(answer).collect()
    })
}

/// What comes of a rank's way to the others, with its name.
type Answers = Receiver<(String, ServiceResult<()>)>;

/// Each on a thread of its own, which ends with the rank where nobody waits for it any more.
fn rejoin(ranks: &[RankHandle]) -> Answers {
    let (sender, answers) = channel();
    for RankHandle { member, service } in ranks.iter().cloned() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            // Nobody listens where another rank failed before.
            let _unheard = sender.send((member.id.name, service.rejoin())).is_err();
        });
    }
    answers
}
