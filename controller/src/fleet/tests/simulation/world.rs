//! The simulated world: a queue of happenings, a network that loses, repeats, delays and reorders, and clocks.

use super::super::super::journal::Entry;
use super::super::super::{Action, ControlPlane, Event, Fence, Job, Role, Ticket, Time, WorkerId};
use super::checker::{Check, Checker, Violation, is_pure, violated, worker};
use super::parts::{Conductor, Order, SimTrainer, SimWorker, ToController};
use super::planted::{Fault, Subject};
use super::rng::{Rng, mix};
use super::scenario::Scenario;
use std::collections::BTreeMap;

const HEARTBEAT: Time = 40;
const TICK: Time = 25;
/// A loop that never comes to rest is a bug of its own.
const MAX_TURNS: usize = 1000;

#[derive(Debug, Clone)]
enum Happening {
    ToController(ToController),
    ToWorker(WorkerId, Order),
    Train { term: u64, step: u64, tickets: Vec<Ticket> },
    AskTrainer { term: u64 },
    Done(WorkerId, u64, Ticket),
    Heartbeat(usize),
    Join(usize),
    Crash(usize, Time),
    ControllerCrash(Time),
    ControllerStart,
    Operator(Event),
    Tick,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub num_events: u64,
    pub fences: BTreeMap<Fence, u64>,
    pub finished_at: Time,
    /// Changes with everything that happened.
    pub digest: u64,
    pub violation: Option<(Time, Violation)>,
}

pub struct World {
    scenario: Scenario,
    fault: Option<Fault>,
    rng: Rng,
    now: Time,
    queue: BTreeMap<(Time, u64), Happening>,
    num_queued: u64,
    controller: Option<(Subject, Conductor)>,
    durable: Vec<Entry>,
    workers: Vec<SimWorker>,
    trainer: SimTrainer,
    checker: Checker,
    report: Report,
}

impl World {
    pub fn new(scenario: Scenario, fault: Option<Fault>) -> Self {
        let role = |id: usize| if id < scenario.num_rollout { Role::Rollout } else { Role::Reward };
        let num_workers = scenario.num_rollout + scenario.num_reward;
        let empty = Report { num_events: 0, fences: BTreeMap::new(), finished_at: 0, digest: 0, violation: None };
        let mut world = World {
            fault,
            rng: Rng::new(mix(scenario.seed, 1)),
            now: 0,
            queue: BTreeMap::new(),
            num_queued: 0,
            controller: None,
            durable: Vec::new(),
            workers: (0..num_workers).map(|id| SimWorker::new(id, role(id))).collect(),
            trainer: SimTrainer::default(),
            checker: Checker::new(scenario.config.max_staleness),
            report: empty,
            scenario,
        };
        world.schedule();
        world
    }

    fn schedule(&mut self) {
        let plan = self.scenario.clone();
        self.at(0, Happening::ControllerStart);
        self.at(TICK, Happening::Tick);
        for (id, at) in plan.joins.iter().enumerate() {
            self.at(*at, Happening::Join(id));
            self.at(at + HEARTBEAT, Happening::Heartbeat(id));
        }
        for (id, at, down) in &plan.crashes {
            self.at(*at, Happening::Crash(*id, *down));
        }
        for (at, down) in &plan.controller_crashes {
            self.at(*at, Happening::ControllerCrash(*down));
        }
        for at in &plan.aborts {
            self.at(*at, Happening::Operator(Event::AbortAll));
        }
        if let Some((from, to)) = plan.pause {
            self.at(from, Happening::Operator(Event::Pause));
            self.at(to, Happening::Operator(Event::Resume));
        }
    }

    /// Run to the end or to the first violation.
    pub fn run(mut self) -> Report {
        while let Some(((at, _), happening)) = self.queue.pop_first() {
            self.now = at;
            self.report.num_events += 1;
            if let Err(violation) = self.happen(happening).and_then(|()| self.is_in_time()) {
                self.report.violation = Some((at, violation));
                break;
            }
            if self.is_finished() {
                break;
            }
        }
        self.report.finished_at = self.now;
        if let (None, Some((subject, _))) = (&self.report.violation, &self.controller) {
            let num_groups = self.scenario.num_steps * self.scenario.groups_per_step;
            let end = self.checker.finished(&subject.plane, num_groups);
            self.report.violation = end.err().map(|violation| (self.now, violation));
        }
        self.report
    }

    fn is_finished(&self) -> bool {
        let done = |(subject, _): &(Subject, Conductor)| subject.plane.last_step() >= self.scenario.num_steps;
        self.controller.as_ref().is_some_and(done) && self.now > self.scenario.faults_end
    }

    fn is_in_time(&self) -> Check {
        if self.now <= self.scenario.deadline {
            return Ok(());
        }
        let done = self.controller.as_ref().map(|(subject, _)| subject.plane.last_step());
        violated("liveness", format!("{done:?} of {} steps are done at {}", self.scenario.num_steps, self.now))
    }

    fn at(&mut self, time: Time, happening: Happening) {
        self.num_queued += 1;
        self.queue.insert((time, self.num_queued), happening);
    }

    fn is_faulty(&self) -> bool {
        self.now < self.scenario.faults_end
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.is_faulty() && self.rng.chance(per_mille)
    }

    /// Send over the network; `worker` is the end that may be cut off.
    fn send(&mut self, worker: Option<usize>, happening: Happening) {
        let cut = |(id, from, to): &(usize, Time, Time)| Some(*id) == worker && (*from..*to).contains(&self.now);
        if self.scenario.partitions.iter().any(cut) || self.chance(self.scenario.drop) {
            return;
        }
        let copies = if self.chance(self.scenario.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            let most = if self.is_faulty() { self.scenario.max_delay } else { 4 };
            let slower = if self.chance(self.scenario.straggle) { 10 } else { 1 };
            let delay = self.rng.between(1, most) * slower;
            self.at(self.now + delay, happening.clone());
        }
    }

    fn happen(&mut self, happening: Happening) -> Check {
        match happening {
            Happening::ToController(message) => self.controller_hears(message),
            Happening::Operator(event) => self.controller_hears(event.into()),
            Happening::ToWorker(id, order) => self.worker_hears(id.0 as usize, order),
            Happening::Train { term, step, tickets } => {
                let answer = self.trainer.train(term, step, &tickets, &mut self.checker)?;
                self.trainer_says(answer)
            }
            Happening::AskTrainer { term } => {
                let answer = self.trainer.ask(term);
                self.trainer_says(answer)
            }
            Happening::Done(id, incarnation, ticket) => self.worker_finishes(id.0 as usize, incarnation, ticket),
            Happening::Heartbeat(id) => self.heartbeat(id),
            Happening::Join(id) => self.join(id),
            Happening::Crash(id, down) => {
                self.workers[id].crash();
                self.at(self.now + down, Happening::Join(id));
                Ok(())
            }
            Happening::ControllerCrash(down) => self.controller_crashes(down),
            Happening::ControllerStart => self.controller_starts(),
            Happening::Tick => self.tick(),
        }
    }

    fn trainer_says(&mut self, answer: Option<Event>) -> Check {
        if let Some(event) = answer {
            self.send(None, Happening::ToController(event.into()));
        }
        Ok(())
    }

    fn heartbeat(&mut self, id: usize) -> Check {
        if self.workers[id].is_up {
            let origin = self.workers[id].origin;
            self.send(Some(id), Happening::ToController(Event::Renew { origin }.into()));
        }
        self.at(self.now + HEARTBEAT, Happening::Heartbeat(id));
        Ok(())
    }

    fn join(&mut self, id: usize) -> Check {
        if !self.workers[id].is_up {
            let message = self.workers[id].begin_life();
            self.send(Some(id), Happening::ToController(message));
        }
        Ok(())
    }

    fn worker_hears(&mut self, id: usize, order: Order) -> Check {
        if !self.workers[id].is_up || self.workers[id].origin != order.origin() {
            return Ok(());
        }
        match order {
            Order::Job(origin, ticket, job, version) => {
                if let (Job::Group(_), held) = (&job, self.workers[id].held) {
                    if held.map(|v| v.number) > version.map(|v| v.number) {
                        return Ok(()); // It was under way for so long that it is of older weights.
                    }
                    self.checker.generates(origin, held, version)?;
                }
                let is_slow = self.is_faulty() && (id == 0 || id == self.scenario.num_rollout);
                let factor = if is_slow { self.scenario.slowness } else { 1 };
                let duration = factor * self.rng.between(3, 40);
                self.workers[id].running.insert(ticket, job);
                self.at(self.now + duration, Happening::Done(origin.worker, origin.incarnation, ticket));
            }
            Order::Sync(origin, version) => {
                let is_damaged = self.chance(self.scenario.corrupt);
                if let Some(message) = self.workers[id].sync(version, is_damaged) {
                    let held = self.workers[id].held.unwrap_or(version);
                    self.checker.attested(origin, held)?;
                    self.send(Some(id), Happening::ToController(message));
                }
            }
            Order::Abort(_, before) => self.workers[id].running.retain(|ticket, _| *ticket >= before),
            Order::Rejoin(_) => {
                let message = self.workers[id].begin_life();
                self.send(Some(id), Happening::ToController(message));
            }
        }
        Ok(())
    }

    fn worker_finishes(&mut self, id: usize, incarnation: u64, ticket: Ticket) -> Check {
        let is_same_life = self.workers[id].is_up && self.workers[id].origin.incarnation == incarnation;
        if is_same_life && let Some(message) = self.workers[id].finish(ticket) {
            self.send(Some(id), Happening::ToController(message));
        }
        Ok(())
    }

    fn tick(&mut self) -> Check {
        self.at(self.now + TICK, Happening::Tick);
        self.controller_hears(Event::Tick.into())?;
        match &self.controller {
            Some((subject, _)) => self.checker.leases(&subject.plane, self.now),
            None => Ok(()),
        }
    }

    fn controller_crashes(&mut self, down: Time) -> Check {
        if let Some((subject, _)) = self.controller.take() {
            self.note_fences(&subject.plane);
            if self.fault == Some(Fault::LostBeforeFsync) {
                self.durable.pop();
            }
            self.at(self.now + down, Happening::ControllerStart);
        }
        Ok(())
    }

    fn controller_starts(&mut self) -> Check {
        let (plane, actions) = ControlPlane::recover(self.scenario.config, &self.durable);
        self.controller = Some((Subject::new(plane, self.fault), Conductor::default()));
        self.perform(actions, &ToController::from(Event::Tick))?;
        match &self.controller {
            Some((subject, _)) => self.checker.recovered(&subject.plane),
            None => Ok(()),
        }
    }

    fn controller_hears(&mut self, message: ToController) -> Check {
        self.one_event(message)?;
        let mut last = None;
        for _ in 0..MAX_TURNS {
            let Some((subject, conductor)) = &mut self.controller else { return Ok(()) };
            let Some(event) = conductor.next(&subject.plane, &self.scenario) else { return Ok(()) };
            last = Some(event.clone());
            self.one_event(event.into())?;
        }
        violated("liveness", format!("the loop never comes to rest, at last with {last:?}"))
    }

    fn one_event(&mut self, message: ToController) -> Check {
        let Some((subject, _)) = &mut self.controller else { return Ok(()) };
        let before = subject.plane.clone();
        let actions = subject.step(message.event.clone(), self.now);
        fenced_messages_change_nothing(&before, &subject.plane)?;
        if let Event::Renew { origin } | Event::Register { origin, .. } = message.event {
            self.checker.renewed(origin, self.now);
        }
        let state = subject.plane.ledger().issued() ^ (subject.plane.next_ticket << 8);
        self.report.digest = mix(self.report.digest, mix(self.now, state ^ ((actions.len() as u64) << 50)));
        self.perform(actions, &message)?;
        match &self.controller {
            Some((subject, _)) => self.checker.check(&subject.plane),
            None => Ok(()),
        }
    }

    fn perform(&mut self, actions: Vec<Action>, message: &ToController) -> Check {
        for action in actions {
            if let Some((to, order)) = Order::from_action(&action) {
                if let Action::Dispatch { to, job: Job::Group(spec), version, .. } = &action {
                    self.checker.dispatched(*to, spec, *version)?;
                }
                self.send(Some(to.0 as usize), Happening::ToWorker(to, order));
                continue;
            }
            match action {
                Action::Append(entries) => {
                    let is_full = |(from, to): (Time, Time)| (from..to).contains(&self.now);
                    if self.scenario.full_disk.is_some_and(is_full) {
                        return self.controller_crashes(50);
                    }
                    self.checker.durable(&entries)?;
                    self.durable.extend(entries);
                }
                Action::Accept { ticket, key } => {
                    if let Some((_, conductor)) = &mut self.controller {
                        conductor.accept(ticket, key, &message.payload, &self.checker)?;
                    }
                }
                Action::GiveUp { key, .. } => {
                    if let Some((_, conductor)) = &mut self.controller {
                        conductor.give_up(key);
                    }
                }
                Action::Train { term, step, tickets } => self.send(None, Happening::Train { term, step, tickets }),
                Action::AskTrainer { term } => self.send(None, Happening::AskTrainer { term }),
                _ => {}
            }
        }
        Ok(())
    }

    fn note_fences(&mut self, plane: &ControlPlane) {
        for (fence, count) in plane.fences() {
            *self.report.fences.entry(*fence).or_default() += count;
        }
    }
}

/// A fenced message leaves the state as it was, but for its count and the time.
fn fenced_messages_change_nothing(before: &ControlPlane, after: &ControlPlane) -> Check {
    let Some((fence, _)) = after.fences.iter().find(|(f, n)| before.fences.get(f) != Some(n)) else { return Ok(()) };
    let mut expected = before.clone();
    expected.fences.clone_from(&after.fences);
    expected.now = after.now;
    if is_pure(*fence) && expected != *after {
        return violated("fenced messages change nothing", format!("{fence:?}"));
    }
    Ok(())
}

/// Run one seed.
pub fn simulate(seed: u64, fault: Option<Fault>) -> Report {
    let mut world = World::new(Scenario::new(seed), fault);
    world.checker.renewed(super::super::super::Origin { worker: worker(0), incarnation: 0 }, 0);
    world.run()
}
