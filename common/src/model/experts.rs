//! Mixtures of experts: a router's soft-max says what each expert is worth to a token, and what the token's MLP gives is
//! the weighted sum of what the best few give. Each expert's tokens are one product.

use super::backward::{Pass, linear, norm_at, normed};
use super::decoder::{Layer, LayerState};
use crate::kernels::gemm::Write;
use crate::kernels::{activation, fit, rows, softmax};
use crate::weights::{Config, Experts};
use std::cell::Cell;
use std::ops::Range;

/// Which tokens went to which experts. A row is a token at one of them; an expert's rows lie together.
#[derive(Default)]
pub struct Routes {
    /// The router's soft-max, `[T, experts]`.
    shares: Vec<f32>,
    /// The experts of each token, the best first, `[T, used]`,
    chosen: Vec<usize>,
    /// and its rows at them.
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
    /// `y` `[T, hidden]` is set to, or gains, the mixture of rows that `read(r, row)` writes. `gate_up` `[rows, 2·ffn]` is what
    /// the experts make on their way.
    pub(super) fn forward(
        &mut self,
        layer: &Layer,
        (c, how): (&Config, Experts),
        read: impl Fn(usize, &mut [f32]) + Sync,
        gate_up: &mut Vec<f32>,
        y: &mut [f32],
        write: Write,
    ) {
        let router = layer.router.as_ref().expect("experts have a router");
        fit(&mut self.shares, y.len() / c.hidden * how.count);
        router.forward_made(&read, &mut self.shares, Write::Set);
        self.choose(how);
        fit(gate_up, self.tokens.len() * 2 * c.ffn);
        let mut all = GIVEN.take();
        fit(&mut all, self.tokens.len() * c.hidden);
        for (expert, mlp) in layer.mlps.iter().enumerate() {
            let of = self.of(expert);
            let tokens = &self.tokens[of.clone()];
            let read = |r: usize, row: &mut [f32]| read(tokens[r], row);
            let gate_up = &mut gate_up[of.start * 2 * c.ffn..of.end * 2 * c.ffn];
            let given = &mut all[of.start * c.hidden..of.end * c.hidden];
            let weights = Some(&self.weights[of]);
            mlp.forward(c, read, weights, gate_up, given, Write::Set);
        }
        rows(y, c.hidden, |first, y| {
            let places = self.places[first * how.used..].chunks_exact(how.used);
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

    /// Goes by the router's logits in `shares`, which become their soft-max. Of equals the first is the better.
    fn choose(&mut self, how: Experts) {
        let tokens = self.shares.len() / how.count;
        self.chosen.clear();
        for shares in self.shares.chunks_exact_mut(how.count) {
            let most = softmax::max(shares);
            let sum = softmax::exp_in_place(shares, most);
            shares.iter_mut().for_each(|x| *x /= sum);
            let begun = self.chosen.len();
            for expert in 0..how.count {
                let better = |other: &usize| shares[*other] >= shares[expert];
                let at = self.chosen[begun..].partition_point(better);
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
        self.places.clear();
        self.tokens.resize(tokens * how.used, 0);
        self.weights.resize(tokens * how.used, 0.0);
        let shares = self.shares.chunks_exact(how.count);
        for (token, (chosen, shares)) in self.chosen.chunks_exact(how.used).zip(shares).enumerate()
        {
            let sum = match how.normed {
                true => chosen.iter().map(|&expert| shares[expert]).sum(),
                false => 1.0,
            };
            for &expert in chosen {
                let row = next[expert];
                next[expert] += 1;
                self.places.push(row);
                self.tokens[row] = token;
                self.weights[row] = shares[expert] / sum;
            }
        }
    }

    /// The gradient of the router's logits, `[T, experts]`, given that of each row's weight.
    fn d_logits(&self, how: Experts, d_weights: &[f32], out: &mut Vec<f32>) {
        fit(out, self.shares.len());
        let of_tokens =
            (self.chosen.chunks_exact(how.used)).zip(self.places.chunks_exact(how.used));
        let out = out.chunks_exact_mut(how.count);
        let shares = self.shares.chunks_exact(how.count);
        for ((out, shares), (chosen, places)) in out.zip(shares).zip(of_tokens) {
            let mean: f32 = places
                .iter()
                .map(|&row| self.weights[row] * d_weights[row])
                .sum();
            // Where weights are normed, they are a soft-max of the chosen alone.
            match how.normed {
                true => out.fill(0.0),
                false => out
                    .iter_mut()
                    .zip(shares)
                    .for_each(|(out, share)| *out = -share * mean),
            }
            for (&expert, &row) in chosen.iter().zip(places) {
                out[expert] = self.weights[row] * (d_weights[row] - mean);
            }
        }
    }
}

/// What the backward pass of a mixture uses, kept from layer to layer.
#[derive(Default)]
pub(super) struct Buffers {
    /// The gradient of what the mixture gave, `[T, hidden]`.
    pub dy: Vec<f32>,
    /// What router and experts read, and its gradient, `[T, hidden]`.
    read: Vec<f32>,
    d_read: Vec<f32>,
    /// The same of one expert's rows.
    rows: Vec<f32>,
    d_rows: Vec<f32>,
    d_weights: Vec<f32>,
    d_logits: Vec<f32>,
}

impl Pass<'_, '_> {
    /// Carries the gradient of what the mixture gave, which is in [`Buffers::dy`], back: `dx` gains that of `state.middle`.
    /// The state's `gate_up` becomes its gradient.
    pub(super) fn experts(&mut self, how: Experts, state: &mut LayerState, dx: &mut [f32]) {
        let (layer, p) = self.layer();
        let c = &self.model.decoder.config;
        let mut own = std::mem::take(&mut self.b.experts);
        let (routes, width) = (&state.routes, 2 * c.ffn);
        let norm = norm_at(&layer.norms.before_mlp, &p.norms.before_mlp);
        let read = normed(norm, &state.middle, c.norm_eps, &mut own.read);
        fit(&mut own.d_read, dx.len());
        own.d_read.fill(0.0);
        fit(&mut own.d_weights, routes.tokens.len());
        for (expert, (mlp, places)) in layer.mlps.iter().zip(&p.mlps).enumerate() {
            let of = routes.of(expert);
            let (tokens, weights) = (&routes.tokens[of.clone()], &routes.weights[of.clone()]);
            let gate_up = &mut state.gate_up[of.start * width..of.end * width];
            let b = &mut *self.b;
            gather(&own.dy, tokens, c.hidden, &mut own.d_rows);
            self.model.decoder.mlp_inner(gate_up, &mut b.inner);
            if !tokens.is_empty() {
                linear(&mlp.down, &own.d_rows, &mut b.d_inner, &mut b.right);
            }
            // What the row counts was left out so far: its own gradient is what it multiplies.
            let inner = b
                .inner
                .chunks_exact(c.ffn)
                .zip(b.d_inner.chunks_exact_mut(c.ffn));
            let d_rows = own.d_rows.chunks_exact_mut(c.hidden);
            let given = own.d_weights[of].iter_mut().zip(weights);
            for (((inner, d_inner), d_row), (d_weight, weight)) in inner.zip(d_rows).zip(given) {
                *d_weight = softmax::dot(inner, d_inner);
                d_inner.iter_mut().for_each(|x| *x *= weight);
                d_row.iter_mut().for_each(|x| *x *= weight);
            }
            self.gradients
                .linear(&places.down, &b.inner, &own.d_rows, &mut b.right);
            activation::backward(c.activation, gate_up, c.ffn, &b.d_inner);
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
        routes.d_logits(how, &own.d_weights, &mut own.d_logits);
        let (router, place) = layer
            .router
            .as_ref()
            .zip(p.router.as_ref())
            .expect("experts have a router");
        let right = &mut self.b.right;
        self.gradients.linear(place, read, &own.d_logits, right);
        linear(router, &own.d_logits, &mut own.d_rows, right);
        own.d_read
            .iter_mut()
            .zip(&own.d_rows)
            .for_each(|(d, x)| *d += x);
        self.through(norm, &state.middle, &own.d_read, dx);
        self.b.experts = own;
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

    fn routed(logits: &[f32], how: Experts) -> Routes {
        let mut routes = Routes {
            shares: logits.to_vec(),
            ..Routes::default()
        };
        routes.choose(how);
        routes
    }

    #[test]
    fn tokens_go_to_the_best_and_experts_have_their_rows_together() {
        let how = Experts {
            count: 4,
            used: 2,
            normed: false,
        };
        let logits = [
            0.0, 2.0, 1.0, 2.0, /**/ 3.0, 1.0, 1.0, -1.0, /**/ -5.0, 0.0, 4.0, 1.0,
        ];
        let routes = routed(&logits, how);
        // Of equals the first.
        assert_eq!(routes.chosen, [1, 3, 0, 1, 2, 3]);
        assert_eq!(routes.starts, [0, 1, 3, 4, 6]);
        assert_eq!(routes.tokens, [1, 0, 1, 2, 0, 2]);
        assert_eq!(routes.places, [1, 4, 0, 2, 3, 5]);
        let sum: f64 = logits[..4].iter().map(|&x| f64::from(x).exp()).sum();
        let share = 2.0f64.exp() / sum;
        assert!((f64::from(routes.weights[1]) - share).abs() < 1e-6);
        let normed = routed(
            &logits,
            Experts {
                normed: true,
                ..how
            },
        );
        assert_eq!(normed.weights[1], 0.5);
        assert_eq!(normed.chosen, routes.chosen);
    }

    #[test]
    fn the_gradient_of_the_routers_logits_is_that_of_differences() {
        use crate::kernels::testing::{finite_difference, noise};
        for (normed, used) in [(false, 2), (true, 2), (false, 5), (true, 1)] {
            let how = Experts {
                count: 5,
                used,
                normed,
            };
            let logits: Vec<f32> = noise(15, 3).iter().map(|x| 3.0 * x).collect();
            let slopes = noise(15, 4); // of each token's weight at each expert
            let weights = |routes: &Routes| -> Vec<(usize, f32)> {
                let expert = |row| routes.starts.partition_point(|&start| start <= row) - 1;
                (routes.weights.iter().enumerate())
                    .map(|(row, &weight)| (routes.tokens[row] * 5 + expert(row), weight))
                    .collect()
            };
            let loss = |logits: &[f32]| {
                let routes = routed(logits, how);
                let terms = weights(&routes).into_iter();
                terms
                    .map(|(i, weight)| f64::from(slopes[i]) * f64::from(weight))
                    .sum()
            };
            let routes = routed(&logits, how);
            let d_weights: Vec<f32> = weights(&routes).iter().map(|&(i, _)| slopes[i]).collect();
            let mut gradient = vec![];
            routes.d_logits(how, &d_weights, &mut gradient);
            finite_difference(&logits, &gradient, loss);
        }
    }
}
