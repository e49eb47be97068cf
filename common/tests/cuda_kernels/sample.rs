//! Drawing tokens, and the bookkeeping of a step.

use crate::decode::Sequence;
use crate::device::{Arg, Null, in_every_order, noise, unwritten};
use crate::kernels;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Params {
    temperature: f32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    top_k: i32,
}

impl From<Params> for Arg {
    fn from(params: Params) -> Self {
        Self::value(params)
    }
}

const PLAIN: Params = Params {
    temperature: 1.0,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
    top_k: 0,
};

/// Everything that a launch reads and changes.
#[derive(Clone, Debug, PartialEq)]
struct State {
    seen: Vec<u32>,
    logps: Vec<u32>,
    tokens: Vec<i32>,
    positions: Vec<i32>,
    cache_rows: Vec<i32>,
    finished: Vec<i32>,
}

const PROMPT: i32 = 10;
const PAGES: [i32; 4] = [9, 5, 7, 3];

/// A draw for each sequence of `state`; they read the rows of `logits` in turn.
fn draw(
    logits: &Vec<f32>,
    vocab: usize,
    how: Params,
    keys: &Vec<u32>,
    seen: Option<&[u32]>,
    ends: &Vec<i32>,
    state: &State,
) -> State {
    let count = state.tokens.len();
    let rows: Vec<i32> = (0..count)
        .map(|s| (s % (logits.len() / vocab)) as i32)
        .collect();
    let sequences = vec![
        Sequence {
            prefix_table: 0,
            prefix_len: PROMPT,
            own_table: 1,
            limit: 30
        };
        count
    ];
    let pages = PAGES.to_vec();
    let mut next = state.clone();
    let mut logps: Vec<f32> = unwritten(count);
    next.seen = seen.unwrap_or(&[]).to_vec();
    let seen_arg = if seen.is_some() {
        Arg::from(&mut next.seen)
    } else {
        Arg::from(Null)
    };
    crate::device::run(
        "sample",
        [count, 1, 1],
        512,
        8 * vocab.div_ceil(1024),
        vec![
            logits.into(),
            (&rows).into(),
            (vocab as i32).into(),
            how.into(),
            keys.into(),
            seen_arg,
            ends.into(),
            (ends.len() as i32).into(),
            (&sequences).into(),
            (&pages).into(),
            2i32.into(),
            (&mut logps).into(),
            (&mut next.tokens).into(),
            (&mut next.positions).into(),
            (&mut next.cache_rows).into(),
            (&mut next.finished).into(),
        ],
    );
    next.logps = logps.iter().map(|p| p.to_bits()).collect();
    next
}

fn fresh(count: usize, draws: impl Fn(usize) -> i32) -> State {
    State {
        seen: vec![],
        logps: vec![],
        tokens: vec![-1; count],
        positions: (0..count).map(|s| PROMPT - 1 + draws(s)).collect(),
        cache_rows: vec![-7; count],
        finished: vec![0; count],
    }
}

/// Keys of `count` streams, and draw number n of each.
fn streams(count: usize) -> (Vec<u32>, impl Fn(usize, usize) -> f64) {
    let key =
        |s: usize| -> [u8; 32] { std::array::from_fn(|i| (i * 7 + s * 13 + s / 20 + 1) as u8) };
    let words = (0..count).flat_map(|s| {
        key(s)
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().unwrap()))
            .collect::<Vec<_>>()
    });
    let uniform = move |s: usize, n: usize| {
        let mut rng = ChaCha8Rng::from_seed(key(s));
        (0..n).for_each(|_| {
            rng.next_u64();
        });
        (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    };
    (words.collect(), uniform)
}

/// What may be drawn: weights in the order of words, by the definitions, in float64 and with the vocabulary sorted.
fn weights(logits: &[f32], seen: &[usize], how: Params) -> Vec<f64> {
    let mut logits: Vec<f64> = logits.iter().map(|&l| l as f64).collect();
    for &t in seen {
        let p = how.repetition_penalty as f64;
        logits[t] = if logits[t] > 0.0 {
            logits[t] / p
        } else {
            logits[t] * p
        };
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut w: Vec<f64> = logits
        .iter()
        .map(|l| ((l - max) / how.temperature as f64).exp())
        .collect();
    w.iter_mut()
        .filter(|w| **w < how.min_p as f64)
        .for_each(|w| *w = 0.0);
    let mut order: Vec<usize> = (0..w.len()).collect();
    order.sort_by(|&a, &b| w[b].total_cmp(&w[a]).then(a.cmp(&b)));
    if how.top_k > 0 {
        order
            .iter()
            .skip(how.top_k as usize)
            .for_each(|&i| w[i] = 0.0);
    }
    let goal = how.top_p as f64 * w.iter().sum::<f64>();
    let mut sum = 0.0;
    for &i in &order {
        if how.top_p < 1.0 && sum >= goal * (1.0 - 1e-9) {
            w[i] = 0.0;
        }
        sum += w[i];
    }
    w
}

#[test]
fn the_order_of_threads_does_not_matter() {
    let (logits, (keys, _)) = (spiky(2, 1100, 6.0), streams(2));
    let how = Params {
        min_p: 0.01,
        top_k: 30,
        top_p: 0.8,
        temperature: 1.3,
        repetition_penalty: 1.2,
    };
    in_every_order(|| {
        draw(
            &logits,
            1100,
            how,
            &keys,
            Some(&[5; 70]),
            &vec![],
            &fresh(2, |s| s as i32),
        )
    });
}

/// The token of each draw is the one whose share of the cumulative weights holds the random number.
fn check(logits: &Vec<f32>, vocab: usize, how: Params, seen: &[usize]) {
    let count = 16;
    let (keys, uniform) = streams(count);
    let words = vocab.div_ceil(32);
    let mut bits = vec![0u32; words];
    seen.iter().for_each(|t| bits[t / 32] |= 1 << (t % 32));
    let bits = bits.repeat(count);
    let draws = |s: usize| 2 * s as i32;
    let state = fresh(count, draws);
    kernels::set_order(3);
    let next = draw(
        logits,
        vocab,
        how,
        &keys,
        (how.repetition_penalty != 1.0).then_some(&bits),
        &vec![],
        &state,
    );
    let mut doubtful = 0;
    for s in 0..count {
        let row = &logits[s % (logits.len() / vocab) * vocab..][..vocab];
        let (weights, n) = (weights(row, seen, how), draws(s) as usize);
        let total: f64 = weights.iter().sum();
        let token = next.tokens[s] as usize;
        let before: f64 = weights[..token].iter().sum::<f64>() / total;
        let (u, share) = (uniform(s, n), weights[token] / total);
        assert!(
            share > 0.0,
            "{how:?}: sequence {s} drew {token}, which is not kept"
        );
        assert!(
            u > before - 1e-5 && u < before + share + 1e-5,
            "{how:?}: {u} is not in {before} + {share}"
        );
        doubtful += (u < before || u >= before + share) as usize;

        let max = row.iter().fold(f32::NEG_INFINITY, |m, &l| m.max(l)) as f64;
        let exact = row[token] as f64
            - max
            - row
                .iter()
                .map(|&l| (l as f64 - max).exp())
                .sum::<f64>()
                .ln();
        let logp = f32::from_bits(next.logps[s]) as f64;
        assert!(
            (logp - exact).abs() < 1e-5 * exact.abs().max(0.1),
            "{logp} for {exact}"
        );
        if how.repetition_penalty != 1.0 {
            let mut expected = bits[s * words..][..words].to_vec();
            expected[token / 32] |= 1 << (token % 32);
            assert_eq!(next.seen[s * words..][..words], expected);
        }
    }
    assert!(doubtful <= 1, "{doubtful} draws beside their places");
}

fn spiky(rows: usize, vocab: usize, scale: f32) -> Vec<f32> {
    noise::<f32>(rows * vocab, 5)
        .iter()
        .map(|x| x * scale)
        .collect()
}

#[test]
fn draws_are_those_of_the_stream() {
    for vocab in [1, 31, 1024, 3000] {
        check(&spiky(3, vocab, 4.0), vocab, PLAIN, &[]);
        check(
            &spiky(3, vocab, 4.0),
            vocab,
            Params {
                temperature: 0.5,
                ..PLAIN
            },
            &[],
        );
    }
}

#[test]
fn truncations_keep_what_they_say() {
    let logits = spiky(3, 2100, 6.0);
    for how in [
        Params { top_k: 1, ..PLAIN },
        Params {
            top_k: 40,
            temperature: 2.0,
            ..PLAIN
        },
        Params {
            top_k: 5000,
            ..PLAIN
        },
        Params {
            top_p: 0.9,
            ..PLAIN
        },
        Params {
            top_p: 0.05,
            temperature: 0.7,
            ..PLAIN
        },
        Params {
            min_p: 0.2,
            ..PLAIN
        },
        Params {
            min_p: 1.0,
            ..PLAIN
        },
        Params {
            min_p: 0.1,
            top_k: 30,
            top_p: 0.8,
            temperature: 1.3,
            ..PLAIN
        },
        Params {
            top_k: 50,
            top_p: 0.5,
            ..PLAIN
        },
    ] {
        check(&logits, 2100, how, &[]);
    }
}

/// Equal logits are kept from the first on.
#[test]
fn ties_are_broken_by_the_order_of_words() {
    let vocab = 2500;
    let logits: Vec<f32> = (0..vocab)
        .map(|i| {
            if i % 5 == 4 {
                2.0
            } else {
                (i % 3) as f32 - 1.0
            }
        })
        .collect();
    for how in [
        Params { top_k: 3, ..PLAIN },
        Params {
            top_k: 700,
            ..PLAIN
        },
        Params {
            top_p: 0.4,
            ..PLAIN
        },
        Params {
            top_p: 0.95,
            ..PLAIN
        },
        Params {
            top_k: 600,
            top_p: 0.9,
            ..PLAIN
        },
        Params {
            min_p: 0.2,
            top_p: 0.9,
            ..PLAIN
        },
    ] {
        check(&logits, vocab, how, &[]);
    }
}

#[test]
fn penalties_change_the_draw_but_not_the_log_probability() {
    let logits = spiky(2, 1500, 5.0);
    let seen: Vec<usize> = (0..1500).step_by(3).collect();
    check(
        &logits,
        1500,
        Params {
            repetition_penalty: 1.5,
            ..PLAIN
        },
        &seen,
    );
    check(
        &logits,
        1500,
        Params {
            repetition_penalty: 1.3,
            top_k: 20,
            ..PLAIN
        },
        &seen,
    );
}

#[test]
fn greedy_takes_the_first_best() {
    let mut logits = spiky(1, 3000, 1.0);
    (logits[77], logits[2500], logits[1300]) = (5.0, 5.0, 5.0);
    let (keys, _) = streams(1);
    let how = Params {
        temperature: 0.0,
        repetition_penalty: 2.0,
        ..PLAIN
    };
    let mut bits = vec![0u32; 3000usize.div_ceil(32)];
    let state = fresh(1, |_| 0);
    assert_eq!(
        draw(&logits, 3000, how, &keys, Some(&bits), &vec![], &state).tokens,
        [77]
    );
    bits[77 / 32] |= 1 << (77 % 32);
    assert_eq!(
        draw(&logits, 3000, how, &keys, Some(&bits), &vec![], &state).tokens,
        [1300]
    );
}

#[test]
fn a_step_is_kept_account_of() {
    let mut logits = vec![0.0f32; 64];
    logits[50] = 60.0;
    let count = 5;
    let (keys, _) = streams(count);
    // Going on within a page, into the next page, to its limit, ended before.
    let draws = |s: usize| [0, 12, 29, 3, 3][s];
    let mut state = fresh(count, draws);
    state.finished[3] = 1;
    let next = draw(&logits, 64, PLAIN, &keys, None, &vec![3], &state);
    assert_eq!(next.finished, [0, 0, 2, 1, 0]);
    assert_eq!(next.tokens, [50, 50, 50, -1, 50]);
    let moved: Vec<i32> = (0..count)
        .map(|s| next.positions[s] - state.positions[s])
        .collect();
    assert_eq!(moved, [1, 1, 0, 0, 1]);
    let row = |n: i32| PAGES[2] * 64 + n; // table 1 begins at page 7
    assert_eq!(next.cache_rows, [row(0), row(12), -1, -7, row(3)]);
    let unwritten = |&logp: &u32| f32::from_bits(logp).is_nan();
    let unwritten: Vec<bool> = next.logps.iter().map(unwritten).collect();
    assert_eq!(unwritten, [false, false, false, true, false]);
    let ended = draw(&logits, 64, PLAIN, &keys, None, &vec![3, 50], &state);
    assert_eq!(ended.finished, [1, 1, 1, 1, 1]);
    assert_eq!(ended.cache_rows, [-1, -1, -1, -7, -1]);
}
