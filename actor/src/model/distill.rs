//! The backward of a divergence between this policy and a frozen teacher over the same target rows.

use super::arena::TrainArena;
use super::backward::Below;
use super::batch::TrainBatch;
use super::packed::PackedPolicy;
use super::sequence::Part;
use super::train::Tape;
use super::units::BackwardUnits;
use temper_tensor::{DistillHead, DistillStats, Divergence, PackedLinear, View};

/// A teacher's final hidden rows at the targets of a batch, with its head.
#[derive(Debug, Clone, Copy)]
pub struct TeacherRows<'a> {
    hidden: View<'a>,
    head: &'a PackedLinear,
}

/// A divergence as a loss.
#[derive(Debug, Clone, Copy)]
pub struct Distillation<'a> {
    /// The teacher over the batch of the tape.
    pub teacher: TeacherRows<'a>,
    /// What is measured.
    pub divergence: Divergence,
    /// Divides the logits of both.
    pub temperature: f32,
    /// Factor of each target row's divergence in the loss.
    pub weights: &'a [f32],
}

impl PackedPolicy {
    /// Run all layers as a teacher: its final hidden rows at the batch's targets stay in `arena`.
    ///
    /// # Panics
    /// If ids or positions are out of range, or the model has no LM head.
    pub fn teach<'a>(&'a self, batch: &TrainBatch, arena: &'a mut TrainArena) -> TeacherRows<'a> {
        let part = self.forward_only(batch, arena);
        let hidden = arena.targets.hidden.view(part.num_targets() * self.dims.model);
        TeacherRows { hidden, head: self.lm_head() }
    }

    /// Add the gradients of the weighted sum of divergences to those of `units`; the divergences of the target rows.
    ///
    /// # Panics
    /// As [`PackedPolicy::backward`]; if the teacher has another vocabulary or saw another batch.
    pub fn backward_distilled(
        &self,
        tape: Tape<'_>,
        loss: Distillation<'_>,
        units: &mut dyn BackwardUnits,
    ) -> DistillStats {
        let mut stats = DistillStats::default();
        self.backward_through(tape, units, |part, arena, units| {
            stats = self.divergence_backward((part, arena), loss, units);
            Below::Gradients
        });
        stats
    }

    fn divergence_backward(
        &self,
        (part, arena): (&Part<'_>, &mut TrainArena),
        loss: Distillation<'_>,
        units: &mut dyn BackwardUnits,
    ) -> DistillStats {
        assert_eq!(loss.weights.len(), part.num_all_targets(), "one weight per target row");
        let len = part.num_targets() * self.dims.model;
        let mut d_hidden = std::mem::take(&mut arena.targets.d_hidden);
        let (unit, range) = self.lm_head_place();
        let (masters, grads) = units.open(unit);
        let args = DistillHead {
            hidden: arena.targets.hidden.view(len),
            head: self.lm_head(),
            weight: masters.view(range),
            teacher_hidden: loss.teacher.hidden,
            teacher_head: loss.teacher.head,
            masked_ids: self.masked_ids(),
            temperature: loss.temperature,
            divergence: loss.divergence,
            weights: &part.pick(loss.weights, 1),
        };
        let stats = self.dev.lm_head_distill(args, d_hidden.view_mut(len), grads.view_mut(range));
        arena.targets.d_hidden = d_hidden;
        let DistillStats { divergences, reverse_kls } = stats;
        DistillStats { divergences: part.join(divergences, 1), reverse_kls: part.join(reverse_kls, 1) }
    }
}
