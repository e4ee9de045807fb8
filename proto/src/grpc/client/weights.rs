//! Weights held by another process.

use crate::grpc::convert::{version_from_wire, version_to_wire};
use crate::grpc::v1::weight_service_client::WeightServiceClient;
use crate::grpc::{Endpoint, planes, v1};
use crate::{
    ServiceError, ServiceResult, SharedWeights, WEIGHT_PIECE, WeightManifest, WeightRange, WeightService, WeightSink,
};
use temper_types::{ContentHash, ErrorCode, PolicyVersion};
use tonic::Status;
use tonic::transport::Channel;

/// [`WeightService`] of another process.
#[derive(Debug)]
pub struct WeightClient {
    endpoint: Endpoint,
    client: WeightServiceClient<Channel>,
}

impl WeightClient {
    /// The holder of weights at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(WeightServiceClient::new(endpoint.channel()), endpoint.config());
        WeightClient { endpoint, client }
    }

    fn check_all(&self, operation: &'static str, expected: u64, received: u64) -> ServiceResult<()> {
        if received == expected {
            return Ok(());
        }
        let message = format!("expected {expected} weights, the stream ended after {received}");
        Err(ServiceError::new(ErrorCode::Unavailable, self.endpoint.name(), operation, message))
    }
}

impl WeightService for WeightClient {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        const OPERATION: &str = "manifest";
        let mut client = self.client.clone();
        let call = (OPERATION, self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, v1::Empty {}, |request| async move { client.manifest(request).await })?;
        let manifest = answer.into_inner();
        let version = version_from_wire(manifest.version).map_err(self.endpoint.unreadable(OPERATION))?;
        Ok(WeightManifest { version, unit_lens: manifest.unit_lens })
    }

    fn shared(&self, version: PolicyVersion) -> ServiceResult<Option<SharedWeights>> {
        const OPERATION: &str = "shared";
        let mut client = self.client.clone();
        let message = v1::SharedWeightsRequest { version: Some(version_to_wire(version)) };
        let call = (OPERATION, self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, message, |request| async move { client.shared(request).await })?;
        let weights = answer.into_inner().weights.map(SharedWeights::try_from).transpose();
        weights.map_err(self.endpoint.unreadable(OPERATION))
    }

    fn pull(&self, version: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        const OPERATION: &str = "pull";
        let mut client = self.client.clone();
        let message = v1::PullRequest { version: Some(version_to_wire(version)), ranges: to_wire(ranges) };
        let expected: u64 = ranges.iter().map(|r| r.len).sum();
        let call = (OPERATION, self.endpoint.config().compute_timeout);
        // What the sink says is no status: it is kept apart.
        let mut refused = None;
        let received = self.endpoint.call(call, message, |request| async {
            let mut stream = client.pull(request).await?.into_inner();
            let (mut values, mut received) = (vec![0.0; WEIGHT_PIECE], 0u64);
            'stream: while let Some(chunk) = stream.message().await? {
                let (words, rest) = chunk.data.as_chunks::<4>();
                if !rest.is_empty() || received + words.len() as u64 > expected {
                    return Err(Status::data_loss("a chunk of weights is cut or beyond what was asked for"));
                }
                received += words.len() as u64;
                for words in words.chunks(WEIGHT_PIECE) {
                    let values = &mut values[..words.len()];
                    values.iter_mut().zip(words).for_each(|(value, word)| *value = f32::from_le_bytes(*word));
                    if let Err(error) = sink(values) {
                        refused = Some(error);
                        break 'stream;
                    }
                }
            }
            Ok(received)
        })?;
        refused.map_or_else(|| self.check_all(OPERATION, expected, received), Err)
    }

    fn changes(
        &self,
        base: ContentHash,
        version: PolicyVersion,
        ranges: &[WeightRange],
        sink: WeightSink<'_>,
    ) -> ServiceResult<bool> {
        const OPERATION: &str = "changes";
        let mut client = self.client.clone();
        let (version, base) = (Some(version_to_wire(version)), base.0.to_vec());
        let message = v1::ChangesRequest { version, ranges: to_wire(ranges), base };
        let expected: u64 = ranges.iter().map(|r| r.len).sum();
        let call = (OPERATION, self.endpoint.config().compute_timeout);
        let mut refused = None;
        let received = self.endpoint.call(call, message, |request| async {
            let mut stream = client.changes(request).await?.into_inner();
            let mut received = 0u64;
            while let Some(changes) = stream.message().await? {
                let values = planes::decode(&changes.planes, changes.num_elements as usize);
                let values = values.map_err(|error| Status::data_loss(error.to_string()))?;
                received += values.len() as u64;
                if received > expected {
                    return Err(Status::data_loss("more changes of weights than were asked for"));
                }
                if let Err(error) = sink(&values) {
                    refused = Some(error);
                    break;
                }
            }
            Ok(received)
        })?;
        if let Some(error) = refused {
            return Err(error);
        }
        if received == 0 && expected > 0 {
            return Ok(false);
        }
        self.check_all(OPERATION, expected, received).map(|()| true)
    }
}

fn to_wire(ranges: &[WeightRange]) -> Vec<v1::WeightRange> {
    ranges.iter().map(|r| v1::WeightRange { unit: r.unit, start: r.start, len: r.len }).collect()
}
