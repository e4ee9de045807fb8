//! Rewards behind an HTTP endpoint: one POST of a request object per sample, one connection per POST.
//!
//! A client of HTTP/1.1 over plain TCP with one deadline for the whole exchange. It follows no redirect, keeps no
//! connection and knows no TLS: an endpoint elsewhere is reached through a proxy.

use super::answer::{self, Answer, BadAnswer, IdRule, quote};
use super::line::MAX_LINE_BYTES;
use super::request::Request;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Most bytes of a whole response, its head included.
const MAX_RESPONSE_BYTES: usize = MAX_LINE_BYTES;

/// Where requests are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Host and port as they stand in the URL.
    authority: String,
    host: String,
    port: u16,
    /// Path and query.
    target: String,
}

impl Endpoint {
    /// `http://HOST[:PORT][/PATH][?QUERY]`; `None` for anything else.
    pub(crate) fn parse(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("http://")?;
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let is_bare = |text: &str| !text.chars().any(|c| c.is_whitespace() || c.is_control() || "#@".contains(c));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().ok()?),
            _ => (authority, 80),
        };
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = bracketed.unwrap_or(host);
        let is_host = !host.is_empty() && (bracketed.is_some() || !host.contains([':', '[', ']']));
        if !is_host || !is_bare(authority) || !is_bare(path) || !path.is_ascii() {
            return None;
        }
        let target = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Some(Endpoint { authority: authority.to_owned(), host: host.to_owned(), port, target })
    }

    /// The score of one sample, or why it has none.
    pub(crate) fn score(&self, request: &Request, timeout_seconds: f64) -> Result<Answer, String> {
        let deadline = Instant::now() + Duration::from_secs_f64(timeout_seconds);
        let response = self.exchange(request, deadline).map_err(|error| match error.kind() {
            ErrorKind::TimedOut | ErrorKind::WouldBlock => {
                format!("no answer within timeout_seconds = {timeout_seconds}")
            }
            _ => format!("{}: {error}", self.authority),
        })?;
        let body = body(&response)?;
        match answer::parse(&body, &request.id, IdRule::Optional) {
            Ok(answer) => Ok(answer),
            Err(BadAnswer::OutOfStep(cause) | BadAnswer::Sample(cause)) => Err(cause),
        }
    }

    fn exchange(&self, request: &Request, deadline: Instant) -> std::io::Result<Vec<u8>> {
        let mut stream = self.connect(deadline)?;
        let Endpoint { authority, target, .. } = self;
        let head = format!(
            "POST {target} HTTP/1.1\r\nHost: {authority}\r\nContent-Type: application/json\r\n\
             Accept: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            request.line.len()
        );
        let message = [head.as_bytes(), request.line.as_bytes()].concat();
        let mut sent = 0;
        while sent < message.len() {
            stream.set_write_timeout(Some(left(deadline)?))?;
            sent += stream.write(&message[sent..])?;
        }
        let (mut response, mut buffer) = (Vec::new(), [0; 8192]);
        loop {
            stream.set_read_timeout(Some(left(deadline)?))?;
            let len = stream.read(&mut buffer)?;
            response.extend_from_slice(&buffer[..len]);
            if len == 0 || is_whole(&response) {
                return Ok(response);
            }
            if response.len() > MAX_RESPONSE_BYTES {
                return Err(std::io::Error::other(format!("a response of more than {MAX_RESPONSE_BYTES} bytes")));
            }
        }
    }

    /// Connect to the first address that answers.
    fn connect(&self, deadline: Instant) -> std::io::Result<TcpStream> {
        let mut last = std::io::Error::other(format!("{} has no address", self.host));
        for address in self.resolve(deadline)? {
            match TcpStream::connect_timeout(&address, left(deadline)?) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Names are resolved by the system, which knows no deadline: on a thread that is left behind where it is passed.
    fn resolve(&self, deadline: Instant) -> std::io::Result<Vec<SocketAddr>> {
        let (sender, addresses) = std::sync::mpsc::channel();
        let name = (self.host.clone(), self.port);
        std::thread::spawn(move || {
            let _nobody_waits = sender.send(name.to_socket_addrs().map(Vec::from_iter));
        });
        addresses.recv_timeout(left(deadline)?).unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
    }
}

/// Time to the deadline; passed, it is an error.
fn left(deadline: Instant) -> std::io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// A response's head and what stands behind it.
fn split(response: &[u8]) -> Option<(String, &[u8])> {
    let end = response.windows(4).position(|window| window == b"\r\n\r\n")?;
    Some((String::from_utf8_lossy(&response[..end]).into_owned(), &response[end + 4..]))
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(given, _)| given.trim().eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

fn is_chunked(head: &str) -> bool {
    header(head, "transfer-encoding").is_some_and(|value| value.to_ascii_lowercase().ends_with("chunked"))
}

/// True once nothing more belongs to the response. One without a length ends with its connection.
fn is_whole(response: &[u8]) -> bool {
    let Some((head, body)) = split(response) else { return false };
    if is_chunked(&head) {
        return matches!(dechunk(body), Ok(Some(_)));
    }
    header(&head, "content-length").and_then(|len| len.parse::<usize>().ok()).is_some_and(|len| body.len() >= len)
}

/// The body of a response of status 200.
fn body(response: &[u8]) -> Result<String, String> {
    let (head, body) = split(response).ok_or("the endpoint hung up before it answered")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if !head.starts_with("HTTP/1.") || status.len() != 3 {
        return Err(format!(
            "the endpoint does not speak HTTP/1.1: {}",
            quote(head.lines().next().unwrap_or_default())
        ));
    }
    let body = match header(&head, "content-length") {
        _ if is_chunked(&head) => dechunk(body)?.ok_or("the endpoint hung up within its answer")?,
        Some(len) => {
            let len: usize = len.parse().map_err(|_| format!("content-length {}: expected a number", quote(len)))?;
            body.get(..len).ok_or("the endpoint hung up within its answer")?.to_vec()
        }
        None => body.to_vec(),
    };
    let text = String::from_utf8_lossy(&body).trim().to_owned();
    if status == "200" {
        Ok(text)
    } else {
        Err(format!("the endpoint answered with status {status}: {}", quote(&text)))
    }
}

/// A chunked body put together; `None` where its last chunk is not there yet.
fn dechunk(mut rest: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|window| window == b"\r\n") else { return Ok(None) };
        let size = String::from_utf8_lossy(&rest[..end]).into_owned();
        let digits = size.split(';').next().unwrap_or_default().trim();
        let len = usize::from_str_radix(digits, 16).ok().filter(|len| *len <= MAX_RESPONSE_BYTES);
        let len = len.ok_or_else(|| format!("chunk size {}: expected a hexadecimal number", quote(&size)))?;
        rest = &rest[end + 2..];
        if len == 0 {
            return Ok(Some(body));
        }
        let Some(chunk) = rest.get(..len + 2) else { return Ok(None) };
        body.extend_from_slice(&chunk[..len]);
        rest = &rest[len + 2..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn urls() {
        let parts = |url: &str| Endpoint::parse(url).map(|e| (e.host, e.port, e.target));
        let some = |host: &str, port, target: &str| Some((host.to_owned(), port, target.to_owned()));
        assert_eq!(parts("http://localhost:8000/score?x=1"), some("localhost", 8000, "/score?x=1"));
        assert_eq!(parts("http://a.b"), some("a.b", 80, "/"));
        assert_eq!(parts("http://[::1]:9/"), some("::1", 9, "/"));
        assert_eq!(parts("http://[::1]"), some("::1", 80, "/"));
        for wrong in
            ["https://a", "a:80", "http://", "http://:80", "http://a:x", "http://a b/", "http://u@a/", "http://a:1:2/"]
        {
            assert_eq!(parts(wrong), None, "{wrong}");
        }
    }

    /// Serves one connection: reads a request and writes `response`, or nothing and holds the line.
    fn score_from(response: Option<&'static str>) -> Result<Answer, String> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let endpoint = Endpoint::parse(&format!("http://127.0.0.1:{port}/score")).expect("a URL");
        let request = Request { id: "7".to_owned(), line: r#"{"id": "7"}"#.to_owned() };
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().expect("a connection");
                let mut request = Vec::new();
                while !request.ends_with(br#"{"id": "7"}"#) {
                    let mut byte = [0];
                    stream.read_exact(&mut byte).expect("a whole request");
                    request.push(byte[0]);
                }
                assert!(request.starts_with(b"POST /score HTTP/1.1\r\nHost: 127.0.0.1:"));
                match response {
                    Some(response) => stream.write_all(response.as_bytes()).expect("a listener"),
                    // Until the client gives up.
                    None => assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0),
                }
            });
            endpoint.score(&request, if response.is_some() { 10.0 } else { 0.05 })
        })
    }

    #[test]
    fn an_answer_by_length_by_chunks_or_by_the_end() {
        for response in [
            "HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"score\": 0.5}ignored",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\n{\"sco\r\n9\r\nre\": 0.5}\r\n0\r\n\r\n",
            "HTTP/1.0 200 OK\r\n\r\n{\"id\": \"7\", \"score\": 0.5}\n",
        ] {
            assert_eq!(score_from(Some(response)).map(|a| a.score), Ok(0.5), "{response}");
        }
    }

    #[test]
    fn everything_else_is_an_error_by_name() {
        for (response, part) in [
            (Some("HTTP/1.1 500 Oops\r\ncontent-length: 4\r\n\r\nboom"), "status 500: `boom`"),
            (Some("HTTP/1.1 200 OK\r\ncontent-length: 40\r\n\r\n{}"), "hung up within its answer"),
            (Some("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"), "chunk size `zz`"),
            (Some("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab"), "hung up within its answer"),
            (Some("SSH-2.0-x\r\n\r\n"), "does not speak HTTP/1.1"),
            (Some(""), "hung up before it answered"),
            (Some("HTTP/1.1 200 OK\r\n\r\n{\"score\": NaN}"), "NaN"),
            (Some("HTTP/1.1 200 OK\r\n\r\n{\"score\": 1e308}"), "out of range"),
            (Some("HTTP/1.1 200 OK\r\n\r\n{\"id\": \"8\", \"score\": 1}"), "the id \"8\" instead of \"7\""),
            (None, "no answer within timeout_seconds = 0.05"),
        ] {
            let error = score_from(response).expect_err(part);
            assert!(error.contains(part), "{response:?}\n  says: {error}\n  lacks: {part}");
        }
    }
}
