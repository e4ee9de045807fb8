//! Finding out, before the first call, whether a peer and we take each other.

use super::{SPEAKS_TLS, Tls, is_expired, is_foreign};
use std::io;
use temper_types::ErrorCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// How a client begins HTTP/2: the preface, and settings that change nothing.
const GREETING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// True where the peer at `address` answers plain text by asking for TLS.
pub(crate) async fn refuses_plain_text(address: &str) -> bool {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(GREETING).await?;
        stream.shutdown().await?;
        let mut answer = Vec::new();
        stream.take(1024).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = asked.await.unwrap_or_default();
    answer.windows(SPEAKS_TLS.len()).any(|part| part == SPEAKS_TLS.as_bytes())
}

impl Tls {
    /// Greet the peer at `host`:`port` and hear its greeting, which comes only after both certificates were taken.
    ///
    /// # Errors
    /// Why not, in words: `Unavailable` where nobody answers, `InvalidArgument` where trying again is no help.
    pub(crate) async fn greet(&self, (host, port): (&str, u16)) -> Result<(), (ErrorCode, String)> {
        let name = ServerName::try_from(host.to_owned())
            .map_err(|e| (ErrorCode::InvalidArgument, format!("`{host}` is no name of a host: {e}")))?;
        let greeted = async {
            let stream = TcpStream::connect((host, port)).await?;
            let mut stream = TlsConnector::from(self.client.clone()).connect(name, stream).await?;
            stream.write_all(GREETING).await?;
            stream.read_exact(&mut [0u8; 9]).await?;
            io::Result::Ok(())
        };
        greeted.await.map_err(|error| self.explain(host, &error))
    }

    fn explain(&self, host: &str, error: &io::Error) -> (ErrorCode, String) {
        let Some(cause) = error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) else {
            return (ErrorCode::Unavailable, error.to_string());
        };
        let (ca, cert) = (self.files.ca.display(), self.files.cert.display());
        let text = match cause {
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => "it does not speak TLS".to_owned(),
            Error::InvalidCertificate(e) if is_expired(e) => "its certificate has expired".to_owned(),
            Error::InvalidCertificate(e) if is_foreign(e) => format!("its certificate is not signed by {ca}"),
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => format!("its certificate is not for `{host}`: {cause}"),
            Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
                format!("it refuses {cert}, which is of another CA")
            }
            Error::AlertReceived(AlertDescription::CertificateExpired) => format!("it says that {cert} has expired"),
            Error::AlertReceived(alert) => format!("it refuses {cert}: {alert:?}"),
            other => other.to_string(),
        };
        (ErrorCode::InvalidArgument, text)
    }
}
