//! Mutual TLS between the processes of a run: each proves by a certificate of one CA that it belongs to it.
//!
//! [`Tls`] is loaded and checked once, and is part of a process's [`super::GrpcRuntime`]: every connection that the
//! runtime makes or takes is then under TLS 1.3, and none in plain text. A peer is found out before the first call
//! ([`Tls::greet`]), so that whoever does not belong is an error that names it and says why.

mod greeting;
mod incoming;

pub(crate) use greeting::refuses_plain_text;
pub(crate) use incoming::TlsIncoming;

use crate::{ServiceError, ServiceResult};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_types::ErrorCode;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{CertificateError, ClientConfig, Error, RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// What is spoken inside: HTTP/2.
const ALPN: &[u8] = b"h2";

/// What a peer that speaks plain text is told.
pub(crate) const SPEAKS_TLS: &str =
    "this server speaks TLS: give the certificates of its CA (--tls-ca, --tls-cert, --tls-key)";

/// The files that a process proves itself and its peers by, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate of the CA that every peer's certificate is signed by.
    pub ca: PathBuf,
    /// The own certificate, with those between it and the CA.
    pub cert: PathBuf,
    /// The own key.
    pub key: PathBuf,
}

/// Checked certificates, ready for connections both ways.
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    channel: ClientTlsConfig,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys stay out of logs.
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Read the files and check them against each other and the clock.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file that is missing, no PEM, not signed by the CA, expired, or a key of another
    /// certificate.
    pub fn load(files: &TlsFiles) -> ServiceResult<Self> {
        let (ca_pem, cert_pem, key_pem) = (read(&files.ca)?, read(&files.cert)?, read(&files.key)?);
        let roots = Arc::new(roots(&files.ca, &ca_pem)?);
        let chain = certificates(&files.cert, &cert_pem)?;
        let key = || PrivateKeyDer::from_pem_slice(&key_pem).map_err(|e| refused(&files.key, format!("no key: {e}")));
        let provider = Arc::new(ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build();
        let verifier = verifier.map_err(|e| refused(&files.ca, e))?;
        check_own(&*verifier, &chain, files)?;
        let unfit = |error: Error| match error {
            Error::InconsistentKeys(_) => refused(&files.key, format!("not the key of {}", files.cert.display())),
            error => refused(&files.key, error),
        };
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key()?)
            .map_err(unfit)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unfit)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key()?)
            .map_err(unfit)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        client.alpn_protocols = vec![ALPN.to_vec()];
        let identity = Identity::from_pem(cert_pem, key_pem);
        let channel = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca_pem)).identity(identity);
        Ok(Tls { files: files.clone(), server: Arc::new(server), client: Arc::new(client), channel })
    }

    /// The files it was loaded from.
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// How this process proves itself, and checks its peers, where it connects and where it accepts: for connections
    /// beside the runtime's own.
    pub fn configs(&self) -> (&ClientConfig, &ServerConfig) {
        (&self.client, &self.server)
    }

    /// What a channel to `host` is made with.
    pub(crate) fn channel(&self, host: &str) -> ClientTlsConfig {
        self.channel.clone().domain_name(host)
    }
}

fn refused(path: &Path, problem: impl std::fmt::Display) -> ServiceError {
    let message = format!("{}: {problem}", path.display());
    ServiceError::new(ErrorCode::InvalidArgument, "tls", "read certificates", message)
}

fn read(path: &Path) -> ServiceResult<Vec<u8>> {
    std::fs::read(path).map_err(|e| refused(path, format!("cannot be read: {e}")))
}

fn certificates(path: &Path, pem: &[u8]) -> ServiceResult<Vec<CertificateDer<'static>>> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|e| refused(path, format!("no certificate: {e}")))?;
    if all.is_empty() { Err(refused(path, "no certificate in PEM")) } else { Ok(all) }
}

fn roots(path: &Path, pem: &[u8]) -> ServiceResult<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| refused(path, format!("no certificate of a CA: {e}")))?;
    }
    Ok(roots)
}

/// The own certificate as a peer with the same CA will see it.
fn check_own(
    verifier: &dyn ClientCertVerifier,
    chain: &[CertificateDer<'static>],
    files: &TlsFiles,
) -> ServiceResult<()> {
    let Some((own, between)) = chain.split_first() else { return Err(refused(&files.cert, "no certificate")) };
    let problem = match verifier.verify_client_cert(own, between, UnixTime::now()) {
        Ok(_) => return Ok(()),
        Err(Error::InvalidCertificate(error)) if is_foreign(&error) => format!("not signed by {}", files.ca.display()),
        Err(Error::InvalidCertificate(error)) if is_expired(&error) => "has expired".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(refused(&files.cert, problem))
}

fn is_expired(error: &CertificateError) -> bool {
    matches!(error, CertificateError::Expired | CertificateError::ExpiredContext { .. })
}

/// True where another CA signed it, or one of the same name and another key.
fn is_foreign(error: &CertificateError) -> bool {
    matches!(error, CertificateError::UnknownIssuer | CertificateError::BadSignature)
}
