//! The bootstrap: how far a figure would move with other prompts (Efron 1979, percentile intervals).

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

/// The figures of `times` resamples of `n` rows drawn with replacement, in the order of the resamples. `figures`
/// gets how often each row was drawn, and may answer `None` where a resample says nothing (no row of a kind).
/// The same seed gives the same draws for the same `n`, on any number of cores.
pub fn resample<T: Send>(
    n: usize,
    times: u64,
    seed: u64,
    figures: impl Fn(&[f64]) -> Option<T> + Sync,
) -> Vec<T> {
    (0..times)
        .into_par_iter()
        .filter_map(|at| figures(&draw(n, at, seed)))
        .collect()
}

/// How often each of `n` rows is in the `at`-th resample.
fn draw(n: usize, at: u64, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(at);
    let mut counts = vec![0.0; n];
    for _ in 0..n {
        // The high half of the product is uniform in 0..n up to n / 2⁶⁴.
        let row = (u128::from(rng.next_u64()) * n as u128) >> 64;
        counts[row as usize] += 1.0;
    }
    counts
}

/// The middle 95% of the values; `None` of none.
pub fn interval(values: impl IntoIterator<Item = f64>) -> Option<[f64; 2]> {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    Some([0.025, 0.975].map(|share| {
        let place = share * last as f64;
        let (low, high) = (
            sorted[place.floor() as usize],
            sorted[place.ceil() as usize],
        );
        low + (high - low) * place.fract()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_n_rows_and_follow_the_seed() {
        let all = |seed| resample(7, 50, seed, |counts| Some(counts.to_vec()));
        let draws = all(3);
        assert_eq!(draws.len(), 50);
        assert!(draws.iter().all(|counts| counts.iter().sum::<f64>() == 7.0));
        assert_eq!(draws, all(3));
        assert_ne!(draws, all(4));
        assert_ne!(draws[0], draws[1]);
    }

    #[test]
    fn the_interval_of_a_mean_is_that_of_theory() {
        // Ten thousand rows, half of them 1: the mean's standard error is 0.005.
        let n = 10_000;
        let mean = |counts: &[f64]| Some(counts.iter().step_by(2).sum::<f64>() / n as f64);
        let [low, high] = interval(resample(n, 400, 1, mean)).unwrap();
        assert!((low - 0.4902).abs() < 0.0015, "{low}");
        assert!((high - 0.5098).abs() < 0.0015, "{high}");
    }

    #[test]
    fn intervals_interpolate() {
        let [low, high] = interval((0..=100).map(f64::from)).unwrap();
        assert!((low - 2.5).abs() < 1e-12 && (high - 97.5).abs() < 1e-12);
        assert_eq!(interval([4.0]), Some([4.0, 4.0]));
        assert_eq!(interval([]), None);
    }
}
