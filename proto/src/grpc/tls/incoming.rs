//! Connections that were taken, each after its peer has proved itself.

use super::{SPEAKS_TLS, Tls};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::Stream;

/// Peers that prove themselves at a time; further ones wait.
const MAX_HANDSHAKES: usize = 64;
/// First byte of whoever speaks TLS.
const TLS_HANDSHAKE: u8 = 0x16;
/// HTTP/2: settings that change nothing, before anything else.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// HTTP/2: why the connection ends.
const INADEQUATE_SECURITY: u32 = 0xc;

/// Takes connections, and gives those whose peers have proved themselves. A peer that is slow holds up no other.
pub(crate) struct TlsIncoming {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    timeout: Duration,
    handshakes: JoinSet<Option<TlsStream<TcpStream>>>,
}

impl TlsIncoming {
    /// Take connections at `listener`; each peer has `timeout` to prove itself.
    pub(crate) fn new(listener: TcpListener, tls: &Tls, timeout: Duration) -> Self {
        TlsIncoming { listener, acceptor: TlsAcceptor::from(tls.server.clone()), timeout, handshakes: JoinSet::new() }
    }
}

impl Stream for TlsIncoming {
    type Item = io::Result<TlsStream<TcpStream>>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        while this.handshakes.len() < MAX_HANDSHAKES {
            match this.listener.poll_accept(context) {
                Poll::Ready(Ok((stream, peer))) => {
                    this.handshakes.spawn(prove(this.acceptor.clone(), (stream, peer), this.timeout));
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(error))),
                Poll::Pending => break,
            }
        }
        loop {
            match this.handshakes.poll_join_next(context) {
                Poll::Ready(Some(Ok(Some(stream)))) => return Poll::Ready(Some(Ok(stream))),
                // One that was refused, which is said where it happens.
                Poll::Ready(Some(_)) => {}
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// The stream to a peer that has proved itself in time.
async fn prove(
    acceptor: TlsAcceptor,
    (stream, peer): (TcpStream, SocketAddr),
    timeout: Duration,
) -> Option<TlsStream<TcpStream>> {
    let cause = match tokio::time::timeout(timeout, handshake(acceptor, stream)).await {
        Ok(Ok(stream)) => return Some(stream),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("it did not prove itself within {timeout:?}"),
    };
    tracing::warn!(%peer, cause, "a connection is refused");
    None
}

async fn handshake(acceptor: TlsAcceptor, mut stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    stream.set_nodelay(true)?;
    let mut first = [0u8; 1];
    match stream.peek(&mut first).await? {
        0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it said nothing")),
        _ if first[0] == TLS_HANDSHAKE => acceptor.accept(stream).await,
        _ => {
            refuse_plain_text(&mut stream).await?;
            Err(io::Error::new(io::ErrorKind::InvalidData, "it speaks plain text"))
        }
    }
}

/// Say why in HTTP/2, which is what a peer of ours speaks, and let it hear that before the connection ends.
async fn refuse_plain_text(stream: &mut TcpStream) -> io::Result<()> {
    let length = (8 + SPEAKS_TLS.len()) as u32;
    let mut answer = SETTINGS.to_vec();
    answer.extend_from_slice(&length.to_be_bytes()[1..]);
    // Type 7 (go away), no flags, of the connection; the last stream that was served: none.
    answer.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    answer.extend_from_slice(&INADEQUATE_SECURITY.to_be_bytes());
    answer.extend_from_slice(SPEAKS_TLS.as_bytes());
    stream.write_all(&answer).await?;
    stream.shutdown().await?;
    let mut rest = [0u8; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}
