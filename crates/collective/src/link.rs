//! The connection between two ranks: TCP, under TLS where the ranks have certificates.
//!
//! A link is made whole ([`Link`]), greets, and is then split into a half that one thread reads ([`LinkReader`]) and a
//! half that others write ([`LinkWriter`]). Both halves share the TLS session; neither holds it while it waits for the
//! network, so that a rank whose peer does not read can still be read from.

use crate::transport::SendFailure;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is spoken inside, so that no other service of the same run is mistaken for a rank.
const ALPN: &[u8] = b"temper-ranks";
/// Bytes that are encrypted, or read from the network, at once.
const CHUNK: usize = 256 << 10;

/// Certificates for the links of a rank: whoever connects checks the other's certificate, and the other checks its.
#[derive(Clone)]
pub struct LinkTls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl LinkTls {
    /// Links that prove themselves, and check their peers, as these configurations do.
    pub fn new(client: &ClientConfig, server: &ServerConfig) -> Self {
        let (mut client, mut server) = (client.clone(), server.clone());
        client.alpn_protocols = vec![ALPN.to_vec()];
        server.alpn_protocols = vec![ALPN.to_vec()];
        // Nobody resumes a link.
        server.send_tls13_tickets = 0;
        LinkTls { client: Arc::new(client), server: Arc::new(server) }
    }
}

impl std::fmt::Debug for LinkTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys stay out of logs.
        f.write_str("LinkTls")
    }
}

/// Time to `deadline`, never none: a timeout of zero would be refused.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// A connection to one rank that is not yet split.
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    session: Option<Box<Connection>>,
}

impl Link {
    /// The connecting side.
    pub(crate) fn dial(stream: TcpStream, tls: Option<&LinkTls>) -> std::io::Result<Self> {
        let connect = |tls: &LinkTls| {
            let name = ServerName::from(stream.peer_addr()?.ip());
            ClientConnection::new(Arc::clone(&tls.client), name).map_err(std::io::Error::other)
        };
        let session = tls.map(connect).transpose()?.map(|client| Box::new(client.into()));
        Ok(Link { stream, session })
    }

    /// The accepting side.
    pub(crate) fn accept(stream: TcpStream, tls: Option<&LinkTls>) -> std::io::Result<Self> {
        let session = tls.map(|tls| ServerConnection::new(Arc::clone(&tls.server))).transpose();
        Ok(Link { stream, session: session.map_err(std::io::Error::other)?.map(|server| Box::new(server.into())) })
    }

    /// Send `ours` and hear as many bytes, each before `deadline`; the handshake is part of it.
    pub(crate) fn exchange<const N: usize>(&mut self, ours: &[u8; N], deadline: Instant) -> std::io::Result<[u8; N]> {
        self.stream.set_nodelay(true)?;
        self.stream.set_read_timeout(Some(left(deadline)))?;
        self.stream.set_write_timeout(Some(left(deadline)))?;
        let mut theirs = [0; N];
        match &mut self.session {
            None => {
                self.stream.write_all(ours)?;
                self.stream.read_exact(&mut theirs)?;
            }
            Some(session) => {
                session.writer().write_all(ours)?;
                let mut heard = 0;
                while heard < N || session.wants_write() {
                    session.complete_io(&mut self.stream)?;
                    match session.reader().read(&mut theirs[heard..]) {
                        Ok(0) if heard < N => return Err(ErrorKind::UnexpectedEof.into()),
                        Ok(len) => heard += len,
                        Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        self.stream.set_read_timeout(None)?;
        Ok(theirs)
    }

    /// What cuts the connection, whoever reads or writes meanwhile.
    pub(crate) fn cutter(&self) -> std::io::Result<LinkCutter> {
        Ok(LinkCutter(self.stream.try_clone()?))
    }

    /// The half to read from and the half to write to.
    pub(crate) fn split(self) -> std::io::Result<(LinkReader, LinkWriter)> {
        let session = self.session.map(|mut session| {
            session.set_buffer_limit(None);
            Arc::new(Mutex::new(session))
        });
        let reader = self.stream.try_clone()?;
        let reader = match &session {
            None => LinkReader::Plain(reader),
            Some(session) => LinkReader::Tls(TlsReader {
                stream: reader,
                session: Arc::clone(session),
                raw: vec![0; CHUNK],
                clear: Vec::new(),
                taken: 0,
            }),
        };
        Ok((reader, LinkWriter { stream: self.stream, session }))
    }
}

/// Ends both halves of a link at once.
#[derive(Debug)]
pub(crate) struct LinkCutter(TcpStream);

impl LinkCutter {
    /// Whoever reads or writes finds that the other end is gone, which it may not be.
    pub(crate) fn cut(&self) {
        // One that is cut already stays so.
        drop(self.0.shutdown(Shutdown::Both));
    }
}

/// A session that both halves of a link use.
type Shared = Arc<Mutex<Box<Connection>>>;

/// The half that is read.
#[derive(Debug)]
pub(crate) enum LinkReader {
    /// As it comes.
    Plain(TcpStream),
    /// Decrypted.
    Tls(TlsReader),
}

impl Read for LinkReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            LinkReader::Plain(stream) => stream.read(buffer),
            LinkReader::Tls(reader) => reader.read(buffer),
        }
    }
}

/// Reads what the session decrypts.
#[derive(Debug)]
pub(crate) struct TlsReader {
    stream: TcpStream,
    session: Shared,
    /// Bytes as they came.
    raw: Vec<u8>,
    /// Decrypted bytes, of which `taken` were read.
    clear: Vec<u8>,
    taken: usize,
}

impl TlsReader {
    /// Decrypt what there is, or wait for more. False where nothing more will come.
    fn fill(&mut self) -> std::io::Result<bool> {
        self.taken = 0;
        self.clear.clear();
        // What came together with the greeting is in the session already.
        self.decrypt(0)?;
        while self.clear.is_empty() {
            let len = match self.stream.read(&mut self.raw) {
                Ok(0) => return Ok(false),
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.decrypt(len)?;
        }
        Ok(true)
    }

    /// Decrypt the first `len` of the bytes that came.
    fn decrypt(&mut self, len: usize) -> std::io::Result<()> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = &self.raw[..len];
        loop {
            let state = session.process_new_packets().map_err(std::io::Error::other)?;
            let from = self.clear.len();
            self.clear.resize(from + state.plaintext_bytes_to_read(), 0);
            session.reader().read_exact(&mut self.clear[from..])?;
            if rest.is_empty() {
                return Ok(());
            }
            session.read_tls(&mut rest)?;
        }
    }
}

impl Read for TlsReader {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if self.taken == self.clear.len() && !self.fill()? {
            return Ok(0);
        }
        let len = buffer.len().min(self.clear.len() - self.taken);
        buffer[..len].copy_from_slice(&self.clear[self.taken..self.taken + len]);
        self.taken += len;
        Ok(len)
    }
}

/// The half that is written.
#[derive(Debug)]
pub(crate) struct LinkWriter {
    stream: TcpStream,
    session: Option<Shared>,
}

impl LinkWriter {
    /// Write all of `bytes` before `deadline`.
    pub(crate) fn write_before(&mut self, bytes: &[u8], deadline: Instant) -> Result<(), SendFailure> {
        let Some(session) = &self.session else { return write_raw(&mut self.stream, bytes, deadline) };
        let mut encrypted = Vec::new();
        for chunk in bytes.chunks(CHUNK) {
            encrypted.clear();
            encrypt(&mut session.lock().unwrap_or_else(PoisonError::into_inner), chunk, &mut encrypted)
                .map_err(|_| SendFailure::Gone)?;
            write_raw(&mut self.stream, &encrypted, deadline)?;
        }
        Ok(())
    }

    /// Say that nothing more comes: whoever is at the other end reads what was sent, and then the end.
    pub(crate) fn end(&self) {
        drop(self.stream.shutdown(Shutdown::Write));
    }
}

fn encrypt(session: &mut Connection, bytes: &[u8], encrypted: &mut Vec<u8>) -> std::io::Result<()> {
    session.writer().write_all(bytes)?;
    while session.wants_write() {
        session.write_tls(encrypted)?;
    }
    Ok(())
}

fn write_raw(stream: &mut TcpStream, bytes: &[u8], deadline: Instant) -> Result<(), SendFailure> {
    let mut rest = bytes;
    while !rest.is_empty() {
        if Instant::now() >= deadline {
            return Err(SendFailure::Late);
        }
        stream.set_write_timeout(Some(left(deadline))).map_err(|_| SendFailure::Gone)?;
        match stream.write(rest) {
            Ok(0) => return Err(SendFailure::Gone),
            Ok(n) => rest = &rest[n..],
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(_) => return Err(SendFailure::Gone),
        }
    }
    Ok(())
}
