//! The services over gRPC: definitions, checked conversions, clients and servers.
//!
//! Owns: the code generated from `temper/v1/*.proto` ([`v1`]), conversions that name the field they refuse, blocking
//! clients that implement the service traits, and a server that puts any implementation of them on a socket.
//!
//! Invariants: every call has a deadline, sent to the server and kept by the client, the streamed bodies included ·
//! both ends send keep-alives, so that a peer that is gone is found while nothing is said · messages are bounded on
//! both ends, and what grows with a batch is streamed row by row · compute never runs on a worker of the runtime.

/// A generated client or server that refuses messages above the limit of its [`TransportConfig`], both ways.
macro_rules! limited {
    ($end:expr, $config:expr) => {{
        let limit = $config.max_message_bytes;
        $end.max_decoding_message_size(limit).max_encoding_message_size(limit)
    }};
}

mod channel;
mod client;
mod convert;
mod planes;
mod runtime;
mod server;
mod tls;

/// Messages and services as generated from the definitions.
#[allow(missing_docs, clippy::all, clippy::too_many_lines, clippy::unwrap_used, rustdoc::all, reason = "generated")]
pub mod v1 {
    include!("../generated/temper.v1.rs");
}

/// Descriptors of all services, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("../generated/temper.v1.bin");

pub use channel::{Endpoint, TransportConfig, decode_error, encode_error};
pub use client::{
    ControlClient, RewardClient, RolloutClient, TableClient, TablePart, TrainerClient, Verb, WeightClient,
    WorkerRegistryClient,
};
pub use convert::{ConvertError, version_from_wire, version_to_wire};
pub use runtime::GrpcRuntime;
pub use server::{
    ControlServer, FlightServer, RewardServer, RolloutServer, ServedRun, ServedServices, ServerHandle, TrainerServer,
    WeightServer, WorkerRegistryServer, serve,
};
pub use tls::{Tls, TlsFiles};
