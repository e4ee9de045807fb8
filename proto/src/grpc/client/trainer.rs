//! A trainer rank in another process.

use crate::grpc::channel::collect;
use crate::grpc::convert::{ConvertError, PartReader, required, version_from_wire, version_to_wire};
use crate::grpc::v1::trainer_service_client::TrainerServiceClient;
use crate::grpc::{Endpoint, v1};
use crate::{
    DistillService, DistillSpec, HeldShard, LogProbs, MiniBatch, MirrorPlan, MirrorReport, MirrorService, PolicyRole,
    PreferencePair, ScalarModelService, ScalarModelSpec, ScalarReport, ServiceError, ServiceResult, StageSpec,
    TokenSequence, TrainerService, UpdateReport,
};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use temper_types::{ErrorCode, PolicyVersion};
use tonic::transport::Channel;

/// [`TrainerService`] of another process. Directories are paths that both processes see.
#[derive(Debug)]
pub struct TrainerClient {
    endpoint: Endpoint,
    client: TrainerServiceClient<Channel>,
    /// The version that was read last.
    last_version: Mutex<PolicyVersion>,
}

impl TrainerClient {
    /// The trainer at `endpoint`.
    pub fn new(endpoint: Endpoint) -> Self {
        let client = limited!(TrainerServiceClient::new(endpoint.channel()), endpoint.config());
        TrainerClient { endpoint, client, last_version: Mutex::default() }
    }

    fn compute(&self, operation: &'static str) -> (&'static str, Duration) {
        (operation, self.endpoint.config().compute_timeout)
    }

    fn remember(&self, version: PolicyVersion) -> PolicyVersion {
        *self.last_version.lock().unwrap_or_else(PoisonError::into_inner) = version;
        version
    }

    /// The wire carries text.
    fn directory(&self, operation: &'static str, dir: &Path) -> ServiceResult<v1::Directory> {
        match dir.to_str() {
            Some(path) => Ok(v1::Directory { path: path.to_owned() }),
            None => {
                let message = format!("the path {} is not UTF-8", dir.display());
                Err(ServiceError::new(ErrorCode::InvalidArgument, self.endpoint.name(), operation, message))
            }
        }
    }

    fn read_update(&self, parts: Vec<v1::UpdateResponse>, operation: &'static str) -> ServiceResult<UpdateReport> {
        use v1::update_response::Part;
        let read = || -> Result<UpdateReport, ConvertError> {
            let mut reader = PartReader::new();
            for part in parts {
                match required(part.part, "part")? {
                    Part::Report(report) => reader.header(report)?,
                    Part::LogProbs(row) => reader.row(row.values),
                }
            }
            let (report, rows) = reader.finish()?;
            Ok(UpdateReport::from_parts(report, rows))
        };
        read().map_err(self.endpoint.unreadable(operation))
    }
}

impl TrainerService for TrainerClient {
    fn begin_stage(&self, spec: StageSpec) -> ServiceResult<()> {
        let mut client = self.client.clone();
        let message = v1::StageSpec::from(spec);
        self.endpoint.call(self.compute("begin_stage"), message, |r| async move { client.begin_stage(r).await })?;
        Ok(())
    }

    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], temperature: f32) -> ServiceResult<LogProbs> {
        use v1::log_probs_request::Part;
        let mut client = self.client.clone();
        let header = v1::LogProbsHeader { role: v1::PolicyRole::from(role).into(), temperature };
        let rows = sequences.iter().cloned().map(|sequence| Part::Sequence(sequence.into()));
        let parts: Vec<v1::LogProbsRequest> = std::iter::once(Part::Header(header))
            .chain(rows)
            .map(|part| v1::LogProbsRequest { part: Some(part) })
            .collect();
        let answer = self.endpoint.call(self.compute("log_probs"), tokio_stream::iter(parts), |r| async move {
            collect(client.log_probs(r).await?).await
        })?;
        let mut out = LogProbs::default();
        for row in answer {
            out.log_probs.push(row.log_probs);
            out.entropies.push(row.entropies);
            out.sum_pi_squared.push(row.sum_pi_squared);
        }
        Ok(out)
    }

    fn mix_reference(&self, alpha: f64) -> ServiceResult<()> {
        let mut client = self.client.clone();
        let message = v1::MixReferenceRequest { alpha };
        self.endpoint.call(self.compute("mix_reference"), message, |r| async move { client.mix_reference(r).await })?;
        Ok(())
    }

    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        const OPERATION: &str = "update";
        let mut client = self.client.clone();
        let parts = tokio_stream::iter(batch.into_parts());
        let answer = self
            .endpoint
            .call(self.compute(OPERATION), parts, |r| async move { collect(client.update(r).await?).await })?;
        self.read_update(answer, OPERATION)
    }

    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion> {
        const OPERATION: &str = "publish";
        let mut client = self.client.clone();
        let message = v1::PublishRequest { number };
        let answer =
            self.endpoint.call(self.compute(OPERATION), message, |r| async move { client.publish(r).await })?;
        let version = version_from_wire(Some(answer.into_inner())).map_err(self.endpoint.unreadable(OPERATION))?;
        Ok(self.remember(version))
    }

    /// The version that was read last, where the trainer does not answer.
    fn version(&self) -> PolicyVersion {
        let mut client = self.client.clone();
        let call = ("version", self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, v1::Empty {}, |r| async move { client.version(r).await });
        match answer.map(|answer| version_from_wire(Some(answer.into_inner()))) {
            Ok(Ok(version)) => self.remember(version),
            _ => *self.last_version.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    fn save_model(&self, dir: &Path) -> ServiceResult<()> {
        const OPERATION: &str = "save_model";
        let (mut client, message) = (self.client.clone(), self.directory(OPERATION, dir)?);
        self.endpoint.call(self.compute(OPERATION), message, |r| async move { client.save_model(r).await })?;
        Ok(())
    }

    fn save_state(&self, dir: &Path) -> ServiceResult<()> {
        const OPERATION: &str = "save_state";
        let (mut client, message) = (self.client.clone(), self.directory(OPERATION, dir)?);
        self.endpoint.call(self.compute(OPERATION), message, |r| async move { client.save_state(r).await })?;
        Ok(())
    }

    fn restore(&self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> ServiceResult<()> {
        const OPERATION: &str = "restore";
        let mut client = self.client.clone();
        let message = v1::RestoreRequest {
            model_dir: self.directory(OPERATION, model_dir)?.path,
            state_dir: self.directory(OPERATION, state_dir)?.path,
            version: Some(version_to_wire(version)),
        };
        self.endpoint.call(self.compute(OPERATION), message, |r| async move { client.restore(r).await })?;
        Ok(())
    }
}

impl ScalarModelService for TrainerClient {
    fn begin_scalar_model(&self, spec: ScalarModelSpec) -> ServiceResult<()> {
        let (mut client, message) = (self.client.clone(), v1::ScalarModelSpec::from(spec));
        let call = self.compute("begin_scalar_model");
        self.endpoint.call(call, message, |r| async move { client.begin_scalar_model(r).await })?;
        Ok(())
    }

    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>> {
        let mut client = self.client.clone();
        let rows: Vec<v1::TokenSequence> = sequences.iter().cloned().map(Into::into).collect();
        let answer = self.endpoint.call(self.compute("values"), tokio_stream::iter(rows), |r| async move {
            collect(client.values(r).await?).await
        })?;
        Ok(answer.into_iter().map(|row| row.values).collect())
    }

    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport> {
        let mut client = self.client.clone();
        let parts = tokio_stream::iter(batch.into_parts());
        let call = self.compute("update_critic");
        let answer = self.endpoint.call(call, parts, |r| async move { client.update_critic(r).await })?;
        Ok(answer.into_inner().into())
    }

    fn update_reward_model(&self, pairs: &[PreferencePair], learning_rate: f64) -> ServiceResult<ScalarReport> {
        use v1::update_reward_model_request::Part;
        let mut client = self.client.clone();
        let header = Part::Header(v1::UpdateRewardModelHeader { learning_rate });
        let rows = pairs.iter().cloned().map(|pair| Part::Pair(pair.into()));
        let parts: Vec<v1::UpdateRewardModelRequest> =
            std::iter::once(header).chain(rows).map(|part| v1::UpdateRewardModelRequest { part: Some(part) }).collect();
        let answer =
            self.endpoint.call(self.compute("update_reward_model"), tokio_stream::iter(parts), |r| async move {
                client.update_reward_model(r).await
            })?;
        Ok(answer.into_inner().into())
    }

    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>> {
        let mut client = self.client.clone();
        let rows: Vec<v1::TokenSequence> = sequences.iter().cloned().map(Into::into).collect();
        let call = self.compute("scores");
        let answer = self.endpoint.call(call, tokio_stream::iter(rows), |r| async move { client.scores(r).await })?;
        Ok(answer.into_inner().values)
    }

    fn save_reward_model(&self, dir: &Path) -> ServiceResult<bool> {
        const OPERATION: &str = "save_reward_model";
        let (mut client, message) = (self.client.clone(), self.directory(OPERATION, dir)?);
        let call = self.compute(OPERATION);
        let answer = self.endpoint.call(call, message, |r| async move { client.save_reward_model(r).await })?;
        Ok(answer.into_inner().saved)
    }

    fn restore_reward_model(&self, dir: &Path) -> ServiceResult<()> {
        const OPERATION: &str = "restore_reward_model";
        let (mut client, message) = (self.client.clone(), self.directory(OPERATION, dir)?);
        self.endpoint.call(
            self.compute(OPERATION),
            message,
            |r| async move { client.restore_reward_model(r).await },
        )?;
        Ok(())
    }
}

impl DistillService for TrainerClient {
    fn begin_distillation(&self, spec: DistillSpec) -> ServiceResult<()> {
        let (mut client, message) = (self.client.clone(), v1::DistillSpec::from(spec));
        let call = self.compute("begin_distillation");
        self.endpoint.call(call, message, |r| async move { client.begin_distillation(r).await })?;
        Ok(())
    }

    fn update_distilled(&self, batch: MiniBatch) -> ServiceResult<UpdateReport> {
        const OPERATION: &str = "update_distilled";
        let mut client = self.client.clone();
        let parts = tokio_stream::iter(batch.into_parts());
        let answer = self.endpoint.call(self.compute(OPERATION), parts, |r| async move {
            collect(client.update_distilled(r).await?).await
        })?;
        self.read_update(answer, OPERATION)
    }
}

impl MirrorService for TrainerClient {
    fn mirror(&self, step: u64) -> ServiceResult<MirrorReport> {
        let (mut client, message) = (self.client.clone(), v1::MirrorRequest { step });
        let answer = self.endpoint.call(self.compute("mirror"), message, |r| async move { client.mirror(r).await })?;
        Ok(answer.into_inner().into())
    }

    /// The deadline is that of a call that computes nothing: a rank that is busy for longer is no help.
    fn held_shards(&self) -> ServiceResult<Vec<HeldShard>> {
        const OPERATION: &str = "held_shards";
        let mut client = self.client.clone();
        let call = (OPERATION, self.endpoint.config().call_timeout);
        let answer = self.endpoint.call(call, v1::Empty {}, |r| async move { client.held_shards(r).await })?;
        let shards = answer.into_inner().shards.into_iter().map(HeldShard::try_from);
        shards.collect::<Result<_, _>>().map_err(self.endpoint.unreadable(OPERATION))
    }

    fn rejoin(&self) -> ServiceResult<()> {
        let mut client = self.client.clone();
        self.endpoint.call(self.compute("rejoin"), v1::Empty {}, |r| async move { client.rejoin(r).await })?;
        Ok(())
    }

    fn restore_mirrored(&self, plan: &MirrorPlan) -> ServiceResult<()> {
        let (mut client, message) = (self.client.clone(), v1::MirrorPlan::from(plan.clone()));
        let call = self.compute("restore_mirrored");
        self.endpoint.call(call, message, |r| async move { client.restore_mirrored(r).await })?;
        Ok(())
    }
}
