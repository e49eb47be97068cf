//! Mixtures of experts: who goes where, products of many experts' rows at once, and the way back.

use crate::device::{
    Arg, Element, Null, assert_close, for_both, in_every_order, launch, noise, unwritten, wide,
};
use common::kernels::activation::Activation;
use half::f16;

const TILE: usize = 128;
const SHARED: usize = 4 * 2 * TILE * 80;

/// How experts are chosen.
#[derive(Clone, Copy)]
#[repr(C)]
struct Routing {
    logits: f32,
    experts: i32,
    used: i32,
    outputs: i32,
    each: i32,
    sigmoid: i32,
    normed: i32,
    least: f32,
    plus: f32,
    scale: f32,
}

impl From<Routing> for Arg {
    fn from(how: Routing) -> Self {
        Self::value(how)
    }
}

impl Routing {
    fn new(experts: usize, used: usize) -> Self {
        Self {
            logits: 1.0,
            experts: experts as i32,
            used: used as i32,
            outputs: experts as i32,
            each: used as i32,
            sigmoid: 0,
            normed: 0,
            least: 0.0,
            plus: 0.0,
            scale: 1.0,
        }
    }

    fn normed(self) -> Self {
        Self { normed: 1, ..self }
    }

    /// With an expert that all tokens go to.
    fn shared(self, gated: bool) -> Self {
        Self {
            outputs: self.experts + i32::from(gated),
            each: self.used + 1,
            ..self
        }
    }

    /// As GLM-4.5 has it.
    fn sigmoid(self) -> Self {
        Self {
            sigmoid: 1,
            scale: 2.5,
            ..self
        }
    }

    /// As Gemma 4 has it.
    fn scaled(self) -> Self {
        Self {
            logits: 0.25,
            ..self
        }
    }

    /// Scores of a token, and its gate.
    fn scores(self, logits: &[f64]) -> Vec<f64> {
        let (logits, gate) = logits.split_at(self.experts as usize);
        let logits = logits.iter().map(|x| x * f64::from(self.logits));
        let logits: Vec<f64> = logits.collect();
        let sigmoid = |x: &f64| 1.0 / (1.0 + (-x).exp());
        let sum: f64 = logits.iter().map(|x| x.exp()).sum();
        let scores = logits.iter().map(|x| match self.sigmoid {
            0 => x.exp() / sum,
            _ => sigmoid(x),
        });
        scores.chain(gate.iter().map(sigmoid)).collect()
    }

    /// What the experts that a token goes to count, that for all of them last.
    fn counts(self, scores: &[f64], chosen: &[i32], factors: Option<&Vec<f32>>) -> Vec<f64> {
        let worth = |&expert: &i32| scores[expert as usize];
        let sum: f64 = chosen.iter().map(worth).sum();
        let over = match self.normed {
            0 => 1.0,
            _ => (sum + f64::from(self.plus)).max(self.least.into()),
        };
        let factor = |&e: &i32| factors.map_or(1.0, |factors| f64::from(factors[e as usize]));
        let counts = chosen
            .iter()
            .map(|e| worth(e) / over * f64::from(self.scale) * factor(e));
        let gate = scores.get(self.experts as usize).copied().unwrap_or(1.0);
        let shared = (self.used..self.each).map(|_| gate);
        counts.chain(shared).collect()
    }
}

/// What `route`, `count_rows` and `place_rows` find.
#[derive(Clone, Debug, PartialEq)]
struct Routes {
    scores: Vec<f32>,
    chosen: Vec<i32>,
    starts: Vec<i32>,
    places: Vec<i32>,
    tokens: Vec<i32>,
    worth: Vec<f32>,
    weights: Vec<f32>,
    tiles: Vec<[i32; 3]>,
}

impl Routes {
    fn new(
        logits: &[f32],
        how: Routing,
        selection: Option<&Vec<f32>>,
        factors: Option<&Vec<f32>>,
    ) -> Self {
        let count = logits.len() / how.outputs as usize;
        let (experts, rows) = (how.experts as usize, count * how.used as usize);
        let all = count * how.each as usize;
        in_every_order(|| {
            let mut found = Self {
                scores: logits.to_vec(),
                chosen: vec![-1; rows],
                starts: vec![-1; experts + 1],
                places: vec![-1; all],
                tokens: vec![-1; rows],
                worth: unwritten(rows),
                weights: unwritten(all),
                tiles: vec![[-1; 3]; rows / TILE + experts.min(rows)],
            };
            let mut counts = vec![-1i32; experts];
            launch!("route", [count.div_ceil(8), 1, 1], 256, 0; &mut found.scores, selection, &mut found.chosen,
                &mut found.worth, &mut found.places, &mut found.weights, count as i32, how);
            launch!("count_rows", [experts, 1, 1], 256, 0; &found.chosen, &mut counts, rows as i32);
            let tiles = found.tiles.len();
            launch!("place_rows", [experts, 1, 1], 256, 0; &found.chosen, &found.worth, factors, &counts, &mut found.starts,
                &mut found.places, &mut found.tokens, &mut found.weights, &mut found.tiles, rows as i32, how.used,
                how.each, tiles as i32);
            found
        })
    }

    /// The rows of an expert.
    fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }
}

/// Logits whose experts are wanted unevenly, one by nobody.
fn logits(count: usize, how: Routing) -> Vec<f32> {
    let mut logits: Vec<f32> = noise(count * how.outputs as usize, 5);
    for row in logits.chunks_exact_mut(how.outputs as usize) {
        row[0] += 1.5;
        row[how.experts as usize - 1] = -20.0;
    }
    logits
}

#[test]
fn tokens_go_to_the_best_and_experts_have_their_rows_together() {
    for (count, how, selects, multiplied) in [
        (1, Routing::new(2, 1), false, false),
        (9, Routing::new(8, 2).normed(), false, false),
        (300, Routing::new(40, 8), false, false),
        (33, Routing::new(512, 5).normed(), false, false),
        (33, Routing::new(60, 4).shared(true), false, false),
        (9, Routing::new(64, 6).shared(false).normed(), true, false),
        (300, Routing::new(128, 8).sigmoid().normed(), true, false),
        (17, Routing::new(5, 5).sigmoid().shared(true), true, false),
        (300, Routing::new(128, 8).normed().scaled(), false, true),
        (9, Routing::new(7, 3).shared(true).scaled(), false, true),
    ] {
        let logits = logits(count, how);
        let experts = how.experts as usize;
        let (used, each) = (how.used as usize, how.each as usize);
        let selection: Vec<f32> = noise(experts, 7);
        let selection = selects.then_some(&selection);
        let factors: Vec<f32> = noise(experts, 9);
        let factors = multiplied.then_some(&factors);
        let found = Routes::new(&logits, how, selection, factors);
        let (mut all_scores, mut weights) = (vec![], vec![f64::NAN; count * each]);
        for (token, logits) in logits.chunks_exact(how.outputs as usize).enumerate() {
            let scores = how.scores(&wide(logits));
            let rank = |e: usize| scores[e] + selection.map_or(0.0, |s| f64::from(s[e]));
            let mut order: Vec<usize> = (0..experts).collect();
            order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
            let best: Vec<i32> = order[..used].iter().map(|&e| e as i32).collect();
            assert_eq!(found.chosen[token * used..][..used], best);
            let places = &found.places[token * each..][..each];
            for (&row, weight) in places.iter().zip(how.counts(&scores, &best, factors)) {
                weights[row as usize] = weight;
            }
            for (&row, &expert) in places.iter().zip(&best) {
                assert!(found.of(expert as usize).contains(&(row as usize)));
                assert_eq!(found.tokens[row as usize], token as i32);
            }
            for &row in &places[used..] {
                assert_eq!(row as usize, count * used + token);
            }
            all_scores.extend(scores);
        }
        assert_close("scores", &found.scores, &all_scores, 20.0);
        assert_close("weights", &found.weights, &weights, 20.0);
        assert_eq!(
            (found.starts[0], found.starts[experts]),
            (0, (count * used) as i32)
        );
        let mut tiles = found.tiles.iter();
        for expert in 0..experts {
            let rows = found.of(expert);
            assert!(
                found.tokens[rows.clone()].is_sorted_by(|a, b| a < b),
                "in the order of tokens"
            );
            for first in rows.clone().step_by(TILE) {
                let left = (rows.end - first).min(TILE) as i32;
                assert_eq!(tiles.next(), Some(&[expert as i32, first as i32, left]));
            }
        }
        assert!(tiles.all(|tile| *tile == [0; 3]), "no rows are left");
    }
}

#[test]
fn of_equals_the_first_is_chosen_and_numbers_that_are_none_choose_somebody() {
    let how = Routing::new(6, 4);
    let found = Routes::new(&[1.0, 2.0, 2.0, 1.0, 2.0, 0.0], how, None, None);
    assert_eq!(found.chosen, [1, 2, 4, 0]);
    // (They are not equal to themselves: one order of threads will do.)
    let (mut scores, mut chosen) = (vec![f32::NAN; 6], vec![-1i32; 4]);
    let (mut worth, mut places, mut weights) = (vec![0f32; 4], vec![0i32; 4], vec![0f32; 4]);
    launch!("route", [1, 1, 1], 256, 0; &mut scores, Null, &mut chosen, &mut worth, &mut places, &mut weights, 1i32,
        how.normed());
    assert_eq!(chosen, [0, 1, 2, 3]);
}

/// The product of two matrices' rows, in float64.
fn dot(a: &[f64], b: impl Iterator<Item = f64>) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Rows of experts beside the tiles' sizes, one without any.
fn uneven() -> Routes {
    let starts = [0, 129, 129, 130, 400, 416];
    let rows = 416;
    let mut tiles = vec![];
    for (expert, ends) in starts.windows(2).enumerate() {
        for first in (ends[0]..ends[1]).step_by(TILE) {
            tiles.push([expert as i32, first, (ends[1] - first).min(TILE as i32)]);
        }
    }
    tiles.push([0; 3]);
    Routes {
        scores: vec![],
        chosen: vec![],
        starts: starts.to_vec(),
        places: vec![],
        tokens: (0..rows).map(|row| row * 7 % 50).collect(),
        worth: vec![],
        weights: vec![],
        tiles,
    }
}

fn products_of<T: Element>(kinds: &[&str]) {
    let routes = uneven();
    let (experts, rows) = (routes.starts.len() - 1, routes.tokens.len());
    for (n, k) in [(8, 8), (136, 40), (256, 176)] {
        let stride = n * k + 64; // other weights lie between
        let weights: Vec<T> = noise(experts * stride, 1);
        for (kind, gathered) in kinds.iter().flat_map(|&kind| [(kind, true), (kind, false)]) {
            let x: Vec<T> = noise(if gathered { 50 } else { rows } * k, 2);
            let tokens = gathered.then_some(&routes.tokens);
            let biases = (kind == "rows" && gathered).then(|| noise::<f32>(experts * n, 3));
            let y = in_every_order(|| {
                let mut y: Vec<T> = unwritten(rows * n);
                launch!(format!("expert_{kind}_{}", T::NAME), [n.div_ceil(TILE), routes.tiles.len(), 1], 256, SHARED;
                    &x, tokens, &weights, stride as i64, &routes.tiles, biases.as_ref(), 0.5f32, &mut y, n as i32, k as i32);
                y
            });
            let (x, weights) = (wide(&x), wide(&weights));
            let mut exact = vec![];
            for expert in 0..experts {
                let w = &weights[expert * stride..][..n * k];
                for row in routes.of(expert) {
                    let from = tokens.map_or(row, |tokens| tokens[row] as usize);
                    let x = &x[from * k..][..k];
                    let bias = |j: usize| match &biases {
                        Some(biases) => 0.5 * f64::from(biases[expert * n + j]),
                        None => 0.0,
                    };
                    exact.extend((0..n).map(|j| match kind {
                        "rows" => dot(x, w[j * k..][..k].iter().copied()) + bias(j),
                        _ => dot(x, (0..k).map(|i| w[i * n + j])),
                    }));
                }
            }
            assert_close(
                kind,
                &y,
                &exact,
                if size_of::<T>() == 2 { 1.0 } else { 60.0 },
            );
        }
    }
}

fn products<T: Element>() {
    products_of::<T>(&["rows", "columns"]);
}

#[test]
fn products_in_half_precision() {
    products_of::<f16>(&["rows"]);
}

/// What a row becomes does not depend on where it lies, nor on how many there are.
#[test]
fn a_row_is_the_same_wherever_it_lies() {
    let (n, k) = (136, 72);
    let weights: Vec<half::bf16> = noise(n * k, 1);
    let x: Vec<half::bf16> = noise(200 * k, 2);
    let product = |tokens: Vec<i32>| {
        let rows = tokens.len() as i32;
        let mut y: Vec<half::bf16> = unwritten(tokens.len() * n);
        let tiles: Vec<[i32; 3]> = (0..rows)
            .step_by(TILE)
            .map(|first| [0, first, (rows - first).min(TILE as i32)])
            .collect();
        launch!("expert_rows_bf16", [n.div_ceil(TILE), tiles.len(), 1], 256, SHARED;
            &x, &tokens, &weights, 0i64, &tiles, Null, 0f32, &mut y, n as i32, k as i32);
        y
    };
    let all = product((0..200).collect());
    for (row, expected) in all.chunks_exact(n).enumerate().step_by(13) {
        assert_eq!(product(vec![row as i32]), expected, "row {row}");
    }
}

fn gradients<T: Element>() {
    let routes = uneven();
    let (experts, rows) = (routes.starts.len() - 1, routes.tokens.len());
    for (m, n) in [(8, 136), (176, 40)] {
        let stride = m * n + 64;
        for gathered in [true, false] {
            // One side is of tokens, the other of rows.
            let other = |turn: bool| if gathered == turn { 50 } else { rows };
            let (dy, x): (Vec<T>, Vec<T>) = (noise(other(true) * m, 1), noise(other(false) * n, 2));
            let tokens = |turn: bool| (gathered == turn).then_some(&routes.tokens);
            let before: Vec<f32> = noise(experts * stride, 3);
            let found = in_every_order(|| {
                let mut gradients = before.clone();
                let grid = [n.div_ceil(TILE), m.div_ceil(TILE), experts];
                launch!(format!("expert_gradient_{}", T::NAME), grid, 256, SHARED; &dy, tokens(true), &x, tokens(false),
                    &routes.starts, &mut gradients, stride as i64, m as i32, n as i32);
                gradients
            });
            let (dy, x, mut exact) = (wide(&dy), wide(&x), wide(&before));
            for expert in 0..experts {
                for row in routes.of(expert) {
                    let from = |turn: bool| tokens(turn).map_or(row, |tokens| tokens[row] as usize);
                    for i in 0..m {
                        for j in 0..n {
                            exact[expert * stride + i * n + j] +=
                                dy[from(true) * m + i] * x[from(false) * n + j];
                        }
                    }
                }
            }
            assert_close("gradients", &found, &exact, 100.0);
        }
    }
}

fn biases<T: Element>() {
    let routes = uneven();
    let (experts, rows) = (routes.starts.len() - 1, routes.tokens.len());
    for width in [8, 300, 33] {
        let (dy, dy_of_rows): (Vec<T>, Vec<T>) = (noise(50 * width, 1), noise(rows * width, 2));
        let (weights, bias): (Vec<f32>, Vec<f32>) = (noise(rows, 3), noise(experts * width, 4));
        let (d_weights, d_bias): (Vec<f32>, Vec<f32>) = (noise(rows, 5), noise(experts * width, 6));
        let (found_weights, of_tokens, of_rows) = in_every_order(|| {
            let (mut d_weights, mut of_tokens, mut of_rows) =
                (d_weights.clone(), d_bias.clone(), d_bias.clone());
            launch!(format!("expert_bias_weights_{}", T::NAME), [routes.tiles.len(), 1, 1], 256, 0;
                &dy, &routes.tokens, &bias, &routes.tiles, &mut d_weights, width as i32);
            let (name, grid) = (
                format!("expert_bias_gradient_{}", T::NAME),
                [width.div_ceil(256), experts, 1],
            );
            launch!(name, grid, 256, 0; &dy, &routes.tokens, &weights, &routes.starts, &mut of_tokens, width as i32);
            launch!(name, grid, 256, 0; &dy_of_rows, Null, Null, &routes.starts, &mut of_rows, width as i32);
            (d_weights, of_tokens, of_rows)
        });
        let (dy, dy_of_rows, bias) = (wide(&dy), wide(&dy_of_rows), wide(&bias));
        let (mut exact_weights, mut tokens_exact, mut rows_exact) =
            (wide(&d_weights), wide(&d_bias), wide(&d_bias));
        for expert in 0..experts {
            for row in routes.of(expert) {
                let own = &dy[routes.tokens[row] as usize * width..][..width];
                let bias = &bias[expert * width..][..width];
                exact_weights[row] += dot(own, bias.iter().copied());
                for c in 0..width {
                    tokens_exact[expert * width + c] += f64::from(weights[row]) * own[c];
                    rows_exact[expert * width + c] += dy_of_rows[row * width + c];
                }
            }
        }
        assert_close("weights", &found_weights, &exact_weights, 60.0);
        assert_close("biases of tokens", &of_tokens, &tokens_exact, 60.0);
        assert_close("biases of rows", &of_rows, &rows_exact, 60.0);
    }
}

fn mixed<T: Element, O: Element>(weighted: bool) {
    for (count, used, width) in [(1, 1, 8), (7, 3, 300), (2, 8, 33)] {
        let rows = count * used;
        let places: Vec<i32> = (0..rows).map(|i| ((i * 5 + 3) % rows) as i32).collect();
        let (given, before): (Vec<T>, Vec<O>) = (noise(rows * width, 1), noise(count * width, 2));
        let weights: Vec<f32> = noise(rows, 3);
        for keep in [false, true] {
            let out = in_every_order(|| {
                let mut out = if keep {
                    before.clone()
                } else {
                    unwritten(count * width)
                };
                launch!(format!("mix_{}_{}", T::NAME, O::NAME), [count, 1, 1], 256, 0; &given, &places,
                    weighted.then_some(&weights), &mut out, width as i32, used as i32, 4.0f32, i32::from(keep));
                out
            });
            let (given, before) = (wide(&given), wide(&before));
            let exact: Vec<f64> = (0..count * width)
                .map(|i| {
                    let rows = &places[i / width * used..][..used];
                    let parts = rows.iter().map(|&row| {
                        let row = row as usize;
                        let weight = if weighted {
                            f64::from(weights[row])
                        } else {
                            1.0
                        };
                        4.0 * weight * given[row * width + i % width]
                    });
                    parts.sum::<f64>() + if keep { before[i] } else { 0.0 }
                })
                .collect();
            assert_close("mixed", &out, &exact, 5.0);
        }
    }
}

#[test]
fn what_experts_give_is_brought_together() {
    mixed::<f32, f32>(true);
    mixed::<half::bf16, f32>(true);
    mixed::<f16, f32>(true);
    mixed::<half::bf16, half::bf16>(false);
    mixed::<f32, f32>(false);
}

fn activations<T: Element>() {
    let (rows, ffn) = (3, 1032);
    let gate_up: Vec<T> = noise(rows * 2 * ffn, 1);
    let dy: Vec<T> = noise(rows * ffn, 2);
    let weights: Vec<f32> = noise(rows, 3);
    let (d_gate_up, inner, d_weights) = in_every_order(|| {
        let (mut d, mut inner, mut d_weights): (_, _, Vec<f32>) =
            (gate_up.clone(), dy.clone(), unwritten(rows));
        launch!(format!("expert_activation_backward_{}", T::NAME), [rows, 1, 1], 256, 0;
            &mut d, &mut inner, &weights, &mut d_weights, ffn as i32, Activation::Silu.curve());
        (d, inner, d_weights)
    });
    let (mut d_exact, mut inner_exact, mut sums) = (vec![0.0; 2 * rows * ffn], vec![], vec![]);
    for r in 0..rows {
        let mut sum = 0.0;
        for c in 0..ffn {
            let at = r * 2 * ffn + c;
            let (g, u) = (gate_up[at].to() as f64, gate_up[at + ffn].to() as f64);
            let (s, d) = (1.0 / (1.0 + (-g).exp()), dy[r * ffn + c].to() as f64);
            let weight = f64::from(weights[r]);
            d_exact[at] = weight * d * u * s * (1.0 + g * (1.0 - s));
            d_exact[at + ffn] = weight * d * g * s;
            inner_exact.push(weight * g * s * u);
            sum += d * g * s * u;
        }
        sums.push(sum);
    }
    assert_close("gate and up", &d_gate_up, &d_exact, 10.0);
    assert_close("inner", &inner, &inner_exact, 10.0);
    assert_close("weights", &d_weights, &sums, 100.0);
}

fn routers_gradients<T: Element>() {
    let (count, experts, used) = (9, 40, 5);
    let how = Routing::new(experts, used);
    let floored = Routing {
        least: 50.0, // more than any sum
        ..how.normed()
    };
    let added = Routing {
        plus: 0.5,
        ..how.normed().sigmoid()
    };
    let factors: Vec<f32> = noise(experts, 9);
    for (how, multiplied) in [
        (how, false),
        (how.normed(), false),
        (floored, false),
        (how.shared(true), false),
        (how.normed().shared(true).sigmoid(), false),
        (how.shared(false).sigmoid(), false),
        (floored.sigmoid(), false),
        (added, false),
        (how.normed().scaled(), true),
        (how.shared(true).scaled(), true),
    ] {
        let (outputs, each) = (how.outputs as usize, how.each as usize);
        let logits = logits(count, how);
        let factors = multiplied.then_some(&factors);
        let routes = Routes::new(&logits, how, None, factors);
        let d_weights: Vec<f32> = noise(count * each, 8);
        let found = in_every_order(|| {
            let mut d_logits: Vec<T> = unwritten(count * outputs);
            launch!(format!("route_backward_{}", T::NAME), [count.div_ceil(8), 1, 1], 256, 0; &routes.scores,
                &routes.chosen, &routes.places, &routes.weights, &d_weights, &mut d_logits, count as i32, how);
            d_logits
        });
        // Σ d_weights·weights by finite differences, the choice as it was.
        let mut exact = vec![];
        for token in 0..count {
            let loss = |logits: &[f64]| -> f64 {
                let chosen = &routes.chosen[token * used..][..used];
                let scores = how.scores(logits);
                let counts = how.counts(&scores, chosen, factors).into_iter();
                let rows = &routes.places[token * each..][..each];
                let d = rows.iter().map(|&row| f64::from(d_weights[row as usize]));
                counts.zip(d).map(|(count, d)| count * d).sum()
            };
            let own: Vec<f64> = wide(&logits[token * outputs..][..outputs]);
            for output in 0..outputs {
                let at = |step: f64| {
                    let mut moved = own.clone();
                    moved[output] += step;
                    loss(&moved)
                };
                exact.push((at(1e-4) - at(-1e-4)) / 2e-4);
            }
        }
        assert_close(
            "d_logits",
            &found,
            &exact,
            if size_of::<T>() == 2 { 1.0 } else { 100.0 },
        );
    }
}

#[test]
fn a_factors_gradient_is_of_its_experts_rows() {
    for (count, how) in [
        (300, Routing::new(40, 8).normed()),
        (9, Routing::new(7, 3).shared(false)),
    ] {
        let (experts, used, each) = (how.experts as usize, how.used as usize, how.each as usize);
        let routes = Routes::new(&logits(count, how), how, None, None);
        let (d_weights, before): (Vec<f32>, Vec<f32>) = (noise(count * each, 8), noise(experts, 3));
        let found = in_every_order(|| {
            let mut gradients = before.clone();
            launch!("factor_gradient", [experts, 1, 1], 256, 0; &routes.chosen, &routes.worth, &routes.places, &d_weights,
                &mut gradients, (count * used) as i32, how.used, how.each);
            gradients
        });
        let mut exact = wide(&before);
        for (i, &expert) in routes.chosen.iter().enumerate() {
            let row = routes.places[i / used * each + i % used] as usize;
            exact[expert as usize] += f64::from(routes.worth[i]) * f64::from(d_weights[row]);
        }
        assert_close("factors", &found, &exact, 100.0);
    }
}

for_both!(products, gradients, biases, activations, routers_gradients);
