//! Gradients of a divergence from a teacher of another family and width against central differences.

use crate::support::Fixture;
use temper_actor::{Distillation, ParamStore, Recompute, TrainArena, TrainBatch, WholeUnits};
use temper_tensor::Divergence;

const TEMPERATURE: f32 = 0.8;

struct Pair {
    student: Fixture,
    teacher: Fixture,
    batch: TrainBatch,
    weights: Vec<f32>,
}

impl Pair {
    fn load(student: &'static str, teacher: &'static str) -> Pair {
        let (student, teacher) = (Fixture::load(student), Fixture::load(teacher));
        let batch = student.cases()[0].log_prob_batch();
        let weights = (0..batch.num_targets()).map(|i| (i * 7 % 5) as f32 / 10.0).collect();
        Pair { student, teacher, batch, weights }
    }

    /// The weighted sum of divergences; its gradients are added to `grads`.
    fn loss(&self, divergence: Divergence, recompute: Recompute, grads: &mut ParamStore) -> f64 {
        let (mut arena, mut teacher_arena) = (TrainArena::new(), TrainArena::new());
        let teacher = self.teacher.policy.teach(&self.batch, &mut teacher_arena);
        let tape = self.student.policy.train_forward(&self.batch, recompute, &mut arena);
        let loss = Distillation { teacher, divergence, temperature: TEMPERATURE, weights: &self.weights };
        let stats = self.student.policy.backward_distilled(
            tape,
            loss,
            &mut WholeUnits { masters: &self.student.params, grads },
        );
        stats.divergences.iter().zip(&self.weights).map(|(d, w)| d * f64::from(*w)).sum()
    }

    fn zeros(&self) -> ParamStore {
        self.student.params.zeros_like(&*self.student.dev)
    }
}

#[test]
fn distillation_gradients_match_differences_and_recomputation() {
    let divergences = [
        Divergence::GeneralizedJsd { beta: 0.0 },
        Divergence::GeneralizedJsd { beta: 0.5 },
        Divergence::GeneralizedJsd { beta: 1.0 },
        Divergence::ForwardKlTopK { k: 8 },
    ];
    for (student, teacher, head) in
        [("llama", "qwen3", "lm_head.weight"), ("qwen3", "llama", "model.embed_tokens.weight")]
    {
        let mut pair = Pair::load(student, teacher);
        let dev = pair.student.dev.clone();
        for divergence in divergences {
            let (mut grads, mut recomputed) = (pair.zeros(), pair.zeros());
            pair.loss(divergence, Recompute::None, &mut grads);
            pair.loss(divergence, Recompute::Layers, &mut recomputed);
            assert_eq!(grads.content_hash(&*dev), recomputed.content_hash(&*dev), "{student} {divergence:?}");
            for name in [head, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"] {
                let base = pair.student.params.read_tensor(&*dev, name).unwrap();
                let grad = grads.read_tensor(&*dev, name).unwrap();
                let norm = grad.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                let mut loss_at = |step: f64| {
                    let along = |(w, g): (&f32, &f32)| (f64::from(*w) + step * f64::from(*g) / norm) as f32;
                    let moved: Vec<f32> = base.iter().zip(&grad).map(along).collect();
                    pair.student.params.write_tensor(&*dev, name, &moved).unwrap();
                    pair.student.policy.repack(&pair.student.params);
                    let mut unused = pair.zeros();
                    pair.loss(divergence, Recompute::None, &mut unused)
                };
                let slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2;
                loss_at(0.0);
                let label = format!("{student} {divergence:?} {name}");
                assert!((slope - norm).abs() <= 1e-2 * norm, "{label}: slope {slope}, gradient norm {norm}");
            }
        }
    }
}
