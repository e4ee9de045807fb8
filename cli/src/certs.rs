//! A CA of one's own, and certificates of hosts that it signs.

use anyhow::{Context, bail};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use std::fs::OpenOptions;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Name of the CA: the same in every directory, so that its key is enough to sign with later.
const CA_NAME: &str = "temper";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Clocks of other hosts may be behind by so much.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

/// The files of a host.
pub struct Issued {
    /// The host.
    pub host: String,
    /// Its certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// A CA in a directory.
pub struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    valid: (SystemTime, SystemTime),
}

impl Authority {
    /// The CA in `dir`, made where there is none; what it signs is valid from now for `days`.
    ///
    /// # Errors
    /// A file that cannot be read or written, or one of the CA's that is missing.
    pub fn open(dir: &Path, days: u32) -> anyhow::Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let now = SystemTime::now();
        let valid = (now - CLOCK_SKEW, now + DAY * days);
        let (cert, key) = (dir.join("ca.pem"), dir.join("ca-key.pem"));
        let params = ca_params(valid);
        let key = match (cert.exists(), key.exists()) {
            (true, true) => {
                let pem = std::fs::read_to_string(&key).with_context(|| format!("reading {}", key.display()))?;
                KeyPair::from_pem(&pem).with_context(|| format!("{} is no key of a CA", key.display()))?
            }
            (false, false) => {
                let pair = KeyPair::generate()?;
                write_new(&key, &pair.serialize_pem(), 0o600)?;
                write_new(&cert, &params.self_signed(&pair)?.pem(), 0o644)?;
                pair
            }
            (true, false) => bail!("{} is missing: without it {} signs nothing", key.display(), cert.display()),
            (false, true) => bail!("{} is missing, but {} is there", cert.display(), key.display()),
        };
        Ok(Authority { dir: dir.to_owned(), issuer: Issuer::new(params, key), valid })
    }

    /// Certificate of the CA.
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    /// Make key and certificate of `host`, a name or an address.
    ///
    /// # Errors
    /// No name of a host, or a file that is there already.
    pub fn issue(&self, host: &str) -> anyhow::Result<Issued> {
        let params = host_params(host, self.valid)?;
        let name = host.replace(':', "-");
        let (cert, key) = (self.dir.join(format!("{name}.pem")), self.dir.join(format!("{name}-key.pem")));
        let pair = KeyPair::generate()?;
        let certificate = params.signed_by(&pair, &self.issuer)?;
        write_new(&key, &pair.serialize_pem(), 0o600)?;
        write_new(&cert, &certificate.pem(), 0o644)?;
        Ok(Issued { host: host.to_owned(), cert, key })
    }
}

fn params((from, to): (SystemTime, SystemTime), name: &str) -> CertificateParams {
    let epoch = date_time_ymd(1970, 1, 1);
    let since_epoch = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (epoch + since_epoch(from), epoch + since_epoch(to));
    params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(name.to_owned()));
    params
}

fn ca_params(valid: (SystemTime, SystemTime)) -> CertificateParams {
    let mut params = params(valid, CA_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// Both ways, since workers take connections and make them; and for the host's own loopback, where workers listen that
/// a run starts itself.
fn host_params(host: &str, valid: (SystemTime, SystemTime)) -> anyhow::Result<CertificateParams> {
    let name = |name: &str| {
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        match Ia5String::try_from(name) {
            Ok(name) if is_name => Ok(SanType::DnsName(name)),
            _ => bail!("`{name}`: expected a host's name or address, such as node-1 or 10.0.0.1"),
        }
    };
    let own = match host.parse::<IpAddr>() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => name(host)?,
    };
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)];
    let mut params = params(valid, host);
    params.subject_alt_names = vec![own, name("localhost")?];
    params.subject_alt_names.extend(loopback.map(SanType::IpAddress));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(params)
}

/// Write a file that is not there yet, so that no key is lost.
fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.with_context(|| format!("writing {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use temper_proto::grpc::{Tls, TlsFiles};

    fn files(authority: &Authority, issued: &Issued) -> TlsFiles {
        TlsFiles { ca: authority.ca(), cert: issued.cert.clone(), key: issued.key.clone() }
    }

    #[test]
    fn what_is_issued_is_taken_also_by_a_ca_that_was_opened_again() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let first = Authority::open(dir.path(), 30).expect("a CA");
        let node = first.issue("node-1").expect("a certificate");
        let again = Authority::open(dir.path(), 30).expect("the CA");
        let late = again.issue("10.0.0.2").expect("a certificate");
        for issued in [&node, &late] {
            Tls::load(&files(&again, issued)).expect("good files");
        }
        use std::os::unix::fs::PermissionsExt;
        for key in [&node.key, &late.key, &dir.path().join("ca-key.pem")] {
            let mode = std::fs::metadata(key).expect("a file").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{} is for its owner alone", key.display());
        }
    }

    #[test]
    fn what_is_over_is_refused_and_nothing_is_written_over() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let over =
            Authority { valid: (UNIX_EPOCH, UNIX_EPOCH + DAY), ..Authority::open(dir.path(), 30).expect("a CA") };
        let node = over.issue("node-1").expect("a certificate");
        let error = Tls::load(&files(&over, &node)).expect_err("it is over").to_string();
        assert!(error.contains("node-1.pem") && error.contains("has expired"), "{error}");
        assert!(over.issue("node-1").is_err_and(|error| format!("{error:#}").contains("node-1-key.pem")));
        assert!(over.issue("no host").is_err_and(|error| error.to_string().contains("expected a host's name")));
        std::fs::remove_file(dir.path().join("ca-key.pem")).expect("it is there");
        assert!(
            Authority::open(dir.path(), 30).is_err_and(|error| error.to_string().contains("ca-key.pem is missing"))
        );
    }
}
