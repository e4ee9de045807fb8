//! Messages of mirrored shards.

use super::ConvertError;
use super::common::hash_from_wire;
use crate::grpc::v1;
use crate::{HeldShard, MirrorPlan, MirrorReport, ShardSource};

same_fields!(MirrorReport, v1::MirrorReport, report => { bytes_sent, wait_seconds, transfer_seconds });

same_fields!(HeldShard, v1::HeldShard, held => { step, shard }
    to { hash: held.hash.0.to_vec() }
    try_from { hash: hash_from_wire(&held.hash, "hash")? });

same_fields!(ShardSource, v1::ShardSource, source => { rank, from });

same_fields!(MirrorPlan, v1::MirrorPlan, plan => { step }
    to { sources: plan.sources.into_iter().map(Into::into).collect() }
    from { sources: plan.sources.into_iter().map(Into::into).collect() });
