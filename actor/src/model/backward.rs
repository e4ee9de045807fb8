//! The backward of a training pass: from gradients of log-probs or values to gradients of every weight.

use super::arena::{Recompute, TrainArena};
use super::layer_grad::UnitGrad;
use super::layout::HeadRanges;
use super::packed::PackedPolicy;
use super::params::{ParamStore, Unit};
use super::sequence::Part;
use super::train::Tape;
use super::units::{BackwardUnits, WholeUnits};
use std::ops::Range;
use temper_tensor::{LmHeadGrad, LmHeadTrain, NormGrad, RowGrads, RowLoss, TokenStats};

/// d loss / d output, one number per target row of the batch.
#[derive(Debug, Clone, Copy)]
pub enum OutputGrads<'a> {
    /// Of a policy.
    LogProbs {
        /// d loss / d log-prob.
        d_log_probs: &'a [f32],
        /// d loss / d entropy; empty for none.
        d_entropies: &'a [f32],
        /// The temperature that the log-probs were computed at.
        temperature: f32,
    },
    /// Of a value or reward model.
    Values {
        /// d loss / d value.
        d_values: &'a [f32],
    },
}

impl OutputGrads<'_> {
    /// True where every number is exactly zero: groups whose rewards are all equal, say, and no KL or entropy term.
    pub(super) fn are_zero(&self) -> bool {
        let zero = |values: &[f32]| values.iter().all(|x| *x == 0.0);
        match self {
            OutputGrads::LogProbs { d_log_probs, d_entropies, .. } => zero(d_log_probs) && zero(d_entropies),
            OutputGrads::Values { d_values } => zero(d_values),
        }
    }
}

/// What a head's backward leaves for the layers below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Below {
    /// Gradients of the target rows' hidden state.
    Gradients,
    /// Nothing: they are all zero.
    Nothing,
}

impl PackedPolicy {
    /// Add the gradients of every weight to `grads`. `masters` are the values that this policy was packed from.
    /// Deterministic for a given batch; recomputation changes no bit. Gradients of the outputs that are all zero add
    /// zero to every weight's, so nothing runs.
    ///
    /// # Panics
    /// If `masters` or `grads` belong to another model, the gradients differ in number from the target rows, or they
    /// are of another kind than the model's head.
    pub fn backward(&self, masters: &ParamStore, tape: Tape<'_>, outputs: OutputGrads<'_>, grads: &mut ParamStore) {
        if outputs.are_zero() {
            return;
        }
        assert_eq!(masters.layout.units, self.layout.units, "masters of another model");
        assert_eq!(grads.layout.units, self.layout.units, "gradients of another model");
        self.backward_units(tape, outputs, &mut WholeUnits { masters, grads });
    }

    /// As [`PackedPolicy::backward_units`], with the gradient that a head beside the model's has for the normed hidden
    /// state of the target rows ([`PackedPolicy::hidden`]), `[R, D]`.
    ///
    /// # Panics
    /// As [`PackedPolicy::backward`], and if `d_hidden` has another length.
    pub fn backward_beside(
        &self,
        tape: Tape<'_>,
        (outputs, d_hidden): (OutputGrads<'_>, &[f32]),
        units: &mut dyn BackwardUnits,
    ) {
        if outputs.are_zero() && d_hidden.iter().all(|x| *x == 0.0) {
            return self.visit_units(units);
        }
        self.backward_through(tape, units, |part, arena, units| {
            let (d, len) = (self.dims.model, part.num_targets() * self.dims.model);
            let expected = part.num_all_targets() * d;
            assert_eq!(d_hidden.len(), expected, "one gradient per number of the target rows' hidden state");
            self.head_backward((part, arena), outputs, units);
            let mut sum = vec![0.0; len];
            self.dev.read(arena.targets.d_hidden.view(len), &mut sum);
            sum.iter_mut().zip(&*part.pick(d_hidden, d)).for_each(|(own, beside)| *own += beside);
            self.dev.write(arena.targets.d_hidden.view_mut(len), &sum);
            Below::Gradients
        });
    }

    /// [`PackedPolicy::log_probs`], a loss, and [`PackedPolicy::backward_units`] with its gradients in one, which
    /// computes every logit once: for losses whose gradient at a target row depends on no other row's output. `loss` is
    /// given ranges of target rows, ascending, and what the policy says of them. Rows of zero gradients take no part.
    /// (Ranks of a group tell each other of all rows before the loss, and compute the logits of their own ones twice.)
    ///
    /// # Panics
    /// As [`PackedPolicy::log_probs`] and [`PackedPolicy::backward`].
    pub fn train_backward(
        &self,
        tape: Tape<'_>,
        temperature: f32,
        loss: &mut RowLoss<'_>,
        units: &mut dyn BackwardUnits,
    ) -> TokenStats {
        if tape.part.turn.is_some() {
            let stats = self.log_probs(&tape, temperature);
            let RowGrads { d_log_probs, d_entropies } = loss(0..stats.log_probs.len(), &stats);
            let (d_log_probs, d_entropies) = (&d_log_probs, &d_entropies);
            self.backward_units(tape, OutputGrads::LogProbs { d_log_probs, d_entropies, temperature }, units);
            return stats;
        }
        let mut stats = TokenStats::default();
        self.backward_through(tape, units, |part, arena, units| {
            let mut below = Below::Nothing;
            let len = part.num_targets() * self.dims.model;
            let mut d_hidden = std::mem::take(&mut arena.targets.d_hidden);
            let (unit, range) = self.lm_head_place();
            let forward = self.target_head(part, arena, temperature);
            let (masters, grads) = units.open(unit);
            let args = LmHeadTrain { forward, weight: masters.view(range) };
            let mut watched = |rows: Range<usize>, said: &TokenStats| {
                let grads = loss(rows, said);
                if grads.d_log_probs.iter().chain(&grads.d_entropies).any(|d| *d != 0.0) {
                    below = Below::Gradients;
                }
                grads
            };
            stats = self.dev.lm_head_train(args, &mut watched, d_hidden.view_mut(len), grads.view_mut(range));
            arena.targets.d_hidden = d_hidden;
            below
        });
        stats
    }

    /// A head and everything below it; `head` writes the gradient of the target rows' hidden state and adds its
    /// weight's.
    pub(super) fn backward_through(
        &self,
        tape: Tape<'_>,
        units: &mut dyn BackwardUnits,
        head: impl FnOnce(&Part<'_>, &mut TrainArena, &mut dyn BackwardUnits) -> Below,
    ) {
        let Tape { arena, batch, part, sequences, recompute } = tape;
        let (dev, d) = (&*self.dev, part.num_rows() * self.dims.model);
        arena.reserve_grads(self, &part);
        if head(&part, arena, units) == Below::Nothing {
            return self.visit_below_head(units);
        }
        self.final_norm_backward(&part, arena, units.grad(self.layout.final_unit()));
        units.close(self.layout.final_unit());
        let lists = sequences.lists(batch);
        let rows = lists.rows(&part);
        let mut parts = arena.train_parts();
        for index in (0..self.layers.len()).rev() {
            let saved = match recompute {
                Recompute::None => index,
                Recompute::Layers => {
                    dev.copy(parts.inputs[index].view(d), parts.scratch.x.view_mut(d));
                    self.run_layer_saving(index, rows, parts.kv, (parts.scratch, &mut parts.saved[0]));
                    0
                }
            };
            let (masters, grads) = units.open(1 + index);
            self.layer_backward(index, rows, (&mut parts, saved), &mut UnitGrad { dev, masters, grads });
            units.close(1 + index);
        }
        let table = units.grad(0).view_mut(&self.layout.embed);
        dev.embed_grad(part.token_ids, parts.grads.x.view(d), table);
        units.close(0);
    }

    /// Unit and range of the LM head's weight.
    pub(super) fn lm_head_place(&self) -> (usize, &Range<usize>) {
        match &self.layout.head {
            HeadRanges::Untied(range) => (self.layout.final_unit(), range),
            _ => (0, &self.layout.embed),
        }
    }

    /// The head: its weight's gradient, and that of the target rows' hidden state.
    pub(super) fn head_backward(
        &self,
        (part, arena): (&Part<'_>, &mut TrainArena),
        outputs: OutputGrads<'_>,
        units: &mut dyn BackwardUnits,
    ) {
        let (dev, last, len) = (&*self.dev, self.layout.final_unit(), part.num_targets() * self.dims.model);
        let mut d_hidden = std::mem::take(&mut arena.targets.d_hidden);
        match outputs {
            OutputGrads::LogProbs { d_log_probs, d_entropies, temperature } => {
                assert_eq!(d_log_probs.len(), part.num_all_targets(), "one gradient per target row");
                let (unit, range) = self.lm_head_place();
                let forward = self.target_head(part, arena, temperature);
                let (d_log_probs, d_entropies) = (&part.pick(d_log_probs, 1), &part.pick(d_entropies, 1));
                let (masters, grads) = units.open(unit);
                let args = LmHeadGrad { forward, weight: masters.view(range), d_log_probs, d_entropies };
                dev.lm_head_grad(args, d_hidden.view_mut(len), grads.view_mut(range));
            }
            OutputGrads::Values { d_values } => {
                assert_eq!(d_values.len(), part.num_all_targets(), "one gradient per target row");
                let d_values = part.pick(d_values, 1);
                let HeadRanges::Scalar(range) = &self.layout.head else {
                    panic!("{}: a model with an LM head has no values", self.config.file().display());
                };
                let (packed, targets) = (self.scalar_head(), &mut arena.targets);
                dev.write(targets.scalars.view_mut(d_values.len()), &d_values);
                let dy = targets.scalars.view(d_values.len());
                let (masters, grads) = units.open(last);
                let mut unit = UnitGrad { dev, masters, grads };
                unit.project((range, packed), targets.hidden.view(len), dy, d_hidden.view_mut(len));
            }
        }
        arena.targets.d_hidden = d_hidden;
    }

    /// The final norm over the target rows, whose gradients then start the residual stream's.
    fn final_norm_backward(&self, part: &Part<'_>, arena: &mut TrainArena, grads: &mut Unit) {
        let (dev, d, r) = (&*self.dev, self.dims.model, part.num_targets());
        let targets = &mut arena.targets;
        dev.fill(targets.d_x.view_mut(r * d), 0.0);
        let args = NormGrad {
            x: targets.x.view(r * d),
            weight: self.final_norm.all(),
            rstd: targets.rstd.view(r),
            dy: targets.d_hidden.view(r * d),
            shape: self.norm_shape(r),
        };
        let d_weight = grads.view_mut(&self.layout.final_norm);
        dev.rms_norm_grad(args, targets.d_x.view_mut(r * d), d_weight);
        let len = part.num_rows() * d;
        dev.fill(arena.grads.x.view_mut(len), 0.0);
        dev.scatter_add_rows(targets.d_x.view(r * d), &part.target_rows, d, arena.grads.x.view_mut(len));
    }
}
