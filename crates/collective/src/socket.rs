//! Ranks that are processes: one TCP connection between every two of them.
//!
//! A rank connects to all lower ranks and accepts all higher ones. Messages are length-prefixed frames; a thread per
//! connection reads them into the mailbox, so that a rank that computes never blocks one that sends.

use crate::link::{Link, LinkCutter, LinkReader, LinkTls, LinkWriter, left};
use crate::mailbox::Mailbox;
use crate::message::{Message, Operation, Payload, Place};
use crate::transport::{SendFailure, Transport};
use crate::{Collective, Error, Result};
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"tmprcol1";
/// Bytes of a frame before its payload, its length not counted.
const HEADER: usize = 1 + 8 + 8 + 1 + 1;
const HELLO: usize = 8 + 8 + 8 + 8;
/// Pause between two attempts to reach a rank that does not listen yet.
const RETRY: Duration = Duration::from_millis(10);
/// Longest that one who was accepted takes to greet: others wait meanwhile.
const GREETING: Duration = Duration::from_secs(5);

/// Which rank of which world this process is.
#[derive(Debug, Clone)]
pub struct SocketConfig {
    /// This rank.
    pub rank: usize,
    /// Where each rank listens, in rank order.
    pub addresses: Vec<SocketAddr>,
    /// The same number on all ranks of a world: connections of another world are refused.
    pub token: u64,
    /// Certificates, the same kind on all ranks; without any, what ranks say to each other is not encrypted.
    pub tls: Option<LinkTls>,
    /// Longest that connecting takes.
    pub connect_timeout: Duration,
    /// Longest that an operation takes.
    pub timeout: Duration,
}

/// Connect to all ranks; `listener` listens at this rank's address.
///
/// # Errors
/// A rank that cannot be reached within the time, or one of another world.
pub fn connect(config: &SocketConfig, listener: &TcpListener) -> Result<Collective> {
    let (rank, world) = (config.rank, config.addresses.len());
    let deadline = Instant::now() + config.connect_timeout;
    if rank >= world {
        return Err(fail(rank, "itself", format!("there are {world} addresses: expected one for this rank")));
    }
    let mut links: Vec<Option<Link>> = (0..world).map(|_| None).collect();
    for (peer, link) in links.iter_mut().enumerate().take(rank) {
        *link = Some(reach(config, peer, deadline)?);
    }
    while links.iter().skip(rank + 1).any(Option::is_none) {
        let waiting: Vec<usize> = (rank + 1..world).filter(|peer| links[*peer].is_none()).collect();
        let (peer, link) = accept(config, listener, &waiting, deadline)?;
        links[peer] = Some(link);
    }
    let transport = SocketTransport::new(links).map_err(|e| fail(rank, "all ranks", e.to_string()))?;
    Ok(Collective::over(Arc::new(transport), (rank, world), config.timeout))
}

fn fail(rank: usize, peer: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Connect { rank, peer: peer.into(), problem: problem.into() }
}

fn hello(config: &SocketConfig) -> [u8; HELLO] {
    let mut bytes = [0; HELLO];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..16].copy_from_slice(&config.token.to_le_bytes());
    bytes[16..24].copy_from_slice(&(config.addresses.len() as u64).to_le_bytes());
    bytes[24..].copy_from_slice(&(config.rank as u64).to_le_bytes());
    bytes
}

/// Exchange greetings; gives the other's rank.
fn greet(config: &SocketConfig, link: &mut Link, deadline: Instant) -> std::result::Result<usize, String> {
    let got = link.exchange(&hello(config), deadline).map_err(|error| match error.kind() {
        ErrorKind::UnexpectedEof if config.tls.is_none() => "it hung up: is it under TLS?".to_owned(),
        ErrorKind::UnexpectedEof => "it hung up".to_owned(),
        _ => error.to_string(),
    })?;
    if got[..24] != hello(config)[..24] {
        return Err("it belongs to another world, or is no rank at all".to_owned());
    }
    usize::try_from(u64_at(&got, 24)).map_err(|e| e.to_string())
}

fn reach(config: &SocketConfig, peer: usize, deadline: Instant) -> Result<Link> {
    let address = config.addresses[peer];
    let name = || format!("rank {peer} at {address}");
    loop {
        let problem = match TcpStream::connect_timeout(&address, left(deadline)) {
            Ok(stream) => {
                let mut link =
                    Link::dial(stream, config.tls.as_ref()).map_err(|e| fail(config.rank, name(), e.to_string()))?;
                match greet(config, &mut link, deadline) {
                    Ok(rank) if rank == peer => return Ok(link),
                    Ok(rank) => return Err(fail(config.rank, name(), format!("rank {rank} answered"))),
                    Err(problem) => return Err(fail(config.rank, name(), problem)),
                }
            }
            Err(error) => error.to_string(),
        };
        if Instant::now() >= deadline {
            return Err(fail(config.rank, name(), problem));
        }
        std::thread::sleep(RETRY);
    }
}

/// The next of the ranks that are `waiting` to be connected. Whoever is none of them is turned away.
fn accept(
    config: &SocketConfig,
    listener: &TcpListener,
    waiting: &[usize],
    deadline: Instant,
) -> Result<(usize, Link)> {
    let name = || format!("ranks {waiting:?}");
    let io = |e: std::io::Error| fail(config.rank, name(), e.to_string());
    listener.set_nonblocking(true).map_err(io)?;
    let mut refused = String::new();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(io)?;
                let mut link = Link::accept(stream, config.tls.as_ref()).map_err(io)?;
                match greet(config, &mut link, deadline.min(Instant::now() + GREETING)) {
                    Ok(peer) if waiting.contains(&peer) => return Ok((peer, link)),
                    Ok(peer) => refused = format!("; rank {peer} came, which is none of them"),
                    Err(problem) => refused = format!("; one who came was turned away: {problem}"),
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(RETRY),
            Err(error) => return Err(io(error)),
        }
        if Instant::now() >= deadline {
            return Err(fail(config.rank, name(), format!("they did not connect in time{refused}")));
        }
    }
}

#[derive(Debug)]
struct SocketTransport {
    mailbox: Arc<Mailbox>,
    /// To write to, by rank; none for this rank.
    links: Vec<Option<Mutex<LinkWriter>>>,
    /// By rank as well; they wait for nobody who writes.
    cutters: Vec<Option<LinkCutter>>,
}

impl SocketTransport {
    fn new(links: Vec<Option<Link>>) -> std::io::Result<Self> {
        let mailbox = Arc::<Mailbox>::default();
        let cutter = |link: &Option<Link>| link.as_ref().map(Link::cutter).transpose();
        let cutters = links.iter().map(cutter).collect::<std::io::Result<_>>()?;
        let mut writers = Vec::with_capacity(links.len());
        for (peer, link) in links.into_iter().enumerate() {
            let Some(link) = link else {
                writers.push(None);
                continue;
            };
            let (mut reader, writer) = link.split()?;
            let mailbox = Arc::clone(&mailbox);
            std::thread::Builder::new().name(format!("from-rank-{peer}")).spawn(move || {
                read_all(&mut reader, peer, &mailbox);
                mailbox.mark_gone(peer);
            })?;
            writers.push(Some(Mutex::new(writer)));
        }
        Ok(SocketTransport { mailbox, links: writers, cutters })
    }
}

impl Transport for SocketTransport {
    fn send(&self, to: usize, message: Message, deadline: Instant) -> std::result::Result<(), SendFailure> {
        let Some(link) = &self.links[to] else { return Err(SendFailure::Gone) };
        link.lock().unwrap_or_else(PoisonError::into_inner).write_before(&encode(&message), deadline)
    }

    fn mailbox(&self) -> &Arc<Mailbox> {
        &self.mailbox
    }

    fn cut(&self, rank: usize) {
        self.mailbox.mark_gone(rank);
        self.cutters.get(rank).into_iter().flatten().for_each(LinkCutter::cut);
    }
}

impl Drop for SocketTransport {
    fn drop(&mut self) {
        self.mailbox.close();
        for link in self.links.iter().flatten() {
            link.lock().unwrap_or_else(PoisonError::into_inner).end();
        }
    }
}

fn read_all(stream: &mut LinkReader, peer: usize, mailbox: &Mailbox) {
    while let Some(message) = read_message(stream) {
        // A full mailbox holds the sender back by the connection's own means, until this rank ends.
        let for_ever = Instant::now() + Duration::from_secs(365 * 24 * 3600);
        if mailbox.put(peer, message, for_ever).is_err() {
            return;
        }
    }
}

/// The next message; none at the end of the stream, or where what came is no message.
fn read_message(stream: &mut impl Read) -> Option<Message> {
    let mut len = [0; 8];
    stream.read_exact(&mut len).ok()?;
    let len = u64::from_le_bytes(len);
    let mut frame = Vec::new();
    stream.take(len).read_to_end(&mut frame).ok()?;
    if frame.len() as u64 != len { None } else { decode(&frame) }
}

/// `[length u64][kind u8][group or rank u64][sequence u64][operation u8][type u8][values]`, little-endian.
fn encode(message: &Message) -> Vec<u8> {
    let (kind, number, place, payload) = match message {
        Message::Data { group, place, payload } => (0, *group, *place, Some(payload)),
        Message::Abort { rank, operation } => (1, *rank as u64, Place { sequence: 0, operation: *operation }, None),
    };
    let num_bytes = payload.map_or(0, Payload::num_bytes);
    let mut frame = Vec::with_capacity(8 + HEADER + num_bytes);
    frame.extend(((HEADER + num_bytes) as u64).to_le_bytes());
    frame.push(kind);
    frame.extend(number.to_le_bytes());
    frame.extend(place.sequence.to_le_bytes());
    frame.push(place.operation.code());
    match payload {
        None => frame.push(0),
        Some(Payload::Bytes(values)) => {
            frame.push(0);
            frame.extend_from_slice(values);
        }
        Some(Payload::F32(values)) => {
            frame.push(1);
            values.iter().for_each(|x| frame.extend_from_slice(&x.to_le_bytes()));
        }
        Some(Payload::F64(values)) => {
            frame.push(2);
            values.iter().for_each(|x| frame.extend_from_slice(&x.to_le_bytes()));
        }
    }
    frame
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(eight)
}

fn decode(frame: &[u8]) -> Option<Message> {
    let values = frame.get(HEADER..)?;
    let (number, sequence) = (u64_at(frame, 1), u64_at(frame, 9));
    let operation = Operation::from_code(frame[17])?;
    if frame[0] == 1 {
        return Some(Message::Abort { rank: usize::try_from(number).ok()?, operation });
    }
    let payload = match frame[18] {
        0 => Payload::Bytes(values.to_vec()),
        1 => {
            let (quads, rest) = values.as_chunks::<4>();
            rest.is_empty().then(|| Payload::F32(quads.iter().map(|x| f32::from_le_bytes(*x)).collect()))?
        }
        2 => {
            let (octets, rest) = values.as_chunks::<8>();
            rest.is_empty().then(|| Payload::F64(octets.iter().map(|x| f64::from_le_bytes(*x)).collect()))?
        }
        _ => return None,
    };
    Some(Message::Data { group: number, place: Place { sequence, operation }, payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(group: u64, sequence: u64, values in prop::collection::vec(any::<u32>(), 0..9)) {
            let floats: Vec<f32> = values.iter().map(|bits| f32::from_bits(*bits & 0x7f7f_ffff)).collect();
            let doubles = floats.iter().map(|x| f64::from(*x)).collect();
            let bytes = values.iter().map(|bits| *bits as u8).collect();
            for payload in [Payload::F32(floats), Payload::F64(doubles), Payload::Bytes(bytes)] {
                let place = Place { sequence, operation: Operation::AllReduce };
                let message = Message::Data { group, place, payload };
                prop_assert_eq!(read_message(&mut &encode(&message)[..]), Some(message));
            }
        }

        #[test]
        fn damaged_frames_are_no_message_and_no_panic(
            frame in prop::collection::vec(any::<u8>(), 0..60), cut in 0..30usize,
        ) {
            let _ = read_message(&mut &frame[..]);
            let place = Place { sequence: 1, operation: Operation::Barrier };
            let whole = encode(&Message::Data { group: 0, place, payload: Payload::F32(vec![1.0; 3]) });
            prop_assert_eq!(read_message(&mut &whole[..cut.min(whole.len() - 1)]), None);
        }
    }
}
