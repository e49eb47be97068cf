//! AdamW in one pass over memory, global-norm clipping, and learning-rate schedules.

use crate::kernels::isa::multiversion;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Elements per task; fixed, so that sums have one order whatever the threads.
const CHUNK: usize = 1 << 16;

/// AdamW (arXiv 1711.05101) as PyTorch computes it, float32 throughout.
pub struct AdamW {
    /// First moments (`exp_avg`).
    pub m: Vec<f32>,
    /// Second moments (`exp_avg_sq`).
    pub v: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
    /// The parameters that weight decay applies to: matrices, not norms and biases.
    pub decayed: Vec<Range<usize>>,
    /// λ.
    pub weight_decay: f32,
}

/// Decay rates of the moments, and the denominator's ε: PyTorch's defaults.
const BETAS: (f32, f32) = (0.9, 0.999);
const EPSILON: f32 = 1e-8;

impl AdamW {
    /// Fresh moments for `len` parameters.
    pub fn new(len: usize, decayed: Vec<Range<usize>>, weight_decay: f32) -> Self {
        Self {
            m: vec![0.0; len],
            v: vec![0.0; len],
            steps: 0,
            decayed,
            weight_decay,
        }
    }

    /// One step on `parameters`; the gradient is taken times `scale` (the clipping factor).
    pub fn step(
        &mut self,
        parameters: &mut [f32],
        gradient: &[f32],
        scale: f32,
        learning_rate: f64,
    ) {
        self.steps += 1;
        if self.weight_decay != 0.0 {
            let keep = kept(learning_rate, self.weight_decay as f64);
            for range in &self.decayed {
                parameters[range.clone()]
                    .par_iter_mut()
                    .for_each(|p| *p *= keep);
            }
        }
        let (rate, root) = corrections(self.steps, learning_rate);
        let moments = self
            .m
            .par_chunks_mut(CHUNK)
            .zip(self.v.par_chunks_mut(CHUNK));
        parameters
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(moments)
            .for_each(|((p, g), (m, v))| update(p, g, m, v, (scale, rate, root)));
    }
}

/// The learning rate over 1 − β₁ᵗ, and √(1 − β₂ᵗ), for step t from 1.
pub(super) fn corrections(step: u64, learning_rate: f64) -> (f32, f32) {
    let correction = |beta: f32| 1.0 - (beta as f64).powi(step as i32);
    (
        (learning_rate / correction(BETAS.0)) as f32,
        correction(BETAS.1).sqrt() as f32,
    )
}

/// What weight decay leaves of a parameter.
pub(super) fn kept(learning_rate: f64, weight_decay: f64) -> f32 {
    (1.0 - learning_rate * weight_decay) as f32
}

multiversion! {
    /// AdamW on a run of parameters, given (the gradient's factor, the learning rate, √correction of v).
    pub fn update(
        p: &mut [f32],
        g: &[f32],
        m: &mut [f32],
        v: &mut [f32],
        factors: (f32, f32, f32),
    ) {
        let ((b1, b2), (scale, rate, root)) = (BETAS, factors);
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let scaled = *g * scale;
            *m += (scaled - *m) * (1.0 - b1);
            *v = *v * b2 + scaled * scaled * (1.0 - b2);
            *p -= rate * *m / (v.sqrt() / root + EPSILON);
        }
    }
}

multiversion! {
    /// Σg² of a run.
    pub fn squares(g: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let mut chunks = g.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, &g) in lanes.iter_mut().zip(chunk) {
                *lane += g as f64 * g as f64;
            }
        }
        let rest = chunks.remainder().iter().map(|&g| g as f64 * g as f64);
        lanes.into_iter().chain(rest).sum()
    }
}

/// √Σg².
pub fn norm(gradient: &[f32]) -> f64 {
    let parts: Vec<f64> = gradient.par_chunks(CHUNK).map(squares).collect();
    parts.iter().sum::<f64>().sqrt()
}

/// The factor that brings a gradient of this norm to at most `limit` (PyTorch's `clip_grad_norm_`); 0 is no limit.
pub fn clip_factor(norm: f64, limit: f64) -> f32 {
    if limit > 0.0 {
        (limit / (norm + 1e-6)).min(1.0) as f32
    } else {
        1.0
    }
}

/// How the learning rate goes over the steps; transformers' names and shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scheduler {
    /// Constant after the warm-up.
    #[value(alias = "constant_with_warmup")]
    Constant,
    /// Falling to 0 at the last step.
    Linear,
    /// Half a cosine down to 0.
    Cosine,
}

impl Scheduler {
    /// The factor on the learning rate at a step, from 0; the first `warmup` steps rise from 0 linearly.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let left = total.saturating_sub(warmup).max(1) as f64;
        let progress = (step - warmup) as f64 / left;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn golden() -> Value {
        serde_json::from_str(include_str!("../../../tests/golden/adamw.json")).unwrap()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap() as f32)
            .collect()
    }

    /// tests/golden/adamw.json, which PyTorch made (make_adamw.py).
    #[test]
    fn steps_are_pytorchs() {
        let golden = golden();
        for run in golden["runs"].as_array().unwrap() {
            let mut parameters = floats(&golden["start"]);
            let decay = run["weight_decay"].as_f64().unwrap() as f32;
            let mut optimizer = AdamW::new(
                parameters.len(),
                std::iter::once(0..parameters.len()).collect(),
                decay,
            );
            let steps = run["steps"].as_array().unwrap();
            for (step, gradient) in steps.iter().zip(golden["gradients"].as_array().unwrap()) {
                let gradient = floats(gradient);
                let norm = norm(&gradient);
                assert!((norm - step["grad_norm"].as_f64().unwrap()).abs() < 1e-6 * norm);
                let factor = clip_factor(norm, run["max_grad_norm"].as_f64().unwrap_or(0.0));
                optimizer.step(
                    &mut parameters,
                    &gradient,
                    factor,
                    run["lr"].as_f64().unwrap(),
                );
                for (ours, theirs) in parameters.iter().zip(floats(&step["params"])) {
                    assert!(
                        (ours - theirs).abs() < 3e-7 * theirs.abs().max(1.0),
                        "{ours} {theirs}"
                    );
                }
            }
        }
    }

    #[test]
    fn schedules_are_transformers() {
        for row in golden()["schedules"].as_array().unwrap() {
            let warmup = row["warmup_steps"].as_u64().unwrap();
            let scheduler = match row["scheduler"].as_str().unwrap() {
                "constant_with_warmup" => Scheduler::Constant,
                "linear" => Scheduler::Linear,
                "cosine" => Scheduler::Cosine,
                _ => continue, // transformers' "constant" takes no warm-up
            };
            for (step, rate) in row["rates"].as_array().unwrap().iter().enumerate() {
                let ours =
                    scheduler.factor(step as u64, warmup, row["total_steps"].as_u64().unwrap());
                assert!(
                    (ours - rate.as_f64().unwrap()).abs() < 1e-12,
                    "{row} at {step}: {ours}"
                );
            }
        }
    }
}
