//! From logits to a token: penalties, temperature, truncation, and one draw that does not sort the vocabulary.

use super::logits::{CHUNK, Chunk, Row};
use crate::kernels::softmax;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How tokens are drawn; the names and meanings are transformers' and vLLM's, the order is vLLM's: temperature, `min_p`,
/// `top_k`, `top_p` (transformers has `min_p` last, of what the others leave).
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the most probable tokens whose probabilities first reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep so many most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens less probable than this fraction of the most probable one; 0 drops none.
    pub min_p: f32,
    /// Divide positive and multiply negative logits of tokens that occurred already (prompt included); 1 changes nothing.
    pub repetition_penalty: f32,
    /// A response ends after so many tokens.
    pub max_tokens: usize,
    /// The seed of all draws.
    pub seed: u64,
}

impl Sampling {
    /// What logits are multiplied by before they become weights.
    pub(super) fn scale(&self) -> f32 {
        match self.temperature {
            0.0 => 1.0,
            temperature => 1.0 / temperature,
        }
    }

    /// Whether logits stay as they are, and all tokens have their chance.
    fn takes_all(&self) -> bool {
        self.repetition_penalty == 1.0 && self.truncates_nothing()
    }

    fn truncates_nothing(&self) -> bool {
        self.temperature == 0.0 || (self.top_k == 0 && self.top_p == 1.0 && self.min_p == 0.0)
    }
}

/// The random numbers of one sample: one draw per token, from a stream that no other sample shares.
pub(super) fn stream(seed: u64, key: &str, sample: usize) -> ChaCha8Rng {
    ChaCha8Rng::from_seed(stream_key(seed, key, sample))
}

/// The key of that stream.
pub(crate) fn stream_key(seed: u64, key: &str, sample: usize) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    hash.update(&seed.to_le_bytes())
        .update(&(sample as u64).to_le_bytes())
        .update(key.as_bytes());
    *hash.finalize().as_bytes()
}

/// Uniform in [0, 1), of 53 bits.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// A drawn token and its log-probability under the model itself (temperature 1, nothing cut off).
pub(super) struct Drawn {
    pub token: u32,
    pub logp: f64,
}

/// Draws one token. `seen` are the prompt's tokens and the response's so far; `logits` were made for this scale.
pub(super) fn draw<'a>(
    logits: Row,
    seen: impl Iterator<Item = &'a u32>,
    how: &Sampling,
    rng: &mut ChaCha8Rng,
) -> Drawn {
    let max = max_of(logits.chunks());
    let parts = (logits.chunks()).map(|c| c.sum as f64 * ((c.max - max) as f64).exp());
    let lse = max as f64 + parts.sum::<f64>().ln();
    let token = if how.takes_all() {
        let chunks: Vec<Chunk> = logits.chunks().copied().collect();
        choose(&chunks, |i| logits.chunk(i), how, rng)
    } else {
        let mut values = logits.values();
        penalise(&mut values, seen, how.repetition_penalty);
        truncate(&mut values, how);
        let chunks: Vec<Chunk> = (values.chunks(CHUNK))
            .map(|part| Chunk::of(part, how.scale()))
            .collect();
        let chunk = |i: usize| {
            let part = values.chunks(CHUNK).nth(i).expect("a chunk of these");
            (part, i * CHUNK)
        };
        choose(&chunks, chunk, how, rng)
    };
    Drawn {
        token: token as u32,
        logp: logits.value(token) as f64 - lse,
    }
}

/// The largest of all logits.
fn max_of<'a>(chunks: impl Iterator<Item = &'a Chunk>) -> f32 {
    chunks.fold(f32::NEG_INFINITY, |max, chunk| chunk.max.max(max))
}

/// The token to take, given all chunks and the logits of each with the number of the first.
fn choose<'a>(
    chunks: &[Chunk],
    chunk: impl Fn(usize) -> (&'a [f32], usize),
    how: &Sampling,
    rng: &mut ChaCha8Rng,
) -> usize {
    let (max, scale) = (max_of(chunks.iter()), how.scale());
    if how.temperature == 0.0 {
        // The first of the largest logits.
        let best = chunks.iter().position(|c| c.max == max).unwrap_or(0);
        let (values, first) = chunk(best);
        return first + values.iter().position(|&l| l == max).unwrap_or(0);
    }
    pick(chunks, chunk, Scaled { max, scale }, uniform(rng))
}

/// How logits become weights: exp((l − max)·scale), at most 1.
#[derive(Clone, Copy)]
struct Scaled {
    max: f32,
    scale: f32,
}

impl Scaled {
    fn exponent(self, logit: f32) -> f32 {
        (logit - self.max) * self.scale
    }

    fn weight(self, logit: f32) -> f64 {
        softmax::exp::<false>(self.exponent(logit)) as f64
    }

    /// The weights of a chunk together.
    fn sum(self, chunk: &Chunk) -> f64 {
        chunk.scaled as f64 * (self.exponent(chunk.max) as f64).exp()
    }
}

fn penalise<'a>(logits: &mut [f32], seen: impl Iterator<Item = &'a u32>, penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut tokens: Vec<usize> = seen.map(|&t| t as usize).collect();
    tokens.sort_unstable();
    tokens.dedup(); // a token is penalised once, however often it occurred
    for token in tokens {
        let l = logits[token];
        logits[token] = if l > 0.0 { l / penalty } else { l * penalty };
    }
}

/// Sets to −∞ what top-k, top-p and min-p drop.
///
/// Only tokens above a floor are looked at one by one; the floor falls until they hold all that is kept.
fn truncate(logits: &mut [f32], how: &Sampling) {
    if how.truncates_nothing() {
        return;
    }
    let scaled = Scaled {
        max: softmax::max(logits),
        scale: how.scale(),
    };
    let lowest = how.min_p.ln(); // −∞ for 0
    let mass = |kept: &[usize]| -> f64 { kept.iter().map(|&i| scaled.weight(logits[i])).sum() };
    let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    for floor in [-7.0, -12.0, f32::NEG_INFINITY] {
        let floor = floor.max(lowest);
        let mut kept: Vec<usize> = (0..logits.len())
            .filter(|&i| scaled.exponent(logits[i]) >= floor)
            .collect();
        let all = floor == lowest;
        if how.top_k > 0 && how.top_k < kept.len() {
            kept.select_nth_unstable_by(how.top_k - 1, by_logit);
            kept.truncate(how.top_k);
        } else if how.top_k > 0 && !all {
            continue;
        }
        if how.top_p < 1.0 {
            let total = if all || how.top_k > 0 {
                mass(&kept)
            } else if how.min_p > 0.0 {
                continue; // what min-p leaves, top-p takes its share of: all of it must be here
            } else {
                softmax::sum_exp(logits, scaled.max, scaled.scale) as f64
            };
            kept.sort_unstable_by(by_logit);
            let mut sum = 0.0;
            let enough = kept.iter().position(|&i| {
                sum += scaled.weight(logits[i]);
                sum >= how.top_p as f64 * total
            });
            match enough {
                Some(at) => kept.truncate(at + 1),
                None if !all => continue,
                None => {}
            }
        } else if how.top_k == 0 && !all {
            continue;
        }
        let values: Vec<f32> = kept.iter().map(|&i| logits[i]).collect();
        logits.fill(f32::NEG_INFINITY);
        kept.iter().zip(values).for_each(|(&i, l)| logits[i] = l);
        return;
    }
}

/// The token at which the cumulative weight passes `u` of the total.
fn pick<'a>(
    chunks: &[Chunk],
    chunk: impl Fn(usize) -> (&'a [f32], usize),
    scaled: Scaled,
    u: f64,
) -> usize {
    let sums: Vec<f64> = chunks.iter().map(|c| scaled.sum(c)).collect();
    let mut rest = u * sums.iter().sum::<f64>();
    for (i, sum) in sums.iter().enumerate() {
        if rest >= *sum {
            rest -= sum;
            continue;
        }
        let (values, first) = chunk(i);
        let mut last = first;
        for (token, &l) in (first..).zip(values) {
            let w = scaled.weight(l);
            if w > 0.0 {
                last = token;
            }
            if rest < w {
                break;
            }
            rest -= w;
        }
        // Rounding can leave a little beyond the chunk's last token: it is the one.
        return last;
    }
    let last_of = |i: usize| {
        let (values, first) = chunk(i);
        let last = values.iter().rposition(|&l| scaled.weight(l) > 0.0);
        last.map(|at| first + at)
    };
    (0..chunks.len()).rev().find_map(last_of).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::logits::Logits;
    use super::*;

    pub fn plain() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_tokens: 1,
            seed: 0,
        }
    }

    fn counts(logits: &[f32], seen: &[u32], how: &Sampling, draws: usize) -> Vec<f64> {
        let mut rng = stream(1, "p", 0);
        let mut counts = vec![0.0; logits.len()];
        let made = Logits::of_row(logits, how.scale());
        for _ in 0..draws {
            let drawn = draw(made.row(0), seen.iter(), how, &mut rng);
            counts[drawn.token as usize] += 1.0 / draws as f64;
        }
        counts
    }

    /// Tokens of at least 1% one by one, the rest together: five standard errors of 20,000 draws each.
    fn assert_frequencies(found: &[f64], weights: &[f64]) {
        let total: f64 = weights.iter().sum();
        let mut rest = (0.0, 0.0);
        for (i, (&f, w)) in found.iter().zip(weights).enumerate() {
            let p = w / total;
            if p > 0.01 {
                assert!(
                    (f - p).abs() <= 5.0 * (p * (1.0 - p) / 20_000.0).sqrt(),
                    "token {i}: {f} for {p}"
                );
            } else {
                rest = (rest.0 + f, rest.1 + p);
            }
        }
        assert!(
            (rest.0 - rest.1).abs() <= 5.0 * (rest.1 / 20_000.0).sqrt(),
            "the rest: {rest:?}"
        );
    }

    #[test]
    fn frequencies_are_the_softmax() {
        let logits: Vec<f32> = (0..1030)
            .map(|i| {
                if i % 200 == 3 {
                    (i as f32 / 500.0) + 4.0
                } else {
                    -6.0
                }
            })
            .collect();
        let weights: Vec<f64> = logits.iter().map(|&l| (l as f64).exp()).collect();
        assert_frequencies(&counts(&logits, &[], &plain(), 20_000), &weights);
        let hot = Sampling {
            temperature: 2.0,
            ..plain()
        };
        let weights: Vec<f64> = logits.iter().map(|&l| (l as f64 / 2.0).exp()).collect();
        assert_frequencies(&counts(&logits, &[], &hot, 20_000), &weights);
    }

    #[test]
    fn truncations_keep_what_they_should() {
        let p = [0.1, 0.4, 0.05, 0.3, 0.15f64];
        let logits = p.map(|p| p.ln() as f32);
        let check = |how: Sampling, kept: [f64; 5]| {
            assert_frequencies(&counts(&logits, &[], &how, 20_000), &kept)
        };
        check(
            Sampling {
                top_k: 2,
                ..plain()
            },
            [0.0, 0.4, 0.0, 0.3, 0.0],
        );
        check(
            Sampling {
                top_p: 0.65,
                ..plain()
            },
            [0.0, 0.4, 0.0, 0.3, 0.0],
        );
        check(
            Sampling {
                top_p: 0.75,
                ..plain()
            },
            [0.0, 0.4, 0.0, 0.3, 0.15],
        );
        check(
            Sampling {
                min_p: 0.3,
                ..plain()
            },
            [0.0, 0.4, 0.0, 0.3, 0.15],
        );
        check(
            Sampling {
                top_k: 3,
                top_p: 0.5,
                ..plain()
            },
            [0.0, 0.4, 0.0, 0.3, 0.0],
        );
    }

    #[test]
    fn greedy_takes_the_first_best_and_penalty_moves_it() {
        let logits = [1.0, 3.0, 3.0, -1.0f32];
        let greedy = Sampling {
            temperature: 0.0,
            ..plain()
        };
        assert_eq!(counts(&logits, &[], &greedy, 1)[1], 1.0);
        let penalised = Sampling {
            repetition_penalty: 2.0,
            ..greedy
        };
        assert_eq!(counts(&logits, &[1, 1, 1], &penalised, 1)[2], 1.0);
    }

    #[test]
    fn logp_is_the_models_own() {
        let mut rng = stream(0, "p", 0);
        let how = Sampling {
            temperature: 0.3,
            top_k: 1,
            ..plain()
        };
        let logits = Logits::of_row(&[0.0, 1.0, 2.0], how.scale());
        let drawn = draw(logits.row(0), [].iter(), &how, &mut rng);
        let exact = 2.0 - (1.0 + 1f64.exp() + 2f64.exp()).ln();
        assert!(drawn.token == 2 && (drawn.logp - exact).abs() < 1e-6);
    }
}
