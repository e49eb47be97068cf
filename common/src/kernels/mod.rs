//! The arithmetic on a CPU: matrix products, norms, rotary positions, gated activations, attention, linear attention, short convolutions, soft-max; forward and backward.
//!
//! All of it works on plain `f32` slices, row-major. Every result row depends on its own inputs alone, never on how
//! many other rows were computed with it or by how many threads, so batch size and packing cannot change a number.

pub mod activation;
pub mod attention;
pub mod cap;
pub mod decoding;
pub mod delta;
pub mod gated_conv;
pub mod gemm;
pub mod isa;
pub mod layout;
pub mod norm;
pub mod rope;
mod shared;
pub mod softmax;
mod taps;
pub mod team;

/// Makes `v` so long. What it holds then is left to chance: it is to be written whole.
pub fn fit(v: &mut Vec<f32>, len: usize) {
    if len > v.capacity() {
        *v = vec![0.0; len]; // neither copied nor grown beyond what is asked for
    } else {
        v.resize(len, 0.0);
    }
}

/// Makes `to` a copy of `from`.
pub fn copy(from: &[f32], to: &mut Vec<f32>) {
    fit(to, from.len());
    rows(to, 1, |first, to| {
        to.copy_from_slice(&from[first..][..to.len()])
    });
}

/// Multiplies all of `x` by a number, where that is not 1.
pub fn scale(x: &mut [f32], by: f32) {
    if by != 1.0 {
        rows(x, 1, |_, x| x.iter_mut().for_each(|x| *x *= by));
    }
}

/// `to` gains `from`.
pub fn add(from: &[f32], to: &mut [f32]) {
    rows(to, 1, |first, to| {
        let from = &from[first..];
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    });
}

/// Runs `f(first row, rows)` over the rows of `data`, over all threads where there is work enough.
pub fn rows(data: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    const SMALL: usize = 1 << 14;
    let count = data.len() / width;
    if data.len() <= SMALL {
        return f(0, data);
    }
    let step = count.div_ceil(4 * rayon::current_num_threads()).max(1);
    team::chunks(data, step * width, |i, part| f(i * step, part));
}

#[cfg(test)]
pub(crate) mod testing {
    /// Reproducible numbers in −1 … 1.
    pub fn noise(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// Holds a gradient to central differences of a loss, element by element.
    pub fn finite_difference(x: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
        let scale = gradient.iter().fold(1e-3f32, |m, g| m.max(g.abs())) as f64;
        for i in 0..x.len() {
            let at = |step: f32| {
                let mut moved = x.to_vec();
                moved[i] += step;
                loss(&moved)
            };
            let estimate = (at(1e-2) - at(-1e-2)) / 2e-2;
            let error = (estimate - gradient[i] as f64).abs();
            assert!(
                error < 5e-3 * scale,
                "element {i}: {} but differences give {estimate}",
                gradient[i]
            );
        }
    }
}
