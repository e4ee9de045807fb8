//! Blocking clients: the service traits over a connection.

mod control;
mod reward;
mod rollout;
mod trainer;
mod weights;
mod worker;

pub use control::{ControlClient, Verb};
pub use reward::RewardClient;
pub use rollout::RolloutClient;
pub use trainer::TrainerClient;
pub use weights::WeightClient;
pub use worker::WorkerRegistryClient;

macro_rules! limited {
    ($client:ty, $endpoint:expr) => {{
        let limit = $endpoint.config().max_message_bytes;
        <$client>::new($endpoint.channel()).max_decoding_message_size(limit).max_encoding_message_size(limit)
    }};
}
pub(crate) use limited;
