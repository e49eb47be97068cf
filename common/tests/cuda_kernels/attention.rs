//! Attention over packed, prefix-shared batches, forward and backward.

use crate::device::{
    Arg, Element, Null, assert_close, in_every_order, launch, noise, unwritten, wide,
};
use common::kernels::layout::{Heads, Layout};

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Tile {
    first: i32,
    rows: i32,
    start: i32,
    prefix: i32,
    prefix_len: i32,
    end: i32,
}

/// How products become scores.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Scores {
    scale: f32,
    share: f32,
    unit: f32,
}

impl Scores {
    pub fn of(scale: f32, cap: Option<f32>) -> Self {
        Self {
            scale,
            share: cap.map_or(0.0, |cap| scale / cap),
            unit: cap.unwrap_or(scale) * std::f32::consts::LOG2_E,
        }
    }
}

impl From<Scores> for Arg {
    fn from(scores: Scores) -> Self {
        Self::value(scores)
    }
}

/// Rows of a tile.
pub fn tile_rows<T: Element>() -> usize {
    if size_of::<T>() == 2 { 64 } else { 32 }
}

fn tiles<T: Element>(layout: &Layout) -> Vec<Tile> {
    let (segments, rows) = (layout.segments(), tile_rows::<T>());
    let mut tiles = vec![];
    for (i, s) in segments.iter().enumerate() {
        let end = match s.prefix {
            Some(_) => s.tokens.end,
            None => (segments[i + 1..].iter().take_while(|b| b.prefix.is_some()))
                .fold(s.tokens.end, |_, branch| branch.tokens.end),
        };
        for first in s.tokens.clone().step_by(rows) {
            tiles.push(Tile {
                first: first as i32,
                rows: rows.min(s.tokens.end - first) as i32,
                start: s.tokens.start as i32,
                prefix: s.prefix.as_ref().map_or(0, |p| p.start as i32),
                prefix_len: s.position as i32,
                end: end as i32,
            });
        }
    }
    tiles
}

/// The head size of the kernel that serves this one.
pub fn made_for(dim: usize) -> usize {
    [16, 32, 64, 96, 128, 256, 512]
        .into_iter()
        .find(|&d| d >= dim)
        .expect("a head size")
}

/// Bytes of shared memory: of attention and decoding, of the queries' gradient, and of the keys' and values'.
pub fn shared<T: Element>(dim: usize) -> [usize; 3] {
    let (rows, made, half) = (tile_rows::<T>(), made_for(dim), size_of::<T>() == 2);
    let [forward, backward] = match (made, half) {
        (512, true) => [64, 16],
        (512, false) => [16, 8],
        _ => [rows, rows],
    };
    let pitch = |width: usize| (width + 16 / size_of::<T>()) * size_of::<T>();
    let scratch = |met: usize| if half { 0 } else { rows * (met + 4) * 4 };
    let results = pitch(made.min(256));
    let to_queries = 2 * (rows + backward) * pitch(made) + scratch(backward);
    [
        rows * pitch(made) + forward * (pitch(made) + results) + scratch(forward),
        to_queries,
        to_queries + 3 * backward * 4,
    ]
}

struct Run<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    d_qkv: Vec<T>,
    d_sinks: Vec<f32>,
}

/// What stands beside the scores of each head, or nothing.
type Sinks<'a> = Option<&'a Vec<f32>>;

impl<T: Element> PartialEq for Run<T> {
    fn eq(&self, other: &Self) -> bool {
        let all = |run: &Self| {
            (
                run.out.clone(),
                run.lse.clone(),
                run.d_qkv.clone(),
                run.d_sinks.clone(),
            )
        };
        all(self) == all(other)
    }
}

impl<T: Element> std::fmt::Debug for Run<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} results", self.out.len())
    }
}

fn forward<T: Element>(
    layout: &Layout,
    heads: Heads,
    qkv: &Vec<T>,
    sinks: Sinks,
) -> (Vec<T>, Vec<f32>) {
    let (tokens, tiles) = (layout.tokens(), tiles::<T>(layout));
    let (r, made) = (tile_rows::<T>(), made_for(heads.dim));
    let [shared, _, _] = shared::<T>(heads.dim);
    let (mut out, mut lse) = (
        unwritten(tokens * heads.q_width()),
        unwritten(tokens * heads.query),
    );
    launch!(format!("attention_{}_{made}", T::NAME), [heads.query, tiles.len(), heads.dim.div_ceil(256)], 2 * r, shared;
        qkv, &mut out, &mut lse, &tiles, sinks, heads.query as i32, heads.kv as i32, heads.dim as i32,
        heads.window.map_or(0, |w| w as i32), Scores::of(heads.scale, heads.cap));
    (out, lse)
}

/// Half precision has no gradient.
#[test]
fn every_head_size_in_half_precision() {
    for dim in [6, 16, 24, 32, 64, 80, 96, 128, 256, 320, 512] {
        let mut layout = Layout::default();
        layout.push(33, &[20, 70]);
        let heads = Heads {
            window: Some(50),
            ..Heads::new(2, 1, dim)
        };
        let qkv: Vec<half::f16> = noise(layout.tokens() * heads.qkv_width(), 1);
        let (out, lse) = in_every_order(|| forward(&layout, heads, &qkv, None));
        let unused = vec![0.0; layout.tokens() * heads.q_width()];
        let exact = exact(&layout, heads, &wide(&qkv), &unused, None);
        assert_close(&format!("out of {dim}"), &out, &exact.out, 8.0);
        assert_close(&format!("lse of {dim}"), &lse, &exact.lse, 200.0);
    }
}

fn ours<T: Element>(
    layout: &Layout,
    heads: Heads,
    qkv: &Vec<T>,
    d_out: &Vec<T>,
    sinks: Sinks,
) -> Run<T> {
    let (tokens, tiles) = (layout.tokens(), tiles::<T>(layout));
    let (query, kv, dim) = (heads.query as i32, heads.kv as i32, heads.dim as i32);
    let window = heads.window.map_or(0, |w| w as i32);
    let made = made_for(heads.dim);
    let name = |stem: &str| format!("{stem}_{}_{made}", T::NAME);
    let (threads, [_, to_queries, to_keys]) = (2 * tile_rows::<T>(), shared::<T>(heads.dim));
    let mut run = Run {
        out: unwritten(tokens * heads.q_width()),
        lse: unwritten(tokens * heads.query),
        d_qkv: unwritten(tokens * heads.qkv_width()),
        d_sinks: vec![1.0; heads.query],
    };
    let mut delta: Vec<f32> = unwritten(tokens * heads.query);
    (run.out, run.lse) = forward(layout, heads, qkv, sinks);
    launch!(name("attention_backward_q"), [heads.query, tiles.len(), heads.dim.div_ceil(256)], threads, to_queries;
        qkv, &run.out, &run.lse, d_out, &mut delta, &mut run.d_qkv, &tiles, query, kv, dim, window,
        Scores::of(heads.scale, heads.cap));
    if let Some(sinks) = sinks {
        launch!("sink_gradient", [heads.query, 1, 1], 256, 0; sinks, &run.lse, &delta, &mut run.d_sinks, tokens as i32, query);
    }
    let positions: Vec<i32> = layout.positions().map(|p| p as i32).collect();
    let positions = if window > 0 {
        Arg::from(&positions)
    } else {
        Arg::from(Null)
    };
    let mut d_heads: Vec<f32> = unwritten(2 * tokens * heads.q_width());
    crate::device::run(
        &name("attention_backward_kv"),
        [heads.query, tiles.len(), heads.dim.div_ceil(128)],
        threads,
        to_keys,
        vec![
            qkv.into(),
            (&run.lse).into(),
            d_out.into(),
            (&delta).into(),
            positions,
            (&mut d_heads).into(),
            (&tiles).into(),
            query.into(),
            kv.into(),
            dim.into(),
            window.into(),
            Scores::of(heads.scale, heads.cap).into(),
        ],
    );
    launch!(format!("sum_heads_{}", T::NAME), [(tokens * heads.kv_width()).div_ceil(256), 1, 1], 256, 0;
        &d_heads, &mut run.d_qkv, tokens as i32, query, kv, dim);
    run
}

struct Exact {
    out: Vec<f64>,
    lse: Vec<f64>,
    d_qkv: Vec<f64>,
    /// Added to ones.
    d_sinks: Vec<f64>,
}

/// The definition, in float64, token by token.
fn exact(layout: &Layout, heads: Heads, qkv: &[f64], d_out: &[f64], sinks: Sinks) -> Exact {
    let (tokens, dim, width) = (layout.tokens(), heads.dim, heads.qkv_width());
    let mut found = Exact {
        out: vec![0.0; tokens * heads.q_width()],
        lse: vec![0.0; tokens * heads.query],
        d_qkv: vec![0.0; qkv.len()],
        d_sinks: vec![1.0; heads.query],
    };
    let scale = 1.0 / (dim as f64).sqrt();
    for segment in layout.segments() {
        for (i, token) in segment.tokens.clone().enumerate() {
            let all: Vec<usize> = segment
                .prefix
                .clone()
                .unwrap_or(0..0)
                .chain(segment.tokens.start..=token)
                .collect();
            assert_eq!(all.len(), segment.position + i + 1);
            let seen = &all[all.len().saturating_sub(heads.window.unwrap_or(usize::MAX))..];
            for head in 0..heads.query {
                let kv = head / heads.group();
                let (q_at, o_at) = (
                    token * width + head * dim,
                    token * heads.q_width() + head * dim,
                );
                let k_at = |t: usize| t * width + heads.q_width() + kv * dim;
                let v_at = |t: usize| k_at(t) + heads.kv_width();
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                let share = |&t: &usize| {
                    let score = scale * dot(&qkv[q_at..][..dim], &qkv[k_at(t)..][..dim]);
                    heads
                        .cap
                        .map_or(score, |cap| (score / f64::from(cap)).tanh())
                };
                let shares: Vec<f64> = seen.iter().map(share).collect();
                let unit = heads.cap.map_or(1.0, f64::from);
                let scores: Vec<f64> = shares.iter().map(|share| share * unit).collect();
                let sink = sinks.map(|sinks| f64::from(sinks[head]));
                let all = || scores.iter().copied().chain(sink);
                let max = all().fold(f64::NEG_INFINITY, f64::max);
                let lse = max + all().map(|s| (s - max).exp()).sum::<f64>().ln();
                found.lse[token * heads.query + head] = lse;
                let weights: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
                for (w, &t) in weights.iter().zip(seen) {
                    for c in 0..dim {
                        found.out[o_at + c] += w * qkv[v_at(t) + c];
                    }
                }
                let d = &d_out[o_at..][..dim];
                let delta = dot(d, &found.out[o_at..][..dim]);
                found.d_sinks[head] -= sink.map_or(0.0, |sink| (sink - lse).exp() * delta);
                for ((w, share), &t) in weights.iter().zip(&shares).zip(seen) {
                    let slope = heads.cap.map_or(1.0, |_| 1.0 - share * share);
                    let ds = w * (dot(d, &qkv[v_at(t)..][..dim]) - delta) * slope * scale;
                    for c in 0..dim {
                        found.d_qkv[v_at(t) + c] += w * d[c];
                        found.d_qkv[q_at + c] += ds * qkv[k_at(t) + c];
                        found.d_qkv[k_at(t) + c] += ds * qkv[q_at + c];
                    }
                }
            }
        }
    }
    found
}

fn check<T: Element>(layout: &Layout, heads: Heads) {
    check_beside::<T>(layout, heads, None);
}

fn check_beside<T: Element>(layout: &Layout, heads: Heads, sinks: Sinks) {
    let qkv: Vec<T> = noise::<f32>(layout.tokens() * heads.qkv_width(), 1)
        .iter()
        .map(|x| T::from(2.0 * x))
        .collect();
    let d_out: Vec<T> = noise(layout.tokens() * heads.q_width(), 2);
    let found = in_every_order(|| ours(layout, heads, &qkv, &d_out, sinks));
    let exact = exact(layout, heads, &wide(&qkv), &wide(&d_out), sinks);
    let what = format!("{} {heads:?}", T::NAME);
    let most = roundings(heads.dim);
    let close = |part: &str, ours: &[T], exact: &[f64], most| {
        assert_close(&format!("{part} of {what}"), ours, exact, most)
    };
    close("out", &found.out, &exact.out, most);
    close("d_qkv", &found.d_qkv, &exact.d_qkv, 2.0 * most);
    assert_close(&format!("lse of {what}"), &found.lse, &exact.lse, most);
    let most = if size_of::<T>() == 2 { 1e5 } else { 100.0 }; // the output is rounded
    assert_close(
        &format!("d_sinks of {what}"),
        &found.d_sinks,
        &exact.d_sinks,
        most,
    );
}

/// How far results may be off: products of wide heads are longer sums.
pub fn roundings(dim: usize) -> f64 {
    20.0 * (dim as f64 / 256.0).max(1.0)
}

fn batch() -> Layout {
    let mut layout = Layout::default();
    layout.push(3, &[]);
    layout.push(70, &[1, 0, 41, 100]);
    layout.push(1, &[2]);
    layout
}

fn every_head_size<T: Element>() {
    for dim in [6, 16, 24, 32, 64, 80, 96, 128, 256, 258, 320, 512] {
        let mut layout = Layout::default();
        layout.push(33, &[20, 35]);
        check::<T>(&layout, Heads::new(2, 1, dim));
    }
}

fn every_group_of_heads<T: Element>() {
    for (query, kv) in [(1, 1), (3, 3), (6, 2), (7, 1)] {
        check::<T>(&batch(), Heads::new(query, kv, 16));
    }
}

fn windows<T: Element>() {
    for window in [1, 5, 64, 90, 1000] {
        check::<T>(
            &batch(),
            Heads {
                window: Some(window),
                ..Heads::new(2, 1, 16)
            },
        );
    }
}

fn soft_caps<T: Element>() {
    for (window, cap) in [(None, 0.6), (Some(50), 2.0)] {
        for dim in [16, 128, 256] {
            let heads = Heads {
                window,
                cap: Some(cap),
                ..Heads::new(2, 1, dim)
            };
            check::<T>(&batch(), heads);
        }
    }
}

/// Above most scores, among them, below.
fn sinks<T: Element>() {
    let sinks = vec![3.0, 0.5, -0.5, -4.0];
    for (dim, window, cap) in [
        (64, Some(50), None),
        (128, None, Some(0.6)),
        (512, Some(5), None),
    ] {
        let heads = Heads {
            window,
            cap,
            ..Heads::new(4, 2, dim)
        };
        let mut layout = Layout::default();
        layout.push(3, &[]);
        layout.push(66, &[1, 0, 41]);
        check_beside::<T>(&layout, heads, Some(&sinks));
    }
}

/// Heads whose results are made in parts, and whose tiles meet fewer rows at a time.
fn wide_heads<T: Element>() {
    for (window, cap) in [(Some(5), None), (Some(50), Some(2.0)), (None, Some(0.6))] {
        let mut layout = Layout::default();
        layout.push(3, &[]);
        layout.push(66, &[1, 0, 41]);
        let heads = Heads {
            window,
            cap,
            ..Heads::new(2, 1, 512)
        };
        check::<T>(&layout, heads);
    }
}

fn edges_of_tiles<T: Element>() {
    for len in [1, 31, 32, 33, 63, 64, 65, 129] {
        let mut layout = Layout::default();
        layout.push(len, &[len, 1]);
        check::<T>(&layout, Heads::new(1, 1, 32));
    }
}

crate::device::for_both!(
    every_head_size,
    every_group_of_heads,
    windows,
    soft_caps,
    sinks,
    wide_heads,
    edges_of_tiles
);
