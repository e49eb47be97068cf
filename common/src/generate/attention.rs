//! Attention of running sequences' last tokens, over their prompt and their own past.

use super::cache::{LayerCache, Shape};
use crate::kernels::decoding::{self, value_stride};
use crate::kernels::gemm::panel_width;
use std::ops::Range;

/// Rows of queries, and what they have seen so far. A token has a row for each query head; those that share a key head
/// lie together, token by token, so that what tokens have in common is read once for all of them.
#[derive(Default)]
pub(super) struct Rows {
    /// Rows of a key head.
    count: usize,
    /// `[kv_head][row][query_words]`, scaled.
    queries: Vec<f32>,
    /// `[kv_head][row]`; see [`decoding::Queries`].
    max: Vec<f32>,
    /// `[kv_head][row]`
    sum: Vec<f32>,
    /// `[kv_head][row][value_stride]`
    weighted: Vec<f32>,
    /// What rows see of a block.
    visible: Vec<u32>,
    scaled: Vec<f32>,
}

impl Rows {
    /// The queries of some tokens, that have seen nothing: `qkv` `[tokens, qkv_width]`. `sinks` `[query]`, where there are
    /// some, stand beside the scores of each head, with nothing to give.
    pub fn start(&mut self, Shape { heads, format }: Shape, qkv: &[f32], sinks: Option<&[f32]>) {
        let k = format.query_words(heads.dim);
        self.count = qkv.len() / heads.qkv_width() * heads.group();
        let rows = heads.kv * self.count;
        for (values, len, at_first) in [
            (&mut self.queries, rows * k, 0.0),
            (&mut self.max, rows, f32::NEG_INFINITY),
            (&mut self.sum, rows, 0.0),
            (&mut self.weighted, rows * value_stride(heads.dim), 0.0),
        ] {
            values.clear();
            values.resize(len, at_first);
        }
        for (token, row) in qkv.chunks_exact(heads.qkv_width()).enumerate() {
            self.scaled.clear();
            self.scaled
                .extend(row[..heads.q_width()].iter().map(|q| q * heads.scale));
            for head in 0..heads.query {
                let row = self.row(heads.group(), token, head);
                let query = &mut self.scaled[head * heads.dim..][..heads.dim];
                format.put_query(query, &mut self.queries[row * k..][..k]);
                if let Some(sinks) = sinks {
                    (self.max[row], self.sum[row]) = (sinks[head], 1.0);
                }
            }
        }
    }

    /// The row of a token's query head, `group` of which share a key head.
    fn row(&self, group: usize, token: usize, head: usize) -> usize {
        head / group * self.count + token * group + head % group
    }

    /// Lets the queries of some tokens see the keys and values of `cache`, each from its `first` visible one on. After it,
    /// `next` will be read.
    pub fn see(
        &mut self,
        tokens: Range<usize>,
        (cache, next): (&LayerCache, Option<&LayerCache>),
        first: impl Fn(usize) -> usize,
    ) {
        let Shape { heads, format } = cache.shape();
        let (k, stride) = (format.query_words(heads.dim), value_stride(heads.dim));
        for (i, block) in cache.blocks(next).enumerate() {
            let start = i * panel_width();
            let count = (cache.tokens() - start).min(panel_width());
            self.visible.clear();
            for token in tokens.clone() {
                let hidden = first(token).saturating_sub(start);
                let seen = (1u64 << count) - (1u64 << hidden.min(count));
                (self.visible).extend(std::iter::repeat_n(seen as u32, heads.group()));
            }
            if self.visible.iter().all(|&seen| seen == 0) {
                continue;
            }
            for (kv_head, block) in block.enumerate() {
                let first = self.row(heads.group(), tokens.start, kv_head * heads.group());
                let count = self.visible.len();
                let rows = decoding::Queries {
                    words: &self.queries[first * k..][..count * k],
                    cap: heads.cap,
                    visible: &self.visible,
                    max: &mut self.max[first..][..count],
                    sum: &mut self.sum[first..][..count],
                    weighted: &mut self.weighted[first * stride..][..count * stride],
                };
                decoding::see(rows, block);
            }
        }
    }

    /// What attention gives for each token: `out` `[tokens, q_width]`.
    pub fn finish(&self, Shape { heads, .. }: Shape, out: &mut [f32]) {
        let stride = value_stride(heads.dim);
        for (token, out) in out.chunks_exact_mut(heads.q_width()).enumerate() {
            for (head, out) in out.chunks_exact_mut(heads.dim).enumerate() {
                let row = self.row(heads.group(), token, head);
                let scale = 1.0 / self.sum[row];
                let weighted = &self.weighted[row * stride..][..heads.dim];
                (out.iter_mut().zip(weighted)).for_each(|(out, w)| *out = w * scale);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::decoding::Format;
    use crate::kernels::gemm::Precision;
    use crate::kernels::layout::Heads;
    use crate::kernels::testing::noise;

    /// Attention of one query head over keys and values given row by row, in float64.
    fn plain(
        query: &[f32],
        keys: &[&[f32]],
        values: &[&[f32]],
        heads: Heads,
        sink: Option<f32>,
    ) -> Vec<f64> {
        let dot = |key: &&[f32]| -> f64 {
            let products = query.iter().zip(*key).map(|(q, k)| *q as f64 * *k as f64);
            let score = products.sum::<f64>() * heads.scale as f64;
            let capped = |cap: f32| cap as f64 * (score / cap as f64).tanh();
            heads.cap.map_or(score, capped)
        };
        let weights: Vec<f64> = keys.iter().map(|key| dot(key).exp()).collect();
        let sink = sink.map_or(0.0, |sink| f64::from(sink).exp());
        let sum: f64 = weights.iter().sum::<f64>() + sink;
        (0..query.len())
            .map(|i| {
                let terms = weights.iter().zip(values).map(|(w, v)| w * v[i] as f64);
                terms.sum::<f64>() / sum
            })
            .collect()
    }

    #[test]
    fn tokens_see_their_prompt_and_their_own_past() {
        // Blocks that are full, begun and one token long; more rows than the kernel takes; head sizes that are no panel.
        for (query, kv, dim, window, cap, sinks) in [
            (9, 3, 64, None, None, false),
            (7, 1, 6, None, None, false),
            (2, 2, 96, Some(40), None, false),
            (8, 2, 15, Some(3), None, false),
            (4, 2, 64, Some(50), Some(1.5), false),
            (8, 2, 64, Some(40), None, true),
        ] {
            let heads = Heads {
                window,
                cap,
                ..Heads::new(query, kv, dim)
            };
            for (prompt, own) in [(70, [0usize, 33, 31]), (32, [64, 5, 1]), (1, [2, 0, 100])] {
                for (format, tolerance) in [
                    (Format::Float(Precision::F32), 1e-5),
                    (Format::Float(Precision::Bf16), 0.03),
                    (Format::Int8, 0.03),
                ] {
                    check((heads, sinks), format, prompt, &own, tolerance);
                }
            }
        }
    }

    /// A prompt, and for each of some sequences so many tokens of its own before the last.
    fn check(
        (heads, sinks): (Heads, bool),
        format: Format,
        prompt: usize,
        own: &[usize],
        tolerance: f64,
    ) {
        let sinks = sinks.then(|| noise(heads.query, 9));
        let shape = Shape { heads, format };
        let width = heads.qkv_width();
        let tokens = |count: usize, seed: u32| -> Vec<f32> {
            noise(count * width, seed).iter().map(|x| 2.0 * x).collect()
        };
        let cache_of = |tokens: &[f32]| {
            let mut cache = LayerCache::new(shape, 1); // and grows
            tokens.chunks_exact(width).for_each(|t| cache.push(t));
            cache
        };
        let prompt_tokens = tokens(prompt, 1);
        let prefix = cache_of(&prompt_tokens);
        let past: Vec<Vec<f32>> = (own.iter().enumerate())
            .map(|(i, own)| tokens(own + 1, 2 + i as u32))
            .collect();
        let last: Vec<f32> = (past.iter())
            .flat_map(|p| p[p.len() - width..].to_vec())
            .collect();
        let first =
            |m: usize| (prompt + own[m] + 1).saturating_sub(heads.window.unwrap_or(usize::MAX));
        let mut rows = Rows::default();
        rows.start(shape, &last, sinks.as_deref());
        rows.see(0..own.len(), (&prefix, None), first);
        for (m, past) in past.iter().enumerate() {
            let see_from = |m: usize| first(m).saturating_sub(prompt);
            rows.see(m..m + 1, (&cache_of(past), Some(&prefix)), see_from);
        }
        let mut out = vec![0.0; own.len() * heads.q_width()];
        rows.finish(shape, &mut out);

        for (m, past) in past.iter().enumerate() {
            let all: Vec<&[f32]> = (prompt_tokens.chunks_exact(width))
                .chain(past.chunks_exact(width))
                .skip(first(m))
                .collect();
            for head in 0..heads.query {
                let part = |at: usize| -> Vec<&[f32]> {
                    let at = at + head / heads.group() * heads.dim;
                    all.iter().map(|t| &t[at..][..heads.dim]).collect()
                };
                let (keys, values) = (
                    part(heads.q_width()),
                    part(heads.q_width() + heads.kv_width()),
                );
                let query = &last[m * width + head * heads.dim..][..heads.dim];
                let sink = sinks.as_ref().map(|sinks| sinks[head]);
                let expected = plain(query, &keys, &values, heads, sink);
                let found = &out[m * heads.q_width() + head * heads.dim..][..heads.dim];
                for (found, expected) in found.iter().zip(expected) {
                    let error = (*found as f64 - expected).abs();
                    assert!(
                        error < tolerance,
                        "{heads:?}, {format:?}, sequence {m}, head {head}: {found} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_score_that_is_not_a_number_shows() {
        let heads = Heads::new(1, 1, 2);
        for format in [
            Format::Float(Precision::F32),
            Format::Float(Precision::Bf16),
            Format::Int8,
        ] {
            let shape = Shape { heads, format };
            let mut cache = LayerCache::new(shape, 3);
            for key in [1.0, f32::NAN, 2.0] {
                cache.push(&[1.0, 1.0, key, 1.0, 1.0, 1.0]);
            }
            let mut rows = Rows::default();
            rows.start(shape, &[1.0; 6], None);
            rows.see(0..1, (&cache, None), |_| 0);
            let mut out = [0.0; 2];
            rows.finish(shape, &mut out);
            assert!(out.iter().all(|x| x.is_nan()), "{out:?}");
        }
    }
}
