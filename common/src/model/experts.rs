//! Mixtures of experts: a router's scores say what each expert is worth to a token, and what the token's MLP gives is
//! the weighted sum of what the best few give. An expert that all tokens go to is one more, after the others. Each expert's
//! tokens are one product.

use super::backward::{Pass, linear, norm_at, normed};
use super::decoder::{Layer, LayerState, Mlp};
use super::params::MlpParams;
use crate::kernels::gemm::Write;
use crate::kernels::{activation, fit, norm, rows, softmax};
use crate::weights::{Config, Experts, Scores};
use std::cell::Cell;
use std::ops::Range;

/// Which tokens went to which experts. A row is a token at one of them; an expert's rows lie together.
#[derive(Default)]
pub struct Routes {
    /// The scores, `[T, experts]`; where a gate says what the expert for all tokens counts, that after each token's.
    scores: Vec<f32>,
    /// The experts of each token, the best first, `[T, used]`,
    chosen: Vec<usize>,
    /// and its rows at them, and at the one for all, `[T, each]`.
    places: Vec<usize>,
    /// The token of each row,
    tokens: Vec<usize>,
    /// and what the row counts.
    weights: Vec<f32>,
    /// Where each expert's rows begin, and where the last one's end.
    starts: Vec<usize>,
}

thread_local! {
    /// What the experts of a layer give, `[rows, hidden]`; kept, since fresh pages in every layer cost.
    static GIVEN: Cell<Vec<f32>> = const { Cell::new(vec![]) };
}

impl Routes {
    /// From `x` `[T, hidden]`, which is normed, to who goes where and to `gate_up` `[rows, 2·ffn]` of the experts' rows.
    pub(super) fn widen(
        &mut self,
        layer: &Layer,
        (c, how): (&Config, Experts),
        x: &[f32],
        gate_up: &mut Vec<f32>,
    ) {
        let router = layer.router.as_ref().expect("experts have a router");
        let norms = [layer.norms.of_router(), layer.norms.of_experts()];
        let [read_by_router, read] =
            norms.map(|norm| norm::rows_of(x, c.hidden, norm.as_deref(), c.norm()));
        let count = x.len() / c.hidden;
        fit(&mut self.scores, count * how.outputs());
        router.forward_made(read_by_router, &mut self.scores, Write::Set);
        self.choose(how, layer.selection.as_deref(), layer.factors.as_deref());
        fit(gate_up, count * 2 * how.width());
        let mut left = &mut gate_up[..];
        for (expert, mlp) in layer.mlps.iter().enumerate() {
            let tokens = &self.tokens[self.of(expert)];
            let gate_up = left
                .split_off_mut(..tokens.len() * 2 * mlp.ffn())
                .expect("there is room for all rows");
            let read = |r: usize, row: &mut [f32]| read(tokens[r], row);
            mlp.gate_up.forward_made(read, gate_up, Write::Set);
        }
    }

    /// `y` `[T, hidden]` is set to, or gains, the mixture of `gate_up`.
    pub(super) fn narrow(
        &self,
        layer: &Layer,
        (c, how): (&Config, Experts),
        gate_up: &[f32],
        y: &mut [f32],
        write: Write,
    ) {
        let mut all = GIVEN.take();
        fit(&mut all, self.tokens.len() * c.hidden);
        let mut left = gate_up;
        for (expert, mlp) in layer.mlps.iter().enumerate() {
            let of = self.of(expert);
            let gate_up = left
                .split_off(..of.len() * 2 * mlp.ffn())
                .expect("there are all rows");
            let given = &mut all[of.start * c.hidden..of.end * c.hidden];
            let weights = Some(&self.weights[of]);
            mlp.narrow(c, gate_up, weights, given, Write::Set);
        }
        rows(y, c.hidden, |first, y| {
            let places = self.places[first * how.each()..].chunks_exact(how.each());
            for (y, places) in y.chunks_exact_mut(c.hidden).zip(places) {
                if write == Write::Set {
                    y.fill(0.0);
                }
                for given in places.iter().map(|&row| &all[row * c.hidden..]) {
                    y.iter_mut().zip(given).for_each(|(y, given)| *y += given);
                }
            }
        });
        GIVEN.set(all);
    }

    /// The rows of an expert.
    fn of(&self, expert: usize) -> Range<usize> {
        self.starts[expert]..self.starts[expert + 1]
    }

    /// Goes by the router's logits in `scores`, which become these. Of equals the first is the better.
    fn choose(&mut self, how: Experts, selection: Option<&[f32]>, factors: Option<&[f32]>) {
        let count = self.scores.len() / how.outputs();
        self.chosen.clear();
        for scores in self.scores.chunks_exact_mut(how.outputs()) {
            let (scores, gate) = scores.split_at_mut(how.count);
            gate.iter_mut().for_each(|x| *x = sigmoid(*x));
            scores.iter_mut().for_each(|x| *x *= how.logit_scale);
            match how.scores {
                Scores::Softmax => {
                    let most = softmax::max(scores);
                    let sum = softmax::exp_in_place(scores, most);
                    scores.iter_mut().for_each(|x| *x /= sum);
                }
                Scores::Sigmoid => scores.iter_mut().for_each(|x| *x = sigmoid(*x)),
            }
            let rank = |expert: usize| scores[expert] + selection.map_or(0.0, |s| s[expert]);
            let begun = self.chosen.len();
            for expert in 0..how.count {
                let own = rank(expert);
                let at = self.chosen[begun..].partition_point(|&other| rank(other) >= own);
                if at < how.used {
                    self.chosen.truncate(begun + how.used - 1);
                    self.chosen.insert(begun + at, expert);
                }
            }
        }
        self.starts.clear();
        self.starts.resize(how.count + 1, 0);
        for &expert in &self.chosen {
            self.starts[expert + 1] += 1;
        }
        for expert in 0..how.count {
            self.starts[expert + 1] += self.starts[expert];
        }
        let mut next = self.starts.clone();
        // The expert for all tokens has its rows in their order.
        let shared = count * how.used;
        self.starts.extend(how.shared.map(|_| shared + count));
        self.places.clear();
        self.tokens.resize(count * how.each(), 0);
        self.weights.resize(count * how.each(), 0.0);
        let scores = self.scores.chunks_exact(how.outputs());
        for (token, (chosen, scores)) in self.chosen.chunks_exact(how.used).zip(scores).enumerate()
        {
            let (sum, _) = norming(how, chosen, scores);
            for &expert in chosen {
                let row = next[expert];
                next[expert] += 1;
                self.places.push(row);
                self.tokens[row] = token;
                let factor = factors.map_or(1.0, |factors| factors[expert]);
                self.weights[row] = scores[expert] / sum * how.scale * factor;
            }
            if how.shared.is_some() {
                let row = shared + token;
                self.places.push(row);
                self.tokens[row] = token;
                self.weights[row] = scores.get(how.count).copied().unwrap_or(1.0);
            }
        }
    }

    /// The gradient of the router's logits, `[T, outputs]`, given that of each row's weight.
    fn d_logits(&self, how: Experts, d_weights: &[f32], out: &mut Vec<f32>) {
        fit(out, self.scores.len());
        let of_tokens =
            (self.chosen.chunks_exact(how.used)).zip(self.places.chunks_exact(how.each()));
        let out = out.chunks_exact_mut(how.outputs());
        let scores = self.scores.chunks_exact(how.outputs());
        for ((out, scores), (chosen, places)) in out.zip(scores).zip(of_tokens) {
            let (out, d_gate) = out.split_at_mut(how.count);
            for d_gate in d_gate {
                let gate = scores[how.count];
                *d_gate = d_weights[places[how.used]] * gate * (1.0 - gate);
            }
            let part = |row: usize| self.weights[row] * d_weights[row];
            let mean: f32 = places[..how.used].iter().map(|&row| part(row)).sum();
            // What weights lose by their common divisor, and what a soft-max's scores lose by theirs: where those are normed,
            // they are a soft-max of the chosen alone.
            let (norming, spread) = match norming(how, chosen, scores) {
                (sum, true) => (mean / sum, 0.0),
                (_, false) => (0.0, mean),
            };
            match how.scores {
                Scores::Softmax => (out.iter_mut().zip(scores)).for_each(|(o, s)| *o = -s * spread),
                Scores::Sigmoid => out.fill(0.0),
            }
            for (&expert, &row) in chosen.iter().zip(places) {
                let d = self.weights[row] * d_weights[row] - scores[expert] * norming;
                out[expert] += match how.scores {
                    Scores::Softmax => d,
                    Scores::Sigmoid => d * (1.0 - scores[expert]),
                };
            }
            out.iter_mut().for_each(|d| *d *= how.logit_scale);
        }
    }

    /// Adds to the gradient of experts' factors, given that of each row's weight.
    fn d_factors(&self, how: Experts, d_weights: &[f32], out: &mut [f32]) {
        let of_tokens =
            (self.chosen.chunks_exact(how.used)).zip(self.places.chunks_exact(how.each()));
        for ((chosen, places), scores) in of_tokens.zip(self.scores.chunks_exact(how.outputs())) {
            let (sum, _) = norming(how, chosen, scores);
            for (&expert, &row) in chosen.iter().zip(places) {
                out[expert] += scores[expert] / sum * how.scale * d_weights[row];
            }
        }
    }
}

/// What the scores of a token's experts are divided by, and whether that is their sum.
fn norming(how: Experts, chosen: &[usize], scores: &[f32]) -> (f32, bool) {
    let Some(least) = how.normed else {
        return (1.0, false);
    };
    let sum: f32 = chosen.iter().map(|&expert| scores[expert]).sum();
    ((sum + how.plus).max(least), sum + how.plus > least)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// What the backward pass of a mixture uses, kept from layer to layer.
#[derive(Default)]
pub(super) struct Buffers {
    /// The gradient of what the mixture gave, with an MLP beside the experts that of the sum of both, `[T, hidden]`.
    pub dy: Vec<f32>,
    /// What experts read, and its gradient, `[T, hidden]`.
    read: Vec<f32>,
    d_read: Vec<f32>,
    /// The same of one expert's rows.
    rows: Vec<f32>,
    d_rows: Vec<f32>,
    d_weights: Vec<f32>,
    d_logits: Vec<f32>,
}

impl Pass<'_, '_> {
    /// Carries the gradient of what the mixture gave, which is in [`Buffers::dy`], back, through the MLP beside it, too: `dx`
    /// gains that of `state.middle`. The state's `gate_up`s become their gradients.
    pub(super) fn experts(&mut self, how: Experts, state: &mut LayerState, dx: &mut [f32]) {
        let (layer, p) = self.layer();
        if let (Some(mlp), Some(places)) = (&layer.beside, &p.beside) {
            self.beside((mlp, places), state, dx);
        }
        let c = &self.model.decoder.config;
        let mut own = std::mem::take(&mut self.b.experts);
        let mut d_given = std::mem::take(&mut self.b.d_given);
        let norm = norm_at(&layer.norms.after_experts, &p.norms.after_experts);
        let dy = self.given(
            norm,
            c.norm(),
            &state.given_by_experts,
            &own.dy,
            &mut d_given,
        );
        let routes = &state.routes;
        let norm = norm_at(layer.norms.of_experts(), p.norms.of_experts());
        let read = normed(norm, &state.middle, c.norm(), &mut own.read);
        fit(&mut own.d_read, dx.len());
        own.d_read.fill(0.0);
        fit(&mut own.d_weights, routes.tokens.len());
        let mut left = &mut state.gate_up[..];
        for (expert, (mlp, places)) in layer.mlps.iter().zip(&p.mlps).enumerate() {
            let of = routes.of(expert);
            let (tokens, weights) = (&routes.tokens[of.clone()], &routes.weights[of.clone()]);
            let gate_up = left
                .split_off_mut(..tokens.len() * 2 * mlp.ffn())
                .expect("there was room for all rows");
            let b = &mut *self.b;
            gather(dy, tokens, c.hidden, &mut own.d_rows);
            self.model.decoder.mlp_inner(mlp, gate_up, &mut b.inner);
            if !tokens.is_empty() {
                linear(&mlp.down, &own.d_rows, &mut b.d_inner, &mut b.right);
            }
            // What the row counts was left out so far: its own gradient is what it multiplies.
            let inner = b
                .inner
                .chunks_exact(mlp.ffn())
                .zip(b.d_inner.chunks_exact_mut(mlp.ffn()));
            let d_rows = own.d_rows.chunks_exact_mut(c.hidden);
            let given = own.d_weights[of].iter_mut().zip(weights);
            let bias = mlp.down.bias.as_deref();
            for (((inner, d_inner), d_row), (d_weight, weight)) in inner.zip(d_rows).zip(given) {
                let of_bias = bias.map_or(0.0, |bias| softmax::dot(bias, d_row));
                *d_weight = softmax::dot(inner, d_inner) + of_bias;
                d_inner.iter_mut().for_each(|x| *x *= weight);
                d_row.iter_mut().for_each(|x| *x *= weight);
            }
            self.gradients
                .linear(&places.down, &b.inner, &own.d_rows, &mut b.right);
            activation::backward(c.activation, gate_up, mlp.ffn(), &b.d_inner);
            gather(read, tokens, c.hidden, &mut own.rows);
            self.gradients
                .linear(&places.gate_up, &own.rows, gate_up, &mut b.right);
            if !tokens.is_empty() {
                linear(&mlp.gate_up, gate_up, &mut own.d_rows, &mut b.right);
            }
            for (&token, d_row) in tokens.iter().zip(own.d_rows.chunks_exact(c.hidden)) {
                let d_read = &mut own.d_read[token * c.hidden..][..c.hidden];
                d_read.iter_mut().zip(d_row).for_each(|(d, x)| *d += x);
            }
        }
        self.b.d_given = d_given;
        self.through(norm, &state.middle, &own.d_read, dx);
        routes.d_logits(how, &own.d_weights, &mut own.d_logits);
        if let Some(d) = (p.factors.as_ref()).and_then(|span| self.gradients.vector(span)) {
            routes.d_factors(how, &own.d_weights, d);
        }
        let router = layer.router.as_ref().zip(p.router.as_ref());
        let norm = norm_at(layer.norms.of_router(), p.norms.of_router());
        let (router, places) = router.expect("experts have a router");
        let reader = (router, places, &own.d_logits[..]);
        self.read(norm, &[reader], &state.middle, dx);
        self.b.experts = own;
    }

    /// The same for the MLP beside experts.
    fn beside(
        &mut self,
        (mlp, places): (&Mlp, &MlpParams),
        state: &mut LayerState,
        dx: &mut [f32],
    ) {
        let (layer, p) = self.layer();
        let dy = std::mem::take(&mut self.b.experts.dy);
        let mut d_given = std::mem::take(&mut self.b.d_given);
        let (kind, norm) = (
            self.model.decoder.config.norm(),
            norm_at(&layer.norms.after_one, &p.norms.after_one),
        );
        let d_mlp = self.given(norm, kind, &state.given_beside, &dy, &mut d_given);
        self.mlp_inner((mlp, places), &mut state.beside_gate_up, d_mlp);
        self.b.d_given = d_given;
        self.b.experts.dy = dy;
        let norm = norm_at(&layer.norms.before_mlp, &p.norms.before_mlp);
        let reader = (&mlp.gate_up, &places.gate_up, &state.beside_gate_up[..]);
        self.read(norm, &[reader], &state.middle, dx);
    }
}

/// The rows of these tokens.
fn gather(x: &[f32], tokens: &[usize], width: usize, out: &mut Vec<f32>) {
    fit(out, tokens.len() * width);
    rows(out, width, |first, part| {
        for (row, &token) in part.chunks_exact_mut(width).zip(&tokens[first..]) {
            row.copy_from_slice(&x[token * width..][..width]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::Shared;

    fn routed(logits: &[f32], how: Experts, selection: Option<&[f32]>) -> Routes {
        let mut routes = Routes {
            scores: logits.to_vec(),
            ..Routes::default()
        };
        routes.choose(how, selection, how.apart.then_some(&FACTORS));
        routes
    }

    /// Of experts that are apart.
    const FACTORS: [f32; 5] = [0.5, 1.25, 0.0, -0.75, 2.0];

    const HOW: Experts = Experts {
        count: 4,
        used: 2,
        ffn: 8,
        logit_scale: 1.0,
        scores: Scores::Softmax,
        biased: false,
        normed: None,
        plus: 0.0,
        scale: 1.0,
        shared: None,
        apart: false,
        biases: false,
    };

    #[test]
    fn tokens_go_to_the_best_and_experts_have_their_rows_together() {
        let logits = [
            0.0, 2.0, 1.0, 2.0, /**/ 3.0, 1.0, 1.0, -1.0, /**/ -5.0, 0.0, 4.0, 1.0,
        ];
        let routes = routed(&logits, HOW, None);
        // Of equals the first.
        assert_eq!(routes.chosen, [1, 3, 0, 1, 2, 3]);
        assert_eq!(routes.starts, [0, 1, 3, 4, 6]);
        assert_eq!(routes.tokens, [1, 0, 1, 2, 0, 2]);
        assert_eq!(routes.places, [1, 4, 0, 2, 3, 5]);
        let sum: f64 = logits[..4].iter().map(|&x| f64::from(x).exp()).sum();
        let share = 2.0f64.exp() / sum;
        assert!((f64::from(routes.weights[1]) - share).abs() < 1e-6);
        let normed = Experts {
            normed: Some(0.0),
            scale: 3.0,
            ..HOW
        };
        let normed = routed(&logits, normed, None);
        assert_eq!(normed.weights[1], 1.5);
        assert_eq!(normed.chosen, routes.chosen);
        let apart = Experts {
            normed: Some(0.0),
            logit_scale: 0.5,
            apart: true,
            ..HOW
        };
        let apart = routed(&logits, apart, None);
        assert_eq!(apart.weights[1], 0.5 * FACTORS[1]);
        // The last token goes to the experts 2 and 3 by logits of 4 and 1.
        let share = 1.0 - sigmoid(0.5 * (4.0 - 1.0));
        assert!((apart.weights[5] - share * FACTORS[3]).abs() < 1e-6);
        assert_eq!(apart.chosen, routes.chosen);
    }

    #[test]
    fn some_are_chosen_by_more_than_what_they_are_worth() {
        let how = Experts {
            scores: Scores::Sigmoid,
            biased: true,
            ..HOW
        };
        let routes = routed(&[0.0, 1.0, 2.0, -1.0], how, Some(&[0.0, -0.5, 0.0, 0.5]));
        assert_eq!(routes.chosen, [2, 3]);
        assert_eq!(routes.weights, [2.0, -1.0].map(sigmoid));
    }

    #[test]
    fn all_tokens_go_to_the_last_that_counts_by_its_gate() {
        let how = |gated| Experts {
            shared: Some(Shared { ffn: 8, gated }),
            used: 1,
            count: 2,
            ..HOW
        };
        let gated = routed(&[1.0, 0.0, 0.5, /**/ 0.0, 1.0, -0.5], how(true), None);
        assert_eq!(gated.starts, [0, 1, 2, 4]);
        assert_eq!(gated.tokens, [0, 1, 0, 1]);
        assert_eq!(gated.places, [0, 2, 1, 3]);
        assert_eq!(gated.weights[2..], [0.5, -0.5].map(sigmoid));
        let plain = routed(&[1.0, 0.0, /**/ 0.0, 1.0], how(false), None);
        assert_eq!(plain.weights[2..], [1.0; 2]);
        assert_eq!(plain.weights[..2], gated.weights[..2]);
    }

    #[test]
    fn the_gradient_of_the_routers_logits_is_that_of_differences() {
        use crate::kernels::testing::{finite_difference, noise};
        let shared = Some(Shared {
            ffn: 8,
            gated: true,
        });
        for (normed, used, scale, shared, apart) in [
            (None, 2, 1.0, None, false),
            (Some(0.0), 2, 1.0, None, false),
            (None, 5, 2.5, shared, false),
            (Some(0.0), 1, 1.5, None, false),
            (Some(100.0), 3, 1.5, None, false), // no sum is as large
            (Some(0.0), 3, 2.5, shared, false),
            (Some(0.0), 4, 2.5, None, true),
            (None, 4, 1.0, shared, true),
        ] {
            for scores in [Scores::Softmax, Scores::Sigmoid] {
                let how = Experts {
                    count: 5,
                    used,
                    normed,
                    scores,
                    scale,
                    shared,
                    logit_scale: if apart { 0.5 } else { 1.0 },
                    apart,
                    ..HOW
                };
                let all = 3 * how.outputs();
                let logits: Vec<f32> = noise(all, 3).iter().map(|x| 3.0 * x).collect();
                let slopes = noise(3 * 6, 4); // of each token's weight at each expert
                let weights = |routes: &Routes| -> Vec<(usize, f32)> {
                    let expert = |row| routes.starts.partition_point(|&start| start <= row) - 1;
                    (routes.weights.iter().enumerate())
                        .map(|(row, &weight)| (routes.tokens[row] * 6 + expert(row), weight))
                        .collect()
                };
                let loss = |logits: &[f32]| {
                    let routes = routed(logits, how, None);
                    let terms = weights(&routes).into_iter();
                    terms
                        .map(|(i, weight)| f64::from(slopes[i]) * f64::from(weight))
                        .sum()
                };
                let routes = routed(&logits, how, None);
                let d_weights: Vec<f32> =
                    weights(&routes).iter().map(|&(i, _)| slopes[i]).collect();
                let mut gradient = vec![];
                routes.d_logits(how, &d_weights, &mut gradient);
                finite_difference(&logits, &gradient, loss);
                if apart {
                    let mut gradient = vec![0.0; 5];
                    routes.d_factors(how, &d_weights, &mut gradient);
                    finite_difference(&FACTORS, &gradient, |factors| {
                        let mut routes = Routes {
                            scores: logits.clone(),
                            ..Routes::default()
                        };
                        routes.choose(how, None, Some(factors));
                        let terms = weights(&routes).into_iter();
                        terms
                            .map(|(i, weight)| f64::from(slopes[i]) * f64::from(weight))
                            .sum()
                    });
                }
            }
        }
    }
}
