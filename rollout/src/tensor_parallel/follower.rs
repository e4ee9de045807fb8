//! A rank other than 0: does what it is told.

use super::command::{Command, Order, Step};
use super::exchange::{Exchange, SliceHash, lost};
use crate::Error;
use std::sync::Arc;
use temper_actor::{Batch, ModelConfig, PackedPolicy, TensorPart, Workspace};
use temper_collective::{Collective, Operation};
use temper_tensor::{DType, Device, KvCache};
use temper_types::ContentHash;

/// Compute this rank's part of `config`, in `dtype`, until rank 0 says that it is over. Weights come from rank 0.
///
/// # Errors
/// A model that cannot be divided, a rank that is lost, or a rank 0 that says what makes no sense. The other ranks are
/// told.
pub fn follow(device: &Arc<dyn Device>, config: &ModelConfig, dtype: DType, ranks: Collective) -> Result<(), Error> {
    let run = || {
        let part = TensorPart::new(config, ranks.rank(), ranks.world()).map_err(|e| Error::Model(e.to_string()))?;
        let from_leader = ranks.subgroup(&[0, ranks.rank()], 0).map_err(lost)?;
        let (policy, cache, workspace) = (None, None, Workspace::new());
        let part = Arc::new(part);
        Follower { device, dtype, part, ranks: &ranks, from_leader, policy, cache, workspace }.run()
    };
    run().inspect_err(|_| ranks.give_up(Operation::Barrier))
}

struct Follower<'a> {
    device: &'a Arc<dyn Device>,
    dtype: DType,
    part: Arc<TensorPart>,
    ranks: &'a Collective,
    /// This rank and rank 0.
    from_leader: Collective,
    /// Nothing before the first weights.
    policy: Option<PackedPolicy>,
    /// Nothing before the first step, and where its memory was given back.
    cache: Option<KvCache>,
    workspace: Workspace,
}

impl Follower<'_> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let bytes = self.ranks.take_list::<u8>(0).map_err(lost)?;
            match Command::decode(&bytes) {
                Some(Command::Order(Order::StillHere)) => {}
                Some(Command::Step(step)) => self.step(&step)?,
                Some(Command::Order(Order::ReleaseKv)) => self.cache = None,
                Some(Command::Order(Order::Weights(hash))) => self.take(hash)?,
                Some(Command::Order(Order::End)) => return Ok(()),
                None => return Err(Error::Ranks(format!("rank 0 sent {} bytes that say nothing", bytes.len()))),
            }
        }
    }

    fn step(&mut self, step: &Step) -> Result<(), Error> {
        let held = self.policy.as_ref().filter(|policy| policy.version.hash.0 == step.weights);
        let Some(policy) = held else {
            let expected = ContentHash(step.weights);
            let got = self.policy.as_ref().map_or_else(|| "none".to_owned(), |p| p.version.hash.to_string());
            let rank = self.part.rank();
            return Err(Error::Ranks(format!("rank {rank} holds weights {got}: expected {expected}")));
        };
        let (num_blocks, block_size) = step.pool;
        let spec = policy.kv_spec(num_blocks as usize, block_size as usize);
        let cache = match self.cache.take() {
            Some(mut cache) => {
                step.copies.iter().for_each(|(from, to)| self.device.kv_copy_block(&mut cache, *from, *to));
                self.cache.insert(cache)
            }
            None => self.cache.insert(self.device.kv_cache(spec)),
        };
        let spans = step.seq_spans();
        let batch = Batch { token_ids: &step.token_ids, positions: &step.positions, spans: &spans };
        policy.forward_part(&batch, cache, &mut self.workspace, &mut Exchange(self.ranks))?;
        Ok(())
    }

    /// Take new weights, and say so once they are what rank 0 sent.
    fn take(&mut self, hash: ContentHash) -> Result<(), Error> {
        let mut arrived = SliceHash::default();
        let (part, from) = (Arc::clone(&self.part), &self.from_leader);
        let mut values = (0..part.num_units()).map(|index| {
            let values = receive(from, part.num_values(index))?;
            arrived.update(&values);
            Ok::<_, Error>(values)
        });
        match &mut self.policy {
            Some(policy) => {
                for (index, values) in values.by_ref().enumerate() {
                    policy.repack_part(index, &values?);
                }
            }
            None => self.policy = Some(PackedPolicy::from_part(self.device, &part, self.dtype, values.by_ref())?),
        }
        drop(values);
        let sent = from.take_list::<u8>(0).map_err(lost)?;
        if sent != arrived.finish() {
            let rank = part.rank();
            return Err(Error::Ranks(format!("rank {rank}: what arrived of weights {hash} is not what rank 0 sent")));
        }
        if let Some(policy) = &mut self.policy {
            policy.version.hash = hash;
        }
        self.ranks.barrier().map_err(lost)
    }
}

/// `len` values of rank 0, which come in pieces.
fn receive(from: &Collective, len: usize) -> Result<Vec<f32>, Error> {
    let mut values = Vec::with_capacity(len);
    while values.len() < len {
        let piece = from.take_list::<f32>(0).map_err(lost)?;
        if piece.is_empty() || values.len() + piece.len() > len {
            let (rank, got) = (from.world_rank(from.rank()), values.len() + piece.len());
            return Err(Error::Ranks(format!("rank {rank} got {got} values of a unit: expected {len}")));
        }
        values.extend_from_slice(&piece);
    }
    Ok(values)
}
