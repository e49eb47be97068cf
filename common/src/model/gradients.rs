//! Where gradients are collected: the whole model's, flat like its parameters, or those of low-rank adapters.

use super::lora::Lora;
use super::params::{Matrix, Params, Span};
use crate::kernels::gemm::{Left, Mat, Packed, Threads, Write, matmul};

/// The sum of gradients over a batch.
pub enum Gradients<'a> {
    /// Of every parameter.
    Full {
        /// Where they lie.
        params: &'a Params,
        /// The flat buffer, as long as the parameters'.
        flat: &'a mut [f32],
        /// Whether matrices hold nothing yet, so that their first gradients are written, not added.
        fresh: bool,
    },
    /// Of the adapters alone.
    Lora {
        /// Where they lie.
        lora: &'a Lora,
        /// Their values.
        values: &'a [f32],
        /// The flat buffer, as long as the adapters'.
        flat: &'a mut [f32],
    },
}

impl Gradients<'_> {
    /// Begins a new sum. Of a model's matrices nothing is cleared: that would be another pass over memory, and the first
    /// backward pass writes them whole.
    pub fn begin(&mut self) {
        match self {
            Self::Full {
                params,
                flat,
                fresh,
            } => {
                *fresh = true;
                let spans = params.spans().into_iter();
                for span in spans.filter(|span| !params.is_product(span)) {
                    flat[span.range.clone()].fill(0.0);
                }
            }
            Self::Lora { flat, .. } => flat.fill(0.0),
        }
    }

    /// Says that a backward pass is over, to which the next will add.
    pub fn passed(&mut self) {
        if let Self::Full { fresh, .. } = self {
            *fresh = false;
        }
    }

    /// For y = x·Wᵀ + b: adds dyᵀ·x to the weight's gradient and Σ dy to the bias's. `x` is `[T, in]`, `dy` `[T, out]`.
    /// `right` is storage to pack `x` in. No tokens at all are a sum, too (an expert may get none).
    pub fn linear(&mut self, matrix: &Matrix, x: &[f32], dy: &[f32], right: &mut Packed) {
        let tokens = x.len() / matrix.cols;
        match self {
            Self::Full { flat, fresh, .. } if tokens == 0 => {
                if *fresh {
                    flat[matrix.weight.range.clone()].fill(0.0);
                }
                return;
            }
            Self::Lora { lora, .. } if lora.of(matrix).is_empty() => return,
            _ => {}
        }
        right.set_columns(Mat::new(x, tokens, matrix.cols));
        match self {
            Self::Full { flat, fresh, .. } => {
                let dy_columns = Left::Columns(Mat::new(dy, tokens, matrix.rows));
                let target = &mut flat[matrix.weight.range.clone()];
                matmul(
                    dy_columns,
                    right.panels(),
                    target,
                    matrix.cols,
                    first(*fresh),
                    Threads::All,
                );
                if let Some(bias) = &matrix.bias {
                    let target = &mut flat[bias.range.clone()];
                    for row in dy.chunks_exact(matrix.rows) {
                        target.iter_mut().zip(row).for_each(|(t, d)| *t += d);
                    }
                }
            }
            Self::Lora { lora, values, flat } => {
                lora.add_gradient(values, flat, matrix, (x, right), dy)
            }
        }
    }

    /// A vector's gradient to add to, or none where it is not trained.
    pub fn vector(&mut self, span: &Span) -> Option<&mut [f32]> {
        match self {
            Self::Full { flat, .. } => Some(&mut flat[span.range.clone()]),
            Self::Lora { .. } => None,
        }
    }

    /// Adds to a vector's gradient, where it is trained.
    pub fn add(&mut self, span: &Span, d: &[f32]) {
        if let Some(sum) = self.vector(span) {
            sum.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
        }
    }

    /// The LM head's gradient `[vocab, hidden]`, and how a pass's first products go into it; none where it is not trained.
    pub fn head(&mut self) -> Option<(&mut [f32], Write)> {
        match self {
            Self::Full {
                params,
                flat,
                fresh,
            } => Some((&mut flat[params.head().range.clone()], first(*fresh))),
            Self::Lora { .. } => None,
        }
    }

    /// Adds the rows of `d` `[T, width]` to those of a table that are the tokens'.
    pub fn table(&mut self, table: &Span, tokens: &[u32], d: &[f32]) {
        if let Self::Full { flat, .. } = self {
            let table = &mut flat[table.range.clone()];
            let width = d.len() / tokens.len();
            for (&token, d) in tokens.iter().zip(d.chunks_exact(width)) {
                table[token as usize * width..][..width]
                    .iter_mut()
                    .zip(d)
                    .for_each(|(t, d)| *t += d);
            }
        }
    }
}

/// How the first of some products goes into a sum.
fn first(fresh: bool) -> Write {
    match fresh {
        true => Write::Set,
        false => Write::Add,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::gemm::Precision;
    use crate::weights::Config;
    use std::path::Path;

    /// The buffer of a batch before is not cleared: what no token came to must be.
    #[test]
    fn an_expert_without_tokens_has_no_gradient() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/golden/families/olmoe/config.json");
        let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let params = Params::new(&Config::from_json(&json, &path).unwrap());
        let down = &params.layers[1].mlps[3].down;
        let mut flat = vec![f32::NAN; params.len];
        let mut gradients = Gradients::Full {
            params: &params,
            flat: &mut flat,
            fresh: false,
        };
        let mut right = Packed::empty(Precision::F32);
        gradients.begin();
        gradients.linear(down, &[], &[], &mut right);
        gradients.passed();
        // The next part's are added.
        let (x, dy) = (vec![1.0; down.cols], vec![2.0; down.rows]);
        gradients.linear(down, &x, &dy, &mut right);
        gradients.linear(down, &[], &[], &mut right);
        assert!(flat[down.weight.range.clone()].iter().all(|&d| d == 2.0));
    }
}
