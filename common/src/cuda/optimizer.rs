//! What is trained on the device: float32 masters and their gradients, AdamW's moments, and the copy that is multiplied.
//! All are flat; one launch passes over all of them, and the gradient's norm is taken in another.

use super::args;
use super::device::{Buffer, Device, Launch, Plain, Precision, bytes_of};
use super::launches::THREADS;
use anyhow::{Context, Result};
use std::ops::Range;

/// Blocks that sum squares.
const SUMS: usize = 1024;
/// Parameters of a block of AdamW, at most: enough of these balance well.
const RUN: usize = 1 << 16;
/// Numbers that come from or go to the host at a time.
const PART: usize = 1 << 22;

/// Parameters in training.
pub struct Trained {
    /// How many.
    pub len: usize,
    /// The sum of gradients since the last step, float32.
    pub gradient: Buffer,
    masters: Buffer,
    /// First and second.
    moments: [Buffer; 2],
    moments_in: Precision,
    /// The masters in bfloat16; none where float32 is multiplied.
    copy: Option<Buffer>,
    runs: Buffer,
    run_count: usize,
    /// Σg² of each block, float64.
    sums: Buffer,
    /// √Σg², float64.
    norm: Buffer,
    /// What the gradient is taken times, float32.
    factor: Buffer,
    device: Device,
}

/// A run of parameters of one kind, as kernels declare it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Run {
    first: i64,
    len: i32,
    decayed: i32,
}
// SAFETY: 64 + 32 + 32 bits without padding.
unsafe impl Plain for Run {}

/// One of the flat buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flat {
    /// The parameters.
    Masters,
    /// First moments, 0, or second, 1.
    Moments(usize),
}

/// The numbers of a step, as the kernel of AdamW takes them.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// The learning rate over 1 − β₁ᵗ.
    pub rate: f32,
    /// √(1 − β₂ᵗ).
    pub root: f32,
    /// 1 − the learning rate times λ.
    pub keep: f32,
    /// t.
    pub step: u64,
}

impl Trained {
    /// Room for `len` parameters that are multiplied in `precision`; weight decay applies to those in `decayed`, which
    /// are in order. Their values are left to chance, the rest is zero.
    ///
    /// # Errors
    /// A device without room.
    pub fn new(
        device: &Device,
        len: usize,
        decayed: &[Range<usize>],
        precision: Precision,
        moments: Precision,
    ) -> Result<Self> {
        let runs = runs(len, decayed);
        let moment = || device.zeroed(len * bytes_of(moments));
        Ok(Self {
            len,
            gradient: device.zeroed(len * size_of::<f32>())?,
            masters: device.allocate(len * size_of::<f32>())?,
            moments: [moment()?, moment()?],
            moments_in: moments,
            copy: match precision {
                Precision::F32 => None,
                Precision::Bf16 | Precision::F16 => {
                    Some(device.allocate(len * bytes_of(precision))?)
                }
            },
            runs: device.buffer_of(&runs)?,
            run_count: runs.len(),
            sums: device.allocate(SUMS * size_of::<f64>())?,
            norm: device.allocate(size_of::<f64>())?,
            factor: device.allocate(size_of::<f32>())?,
            device: device.clone(),
        })
    }

    /// The bytes that it takes for each parameter.
    pub fn bytes(precision: Precision, moments: Precision) -> usize {
        let copy = match precision {
            Precision::F32 => 0,
            Precision::Bf16 | Precision::F16 => bytes_of(precision),
        };
        2 * size_of::<f32>() + 2 * bytes_of(moments) + copy
    }

    /// The parameters, float32.
    pub fn masters(&self) -> &Buffer {
        &self.masters
    }

    /// The parameters as they are multiplied.
    pub fn working(&self) -> &Buffer {
        self.copy.as_ref().unwrap_or(&self.masters)
    }

    /// Writes numbers into a flat buffer, from `first` on. After the last, [`Self::refresh`].
    ///
    /// # Errors
    /// More numbers than there is place for.
    pub fn write(&self, flat: Flat, first: usize, values: &[f32]) -> Result<()> {
        let (buffer, format) = self.flat(flat);
        buffer.write_in(first, values, format)
    }

    /// Hands over a range of a flat buffer, part after part.
    pub fn read(
        &self,
        flat: Flat,
        range: Range<usize>,
        take: &mut dyn FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let (buffer, format) = self.flat(flat);
        for first in range.clone().step_by(PART) {
            let len = (range.end - first).min(PART);
            take(&buffer.read_in(first, len, format)?)?;
        }
        Ok(())
    }

    fn flat(&self, flat: Flat) -> (&Buffer, Precision) {
        match flat {
            Flat::Masters => (&self.masters, Precision::F32),
            Flat::Moments(which) => (&self.moments[which], self.moments_in),
        }
    }

    /// Makes the working copy again from the masters, rounded as a step rounds it.
    pub fn refresh(&self) -> Result<()> {
        let Some(copy) = &self.copy else {
            return Ok(());
        };
        self.device.launch(
            "round_bf16",
            elements(self.len),
            args![&self.masters, copy, self.len as u64, 0u64, 1],
        )
    }

    /// √Σg², after which [`Self::step`] takes the gradient with a norm of at most `limit` (0 is no limit).
    pub fn gradient_norm(&self, limit: f64) -> Result<f64> {
        self.device.launch(
            "square_sum",
            Launch::row(SUMS, THREADS),
            args![&self.gradient, self.len as u64, &self.sums],
        )?;
        self.device.launch(
            "clip",
            Launch::row(1, THREADS),
            args![&self.sums, SUMS as i32, limit, &self.norm, &self.factor],
        )?;
        Ok(self.norm.read(0, 1)?[0])
    }

    /// Sets the gradient to zero, as a step would.
    pub fn drop_gradient(&self) -> Result<()> {
        self.gradient.clear()
    }

    /// A step of AdamW on everything, given [`Self::gradient_norm`] before; the gradient is zero after it.
    pub fn step(&self, rates: Rates) -> Result<()> {
        let step = i32::try_from(rates.step).context("more steps than are counted")?;
        self.device.launch(
            &format!("adamw_{}", self.moments_in.name()),
            Launch::row(self.run_count, THREADS),
            args![
                &self.runs,
                &self.masters,
                &self.gradient,
                &self.moments[0],
                &self.moments[1],
                self.copy.as_ref(),
                &self.factor,
                rates.rate,
                rates.root,
                rates.keep,
                step,
            ],
        )
    }
}

/// A launch over `n` elements, each its own sum.
pub(super) fn elements(n: usize) -> Launch {
    Launch::row(n.div_ceil(1024).min(8192), THREADS)
}

/// Cuts `len` parameters into runs of one kind.
fn runs(len: usize, decayed: &[Range<usize>]) -> Vec<Run> {
    let mut runs = vec![];
    let mut push = |range: Range<usize>, decayed: bool| {
        for first in range.clone().step_by(RUN) {
            runs.push(Run {
                first: first as i64,
                len: (range.end - first).min(RUN) as i32,
                decayed: i32::from(decayed),
            });
        }
    };
    let mut at = 0;
    for range in decayed {
        push(at..range.start, false);
        push(range.clone(), true);
        at = range.end;
    }
    push(at..len, false);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_every_parameter_once_in_its_kind() {
        let runs = runs(200_000, &[3..5, 5..140_000, 150_000..150_001]);
        let mut at = 0;
        for run in &runs {
            assert_eq!(run.first, at);
            assert!((1..=RUN as i32).contains(&run.len));
            let decayed = (3..140_000).contains(&run.first) || run.first == 150_000;
            assert_eq!(run.decayed, i32::from(decayed), "{run:?}");
            at += i64::from(run.len);
        }
        assert_eq!(at, 200_000);
    }
}
