//! Ranks that are threads of one process: messages are moved into each other's mailboxes.

use crate::Collective;
use crate::mailbox::Mailbox;
use crate::message::Message;
use crate::transport::{SendFailure, Transport};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connect `world` ranks of this process; the handles are in rank order. `timeout` bounds every operation.
///
/// # Panics
/// If `world` is 0.
pub fn connect_threads(world: usize, timeout: Duration) -> Vec<Collective> {
    assert!(world > 0, "at least one rank");
    let mailboxes: Vec<Arc<Mailbox>> = (0..world).map(|_| Arc::default()).collect();
    let transport = |rank| ThreadTransport { rank, mailboxes: mailboxes.clone() };
    (0..world).map(|rank| Collective::over(Arc::new(transport(rank)), (rank, world), timeout)).collect()
}

#[derive(Debug)]
struct ThreadTransport {
    rank: usize,
    mailboxes: Vec<Arc<Mailbox>>,
}

impl Transport for ThreadTransport {
    fn send(&self, to: usize, message: Message, deadline: Instant) -> Result<(), SendFailure> {
        self.mailboxes[to].put(self.rank, message, deadline)
    }

    fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailboxes[self.rank]
    }

    fn cut(&self, rank: usize) {
        self.mailbox().mark_gone(rank);
    }
}

impl Drop for ThreadTransport {
    fn drop(&mut self) {
        self.mailboxes[self.rank].close();
        self.mailboxes.iter().for_each(|mailbox| mailbox.mark_gone(self.rank));
    }
}
