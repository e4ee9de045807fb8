//! Where a run is reached, as flags name it.

/// HOST:PORT as it stands, refused before anything waits for an answer from somewhere else.
///
/// # Errors
/// Anything else, with what is expected.
pub fn host_port(text: &str) -> Result<String, String> {
    let is_port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !text.contains('/') && is_port(port) => Ok(text.to_owned()),
        _ => Err("expected HOST:PORT, such as 127.0.0.1:4000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::host_port;

    #[test]
    fn a_host_and_a_port_or_nothing() {
        for good in ["127.0.0.1:4000", "node-1:80", "[::1]:4000"] {
            assert_eq!(host_port(good).as_deref(), Ok(good));
        }
        for bad in ["", "node", "node:", ":4000", "node:0", "node:99999", "node:x", "http://node:80"] {
            assert!(host_port(bad).is_err(), "{bad}");
        }
    }
}
