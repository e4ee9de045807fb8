//! The forward of a tensor-parallel rank: the whole model's, but for sums that ranks join.

use super::generate::{Batch, Workspace};
use super::layer::Rows;
use super::packed::{PackedPolicy, PackedProjection};
use super::scratch::GrowBuffer;
use temper_tensor::{KvCache, Store, View, ViewMut};

/// The other ranks of a model, as one of them sees them.
pub trait PartialSums {
    /// Why they cannot be reached.
    type Error;

    /// Give this rank's sums, `[T, D]`, and get those of all ranks, this one's among them, in the order of the ranks.
    ///
    /// # Errors
    /// A rank that is lost. Nothing more can be computed then.
    fn exchange(&mut self, own: &[f32]) -> Result<Vec<Vec<f32>>, Self::Error>;
}

/// What ranks summed, each `[T, D]`.
#[derive(Debug, Default)]
pub(super) struct SumBuffers {
    ranks: Vec<GrowBuffer>,
    host: Vec<f32>,
}

impl PackedPolicy {
    /// As [`PackedPolicy::forward`], of a rank's part: all ranks run it over the same batch at the same time.
    ///
    /// # Errors
    /// Those of the exchange.
    ///
    /// # Panics
    /// As [`PackedPolicy::forward`]; if this is no rank's part, or the exchange gives sums of other lengths or ranks.
    pub fn forward_part<'w, X: PartialSums>(
        &self,
        batch: &Batch<'_>,
        cache: &mut KvCache,
        workspace: &'w mut Workspace,
        ranks: &mut X,
    ) -> Result<View<'w>, X::Error> {
        let (t, d) = (batch.token_ids.len(), self.dims.model);
        self.begin_rows(batch, workspace);
        let rows =
            Rows { positions: batch.positions, spans: batch.spans, appends: batch.spans, prefixes: &[], turn: None };
        for (index, layer) in self.layers.iter().enumerate() {
            let ws = &mut *workspace;
            self.attend_rows(index, rows, (cache, index), ws);
            let (attn, x) = (ws.attn.view(t * self.dims.attn), ws.x.view_mut(t * d));
            self.add_sums((&layer.o, attn), x, (&mut ws.sums, ranks))?;
            self.expand_rows(index, t, ws);
            let (act, x) = (ws.act.view(t * self.dims.ffn), ws.x.view_mut(t * d));
            self.add_sums((&layer.down, act), x, (&mut ws.sums, ranks))?;
        }
        Ok(self.finish_rows(t, workspace))
    }

    /// `x += input W^T + bias`, of which every rank sums a part.
    fn add_sums<X: PartialSums>(
        &self,
        (projection, input): (&PackedProjection, View<'_>),
        x: ViewMut<'_>,
        (sums, ranks): (&mut SumBuffers, &mut X),
    ) -> Result<(), X::Error> {
        let (dev, len) = (&*self.dev, x.len());
        let part = self.part.as_ref().expect("a rank's part of a policy");
        sums.ranks.resize_with(part.num_ranks(), GrowBuffer::default);
        sums.ranks.iter_mut().for_each(|buffer| buffer.reserve(dev, len));
        let own = &mut sums.ranks[part.rank()];
        dev.linear(input, &projection.weight, None, own.view_mut(len), Store::Write);
        sums.host.resize(len, 0.0);
        dev.read(own.view(len), &mut sums.host);
        let all = ranks.exchange(&sums.host)?;
        assert_eq!(all.len(), sums.ranks.len(), "sums of every tensor-parallel rank");
        let others = sums.ranks.iter_mut().zip(&all).enumerate().filter(|(rank, _)| *rank != part.rank());
        others.for_each(|(_, (buffer, values))| dev.write(buffer.view_mut(len), values));
        let views: Vec<View<'_>> = sums.ranks.iter().map(|buffer| buffer.view(len)).collect();
        dev.add_joined(&views, projection.bias.as_ref().map(|bias| bias.all()), x);
        Ok(())
    }
}
