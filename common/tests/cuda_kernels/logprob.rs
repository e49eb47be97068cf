//! log p(target), its gradient, and rewards.

use crate::device::{Element, assert_close, in_every_order, launch, noise, unwritten, wide};
use common::reward::{Point, best_and_worst, implicit_reward};

/// The columns `words` of logits `[rows, vocab]`, as a product of a part of the vocabulary gives them.
fn part(logits: &[f32], vocab: usize, words: std::ops::Range<usize>) -> Vec<f32> {
    logits
        .chunks_exact(vocab)
        .flat_map(|row| row[words.clone()].to_vec())
        .collect()
}

/// Logits under a soft cap, where there is one.
fn capped(mut logits: Vec<f32>, cap: Option<f32>) -> Vec<f32> {
    if let Some(cap) = cap {
        let n = logits.len();
        launch!("soft_cap", [n.div_ceil(1024), 1, 1], 256, 0; &mut logits, n as i64, cap);
    }
    logits
}

fn log_probs_of_chunks<T: Element>() {
    for (vocab, chunk, spread, cap) in [
        (1, 1, 1.0, None),
        (3000, 1030, 20.0, None),
        (700, 700, 1.0, None),
        (1000, 300, 80.0, None),
        (900, 400, 60.0, Some(30.0f32)),
    ] {
        let rows = 4;
        let logits: Vec<f32> = noise::<f32>(rows * vocab, 1)
            .iter()
            .map(|x| x * spread)
            .collect();
        let best = |r: usize| {
            (0..vocab)
                .max_by(|&a, &b| logits[r * vocab + a].total_cmp(&logits[r * vocab + b]))
                .unwrap()
        };
        let targets: Vec<i32> = vec![0, vocab as i32 - 1, vocab as i32 / 2, best(3) as i32];
        let d_logps: Vec<f32> = noise(rows, 2);
        let chunks: Vec<_> = (0..vocab)
            .step_by(chunk)
            .map(|first| first..(first + chunk).min(vocab))
            .collect();
        let (logps, lse, d) = in_every_order(|| {
            let mut state: Vec<f32> = unwritten(rows * 3);
            for words in &chunks {
                let logits = part(&logits, vocab, words.clone());
                let logits = capped(logits, cap);
                launch!("logprob_update", [rows, 1, 1], 256, 0;
                    &logits, &targets, &mut state, words.len() as i32, words.start as i32, (words.start == 0) as i32);
            }
            let (mut logps, mut lse): (Vec<f32>, Vec<f32>) = (unwritten(rows), unwritten(rows));
            launch!("logprob_finish", [1, 1, 1], 256, 0; &state, &mut logps, &mut lse, rows as i32);
            let mut d: Vec<T> = unwritten(rows * vocab);
            for words in &chunks {
                let logits = part(&logits, vocab, words.clone());
                let logits = capped(logits, cap);
                let mut d_part: Vec<T> = unwritten(logits.len());
                let inverse_cap = cap.map_or(0.0, |cap| 1.0 / cap);
                launch!(format!("logprob_backward_{}", T::NAME), [words.len().div_ceil(1024), rows, 1], 256, 0;
                    &logits, &targets, &lse, &d_logps, &mut d_part, words.len() as i32, words.start as i32,
                    inverse_cap);
                for r in 0..rows {
                    d[r * vocab..][words.clone()]
                        .copy_from_slice(&d_part[r * words.len()..][..words.len()]);
                }
            }
            (logps, lse, d)
        });
        let (mut logps_exact, mut lse_exact, mut d_exact) = (vec![], vec![], vec![]);
        for (r, row) in wide(&logits).chunks_exact(vocab).enumerate() {
            let cap = cap.map(f64::from);
            let share = |l: f64| cap.map_or(0.0, |cap| (l / cap).tanh());
            let slopes: Vec<f64> = row.iter().map(|&l| 1.0 - share(l).powi(2)).collect();
            let held = |&l: &f64| cap.map_or(l, |cap| cap * share(l));
            let row: Vec<f64> = row.iter().map(held).collect();
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let log_sum = row.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            logps_exact.push((row[targets[r] as usize] - max) - log_sum);
            lse_exact.push(max + log_sum);
            d_exact.extend(row.iter().enumerate().map(|(w, l)| {
                slopes[w]
                    * d_logps[r] as f64
                    * ((w == targets[r] as usize) as u8 as f64 - (l - max - log_sum).exp())
            }));
        }
        assert_close("log p", &logps, &logps_exact, 10.0);
        for (x, exact) in logps.iter().zip(&logps_exact) {
            assert!(
                (*x as f64 - exact).abs() <= 1e-4 * exact.abs().max(1e-6),
                "{x} for {exact}: near 0 too"
            );
        }
        assert_close("lse", &lse, &lse_exact, 10.0);
        // A logit of 80 is itself known to 40 roundings of 1, and so is its exponential.
        let roundings = if T::NAME == "f32" { 100.0 } else { 4.0 };
        assert_close("d_logits", &d, &d_exact, roundings);
    }
}

crate::device::for_both!(log_probs_of_chunks);

#[test]
fn sums_of_responses_and_back() {
    let offsets = vec![0, 0, 1, 34, 34, 100, 101, 101, 150, 151i32];
    let (values, coefficients): (Vec<f32>, Vec<f32>) = (noise(151, 1), noise(9, 2));
    let (sums, spread) = in_every_order(|| {
        let (mut sums, mut spread) = (vec![f64::NAN; 9], unwritten::<f32>(151));
        launch!("segment_sums", [2, 1, 1], 256, 0; &values, &offsets, &mut sums, 9i32);
        launch!("spread", [2, 1, 1], 256, 0; &coefficients, &offsets, &mut spread, 9i32);
        (sums, spread)
    });
    for i in 0..9 {
        let range = offsets[i] as usize..offsets[i + 1] as usize;
        let exact: f64 = values[range.clone()].iter().map(|&v| v as f64).sum();
        assert!((sums[i] - exact).abs() < 1e-12);
        assert!(spread[range].iter().all(|&v| v == coefficients[i]));
    }
}

/// The choice is that of the CPU even where floating point would waver: many ties, corners hit exactly, wide ranges.
#[test]
fn rewards_choose_what_the_cpu_chooses() {
    let mut draw = {
        let mut state = 1u64;
        move |n: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % n
        }
    };
    let (mut policy, mut reference, mut lengths, mut offsets) =
        (vec![], vec![], vec![], vec![0i32]);
    for prompt in 0..60 {
        for _ in 0..[0, 1, 2, 16, 40][prompt % 5] {
            let scale = if prompt % 2 == 0 { 1.0 } else { 0.1 };
            policy.push(draw(8) as f64 * scale);
            reference.push(draw(8) as f64 * scale);
            lengths.push(draw(6) as i64);
        }
        offsets.push(policy.len() as i32);
    }
    for (beta, alpha) in [
        (0.1, 0.0),
        (1.0, 1.0),
        (0.1, 0.1),
        (0.1, 1.0 / 3.0),
        (1.0, -0.5),
    ] {
        let prompts = offsets.len() - 1;
        let (found, best, worst) = in_every_order(|| {
            let (mut rewards, mut best, mut worst) = (
                vec![f64::NAN; policy.len()],
                vec![7i32; prompts],
                vec![7i32; prompts],
            );
            launch!("rewards", [prompts.div_ceil(8), 1, 1], 256, 0;
                &policy, &reference, &lengths, &offsets, beta, alpha, &mut rewards, &mut best, &mut worst, prompts as i32);
            (rewards, best, worst)
        });
        for p in 0..prompts {
            let range = offsets[p] as usize..offsets[p + 1] as usize;
            let points: Vec<Point> = (range.clone())
                .map(|i| Point {
                    reward: implicit_reward(beta, policy[i], reference[i]),
                    length: lengths[i] as u64,
                })
                .collect();
            assert!(
                points
                    .iter()
                    .zip(&found[range])
                    .all(|(p, r)| p.reward == *r)
            );
            let expected =
                best_and_worst(&points, alpha).map_or((-1, -1), |(b, w)| (b as i32, w as i32));
            assert_eq!((best[p], worst[p]), expected, "prompt {p}, alpha {alpha}");
        }
    }
}
