//! Which certificates a process proves itself by: those of flags, of a recipe, or of the run that it asks.

use crate::recipe::{Placement, PlacementMode, RecipeError, Source};
use crate::usage;
use anyhow::Context;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use temper_proto::grpc::{GrpcRuntime, Tls, TlsFiles};

/// Certificates of this process, as flags name them.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct TlsFlags {
    /// Speak TLS, and only to processes whose certificate this CA has signed (PEM; `temper certs` makes all three).
    #[arg(long, value_name = "FILE", requires_all = ["tls_cert", "tls_key"])]
    tls_ca: Option<PathBuf>,
    /// This process's certificate.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    tls_cert: Option<PathBuf>,
    /// Key of that certificate.
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_cert"])]
    tls_key: Option<PathBuf>,
}

impl TlsFlags {
    /// The files, where they are given.
    pub fn files(&self) -> Option<TlsFiles> {
        let (Some(ca), Some(cert), Some(key)) = (&self.tls_ca, &self.tls_cert, &self.tls_key) else { return None };
        Some(TlsFiles { ca: ca.clone(), cert: cert.clone(), key: key.clone() })
    }
}

/// Certificates of a run's processes on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsPlacement {
    /// Certificate of the CA that has signed those of all processes of the run.
    pub ca: PathBuf,
    /// Certificate of this machine.
    pub cert: PathBuf,
    /// Key of that certificate.
    pub key: PathBuf,
}

impl TlsPlacement {
    /// The files.
    pub fn files(&self) -> TlsFiles {
        TlsFiles { ca: self.ca.clone(), cert: self.cert.clone(), key: self.key.clone() }
    }
}

/// The flags that give another process the same certificates.
pub fn arguments(files: &TlsFiles) -> [&std::ffi::OsStr; 6] {
    let flag = std::ffi::OsStr::new;
    let (ca, cert, key) = (files.ca.as_os_str(), files.cert.as_os_str(), files.key.as_os_str());
    [flag("--tls-ca"), ca, flag("--tls-cert"), cert, flag("--tls-key"), key]
}

/// A transport that speaks TLS where there are certificates, and plain text where there are none.
///
/// # Errors
/// A file that is missing or does not fit the others, by name.
pub fn transport(files: Option<&TlsFiles>) -> anyhow::Result<GrpcRuntime> {
    let tls = files.map(Tls::load).transpose().map_err(usage)?;
    Ok(GrpcRuntime::start().context("starting the transport")?.with_tls(tls))
}

/// Check `[placement.tls]`: the files, and that there is something to send.
///
/// # Errors
/// The key, with the file that does not fit or what would be right.
pub fn check(placement: &Placement, source: &Source) -> Result<(), RecipeError> {
    let Some(tls) = &placement.tls else { return Ok(()) };
    if placement.mode == PlacementMode::Embedded {
        let problem = "goes with placement.mode = \"processes\" only: in one process nothing is sent";
        return Err(source.error("placement.tls", problem));
    }
    Tls::load(&tls.files()).map(|_| ()).map_err(|error| source.error("placement.tls", error.message))
}
