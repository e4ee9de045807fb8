//! Temper's side of one warden.

use super::answer::Answer;
use super::launch;
use super::proc_tree;
use super::request::Request;
use super::warden::{KILL_PATIENCE, MARKER, WardenReply, WardenRequest, WardenSpec};
use crate::{ComponentConfig, Error, RewardConfig};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How much longer than its own limits a warden may take: it starts and kills processes.
const WARDEN_PATIENCE: Duration = Duration::from_secs(90);

/// How to start temper's own binary: the wardens of external rewards are that, in another role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launcher {
    program: PathBuf,
    search_path: OsString,
}

impl Launcher {
    /// A launcher that starts `program`, whose `main` gives its arguments to [`role`](super::role) first. Programs of
    /// rewards that are given by a bare name are looked for in the directories of `search_path` (`PATH`).
    pub fn new(program: impl Into<PathBuf>, search_path: impl Into<OsString>) -> Self {
        Launcher { program: program.into(), search_path: search_path.into() }
    }

    /// A launcher that starts the running binary, also after its file has been replaced.
    pub fn this_binary(search_path: impl Into<OsString>) -> Self {
        Launcher::new("/proc/self/exe", search_path)
    }

    /// What the components of `config` need to run is there: files can be read, programs are found. Runs nothing.
    ///
    /// # Errors
    /// The first thing that is missing, with the component.
    pub fn check(&self, config: &RewardConfig) -> Result<(), Error> {
        config.components.iter().try_for_each(|component| self.check_component(component))
    }

    pub(crate) fn check_component(&self, component: &ComponentConfig) -> Result<(), Error> {
        super::check::component(component, &self.search_path)
    }
}

/// One process of user code behind its warden. It is started when it is first needed and again after it was killed.
#[derive(Debug)]
pub(crate) struct Worker {
    launcher: Launcher,
    spec: WardenSpec,
    warden: Option<Warden>,
}

#[derive(Debug)]
struct Warden {
    child: Child,
    /// `None` once it was told to go.
    stdin: Option<ChildStdin>,
    /// Its lines; hung up when it is gone.
    replies: Receiver<String>,
    marker: String,
}

impl Worker {
    /// A worker that runs `spec`, whose marker it chooses itself.
    pub(crate) fn new(launcher: Launcher, spec: WardenSpec) -> Self {
        Worker { launcher, spec, warden: None }
    }

    /// Start the user's program now.
    pub(crate) fn start(&mut self) -> Result<(), String> {
        self.ask(&WardenRequest::Start).map(|_no_score| ())
    }

    /// The score of one sample, or why it has none.
    pub(crate) fn score(&mut self, request: &Request) -> Result<Answer, String> {
        self.ask(&WardenRequest::Score { id: request.id.clone(), line: request.line.clone() })
    }

    fn ask(&mut self, request: &WardenRequest) -> Result<Answer, String> {
        let mut warden = match self.warden.take() {
            Some(warden) => warden,
            None => Warden::start(&self.launcher, &self.spec)?,
        };
        // A dropped warden is killed with all its processes, so that the next sample starts anew.
        let reply = warden.ask(request, self.patience())?;
        self.warden = Some(warden);
        if let Some(note) = reply.note {
            tracing::warn!(program = self.spec.argv.join(" "), "a reward's process was restarted: {note}");
        }
        reply.answer.map(Answer::from)
    }

    /// Every limit that one request may come up against: two starts and two answers, where a program left in between.
    fn patience(&self) -> Duration {
        let seconds = self.spec.start_seconds.unwrap_or(0.0) + self.spec.limits.timeout_seconds;
        Duration::from_secs_f64(2.0 * seconds) + WARDEN_PATIENCE
    }
}

impl Warden {
    fn start(launcher: &Launcher, spec: &WardenSpec) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let spec = WardenSpec { marker: format!("{}-{number}", std::process::id()), ..spec.clone() };
        // A group of its own keeps it from the signals of the terminal, which are temper's to handle.
        let mut child = Command::new(&launcher.program)
            .args([OsString::from(launch::WARDEN)])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("cannot start {}: {e}", launcher.program.display()))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().ok_or("a child without stdout")?);
        let (sender, replies) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines();
            while let Some(Ok(line)) = lines.next() {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let marker = format!("{MARKER}={}", spec.marker);
        let mut warden = Warden { child, stdin, replies, marker };
        warden.send(&serde_json::to_string(&spec).map_err(|e| e.to_string())?)?;
        Ok(warden)
    }

    fn send(&mut self, line: &str) -> Result<(), String> {
        let stdin = self.stdin.as_mut().ok_or("the warden was told to go")?;
        let written = stdin.write_all(line.as_bytes()).and_then(|()| stdin.write_all(b"\n"));
        written.map_err(|e| format!("the process that watches over the reward is gone: {e}"))
    }

    fn ask(&mut self, request: &WardenRequest, patience: Duration) -> Result<WardenReply, String> {
        self.send(&serde_json::to_string(request).map_err(|e| e.to_string())?)?;
        let line = self.replies.recv_timeout(patience).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                format!("the process that watches over the reward said nothing in {patience:?}")
            }
            RecvTimeoutError::Disconnected => "the process that watches over the reward was killed".to_owned(),
        })?;
        serde_json::from_str(&line).map_err(|e| format!("the process that watches over the reward answered {e}"))
    }
}

impl Drop for Warden {
    /// Its stdin ends, so it kills what is below it and goes. One that does not go is killed, and what it leaves is
    /// found by its marker.
    fn drop(&mut self) {
        self.stdin = None;
        let gone = loop {
            match self.replies.recv_timeout(2 * KILL_PATIENCE) {
                Ok(_late) => {}
                Err(error) => break error == RecvTimeoutError::Disconnected,
            }
        };
        if !gone {
            let _gone_already = self.child.kill();
        }
        let left_cleanly = self.child.wait().is_ok_and(|status| status.success());
        if !left_cleanly {
            proc_tree::kill_marked(&self.marker, KILL_PATIENCE);
        }
    }
}
