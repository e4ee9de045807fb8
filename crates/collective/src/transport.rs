//! How messages reach other ranks.

use crate::mailbox::Mailbox;
use crate::message::Message;
use std::sync::Arc;
use std::time::Instant;

/// Why a message did not go out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SendFailure {
    /// The receiver is gone.
    Gone,
    /// It takes nothing more, and the deadline has passed.
    Late,
}

/// The way to the other ranks. What comes from them is in a mailbox.
pub(crate) trait Transport: Send + Sync + std::fmt::Debug {
    /// Bring `message` on its way to rank `to`, or give up at `deadline`.
    fn send(&self, to: usize, message: Message, deadline: Instant) -> Result<(), SendFailure>;
    /// What has come from the others.
    fn mailbox(&self) -> &Arc<Mailbox>;
    /// Nothing goes to `rank` or comes from it any more, also where somebody waits for that now.
    fn cut(&self, rank: usize);
}
