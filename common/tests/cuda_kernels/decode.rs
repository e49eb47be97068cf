//! Attention of one new token a sequence, over pages that its prompt and it have.

use crate::attention::{Scores, made_for, roundings, shared, tile_rows};
use crate::device::{Element, assert_close, in_every_order, launch, noise, unwritten};

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Sequence {
    pub prefix_table: i32,
    pub prefix_len: i32,
    pub own_table: i32,
    pub limit: i32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Tile {
    first: i32,
    rows: i32,
    prefix_table: i32,
    prefix_len: i32,
}

const PAGE: usize = 64;

/// Groups of sequences: a prompt's length, and how many tokens each of its samples has, the newest included.
struct Batch<T> {
    groups: Vec<(usize, Vec<usize>)>,
    cache: Vec<T>,
    pages: Vec<i32>,
    max_pages: usize,
    /// In another order than the groups have them, which is `order`.
    sequences: Vec<Sequence>,
    positions: Vec<i32>,
    order: Vec<i32>,
}

impl<T: Element> Batch<T> {
    fn new(groups: &[(usize, Vec<usize>)], kv_width: usize) -> Self {
        let longest = groups
            .iter()
            .flat_map(|(prompt, own)| own.iter().chain([prompt]))
            .max()
            .unwrap();
        let max_pages = longest.div_ceil(PAGE);
        let tables = groups.iter().map(|(_, own)| own.len() + 1).sum::<usize>();
        // Pages lie anywhere: every second one, from the end.
        let count = tables * max_pages;
        let pages: Vec<i32> = (0..count).map(|i| 2 * (count - i) as i32 - 1).collect();
        let mut batch = Self {
            groups: groups.to_vec(),
            // What no table holds is NaN, and so are the rows after a sequence's last.
            cache: unwritten(2 * (count + 1) * PAGE * 2 * kv_width),
            pages,
            max_pages,
            sequences: vec![],
            positions: vec![],
            order: vec![],
        };
        let mut table = 0;
        for (prompt, own) in groups {
            let prefix_table = table;
            batch.fill(table, *prompt, kv_width);
            for &len in own {
                table += 1;
                batch.fill(table, len, kv_width);
                batch.sequences.push(Sequence {
                    prefix_table: prefix_table as i32,
                    prefix_len: *prompt as i32,
                    own_table: table as i32,
                    limit: 1000,
                });
                batch.positions.push((prompt + len) as i32 - 1);
            }
            table += 1;
        }
        batch.sequences.reverse();
        batch.positions.reverse();
        batch.order = (0..batch.sequences.len() as i32).rev().collect();
        batch
    }

    fn row(&self, table: usize, i: usize) -> usize {
        self.pages[table * self.max_pages + i / PAGE] as usize * PAGE + i % PAGE
    }

    fn fill(&mut self, table: usize, len: usize, kv_width: usize) {
        let values: Vec<T> = noise::<f32>(len * 2 * kv_width, table as u32)
            .iter()
            .map(|x| T::from(x * 2.0))
            .collect();
        for (i, values) in values.chunks_exact(2 * kv_width).enumerate() {
            let at = self.row(table, i) * 2 * kv_width;
            self.cache[at..at + 2 * kv_width].copy_from_slice(values);
        }
    }

    fn tiles(&self, group: usize) -> Vec<Tile> {
        let (mut tiles, mut first, most) = (vec![], 0, tile_rows::<T>());
        let mut sequence = 0;
        for (prompt, own) in &self.groups {
            let end = first + own.len() * group;
            let prefix_table = self.sequences[self.order[sequence] as usize].prefix_table;
            for at in (first..end).step_by(most) {
                let rows = most.min(end - at) as i32;
                tiles.push(Tile {
                    first: at as i32,
                    rows,
                    prefix_table,
                    prefix_len: *prompt as i32,
                });
            }
            (first, sequence) = (end, sequence + own.len());
        }
        tiles
    }
}

struct Shape {
    query: usize,
    kv: usize,
    dim: usize,
    window: Option<usize>,
    cap: Option<f32>,
    splits: (usize, usize),
    /// Something stands beside the scores of each head.
    sinks: bool,
}

fn check<T: Element>(groups: &[(usize, Vec<usize>)], shape: Shape) {
    let Shape {
        query,
        kv,
        dim,
        window,
        cap,
        splits,
        sinks,
    } = shape;
    let sinks = sinks.then(|| noise::<f32>(query, 5));
    let (kv_width, width, group) = (kv * dim, (query + 2 * kv) * dim, query / kv);
    let batch = Batch::<T>::new(groups, kv_width);
    let count = batch.sequences.len();
    let qkv: Vec<T> = noise::<f32>(count * width, 99)
        .iter()
        .map(|x| T::from(x * 2.0))
        .collect();
    let (tiles, parts) = (batch.tiles(group), splits.0 + splits.1);
    let scale = 1.0 / (dim as f32).sqrt();
    let (r, made) = (tile_rows::<T>(), made_for(dim));
    let own = count * splits.1 * kv * group.div_ceil(16);
    let blocks = tiles.len() * splits.0 * kv + own.div_ceil(r / 16);
    let out = in_every_order(|| {
        let (mut partial, mut lse): (Vec<f32>, Vec<f32>) = (
            unwritten(parts * count * query * dim),
            unwritten(parts * count * query),
        );
        let mut out: Vec<T> = unwritten(count * query * dim);
        launch!(format!("decode_attention_{}_{made}", T::NAME),
            [blocks * dim.div_ceil(256), 1, 1], 2 * r, shared::<T>(dim)[0];
            &qkv, &batch.cache, &mut partial, &mut lse, &batch.sequences, &batch.positions, &tiles, &batch.order, &batch.pages,
            batch.max_pages as i32, count as i32, tiles.len() as i32, splits.0 as i32, splits.1 as i32,
            query as i32, kv as i32, dim as i32, window.unwrap_or(0) as i32, Scores::of(scale, cap));
        launch!(format!("decode_merge_{}", T::NAME), [(count * query).div_ceil(8), 1, 1], 256, 0;
            &partial, &lse, sinks.as_ref(), &mut out, parts as i32, (count * query) as i32, query as i32, dim as i32);
        out
    });
    let mut exact = vec![];
    for (s, sequence) in batch.sequences.iter().enumerate() {
        let (prompt, last) = (sequence.prefix_len as usize, batch.positions[s] as usize);
        let rows: Vec<usize> = (0..prompt)
            .map(|i| batch.row(sequence.prefix_table as usize, i))
            .chain((0..=last - prompt).map(|i| batch.row(sequence.own_table as usize, i)))
            .collect();
        let seen = &rows[rows.len().saturating_sub(window.unwrap_or(usize::MAX))..];
        for head in 0..query {
            let at = |row: usize, c: usize| {
                batch.cache[row * 2 * kv_width + head / group * dim + c].to() as f64
            };
            let q = |c: usize| qkv[s * width + head * dim + c].to() as f64;
            let weights: Vec<f64> = (seen.iter())
                .map(|&row| {
                    let dot = (0..dim).map(|c| q(c) * at(row, c)).sum::<f64>();
                    let score = dot / (dim as f64).sqrt();
                    let capped = |cap: f64| cap * (score / cap).tanh();
                    cap.map_or(score, |cap| capped(f64::from(cap))).exp()
                })
                .collect();
            let sink = |sinks: &Vec<f32>| f64::from(sinks[head]).exp();
            let total = weights.iter().sum::<f64>() + sinks.as_ref().map_or(0.0, sink);
            exact.extend((0..dim).map(|c| {
                weights
                    .iter()
                    .zip(seen)
                    .map(|(w, &row)| w / total * at(row, kv_width + c))
                    .sum::<f64>()
            }));
        }
    }
    assert_close(
        &format!("{query} heads over {kv} of {dim}, window {window:?}, splits {splits:?}"),
        &out,
        &exact,
        roundings(dim),
    );
}

fn groups() -> Vec<(usize, Vec<usize>)> {
    vec![
        (70, vec![1, 5, 64, 65, 130]),
        (1, vec![1]),
        (200, vec![3; 40]),
        (800, vec![2, 70]),
    ]
}

fn every_head_size<T: Element>() {
    for dim in [6, 16, 32, 64, 80, 96, 128, 256, 258, 320, 512] {
        check::<T>(
            &[(70, vec![1, 66])],
            Shape {
                query: 2,
                kv: 1,
                dim,
                window: None,
                cap: None,
                splits: (1, 1),
                sinks: false,
            },
        );
    }
}

fn every_group_of_heads<T: Element>() {
    for (query, kv) in [(1, 1), (4, 2), (3, 1), (20, 1)] {
        check::<T>(
            &groups(),
            Shape {
                query,
                kv,
                dim: 16,
                window: None,
                cap: None,
                splits: (2, 1),
                sinks: false,
            },
        );
    }
}

fn soft_caps<T: Element>() {
    for (dim, window) in [(16, None), (256, Some(66)), (512, Some(66))] {
        check::<T>(
            &groups()[..2],
            Shape {
                query: 2,
                kv: 1,
                dim,
                window,
                cap: Some(0.8),
                splits: (2, 2),
                sinks: false,
            },
        );
    }
}

fn sinks<T: Element>() {
    for (dim, window) in [(64, Some(66)), (512, None)] {
        check::<T>(
            &groups()[..2],
            Shape {
                query: 4,
                kv: 2,
                dim,
                window,
                cap: None,
                splits: (2, 2),
                sinks: true,
            },
        );
    }
}

fn windows_and_splits<T: Element>() {
    for window in [None, Some(1), Some(3), Some(66), Some(1000)] {
        for splits in [(1, 1), (3, 2), (8, 8)] {
            check::<T>(
                &groups(),
                Shape {
                    query: 2,
                    kv: 1,
                    dim: 16,
                    window,
                    cap: None,
                    splits,
                    sinks: false,
                },
            );
        }
    }
}

crate::device::for_both!(
    every_head_size,
    every_group_of_heads,
    windows_and_splits,
    soft_caps,
    sinks
);
