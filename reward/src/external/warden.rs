//! The warden: a process between temper and a user's program, which it starts, watches and kills.
//!
//! Reads a [`WardenSpec`] and then [`WardenRequest`]s from its stdin, one JSON object a line; writes a [`WardenReply`]
//! for each to its stdout. Its stdin ends when temper drops the worker or dies, however that happens; then it kills
//! everything below it and goes.

use super::answer::{self, Answer, BadAnswer, IdRule, quote};
use super::config::ProcessLimits;
use super::line::{Line, read_line};
use super::watch::Watch;
use super::{launch, proc_tree};
use rustix::process::{Pid, WaitStatus};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::{BufReader, Read, Write};
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use temper_types::RewardComponent;

/// Environment variable that marks the processes of a worker.
pub(crate) const MARKER: &str = "TEMPER_REWARD_WORKER";
/// How long killed processes may take to be gone.
pub(crate) const KILL_PATIENCE: Duration = Duration::from_secs(30);
/// How often limits are looked at while a sample is scored.
const TICK: Duration = Duration::from_millis(20);
/// The same while none is.
const IDLE_TICK: Duration = Duration::from_millis(200);
/// How often the process table is looked at while a sample is scored, unless it grows.
const LOOK: Duration = Duration::from_millis(100);
/// The same while none is.
const IDLE_LOOK: Duration = Duration::from_secs(2);
/// How long a process whose stdout ended may take to end itself, so that its exit status is known.
const EXIT_PATIENCE: Duration = Duration::from_millis(200);
/// Events that wait at most, so that a process that floods its stdout is made to wait.
const QUEUE: usize = 64;
/// How much of stderr is kept, in bytes.
const STDERR_BYTES: usize = 2000;
/// Lines of stderr that an error repeats.
const STDERR_LINES: usize = 4;

/// What a warden runs, and within which limits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct WardenSpec {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// Where the program says `{"ready": true}` before it takes requests: how long it may take for that.
    pub(crate) start_seconds: Option<f64>,
    /// Limits of the program and all that it starts.
    pub(crate) limits: ProcessLimits,
    /// Value of [`MARKER`].
    pub(crate) marker: String,
}

/// What a warden is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum WardenRequest {
    /// Start the program, so that what is wrong with it is known early.
    Start,
    /// Score a sample.
    Score {
        /// Id that the answer must have.
        id: String,
        /// What the program is sent.
        line: String,
    },
}

/// What a warden answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct WardenReply {
    /// Score and components, or the cause; a score of 0 without components to [`WardenRequest::Start`].
    pub(crate) answer: Result<AnswerBits, String>,
    /// What happened while no sample was scored, where something did.
    pub(crate) note: Option<String>,
}

/// An [`Answer`] on its way: numbers as their bits, which decimals in JSON would not keep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct AnswerBits {
    score: u64,
    components: Vec<(String, u64)>,
}

impl From<Answer> for AnswerBits {
    fn from(answer: Answer) -> Self {
        let components = answer.components.into_iter().map(|c| (c.name, c.value.to_bits())).collect();
        AnswerBits { score: answer.score.to_bits(), components }
    }
}

impl From<AnswerBits> for Answer {
    fn from(bits: AnswerBits) -> Self {
        let component = |(name, value)| RewardComponent { name, value: f64::from_bits(value) };
        let components = bits.components.into_iter().map(component).collect();
        Answer { score: f64::from_bits(bits.score), components }
    }
}

enum Event {
    Request(WardenRequest),
    /// Temper is gone, or done.
    Closed,
    /// From the stdout of the process of this generation.
    Output(u64, Line),
}

/// Temper is gone, or done.
struct Closed;

/// Why there is no answer.
struct Failure {
    cause: String,
    /// The process ended by itself with exit code 0.
    left_cleanly: bool,
}

impl From<String> for Failure {
    fn from(cause: String) -> Self {
        Failure { cause, left_cleanly: false }
    }
}

struct Program {
    pid: Pid,
    requests: Sender<String>,
    stderr: Arc<Mutex<VecDeque<u8>>>,
    /// Hung up once stderr has been read to its end.
    stderr_end: Receiver<()>,
    status: Option<WaitStatus>,
    num_answers: u64,
}

struct Warden {
    spec: WardenSpec,
    events: SyncSender<Event>,
    inbox: Receiver<Event>,
    generation: u64,
    program: Option<Program>,
    /// Taken from the inbox too early.
    unread: Option<Event>,
    note: Option<String>,
}

pub(crate) fn main() -> ExitCode {
    let spec = match read_line(&mut std::io::stdin().lock()) {
        Line::Text(line) => serde_json::from_str::<WardenSpec>(&line).ok(),
        Line::TooLong | Line::End => None,
    };
    let is_subreaper = rustix::process::set_child_subreaper(Some(rustix::process::getpid())).is_ok();
    let (Some(spec), true) = (spec, is_subreaper) else { return ExitCode::FAILURE };
    let (events, inbox) = std::sync::mpsc::sync_channel(QUEUE);
    let requests = events.clone();
    std::thread::spawn(move || read_requests(&requests));
    let mut warden = Warden { spec, events, inbox, generation: 0, program: None, unread: None, note: None };
    let Closed = warden.run();
    proc_tree::kill_below_me(KILL_PATIENCE);
    ExitCode::SUCCESS
}

fn read_requests(events: &SyncSender<Event>) {
    // Temper's own lines are longer than a program's may be: a request quotes a whole sample.
    for line in std::io::stdin().lines() {
        let Some(request) = line.ok().and_then(|line| serde_json::from_str(&line).ok()) else { break };
        if events.send(Event::Request(request)).is_err() {
            return;
        }
    }
    let _nobody_listens = events.send(Event::Closed);
}

impl Warden {
    fn run(&mut self) -> Closed {
        let mut watch = Watch::new(IDLE_LOOK);
        loop {
            let tick = self.program.as_ref().map(|_| IDLE_TICK);
            match self.receive(tick) {
                Ok(Event::Request(request)) => {
                    let Ok(answer) = self.serve(&request) else { return Closed };
                    let reply = WardenReply { answer: answer.map(AnswerBits::from), note: self.note.take() };
                    if !say(&reply) {
                        return Closed;
                    }
                    watch = Watch::new(IDLE_LOOK);
                }
                // A program that speaks or ends while nothing was asked is dealt with by the next request.
                Ok(Event::Output(generation, line)) => self.between_requests(generation, &line),
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(cause) = watch.check(&self.spec.limits) {
                        self.note = Some(self.killed(&format!("between two samples it {cause}")));
                    }
                }
                Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => return Closed,
            }
        }
    }

    /// The next event, waited for without an end where no time is given: while nothing runs, nothing is to be watched.
    fn receive(&mut self, timeout: Option<Duration>) -> Result<Event, RecvTimeoutError> {
        match (self.unread.take(), timeout) {
            (Some(event), _) => Ok(event),
            (None, Some(timeout)) => self.inbox.recv_timeout(timeout),
            (None, None) => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
        }
    }

    fn between_requests(&mut self, generation: u64, line: &Line) {
        if self.generation != generation || self.program.is_none() {
            return;
        }
        match line {
            Line::End => {
                let failure = self.ended();
                self.note = (!failure.left_cleanly).then(|| format!("between two samples: {}", failure.cause));
            }
            Line::TooLong => self.note = Some(self.killed("it wrote without being asked, and without an end")),
            Line::Text(text) => {
                self.note = Some(self.killed(&format!("it answered twice or without being asked: {}", quote(text))));
            }
        }
    }

    /// Answer one request. A process that had answered before and then left with exit code 0 is no failure of the
    /// sample that it left unanswered: a new one gets it.
    fn serve(&mut self, request: &WardenRequest) -> Result<Result<Answer, String>, Closed> {
        loop {
            let had_answered = self.program.as_ref().is_some_and(|program| program.num_answers > 0);
            let outcome = match self.started()? {
                Err(cause) => Err(Failure::from(cause)),
                Ok(()) => match request {
                    WardenRequest::Start => return Ok(Ok(Answer { score: 0.0, components: Vec::new() })),
                    WardenRequest::Score { id, line } => self.exchange(id, line)?,
                },
            };
            match outcome {
                Ok(answer) => return Ok(Ok(answer)),
                Err(failure) if failure.left_cleanly && had_answered => {}
                Err(failure) => return Ok(Err(failure.cause)),
            }
        }
    }

    /// Start the program unless it runs.
    fn started(&mut self) -> Result<Result<(), String>, Closed> {
        if self.program.is_some() {
            return Ok(Ok(()));
        }
        self.generation += 1;
        // What a swarm left dying must not count for the next sample.
        if let (_reaped, left @ 1..) = proc_tree::kill_below_me(KILL_PATIENCE) {
            return Ok(Err(format!("cannot start: {left} processes of an earlier sample do not die")));
        }
        match self.spawn() {
            Ok(program) => self.program = Some(program),
            Err(cause) => return Ok(Err(cause)),
        }
        let Some(seconds) = self.spec.start_seconds else { return Ok(Ok(())) };
        let line = match self.next_line(seconds, "start_seconds")? {
            Ok(line) => line,
            Err(failure) => return Ok(Err(format!("cannot start: {}", failure.cause))),
        };
        let message = serde_json::from_str::<serde_json::Value>(&line).unwrap_or_default();
        if message["ready"] == true {
            return Ok(Ok(()));
        }
        let cause = message["error"].as_str().map_or_else(|| quote(&line), str::to_owned);
        proc_tree::kill_below_me(KILL_PATIENCE);
        self.program = None;
        Ok(Err(format!("cannot start: {cause}")))
    }

    fn spawn(&self) -> Result<Program, String> {
        let limits = &self.spec.limits;
        let mut child = Command::new("/proc/self/exe")
            .args(launch::arguments(limits.memory_mb, limits.max_processes, &self.spec.argv))
            .env(MARKER, &self.spec.marker)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("cannot start a process: {e}"))?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("a child without a process id")?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            return Err("a child without pipes".to_owned());
        };
        let (requests, lines) = std::sync::mpsc::channel();
        let (events, generation, kept) = (self.events.clone(), self.generation, Arc::default());
        let tail = Arc::clone(&kept);
        std::thread::spawn(move || write_lines(stdin, &lines));
        std::thread::spawn(move || forward(BufReader::new(stdout), generation, &events));
        let (at_end, stderr_end) = std::sync::mpsc::channel();
        std::thread::spawn(move || keep_tail(stderr, (&tail, at_end)));
        Ok(Program { pid, requests, stderr: kept, stderr_end, status: None, num_answers: 0 })
    }

    /// Send one request and wait for its answer, within the limits.
    fn exchange(&mut self, id: &str, line: &str) -> Result<Result<Answer, Failure>, Closed> {
        if let Some(program) = &self.program {
            let _ended_processes_are_noticed_below = program.requests.send(line.to_owned());
        }
        let answer = match self.next_line(self.spec.limits.timeout_seconds, "timeout_seconds")? {
            Ok(answer) => answer,
            Err(failure) => return Ok(Err(failure)),
        };
        Ok(match answer::parse(&answer, id, IdRule::Required) {
            Ok(answer) => self.answered().map(|()| answer),
            Err(BadAnswer::Sample(cause)) => self.answered().and(Err(Failure::from(cause))),
            Err(BadAnswer::OutOfStep(cause)) => Err(Failure::from(self.killed(&cause))),
        })
    }

    /// The program answered; a second answer in the same breath makes the first one worthless.
    fn answered(&mut self) -> Result<(), Failure> {
        if let Some(program) = &mut self.program {
            program.num_answers += 1;
        }
        match self.inbox.try_recv() {
            Ok(Event::Output(generation, Line::Text(line))) if generation == self.generation => {
                Err(Failure::from(self.killed(&format!("it answered twice, the second time {}", quote(&line)))))
            }
            Ok(event) => {
                self.unread = Some(event);
                Ok(())
            }
            Err(_) => Ok(()),
        }
    }

    /// The next line of the program. Where there is none within `seconds` (of the key `key`) or within the limits, the
    /// process is no more.
    fn next_line(&mut self, seconds: f64, key: &str) -> Result<Result<String, Failure>, Closed> {
        let deadline = Instant::now() + Duration::from_secs_f64(seconds);
        let mut watch = Watch::new(LOOK);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive(Some(left.min(TICK))) {
                Ok(Event::Output(generation, _)) if generation != self.generation => {}
                Ok(Event::Output(_, Line::Text(line))) => return Ok(Ok(line)),
                Ok(Event::Output(_, Line::TooLong)) => {
                    let max = super::line::MAX_LINE_BYTES;
                    return Ok(Err(self.killed(&format!("wrote more than {max} bytes without an end of line")).into()));
                }
                Ok(Event::Output(_, Line::End)) => return Ok(Err(self.ended())),
                Ok(Event::Request(_) | Event::Closed) | Err(RecvTimeoutError::Disconnected) => return Err(Closed),
                Err(RecvTimeoutError::Timeout) => self.close_pipes_of_the_dead(),
            }
            let late = || Err(format!("no answer within {key} = {seconds}"));
            let within = if Instant::now() < deadline { watch.check(&self.spec.limits) } else { late() };
            if let Err(cause) = within {
                // What was written before the look counts.
                match self.receive(Some(Duration::ZERO)) {
                    Ok(event) => self.unread = Some(event),
                    Err(_) => return Ok(Err(self.killed(&cause).into())),
                }
            }
        }
    }

    /// Where the program itself has ended, kill what it left behind: that may hold its stdout open, whose end is
    /// waited for.
    fn close_pipes_of_the_dead(&mut self) {
        if self.program.as_mut().is_some_and(Program::has_exited) {
            proc_tree::kill_below_me(KILL_PATIENCE);
        }
    }

    /// The program closed its stdout: wait a little for its exit status, then make sure that nothing is left of it.
    fn ended(&mut self) -> Failure {
        let begin = Instant::now();
        while begin.elapsed() < EXIT_PATIENCE && self.program.as_mut().is_some_and(|p| !p.has_exited()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let Some(program) = self.program.take() else { return Failure::from("there is no process".to_owned()) };
        proc_tree::kill_below_me(KILL_PATIENCE);
        let how = match program.status {
            None => "closed its stdout, was killed".to_owned(),
            Some(status) => describe(status),
        };
        let left_cleanly = program.status.and_then(WaitStatus::exit_status) == Some(0);
        Failure { cause: format!("{how} before it answered{}", program.last_words()), left_cleanly }
    }

    /// Kill the program and all that it started; the cause with what it last said.
    fn killed(&mut self, cause: &str) -> String {
        let (_reaped, left) = proc_tree::kill_below_me(KILL_PATIENCE);
        let words = self.program.take().map(|program| program.last_words()).unwrap_or_default();
        let left = if left > 0 { format!(", {left} processes do not die") } else { String::new() };
        format!("{cause}: killed{left}{words}")
    }
}

impl Program {
    fn has_exited(&mut self) -> bool {
        let mine = proc_tree::reap().into_iter().find(|(pid, _)| *pid == self.pid);
        self.status = self.status.or(mine.map(|(_, status)| status));
        self.status.is_some()
    }

    /// The end of stderr, for a message. Nobody writes there any more.
    fn last_words(&self) -> String {
        let _hung_up_or_too_late = self.stderr_end.recv_timeout(EXIT_PATIENCE);
        let bytes: Vec<u8> = self.stderr.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let last = &lines[lines.len().saturating_sub(STDERR_LINES)..];
        if last.is_empty() { String::new() } else { format!("; stderr: {}", last.join(" | ")) }
    }
}

fn describe(status: WaitStatus) -> String {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => format!("ended with exit code {code}"),
        (None, Some(signal)) => format!("ended by signal {signal}{}", signal_name(signal)),
        (None, None) => "ended".to_owned(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

/// Write a reply; false where nobody reads it any more.
fn say(reply: &WardenReply) -> bool {
    let Ok(mut line) = serde_json::to_vec(reply) else { return false };
    line.push(b'\n');
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&line).and_then(|()| stdout.flush()).is_ok()
}

fn write_lines(mut stdin: ChildStdin, lines: &Receiver<String>) {
    while let Ok(mut line) = lines.recv() {
        line.push('\n');
        if stdin.write_all(line.as_bytes()).is_err() {
            return;
        }
    }
}

fn forward(mut stdout: impl std::io::BufRead, generation: u64, events: &SyncSender<Event>) {
    loop {
        let line = read_line(&mut stdout);
        let is_last = matches!(line, Line::TooLong | Line::End);
        if events.send(Event::Output(generation, line)).is_err() || is_last {
            return;
        }
    }
}

fn keep_tail(mut stderr: impl Read, (tail, _at_end): (&Mutex<VecDeque<u8>>, Sender<()>)) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = stderr.read(&mut buffer) {
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend(&buffer[..len]);
        let surplus = tail.len().saturating_sub(STDERR_BYTES);
        tail.drain(..surplus);
    }
}
