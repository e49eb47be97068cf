//! Queries, keys and values: from rows of a layer's fused projection, which may be something else ([`Fused`]), through norms of
//! heads and the rotation; keys and values that later layers attend to; and the way back.

use super::backward::{Pass, wanted};
use super::decoder::{Aside, Decoder, Layer, LayerState};
use super::params::Span;
use super::rotations::Rotations;
use crate::kernels::gemm::Write;
use crate::kernels::rope::Rotary;
use crate::kernels::{copy, fit, norm, rows};
use crate::weights::{Fused, QkNorm};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

impl Decoder {
    /// The part of layer `i` before attention: from `state.x` to `state.qkv`, each row at its position; before what stands in its
    /// place, to `state.qkv_raw`.
    pub fn project(
        &self,
        i: usize,
        positions: &[usize],
        rotations: &Rotations,
        aside: &mut Aside,
        state: &mut LayerState,
    ) {
        let layer = &self.layers[i];
        let heads = layer.heads;
        let (width, around) = (heads.qkv_width(), rotations.around_norms(i));
        let (x, norm) = (&state.x, layer.norms.before_attention.as_deref());
        let read = norm::rows_of(x, self.config.hidden, norm, self.config.norm());
        let apart = layer.recurrent.is_some() || layer.fused != Fused::All;
        let fused = if apart {
            &mut state.qkv_raw
        } else {
            &mut state.qkv
        };
        fit(fused, positions.len() * layer.qkv.weight.n());
        layer.qkv.forward_made(read, fused, Write::Set);
        if layer.recurrent.is_some() {
            return;
        }
        if apart {
            layer.spread(&state.qkv_raw, &aside.keys, &mut state.qkv);
        } else if layer.q_norm.is_some() {
            copy(&state.qkv, &mut state.qkv_raw);
        }
        let queries = rotations.of(i).map_or(0, Rotary::queries);
        rows(&mut state.qkv, width, |first, qkv| {
            for (row, &position) in qkv.chunks_exact_mut(width).zip(&positions[first..]) {
                let (q, rest) = row.split_at_mut(heads.q_width());
                self.prepare(q, &layer.q_norm, heads.dim, around, queries + position);
                if layer.fused == Fused::Queries {
                    continue;
                }
                let (k, v) = rest.split_at_mut(heads.kv_width());
                self.prepare(k, &layer.k_norm, heads.dim, around, position);
                self.prepare(v, &layer.v_norm, heads.dim, [None, None], position);
            }
        });
        if layer.lends_keys {
            let lent = aside.keys.entry(i).or_default();
            fit(lent, positions.len() * 2 * heads.kv_width());
            let tails = state.qkv.chunks_exact(width);
            for (lent, row) in lent.chunks_exact_mut(2 * heads.kv_width()).zip(tails) {
                lent.copy_from_slice(&row[heads.q_width()..]);
            }
        }
    }

    /// Heads of a row, so wide, are normed, where there is a norm, and turned to a position before or after that.
    fn prepare(
        &self,
        part: &mut [f32],
        norm: &Option<Vec<f32>>,
        dim: usize,
        [before, after]: [Option<&Rotary>; 2],
        position: usize,
    ) {
        let turn = |part: &mut [f32], rotary: Option<&Rotary>| {
            if let Some(rotary) = rotary {
                let heads = part.chunks_exact_mut(dim);
                heads.for_each(|head| rotary.rotate(head, position));
            }
        };
        turn(part, before);
        if let Some(weight) = norm {
            let (width, kind) = self.head_norm(weight.len(), dim);
            let weights = weight.chunks_exact(width).cycle();
            let normed = part.chunks_exact_mut(width).zip(weights);
            normed.for_each(|(x, weight)| kind.row_in_place(x, weight));
        }
        turn(part, after);
    }

    /// How wide what such a weight norms is, and how that is normed: a head of so many dimensions, or all of them as one.
    fn head_norm(&self, weight: usize, dim: usize) -> (usize, norm::Kind) {
        match self.config.qk_norm {
            Some(QkNorm::Apart) => (dim, self.config.norm()),
            _ => (weight, self.config.rms_norm()),
        }
    }
}

impl Layer {
    /// From rows of the fused projection to `[q | k | v]`, where they are something else; keys and values that are an earlier
    /// layer's come from `lent`.
    fn spread(&self, raw: &[f32], lent: &BTreeMap<usize, Vec<f32>>, qkv: &mut Vec<f32>) {
        let (q, kv, width) = (
            self.heads.q_width(),
            self.heads.kv_width(),
            self.heads.qkv_width(),
        );
        let raw_width = self.qkv.weight.n();
        let lent = lent.get(&self.keys_of);
        fit(qkv, raw.len() / raw_width * width);
        rows(qkv, width, |first, part| {
            let raw = raw[first * raw_width..].chunks_exact(raw_width);
            for (r, (row, raw)) in (first..).zip(part.chunks_exact_mut(width).zip(raw)) {
                let (queries, keys) = row.split_at_mut(q);
                queries.copy_from_slice(&raw[..q]);
                match self.fused {
                    Fused::All => keys.copy_from_slice(&raw[q..]),
                    Fused::Gated => keys.copy_from_slice(&raw[2 * q..]),
                    Fused::QueriesAndKeys => {
                        keys[..kv].copy_from_slice(&raw[q..]);
                        keys[kv..].copy_from_slice(&raw[q..]);
                    }
                    Fused::Queries => {
                        let lent = lent.expect("that layer ran before");
                        keys.copy_from_slice(&lent[r * 2 * kv..][..2 * kv]);
                    }
                }
            }
        });
    }

    /// Where a row of the fused projection has keys, and where values.
    fn keys_and_values(&self) -> [usize; 2] {
        let (q, kv) = (self.heads.q_width(), self.heads.kv_width());
        match self.fused {
            Fused::All => [q, q + kv],
            Fused::Gated => [2 * q, 2 * q + kv],
            Fused::QueriesAndKeys | Fused::Queries => [q, q],
        }
    }

    /// From gradients of `[q | k | v]`, and of gates, to those of rows of the fused projection, where these are something else.
    pub fn gather(&self, d_qkv: &[f32], d_gates: &[f32], d_raw: &mut Vec<f32>) {
        let (q, kv, width) = (
            self.heads.q_width(),
            self.heads.kv_width(),
            self.heads.qkv_width(),
        );
        let raw_width = self.qkv.weight.n();
        fit(d_raw, d_qkv.len() / width * raw_width);
        rows(d_raw, raw_width, |first, part| {
            let qkv = d_qkv[first * width..].chunks_exact(width);
            for (r, (raw, d)) in (first..).zip(part.chunks_exact_mut(raw_width).zip(qkv)) {
                let (queries, rest) = raw.split_at_mut(q);
                queries.copy_from_slice(&d[..q]);
                match self.fused {
                    Fused::All => rest.copy_from_slice(&d[q..]),
                    Fused::Gated => {
                        rest[..q].copy_from_slice(&d_gates[r * q..][..q]);
                        rest[q..].copy_from_slice(&d[q..]);
                    }
                    Fused::QueriesAndKeys => {
                        let (keys, values) = d[q..].split_at(kv);
                        let each = rest.iter_mut().zip(keys.iter().zip(values));
                        each.for_each(|(raw, (k, v))| *raw = k + v);
                    }
                    Fused::Queries => {}
                }
            }
        });
    }
}

impl Pass<'_, '_> {
    /// Where keys and values are an earlier layer's, their gradients are kept for it; where they were lent, it gains those.
    pub(super) fn lent_keys(&mut self, layer: &Layer, d_qkv: &mut [f32]) {
        let (q, width) = (layer.heads.q_width(), layer.heads.qkv_width());
        let borrowed = layer.fused == Fused::Queries;
        if !borrowed && !layer.lends_keys {
            return;
        }
        let lent = self.lent.entry(layer.keys_of).or_default();
        lent.resize(d_qkv.len() / width * (width - q), 0.0);
        for (row, lent) in (d_qkv.chunks_exact_mut(width)).zip(lent.chunks_exact_mut(width - q)) {
            let (from, to) = match borrowed {
                true => (&row[q..], lent),
                false => (&*lent, &mut row[q..]),
            };
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
        }
    }

    pub(super) fn rotate_back(&self, rotary: Option<&Rotary>, d_qkv: &mut [f32]) {
        let Some(rotary) = rotary else {
            return;
        };
        let (layer, _) = self.layer();
        let (heads, borrowed) = (layer.heads, layer.fused == Fused::Queries);
        let positions: Vec<usize> = self.layout.positions().collect();
        rows(d_qkv, heads.qkv_width(), |first, part| {
            for (row, &position) in part
                .chunks_exact_mut(heads.qkv_width())
                .zip(&positions[first..])
            {
                let (q, rest) = row.split_at_mut(heads.q_width());
                let keys = if borrowed { 0 } else { heads.kv_width() };
                for (part, first) in [(q, rotary.queries()), (&mut rest[..keys], 0)] {
                    let heads = part.chunks_exact_mut(heads.dim);
                    heads.for_each(|head| rotary.rotate_back(head, first + position));
                }
            }
        });
    }

    /// Carries the gradient through the norms of queries, keys and values, where the family has them: those of `qkv_raw`, rotated
    /// where that comes before.
    pub(super) fn qk_norms(&mut self, qkv_raw: &[f32], rotary: Option<&Rotary>, d_qkv: &mut [f32]) {
        let (layer, p) = self.layer();
        let (q, kv) = (layer.heads.q_width(), layer.heads.kv_width());
        let [keys, values] = layer.keys_and_values();
        let turned = |first: usize| rotary.map(|rotary| (rotary, first));
        self.head_norm(
            (layer.q_norm.as_deref(), p.q_norm.as_ref()),
            turned(rotary.map_or(0, Rotary::queries)),
            (qkv_raw, 0..q),
            (d_qkv, 0),
        );
        if layer.fused == Fused::Queries {
            return;
        }
        self.head_norm(
            (layer.k_norm.as_deref(), p.k_norm.as_ref()),
            turned(0),
            (qkv_raw, keys..keys + kv),
            (d_qkv, q),
        );
        self.head_norm(
            (layer.v_norm.as_deref(), None),
            None,
            (qkv_raw, values..values + kv),
            (d_qkv, q + kv),
        );
    }

    /// The same of these columns of rows of `qkv_raw`, which were turned from that position on before; the gradients are at `at` in
    /// rows of `d_qkv`.
    fn head_norm(
        &mut self,
        (weight, span): (Option<&[f32]>, Option<&Span>),
        turned: Option<(&Rotary, usize)>,
        (qkv_raw, columns): (&[f32], Range<usize>),
        (d_qkv, at): (&mut [f32], usize),
    ) {
        let (layer, p) = self.layer();
        let Some(weight) = weight else {
            return;
        };
        let heads = layer.heads;
        let (width, kind) = self.model.decoder.head_norm(weight.len(), heads.dim);
        let d_weight = wanted(self.gradients, &mut self.b.unused, weight, span);
        let raw = qkv_raw.chunks_exact(p.qkv.rows);
        let tokens = raw.zip(d_qkv.chunks_exact_mut(heads.qkv_width()));
        for ((raw, d), position) in tokens.zip(self.layout.positions()) {
            let mut raw = Cow::Borrowed(&raw[columns.clone()]);
            if let Some((rotary, first)) = turned {
                let heads = raw.to_mut().chunks_exact_mut(heads.dim);
                heads.for_each(|head| rotary.rotate(head, first + position));
            }
            let d = d[at..][..columns.len()].chunks_exact_mut(width);
            for (head, (raw, d)) in raw.chunks_exact(width).zip(d).enumerate() {
                let own = head * width % weight.len()..head * width % weight.len() + width;
                let dy = d.to_vec();
                d.fill(0.0);
                kind.backward_row(raw, &weight[own.clone()], &dy, d, &mut d_weight[own]);
            }
        }
    }
}
