//! The length-controlled win rate of AlpacaEval 2 (arXiv 2404.04475; alpaca_eval 0.6.6, metrics/glm_winrate.py):
//! what the win rate would be if the model's outputs were as long as the baseline's.
//!
//! One logistic regression per model, without intercept. A pair i is won with probability sigmoid(η_i),
//!
//! ```text
//! η_i = φ tanh(s_i) + θ d_i + ψ g_i,
//! ```
//!
//! s_i = (len_1 − len_2) / sd over the model's pairs; d_i the instruction's difficulty, a given constant; g_i = 1 for
//! the model's pairs and 0 for regularisation rows (the baseline, asked to be verbose or concise, against itself).
//! The weights minimise the weighted cross-entropy + (|φ| + |θ| + |ψ|) / C. The figure is the mean of
//! sigmoid(θ d_i + ψ): the length term is left out.
//!
//! The reference leaves the optimum to liblinear, at a tolerance that moves the figure by up to 0.02 points; here it
//! is exact.

use nalgebra::{Matrix3, Vector3};
use serde::{Deserialize, Serialize};

use super::spread;
use super::win_rate::Judged;

/// Inverse strengths of the L1 penalty that cross-validation chooses from: 10^(−4 + 8k/9), scikit-learn's grid.
pub fn c_grid() -> [f64; 10] {
    std::array::from_fn(|k| 10_f64.powf(-4.0 + 8.0 * k as f64 / 9.0))
}

/// Weight of a regularisation row; a pair of the model weighs 1 (λ/2 with λ = 0.2).
const REGULARISATION_WEIGHT: f64 = 0.1;

const FOLDS: usize = 5;

/// Which terms the regression has, under the reference's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Form {
    /// Length, difficulty, and the regularisation rows: the leaderboard's.
    #[serde(rename = "length_controlled")]
    Full,
    /// Length and difficulty.
    #[serde(rename = "length_controlled_noreg")]
    Unregularised,
    /// Length alone: for instructions whose difficulty nobody has measured.
    #[serde(rename = "length_controlled_minimal")]
    LengthOnly,
}

/// The fitted weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Weights {
    /// φ, of the difference in length.
    #[serde(alias = "np.tanh(std_delta_len)")]
    pub phi_length: f64,
    /// θ, of the instruction's difficulty.
    #[serde(alias = "instruction_difficulty")]
    pub theta_difficulty: f64,
    /// ψ, of the model.
    #[serde(alias = "not_gamed_baseline.astype(float)")]
    pub psi_model: f64,
}

impl Weights {
    /// Probability that the model beats the baseline on an instruction of difficulty `d`, lengths being equal.
    pub fn predict(&self, d: f64) -> f64 {
        sigmoid(self.theta_difficulty * d + self.psi_model)
    }

    /// The weights of this model against another of the same baseline: `predict` of the difference is the
    /// probability that this one wins.
    pub fn against(&self, other: &Self) -> Self {
        Self {
            phi_length: self.phi_length - other.phi_length,
            theta_difficulty: self.theta_difficulty - other.theta_difficulty,
            psi_model: self.psi_model - other.psi_model,
        }
    }
}

/// The length-controlled win rate and its standard error, percent. The error is the leaderboard's: the spread over
/// instructions alone, blind to the uncertainty of the weights and so far too small (0 in the length-only form).
pub fn controlled(
    weights: &Weights,
    difficulties: impl Iterator<Item = f64>,
) -> Option<(f64, f64)> {
    let predicted: Vec<f64> = difficulties.map(|d| weights.predict(d)).collect();
    let spread = spread(&predicted)?;
    let error = spread.standard_deviation / (spread.count as f64).sqrt();
    Some((100.0 * spread.mean, 100.0 * error))
}

/// Whether the controlled rate is so far from the raw one (both percent) that the reference warns of a failed fit:
/// beyond 10 points and a quarter of the way to 0 or 100.
pub fn is_extreme(raw: f64, controlled: f64) -> bool {
    controlled < (raw - raw / 4.0).min(raw - 10.0)
        || controlled > (raw + (100.0 - raw) / 4.0).max(raw + 10.0)
}

/// A pair of the baseline against itself, asked to write longer or shorter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regulariser {
    /// Difference in length (plain minus prompted) over its standard deviation.
    pub std_delta_len: f64,
    pub difficulty: f64,
    /// Probability that the prompted output wins.
    pub win: f64,
}

/// The regression, ready to be fitted to any model's pairs.
#[derive(Clone, Debug)]
pub struct LengthModel {
    form: Form,
    regularisers: Vec<Observation>,
}

/// A row of the regression.
#[derive(Clone, Copy, Debug)]
struct Observation {
    features: Vector3<f64>,
    target: f64,
    weight: f64,
}

impl LengthModel {
    /// The full form, or without regularisers the one that has none.
    pub fn new(regularisers: &[Regulariser]) -> Self {
        let form = match regularisers {
            [] => Form::Unregularised,
            _ => Form::Full,
        };
        let observation = |row: &Regulariser| Observation {
            features: Vector3::new(row.std_delta_len.tanh(), row.difficulty, 0.0),
            target: row.win,
            weight: REGULARISATION_WEIGHT,
        };
        Self {
            form,
            regularisers: regularisers.iter().map(observation).collect(),
        }
    }

    /// The form without difficulties.
    pub fn length_only() -> Self {
        Self {
            form: Form::LengthOnly,
            regularisers: vec![],
        }
    }

    pub fn form(&self) -> Form {
        self.form
    }

    /// Fits the weights at a given C.
    pub fn fit(&self, pairs: &[Judged], c: f64) -> Weights {
        self.fit_counted(pairs, &vec![1.0; pairs.len()], c, &Weights::default())
    }

    /// Fits the weights at the grid's greatest C, where the penalty hardly pulls.
    pub fn fit_freely(&self, pairs: &[Judged]) -> Weights {
        self.fit(pairs, c_grid()[9])
    }

    /// Fits the weights where pair i counts `counts[i]` times. `start` is where the search begins: near the result it
    /// is short.
    pub fn fit_counted(
        &self,
        pairs: &[Judged],
        counts: &[f64],
        c: f64,
        start: &Weights,
    ) -> Weights {
        minimise(&self.observations(pairs, counts), c, start)
    }

    /// C by cross-validation: five folds by position, regularisation rows first; the grid's first C with the least
    /// mean of the folds' mean weighted cross-entropies.
    pub fn choose_c(&self, pairs: &[Judged]) -> f64 {
        let rows = self.observations(pairs, &vec![1.0; pairs.len()]);
        let mut best = (f64::INFINITY, 1.0);
        for c in c_grid() {
            let loss = cross_validated(&rows, c);
            // A NaN (no rows) never is the best.
            if loss < best.0 {
                best = (loss, c);
            }
        }
        best.1
    }

    /// Regularisation rows, then the judged pairs. The lengths are scaled by all pairs, judged or not.
    fn observations(&self, pairs: &[Judged], counts: &[f64]) -> Vec<Observation> {
        let scale = deviation(pairs, counts);
        let difficulty = |pair: &Judged| match self.form {
            Form::LengthOnly => 0.0,
            _ => pair.difficulty,
        };
        let judged = pairs.iter().zip(counts).filter_map(|(pair, &count)| {
            let s = (pair.len_1 - pair.len_2) / scale;
            // Lengths that do not vary say nothing: no NaN from 0 / 0.
            let s = if scale > 0.0 { s.tanh() } else { 0.0 };
            (count > 0.0).then_some(Observation {
                features: Vector3::new(s, difficulty(pair), 1.0),
                target: pair.win?,
                weight: count,
            })
        });
        self.regularisers.iter().copied().chain(judged).collect()
    }
}

/// Standard deviation (n − 1) of len_1 − len_2.
fn deviation(pairs: &[Judged], counts: &[f64]) -> f64 {
    let n: f64 = counts.iter().sum();
    let over = |f: &dyn Fn(f64) -> f64| -> f64 {
        let deltas = pairs.iter().map(|pair| pair.len_1 - pair.len_2);
        deltas.zip(counts).map(|(d, count)| count * f(d)).sum()
    };
    let mean = over(&|d| d) / n;
    (over(&|d| (d - mean) * (d - mean)) / (n - 1.0)).sqrt()
}

fn cross_validated(rows: &[Observation], c: f64) -> f64 {
    let mut losses = vec![];
    // A fold's weights are a good start for the next one's.
    let mut start = Weights::default();
    for fold in 0..FOLDS {
        let part = |held: bool| -> Vec<Observation> {
            let indexed = rows.iter().enumerate();
            let wanted = indexed.filter(|(i, _)| (i % FOLDS == fold) == held);
            wanted.map(|(_, row)| *row).collect()
        };
        let held = part(true);
        if held.is_empty() {
            continue;
        }
        start = minimise(&part(false), c, &start);
        let weights = vector(&start);
        let sum: f64 = held
            .iter()
            .map(|row| row.weight * loss(row, &weights))
            .sum();
        losses.push(sum / held.len() as f64);
    }
    losses.iter().sum::<f64>() / losses.len() as f64
}

fn vector(weights: &Weights) -> Vector3<f64> {
    Vector3::new(
        weights.phi_length,
        weights.theta_difficulty,
        weights.psi_model,
    )
}

/// Minimises Σ weight · cross-entropy + ‖w‖₁ / C: Newton's method, each step the exact minimum of the quadratic model
/// with the penalty (a proximal Newton method), damped where that does not descend (Levenberg and Marquardt). The problem
/// is convex and the penalty bounds the weights, so there is one minimum.
fn minimise(rows: &[Observation], c: f64, start: &Weights) -> Weights {
    let penalty = 1.0 / c;
    let enough = 1e-10 * rows.iter().map(|row| row.weight).sum::<f64>().max(1.0);
    let mut at = vector(start);
    let mut value = objective(rows, &at, penalty);
    let mut damping = 0.0;
    // Five or six steps are usual; more where every pair is won or the start is far away.
    for _ in 0..500 {
        let (gradient, hessian) = derivatives(rows, &at);
        if imbalance(&gradient, &at, penalty) <= enough {
            break;
        }
        let damped = hessian + Matrix3::identity() * damping;
        let next = penalised_minimum(&gradient, &damped, &at, penalty);
        let step = next - at;
        let promised = gradient.dot(&step)
            + 0.5 * step.dot(&(damped * step))
            + penalty * (next.lp_norm(1) - at.lp_norm(1));
        let next_value = objective(rows, &next, penalty);
        let rounding = 4.0 * f64::EPSILON * value.abs();
        if promised < 0.0 && next_value <= value + 1e-4 * promised + rounding {
            (at, value) = (next, next_value);
            damping = if damping < 1e-12 { 0.0 } else { damping / 10.0 };
        } else if damping > 1e12 {
            // No step is short enough to descend: only rounding stands between here and the minimum.
            break;
        } else {
            damping = (damping * 10.0).max(1e-6 * hessian.trace()).max(1e-9);
        }
    }
    weights(&at)
}

/// How far the weights are from the minimum's condition: at it, the penalty's slope balances the gradient, or at a weight
/// of 0 outweighs it.
fn imbalance(gradient: &Vector3<f64>, at: &Vector3<f64>, penalty: f64) -> f64 {
    let of = |i: usize| match at[i] {
        0.0 => (gradient[i].abs() - penalty).max(0.0),
        weight => (gradient[i] + weight.signum() * penalty).abs(),
    };
    of(0).max(of(1)).max(of(2))
}

fn weights(vector: &Vector3<f64>) -> Weights {
    Weights {
        phi_length: vector[0],
        theta_difficulty: vector[1],
        psi_model: vector[2],
    }
}

/// Minimum over z of gᵀ(z − w) + ½ (z − w)ᵀH(z − w) + λ‖z‖₁, exactly: for every choice of signs the minimum solves a
/// linear system, and the least of those that have the signs they were solved for is the answer.
fn penalised_minimum(
    gradient: &Vector3<f64>,
    hessian: &Matrix3<f64>,
    at: &Vector3<f64>,
    penalty: f64,
) -> Vector3<f64> {
    let linear = gradient - hessian * at;
    let model =
        |z: &Vector3<f64>| linear.dot(z) + 0.5 * z.dot(&(hessian * z)) + penalty * z.lp_norm(1);
    // All signs zero always solves; its model is 0.
    let mut best = (0.0, Vector3::zeros());
    for pattern in 0..27 {
        let signs =
            Vector3::new(pattern % 3, pattern / 3 % 3, pattern / 9).map(|s| f64::from(s - 1));
        let mut system = *hessian;
        let mut right = -linear - signs * penalty;
        for i in 0..3 {
            if signs[i] == 0.0 {
                system.fill_row(i, 0.0);
                system.fill_column(i, 0.0);
                system[(i, i)] = 1.0;
                right[i] = 0.0;
            }
        }
        // A singular system belongs to a feature that is 0 throughout; its sign 0 is another pattern.
        let Some(factors) = system.cholesky() else {
            continue;
        };
        let z = factors.solve(&right);
        let consistent = (0..3).all(|i| z[i] * signs[i] > 0.0 || signs[i] == 0.0);
        let value = model(&z);
        if consistent && value < best.0 {
            best = (value, z);
        }
    }
    best.1
}

fn objective(rows: &[Observation], weights: &Vector3<f64>, penalty: f64) -> f64 {
    let loss: f64 = rows.iter().map(|row| row.weight * loss(row, weights)).sum();
    loss + penalty * weights.lp_norm(1)
}

/// Gradient and Hessian of the weighted cross-entropy.
fn derivatives(rows: &[Observation], weights: &Vector3<f64>) -> (Vector3<f64>, Matrix3<f64>) {
    let mut gradient = Vector3::zeros();
    let mut hessian = Matrix3::zeros();
    for row in rows {
        let p = sigmoid(row.features.dot(weights));
        gradient += row.features * (row.weight * (p - row.target));
        let curvature = row.features * (row.weight * p * (1.0 - p));
        hessian += curvature * row.features.transpose();
    }
    (gradient, hessian)
}

/// Cross-entropy with target y: log(1 + e^η) − yη.
fn loss(row: &Observation, weights: &Vector3<f64>) -> f64 {
    let eta = row.features.dot(weights);
    eta.max(0.0) + (-eta.abs()).exp().ln_1p() - row.target * eta
}

fn sigmoid(eta: f64) -> f64 {
    1.0 / (1.0 + (-eta).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair(len_2: f64, win: f64, difficulty: f64) -> Judged {
        Judged {
            len_1: 100.0,
            len_2,
            win: Some(win),
            difficulty,
        }
    }

    #[test]
    fn the_grid_is_scikit_learns() {
        let grid = c_grid();
        assert_eq!((grid[0], grid[9]), (1e-4, 1e4));
        assert!((grid[5] - 2.782_559_402).abs() < 1e-9);
    }

    #[test]
    fn a_constant_rate_is_its_logit() {
        // Equal lengths, no difficulty: only ψ is left, and at a weak penalty it is the logit of the win rate.
        let pairs = [pair(100.0, 0.75, 0.0); 40];
        let weights = LengthModel::new(&[]).fit(&pairs, 1e9);
        assert!((weights.psi_model - 3_f64.ln()).abs() < 1e-6, "{weights:?}");
        assert_eq!((weights.phi_length, weights.theta_difficulty), (0.0, 0.0));
        // A strong one leaves nothing: the gradient at 0 is 40 · 0.25 = 10.
        let weights = LengthModel::new(&[]).fit(&pairs, 0.09);
        assert_eq!(weights.psi_model, 0.0);
        assert!(LengthModel::new(&[]).fit(&pairs, 0.11).psi_model > 0.0);
    }

    #[test]
    fn length_is_taken_out() {
        // Longer always wins, and the model is longer twice in three: at equal length it is no better.
        let pairs: Vec<_> = (0..300)
            .map(|i| match i % 3 {
                0 => pair(50.0, 0.0, 0.0),
                _ => pair(150.0, 1.0, 0.0),
            })
            .collect();
        let model = LengthModel::length_only();
        let weights = model.fit(&pairs, 10.0);
        let (rate, error) = controlled(&weights, pairs.iter().map(|p| p.difficulty)).unwrap();
        assert!((rate - 50.0).abs() < 3.0, "{rate} {weights:?}");
        assert!(error < 1e-12);
        assert!(weights.phi_length < -2.0);
        assert!(is_extreme(66.7, 40.0) && !is_extreme(66.7, 60.0));
    }

    #[test]
    fn nothing_varies_and_everything_is_won() {
        let pairs = [pair(100.0, 1.0, 0.0); 7];
        let model = LengthModel::length_only();
        for c in c_grid() {
            let weights = model.fit(&pairs, c);
            assert!(weights.psi_model.is_finite(), "{c}");
        }
        assert!(c_grid().contains(&model.choose_c(&pairs)));
        assert_eq!(model.choose_c(&[]), 1.0);
        assert_eq!(model.fit(&[], 1.0), Weights::default());
        let one = model.fit(&pairs[..1], 1.0);
        assert!(one.psi_model.is_finite());
    }

    #[test]
    fn counts_are_repetitions() {
        let pairs = [
            pair(50.0, 0.2, 1.0),
            pair(180.0, 0.9, -1.0),
            pair(90.0, 0.4, 0.3),
        ];
        let repeated = [pairs[0], pairs[2], pairs[2], pairs[2]];
        let model = LengthModel::new(&[]);
        let counted = model.fit_counted(&pairs, &[1.0, 0.0, 3.0], 5.0, &Weights::default());
        let plain = model.fit(&repeated, 5.0);
        assert!((vector(&counted) - vector(&plain)).amax() < 1e-9);
    }

    proptest! {
        /// At the minimum every weight's derivative is balanced by the penalty; at 0 it is no greater than it.
        #[test]
        fn the_minimum_is_one(
            rows in prop::collection::vec((0.0..300.0_f64, 0.0..=1.0_f64, -3.0..5.0_f64), 1..40),
            c in 0.001..1000.0_f64,
            start in prop::array::uniform3(-3.0..3.0_f64),
        ) {
            let pairs: Vec<_> = rows.iter().map(|&(len, win, d)| pair(len, win, d)).collect();
            let model = LengthModel::new(&[Regulariser { std_delta_len: 1.0, difficulty: 0.5, win: 0.3 }]);
            let counts = vec![1.0; pairs.len()];
            let found = vector(&model.fit_counted(&pairs, &counts, c, &weights(&start.into())));
            let (gradient, _) = derivatives(&model.observations(&pairs, &counts), &found);
            let off = imbalance(&gradient, &found, 1.0 / c);
            prop_assert!(off < 1e-6, "{off} {} {found:?} {gradient:?}", 1.0 / c);
        }
    }
}
