//! One external reward: its workers, and scoring a batch on them.

use super::answer::Answer;
use super::breaker::Breaker;
use super::config::{BreakerConfig, PythonConfig};
use super::http::Endpoint;
use super::request::Request;
use super::warden::WardenSpec;
use super::worker::{Launcher, Worker};
use crate::Error;
use crate::config::{ComponentConfig, RewardKind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use temper_proto::ScoreRequest;

/// Reads requests and calls a function of a Python file. Given to the interpreter as an argument, so that nothing is
/// written anywhere.
const PYTHON_RUNNER: &str = include_str!("runner.py");

/// A score, or why there is none.
pub(crate) type Scored = Result<Answer, String>;

/// An external reward, ready to score.
#[derive(Debug)]
pub(crate) struct ExternalScorer {
    name: String,
    seats: Vec<Mutex<Seat>>,
    breaker: Mutex<Breaker>,
}

/// Where one sample is scored at a time.
#[derive(Debug)]
enum Seat {
    Process(Box<Worker>),
    Http(Endpoint, f64),
}

/// What a batch has so far, in the requests' order.
struct Progress {
    scored: Vec<Option<Scored>>,
    /// How many from the first on have been shown to the breaker.
    num_seen: usize,
    /// Why the run stops.
    tripped: Option<String>,
}

impl ExternalScorer {
    /// The reward of a component; `None` where its kind is not external. A Python file is loaded once, so that what is
    /// wrong with it is known before anything is scored.
    pub(crate) fn new(component: &ComponentConfig, launcher: &Launcher) -> Result<Option<Self>, Error> {
        let failed = |cause| Error::External { component: component.name().to_owned(), cause };
        launcher.check_component(component)?;
        let (seats, breaker): (Vec<Seat>, BreakerConfig) = match &component.kind {
            RewardKind::Command(config) => {
                let spec = WardenSpec {
                    argv: config.command.clone(),
                    start_seconds: None,
                    limits: config.limits.clone(),
                    marker: String::new(),
                };
                (processes(&spec, launcher), config.breaker.clone())
            }
            RewardKind::Python(config) => {
                let mut seats = processes(&python_spec(config).map_err(failed)?, launcher);
                if let Some(Seat::Process(worker)) = seats.first_mut() {
                    worker.start().map_err(failed)?;
                }
                (seats, config.breaker.clone())
            }
            RewardKind::Http(config) => {
                let endpoint =
                    Endpoint::parse(&config.url).ok_or_else(|| failed(format!("{} is no http URL", config.url)))?;
                let seat = || Seat::Http(endpoint.clone(), config.timeout_seconds);
                ((0..config.workers).map(|_| seat()).collect(), config.breaker.clone())
            }
            _ => return Ok(None),
        };
        let seats = seats.into_iter().map(Mutex::new).collect();
        Ok(Some(ExternalScorer {
            name: component.name().to_owned(),
            seats,
            breaker: Mutex::new(Breaker::new(breaker)),
        }))
    }

    /// Score a batch; outcomes stand in the requests' order.
    ///
    /// # Errors
    /// Where so many samples failed that the reward itself must be broken: what to stop the run with.
    pub(crate) fn score(&self, requests: &[ScoreRequest]) -> Result<Vec<Scored>, String> {
        let next = AtomicUsize::new(0);
        let scored = vec![None; requests.len()];
        let progress = Mutex::new(Progress { scored, num_seen: 0, tripped: None });
        std::thread::scope(|scope| {
            for seat in self.seats.iter().take(requests.len()) {
                scope.spawn(|| self.work(seat, requests, (&next, &progress)));
            }
        });
        let progress = progress.into_inner().unwrap_or_else(PoisonError::into_inner);
        match progress.tripped {
            Some(cause) => Err(format!("reward `{}` is broken: {cause}", self.name)),
            None => Ok(progress.scored.into_iter().map(|s| s.expect("every request was worked on")).collect()),
        }
    }

    /// Score what is next until nothing is, or the run stops.
    fn work(&self, seat: &Mutex<Seat>, requests: &[ScoreRequest], (next, progress): (&AtomicUsize, &Mutex<Progress>)) {
        loop {
            let row = next.fetch_add(1, Ordering::Relaxed);
            if row >= requests.len() || lock(progress).tripped.is_some() {
                return;
            }
            let scored = lock(seat).score(&Request::new(&requests[row]));
            let mut progress = lock(progress);
            progress.scored[row] = Some(scored);
            self.show_breaker(&mut progress);
        }
    }

    /// Show the breaker what stands without a gap behind what it has seen: the same in every run, whoever was faster.
    fn show_breaker(&self, progress: &mut Progress) {
        let mut breaker = lock(&self.breaker);
        while let (Some(Some(scored)), None) = (progress.scored.get(progress.num_seen), &progress.tripped) {
            progress.tripped = breaker.record(scored.as_ref().err().map(String::as_str)).err();
            progress.num_seen += 1;
        }
    }
}

impl Seat {
    fn score(&mut self, request: &Request) -> Scored {
        match self {
            Seat::Process(worker) => worker.score(request),
            Seat::Http(endpoint, seconds) => endpoint.score(request, *seconds),
        }
    }
}

fn processes(spec: &WardenSpec, launcher: &Launcher) -> Vec<Seat> {
    let seat = |_| Seat::Process(Box::new(Worker::new(launcher.clone(), spec.clone())));
    (0..spec.limits.workers).map(seat).collect()
}

fn python_spec(config: &PythonConfig) -> Result<WardenSpec, String> {
    let path = Path::new(&config.path);
    let path = path.to_str().ok_or_else(|| format!("{}: expected a path in UTF-8", path.display()))?;
    let argv = [&config.python, "-c", PYTHON_RUNNER, path, &config.function];
    Ok(WardenSpec {
        argv: argv.map(str::to_owned).to_vec(),
        start_seconds: Some(config.start_seconds),
        limits: config.limits.clone(),
        marker: String::new(),
    })
}

/// What a panic in another thread left is still whole: every value behind these locks is replaced as one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
