//! A trainer rank for other processes.

use super::{Ready, blocking, empty, read_all, ready, refused};
use crate::grpc::convert::{ConvertError, PartReader, required, version_from_wire, version_to_wire};
use crate::grpc::v1::trainer_service_server::{TrainerService as Wire, TrainerServiceServer};
use crate::grpc::{TransportConfig, v1};
use crate::{MiniBatch, PreferencePair, ServiceResult, TokenSequence, TrainRow, TrainerService};
use std::path::PathBuf;
use std::sync::Arc;
use tonic::{Request, Response, Status, Streaming};

/// Puts a [`TrainerService`] on the wire.
#[derive(Clone)]
pub struct TrainerServer {
    service: Arc<dyn TrainerService>,
}

impl TrainerServer {
    /// The generated service over `service`.
    pub fn service(service: Arc<dyn TrainerService>, config: &TransportConfig) -> TrainerServiceServer<Self> {
        limited!(TrainerServiceServer::new(TrainerServer { service }), config)
    }

    async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn TrainerService) -> ServiceResult<T> + Send + 'static,
    ) -> Result<T, Status> {
        let service = Arc::clone(&self.service);
        blocking(move || call(&*service)).await
    }
}

async fn read_batch(request: Request<Streaming<v1::UpdateRequest>>) -> Result<MiniBatch, Status> {
    use v1::update_request::Part;
    let parts = read_all(request).await?;
    let read = || -> Result<MiniBatch, ConvertError> {
        let mut reader = PartReader::new();
        for part in parts {
            match required(part.part, "part")? {
                Part::Header(header) => reader.header(header)?,
                Part::Row(row) => reader.row(TrainRow::try_from(row)?),
            }
        }
        let (header, rows) = reader.finish()?;
        MiniBatch::from_parts(&header, rows)
    };
    read().map_err(refused)
}

async fn read_sequences(request: Request<Streaming<v1::TokenSequence>>) -> Result<Vec<TokenSequence>, Status> {
    Ok(read_all(request).await?.into_iter().map(Into::into).collect())
}

fn dir(request: Request<v1::Directory>) -> PathBuf {
    request.into_inner().path.into()
}

#[tonic::async_trait]
impl Wire for TrainerServer {
    type LogProbsStream = Ready<v1::SequenceLogProbs>;
    type UpdateStream = Ready<v1::UpdateResponse>;
    type UpdateDistilledStream = Ready<v1::UpdateResponse>;
    type ValuesStream = Ready<v1::FloatArray>;

    async fn begin_stage(&self, request: Request<v1::StageSpec>) -> Result<Response<v1::Empty>, Status> {
        let spec = request.into_inner().try_into().map_err(refused)?;
        self.call(move |service| service.begin_stage(spec)).await?;
        Ok(empty())
    }

    async fn log_probs(
        &self,
        request: Request<Streaming<v1::LogProbsRequest>>,
    ) -> Result<Response<Self::LogProbsStream>, Status> {
        use v1::log_probs_request::Part;
        let mut reader = PartReader::new();
        for part in read_all(request).await? {
            match required(part.part, "part").map_err(refused)? {
                Part::Header(header) => reader.header(header).map_err(refused)?,
                Part::Sequence(sequence) => reader.row(TokenSequence::from(sequence)),
            }
        }
        let (header, sequences) = reader.finish().map_err(refused)?;
        let role = header.policy_role().map_err(refused)?;
        let out = self.call(move |service| service.log_probs(role, &sequences, header.temperature)).await?;
        let mut entropies = out.entropies.into_iter();
        let mut squares = out.sum_pi_squared.into_iter();
        Ok(ready(out.log_probs.into_iter().map(|log_probs| v1::SequenceLogProbs {
            log_probs,
            entropies: entropies.next().unwrap_or_default(),
            sum_pi_squared: squares.next().unwrap_or_default(),
        })))
    }

    async fn mix_reference(&self, request: Request<v1::MixReferenceRequest>) -> Result<Response<v1::Empty>, Status> {
        let alpha = request.into_inner().alpha;
        self.call(move |service| service.mix_reference(alpha)).await?;
        Ok(empty())
    }

    async fn update(
        &self,
        request: Request<Streaming<v1::UpdateRequest>>,
    ) -> Result<Response<Self::UpdateStream>, Status> {
        let batch = read_batch(request).await?;
        let report = self.call(move |service| service.update(batch)).await?;
        Ok(ready(report.into_parts()))
    }

    async fn update_distilled(
        &self,
        request: Request<Streaming<v1::UpdateRequest>>,
    ) -> Result<Response<Self::UpdateDistilledStream>, Status> {
        let batch = read_batch(request).await?;
        let report = self.call(move |service| service.update_distilled(batch)).await?;
        Ok(ready(report.into_parts()))
    }

    async fn update_critic(
        &self,
        request: Request<Streaming<v1::UpdateRequest>>,
    ) -> Result<Response<v1::ScalarReport>, Status> {
        let batch = read_batch(request).await?;
        let report = self.call(move |service| service.update_critic(batch)).await?;
        Ok(Response::new(report.into()))
    }

    async fn publish(&self, request: Request<v1::PublishRequest>) -> Result<Response<v1::PolicyVersion>, Status> {
        let number = request.into_inner().number;
        let version = self.call(move |service| service.publish(number)).await?;
        Ok(Response::new(version_to_wire(version)))
    }

    async fn version(&self, _: Request<v1::Empty>) -> Result<Response<v1::PolicyVersion>, Status> {
        let version = self.call(|service| Ok(service.version())).await?;
        Ok(Response::new(version_to_wire(version)))
    }

    async fn save_model(&self, request: Request<v1::Directory>) -> Result<Response<v1::Empty>, Status> {
        let dir = dir(request);
        self.call(move |service| service.save_model(&dir)).await?;
        Ok(empty())
    }

    async fn save_state(&self, request: Request<v1::Directory>) -> Result<Response<v1::Empty>, Status> {
        let dir = dir(request);
        self.call(move |service| service.save_state(&dir)).await?;
        Ok(empty())
    }

    async fn restore(&self, request: Request<v1::RestoreRequest>) -> Result<Response<v1::Empty>, Status> {
        let request = request.into_inner();
        let version = version_from_wire(request.version).map_err(refused)?;
        let (model, state) = (PathBuf::from(request.model_dir), PathBuf::from(request.state_dir));
        self.call(move |service| service.restore(&model, &state, version)).await?;
        Ok(empty())
    }

    async fn begin_scalar_model(&self, request: Request<v1::ScalarModelSpec>) -> Result<Response<v1::Empty>, Status> {
        let spec = request.into_inner().try_into().map_err(refused)?;
        self.call(move |service| service.begin_scalar_model(spec)).await?;
        Ok(empty())
    }

    async fn values(
        &self,
        request: Request<Streaming<v1::TokenSequence>>,
    ) -> Result<Response<Self::ValuesStream>, Status> {
        let sequences = read_sequences(request).await?;
        let values = self.call(move |service| service.values(&sequences)).await?;
        Ok(ready(values.into_iter().map(|values| v1::FloatArray { values })))
    }

    async fn update_reward_model(
        &self,
        request: Request<Streaming<v1::UpdateRewardModelRequest>>,
    ) -> Result<Response<v1::ScalarReport>, Status> {
        use v1::update_reward_model_request::Part;
        let mut reader = PartReader::new();
        for part in read_all(request).await? {
            match required(part.part, "part").map_err(refused)? {
                Part::Header(header) => reader.header(header).map_err(refused)?,
                Part::Pair(pair) => reader.row(PreferencePair::try_from(pair).map_err(refused)?),
            }
        }
        let (header, pairs) = reader.finish().map_err(refused)?;
        let report = self.call(move |service| service.update_reward_model(&pairs, header.learning_rate)).await?;
        Ok(Response::new(report.into()))
    }

    async fn scores(&self, request: Request<Streaming<v1::TokenSequence>>) -> Result<Response<v1::FloatArray>, Status> {
        let sequences = read_sequences(request).await?;
        let values = self.call(move |service| service.scores(&sequences)).await?;
        Ok(Response::new(v1::FloatArray { values }))
    }

    async fn save_reward_model(
        &self,
        request: Request<v1::Directory>,
    ) -> Result<Response<v1::SaveRewardModelResponse>, Status> {
        let dir = dir(request);
        let saved = self.call(move |service| service.save_reward_model(&dir)).await?;
        Ok(Response::new(v1::SaveRewardModelResponse { saved }))
    }

    async fn restore_reward_model(&self, request: Request<v1::Directory>) -> Result<Response<v1::Empty>, Status> {
        let dir = dir(request);
        self.call(move |service| service.restore_reward_model(&dir)).await?;
        Ok(empty())
    }

    async fn begin_distillation(&self, request: Request<v1::DistillSpec>) -> Result<Response<v1::Empty>, Status> {
        let spec = request.into_inner().into();
        self.call(move |service| service.begin_distillation(spec)).await?;
        Ok(empty())
    }

    async fn mirror(&self, request: Request<v1::MirrorRequest>) -> Result<Response<v1::MirrorReport>, Status> {
        let step = request.into_inner().step;
        let report = self.call(move |service| service.mirror(step)).await?;
        Ok(Response::new(report.into()))
    }

    async fn held_shards(&self, _: Request<v1::Empty>) -> Result<Response<v1::HeldShardsResponse>, Status> {
        let shards = self.call(|service| service.held_shards()).await?;
        Ok(Response::new(v1::HeldShardsResponse { shards: shards.into_iter().map(Into::into).collect() }))
    }

    async fn rejoin(&self, _: Request<v1::Empty>) -> Result<Response<v1::Empty>, Status> {
        self.call(|service| service.rejoin()).await?;
        Ok(empty())
    }

    async fn restore_mirrored(&self, request: Request<v1::MirrorPlan>) -> Result<Response<v1::Empty>, Status> {
        let plan = request.into_inner().into();
        self.call(move |service| service.restore_mirrored(&plan)).await?;
        Ok(empty())
    }
}
