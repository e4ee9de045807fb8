//! What has come for one rank and was not read yet: one queue per sender and group.

use crate::message::{Message, Payload, Place};
use crate::transport::SendFailure;
use crate::{Error, Loss, Operation};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Most unread messages of one sender. Ranks run at most a few operations ahead of each other.
const MAX_UNREAD: usize = 256;

#[derive(Debug, Default)]
struct State {
    unread: BTreeMap<(usize, u64), VecDeque<(Place, Payload)>>,
    num_unread: BTreeMap<usize, usize>,
    gone: Vec<usize>,
    /// The first loss that anyone reported: who, what, by whom.
    aborted: Option<(usize, Operation, usize)>,
    closed: bool,
}

/// The mailbox of a rank.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    state: Mutex<State>,
    changed: Condvar,
}

/// Why nothing could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Gone,
    Late,
    Aborted { rank: usize, operation: Operation, by: usize },
}

impl Missing {
    /// The error of a wait for `rank` in `operation` that began at `start`.
    pub(crate) fn into_error(self, rank: usize, operation: Operation, start: Instant) -> Error {
        match self {
            Missing::Gone => Error::RankLost { rank, operation, loss: Loss::Gone },
            Missing::Late => Error::RankLost { rank, operation, loss: Loss::Late { waited: start.elapsed() } },
            Missing::Aborted { rank, operation, by } => {
                Error::RankLost { rank, operation, loss: Loss::Reported { by } }
            }
        }
    }
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Put a message of rank `from` in; waits while too many are unread.
    pub(crate) fn put(&self, from: usize, message: Message, deadline: Instant) -> Result<(), SendFailure> {
        let mut state = self.lock();
        match message {
            Message::Abort { rank, operation } => {
                state.aborted.get_or_insert((rank, operation, from));
            }
            Message::Data { group, place, payload } => {
                while state.num_unread.get(&from).copied().unwrap_or(0) >= MAX_UNREAD {
                    if state.closed {
                        return Err(SendFailure::Gone);
                    }
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(SendFailure::Late);
                    }
                    state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                if state.closed {
                    return Err(SendFailure::Gone);
                }
                state.unread.entry((from, group)).or_default().push_back((place, payload));
                *state.num_unread.entry(from).or_default() += 1;
            }
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Nothing more comes from `rank`. What it sent before stays.
    pub(crate) fn mark_gone(&self, rank: usize) {
        self.lock().gone.push(rank);
        self.changed.notify_all();
    }

    /// Nobody reads any more.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Why `rank` takes nothing any more: it may have said that another rank was lost before it went. What it sent is
    /// in when its connection ends, which is waited for until `deadline`.
    pub(crate) fn why_gone(&self, rank: usize, deadline: Instant) -> Missing {
        let mut state = self.lock();
        loop {
            if let Some((rank, operation, by)) = state.aborted {
                return Missing::Aborted { rank, operation, by };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.gone.contains(&rank) || left.is_zero() {
                return Missing::Gone;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The next message of `from` in `group`. A message that came is given even where its sender is gone since.
    pub(crate) fn take(&self, from: usize, group: u64, deadline: Instant) -> Result<(Place, Payload), Missing> {
        let mut state = self.lock();
        loop {
            if let Some(message) = state.unread.get_mut(&(from, group)).and_then(VecDeque::pop_front) {
                *state.num_unread.entry(from).or_default() -= 1;
                drop(state);
                self.changed.notify_all();
                return Ok(message);
            }
            if let Some((rank, operation, by)) = state.aborted {
                return Err(Missing::Aborted { rank, operation, by });
            }
            if state.gone.contains(&from) {
                return Err(Missing::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Late);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
