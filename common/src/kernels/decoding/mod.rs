//! Attention of a few rows of queries over a block of cached keys and values, with the soft-max made as blocks come: the
//! part of a decoding step that reads every sequence's own past. Here is what the formats of caches have in common, and how
//! each lays out a block.

mod float;
mod int8;

use super::gemm::{Precision, panel_width, put_column, put_row, turn_words, words};
use super::isa::Isa;
use super::{cap, softmax};

/// How keys and values are kept, and queries that meet them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As the operands of products are.
    Float(Precision),
    /// Keys and values in 8 bits, each with a scale of its own; queries and what weighs values in 16.
    Int8,
}

/// How a head's part of a block lies: its keys token by token while tokens come, since a new key does not touch a line for
/// each of its words then, and `[word of dim][panel_width]` in a block that is full: quickest to read. Its values lie as
/// `[word of tokens][value_stride]`. Before keys and values lie their scales, `[panel_width]`, if they have any.
impl Format {
    /// Words of a query of `dim` elements.
    pub fn query_words(self, dim: usize) -> usize {
        match self {
            Self::Float(precision) => words(dim, precision),
            Self::Int8 => int8::query_words(dim),
        }
    }

    /// Words of a block's keys.
    pub fn key_words(self, dim: usize) -> usize {
        self.scales() + self.words(dim) * panel_width()
    }

    /// Words of a block's values.
    pub fn value_words(self, dim: usize) -> usize {
        self.scales() + self.words(panel_width()) * value_stride(dim)
    }

    /// Words that so many elements of a key, or of a column of values, take.
    fn words(self, elements: usize) -> usize {
        match self {
            Self::Float(precision) => words(elements, precision),
            Self::Int8 => elements.div_ceil(int8::PER_WORD),
        }
    }

    /// Words of the scales.
    fn scales(self) -> usize {
        match self {
            Self::Float(_) => 0,
            Self::Int8 => panel_width(),
        }
    }

    /// Writes a query, which it may change.
    pub fn put_query(self, query: &mut [f32], out: &mut [f32]) {
        match self {
            Self::Float(precision) => put_row(query, precision, out),
            Self::Int8 => int8::put_query(query, out),
        }
    }

    /// Writes the key of a block's token `at`.
    pub fn put_key(self, key: &[f32], at: usize, keys: &mut [f32]) {
        let k = self.words(key.len());
        let (scales, keys) = keys.split_at_mut(self.scales());
        let row = &mut keys[at * k..][..k];
        match self {
            Self::Float(precision) => put_row(key, precision, row),
            Self::Int8 => scales[at] = int8::put_key(key, row),
        }
    }

    /// Writes the value of a block's token `at`; tokens come in order.
    pub fn put_value(self, value: &[f32], at: usize, values: &mut [f32]) {
        let stride = value_stride(value.len());
        let (scales, values) = values.split_at_mut(self.scales());
        let line = &mut values[(self.words(at + 1) - 1) * stride..][..stride];
        match self {
            Self::Float(precision) => put_column(value, at, precision, line),
            Self::Int8 => scales[at] = int8::put_value(value, at, line),
        }
    }

    /// Turns a block's keys, which lie token by token, into a panel.
    pub fn turn_keys(self, dim: usize, keys: &mut [f32]) {
        let keys = &mut keys[self.scales()..];
        let by_token = keys.to_vec();
        turn_words(&by_token, self.words(dim), keys);
    }
}

/// From the values of a token, or of a word of tokens, to those of the next: whole panels.
pub fn value_stride(dim: usize) -> usize {
    dim.next_multiple_of(panel_width())
}

/// Words between what is read and what is asked for meanwhile, or a head's part of a block where that is longer. Half as
/// far took a sixth longer, twice as far a tenth.
pub const AHEAD: usize = 2048;

/// Keys and values of neighbouring tokens, at most [`panel_width`], of one key head.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Its keys.
    pub keys: &'a [f32],
    /// Whether they were turned into a panel.
    pub panel: bool,
    /// Its values; those of tokens that have not come need not be there.
    pub values: &'a [f32],
    /// How many tokens it holds.
    pub tokens: usize,
    /// Elements of a key and of a value.
    pub dim: usize,
    /// How they are kept.
    pub format: Format,
    /// What will be read later, laid out like this block, best [`AHEAD`]: it is asked for meanwhile, line by line, since
    /// caches come from memory, and the processor's own prefetching begins anew with every page. Any address will do.
    pub ahead: *const f32,
}

/// Some queries, and what they have seen so far.
pub struct Queries<'a> {
    /// `[rows][query_words]`, scaled, for the blocks' format.
    pub words: &'a [f32],
    /// What scores are softly held within, if anything.
    pub cap: Option<f32>,
    /// Of each row, the tokens of the block that it sees: bit i is token i.
    pub visible: &'a [u32],
    /// The largest score so far; −∞ where nothing has been seen.
    pub max: &'a mut [f32],
    /// Σ exp(score − max).
    pub sum: &'a mut [f32],
    /// Σ exp(score − max)·value, `[rows][value_stride]`.
    pub weighted: &'a mut [f32],
}

/// Queries that a kernel takes at once: as many as its registers hold the sums of.
fn most() -> usize {
    match Isa::current() {
        Isa::Avx2 => 3,
        _ => 4,
    }
}

/// Lets rows see a block: what they have is brought to the largest score yet, and the block's part is added (Milakov and
/// Gimelshein, *Online normalizer calculation for softmax*, algorithm 3). A row's result does not depend on the rows
/// beside it.
pub fn see(rows: Queries, block: Block) {
    let (format, dim) = (block.format, block.dim);
    let (k, stride) = (format.query_words(dim), value_stride(dim));
    let (count, value_words) = (rows.max.len(), format.words(block.tokens) * stride);
    let key_words = match block.panel {
        true => format.key_words(dim),
        false => format.scales() + format.words(dim) * block.tokens,
    };
    assert!(block.tokens <= panel_width() && block.keys.len() >= key_words);
    assert!(block.values.len() >= format.scales() + value_words);
    assert!(rows.words.len() == count * k && rows.weighted.len() == count * stride);
    assert!(rows.visible.len() == count && rows.sum.len() == count);
    let mut start = 0;
    while start < count {
        let some = start..(start + most()).min(count);
        let part = Queries {
            words: &rows.words[some.start * k..some.end * k],
            cap: rows.cap,
            visible: &rows.visible[some.clone()],
            max: &mut rows.max[some.clone()],
            sum: &mut rows.sum[some.clone()],
            weighted: &mut rows.weighted[some.start * stride..some.end * stride],
        };
        start = some.end;
        match format {
            Format::Float(precision) => float::see(part, block, precision),
            Format::Int8 => int8::see(part, block),
        }
    }
}

/// A row's scores become weights, exp(score − max) where the row sees the token; what its earlier weights are to be
/// multiplied by comes back. Where a score is NaN the sum will be, too.
#[inline(always)]
fn soften<const FMA: bool, const N: usize>(
    scores: &mut [f32; N],
    cap: Option<f32>,
    seen: u32,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    if let Some(cap) = cap {
        (scores.iter_mut()).for_each(|score| *score = cap::capped::<FMA>(*score, cap));
    }
    for (i, score) in scores.iter_mut().enumerate() {
        if seen >> i & 1 == 0 {
            *score = f32::NEG_INFINITY;
        }
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let top = larger(*max, softmax::fold(*scores, larger));
    let base = if top == f32::NEG_INFINITY { 0.0 } else { top };
    let factor = softmax::exp::<FMA>(*max - base);
    *max = top;
    (scores.iter_mut()).for_each(|score| *score = softmax::exp::<FMA>(*score - base));
    *sum = *sum * factor + softmax::fold(*scores, |a, b| a + b);
    factor
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! What the kernels of all formats share.
    use super::super::cap::x86::capped;
    use super::super::isa::x86::{fetch, narrow};
    use super::super::softmax::x86::exp;
    use std::arch::x86_64::*;

    /// As [`super::soften`], for the scores of a block.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub fn soften_narrow(
        scores: [__m256; 2],
        cap: Option<f32>,
        seen: u32,
        max: &mut f32,
        sum: &mut f32,
    ) -> ([__m256; 2], __m256) {
        let mut words = [0.0f32; 16];
        // SAFETY: a block's scores are two vectors.
        unsafe {
            narrow::store_two(words.as_mut_ptr(), scores);
            let factor = super::soften::<true, 16>(&mut words, cap, seen, max, sum);
            let weights = [
                narrow::load(words.as_ptr()),
                narrow::load(words.as_ptr().add(8)),
            ];
            (weights, narrow::splat(factor))
        }
    }

    /// As [`super::soften`], for the scores of a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub fn soften_wide(
        scores: [__m512; 2],
        cap: Option<f32>,
        seen: u32,
        max: &mut f32,
        sum: &mut f32,
    ) -> ([__m512; 2], __m512) {
        let scores = match cap {
            Some(cap) => [capped(scores[0], cap), capped(scores[1], cap)],
            None => scores,
        };
        let unseen = _mm512_set1_ps(f32::NEG_INFINITY);
        let low = _mm512_mask_blend_ps(seen as u16, unseen, scores[0]);
        let high = _mm512_mask_blend_ps((seen >> 16) as u16, unseen, scores[1]);
        let top = _mm512_reduce_max_ps(_mm512_max_ps(low, high)).max(*max);
        let base = _mm512_set1_ps(if top == f32::NEG_INFINITY { 0.0 } else { top });
        let factor = exp(_mm512_sub_ps(_mm512_set1_ps(*max), base));
        let (low, high) = (
            exp(_mm512_sub_ps(low, base)),
            exp(_mm512_sub_ps(high, base)),
        );
        *max = top;
        *sum = *sum * _mm512_cvtss_f32(factor) + _mm512_reduce_add_ps(_mm512_add_ps(low, high));
        ([low, high], factor)
    }

    /// Asks for row `r`'s share of so many words: half of the values that come later are asked for row by row while the
    /// soft-max is at work, the other half with the values, so that memory has no pause.
    #[inline(always)]
    pub fn fetch_share<const R: usize>(r: usize, words: *const f32, count: usize) {
        let lines = count / 16;
        for line in lines * r / R..lines * (r + 1) / R {
            fetch::<_MM_HINT_T0>(words.wrapping_add(16 * line));
        }
    }
}
