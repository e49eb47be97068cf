//! AdamW, clipping, rounding.

use crate::device::{Element, assert_close, in_every_order, launch, noise, unwritten, wide};
use half::bf16;

#[derive(Clone, Copy)]
#[repr(C)]
struct Run {
    first: i64,
    len: i32,
    decayed: i32,
}

fn sixteen_bits(number: u32) -> u32 {
    let x = (number ^ (number >> 16)).wrapping_mul(0x7feb_352d);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x >> 16
}

fn rounded_with(x: f32, noise: u32) -> bf16 {
    bf16::from_bits((x.to_bits().wrapping_add(noise) >> 16) as u16)
}

const RUNS: [(usize, i32, i32); 4] = [(0, 300, 1), (300, 1, 0), (301, 255, 0), (556, 700, 1)];

/// Three steps beside the same in float64, for moments of each type.
fn adamw<M: Element>() {
    let len = 1256;
    let runs: Vec<Run> = RUNS
        .iter()
        .map(|&(first, len, decayed)| Run {
            first: first as i64,
            len,
            decayed,
        })
        .collect();
    let (p, factor) = (noise::<f32>(len, 1), vec![0.25f32]);
    let (rate, decay) = (1e-2f64, 0.1);
    let steps: Vec<Vec<f32>> = (0..3).map(|s| noise(len, 10 + s)).collect();
    let (ours, copy) = in_every_order(|| {
        let (mut p, mut m, mut v): (_, Vec<M>, Vec<M>) =
            (p.clone(), vec![M::default(); len], vec![M::default(); len]);
        let mut copy: Vec<bf16> = unwritten(len);
        for (i, g) in steps.iter().enumerate() {
            let (mut g, t) = (g.clone(), i as i32 + 1);
            let (step_rate, root) = (
                rate / (1.0 - 0.9f64.powi(t)),
                (1.0 - 0.999f64.powi(t)).sqrt(),
            );
            launch!(format!("adamw_{}", M::NAME), [runs.len(), 1, 1], 256, 0;
                &runs, &mut p, &mut g, &mut m, &mut v, &mut copy, &factor,
                step_rate as f32, root as f32, (1.0 - rate * decay) as f32, t);
            assert!(g.iter().all(|&g| g == 0.0));
        }
        (p, copy)
    });
    let (mut q, mut m, mut v) = (wide(&p), vec![0.0; len], vec![0.0; len]);
    for (i, g) in steps.iter().enumerate() {
        let t = i as i32 + 1;
        for (first, n, decayed) in RUNS {
            for k in first..first + n as usize {
                let g = g[k] as f64 * 0.25;
                q[k] *= if decayed == 1 {
                    1.0 - rate * decay
                } else {
                    1.0
                };
                m[k] = 0.9 * m[k] + 0.1 * g;
                v[k] = 0.999 * v[k] + 0.001 * g * g;
                q[k] -= rate * (m[k] / (1.0 - 0.9f64.powi(t)))
                    / ((v[k] / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
            }
        }
    }
    // Steps are 1e-2 of a parameter; moments in bfloat16 keep each step to about a hundredth.
    let tolerance = if M::NAME == "f32" { 1e-6 } else { 6e-4 };
    for (i, (x, exact)) in ours.iter().zip(&q).enumerate() {
        assert!(
            (*x as f64 - exact).abs() < tolerance,
            "element {i}: {x}, not {exact}"
        );
    }
    for (i, (c, p)) in copy.iter().zip(&ours).enumerate() {
        assert_eq!(*c, rounded_with(*p, sixteen_bits(i as u32)));
    }
}

crate::device::for_both!(adamw);

/// A gradient's square that is a constant must raise the second moment to itself, not leave it where bfloat16 stalls.
#[test]
fn moments_in_bfloat16_do_not_stall() {
    let len = 512;
    let runs = vec![Run {
        first: 0,
        len: len as i32,
        decayed: 0,
    }];
    let (mut p, mut m, mut v) = (
        vec![0.0f32; len],
        vec![bf16::ZERO; len],
        vec![bf16::ZERO; len],
    );
    let factor = vec![1.0f32];
    let steps = 2000;
    for t in 1..=steps {
        let mut g = vec![1.0f32; len];
        launch!("adamw_bf16", [1, 1, 1], 256, 0; &runs, &mut p, &mut g, &mut m, &mut v, crate::device::Null, &factor,
            0.0f32, 1.0f32, 1.0f32, t);
    }
    let mean = v.iter().map(|v| v.to() as f64).sum::<f64>() / len as f64;
    let exact = 1.0 - 0.999f64.powi(steps);
    assert!((mean - exact).abs() < 0.02 * exact, "{mean} for {exact}");
}

#[test]
fn norm_and_clipping() {
    for n in [1usize, 1000, 5000] {
        let x: Vec<f32> = noise(n, 1);
        let exact = x.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt();
        for (limit, factor) in [
            (0.0, 1.0),
            (1e9, 1.0),
            (0.1, (0.1 / (exact + 1e-6)).min(1.0)),
        ] {
            let (norm, found) = in_every_order(|| {
                let (mut partial, mut norm, mut found) =
                    (vec![f64::NAN; 7], vec![f64::NAN], vec![f32::NAN]);
                launch!("square_sum", [7, 1, 1], 256, 0; &x, n as i64, &mut partial);
                launch!("clip", [1, 1, 1], 256, 0; &partial, 7i32, limit, &mut norm, &mut found);
                (norm, found)
            });
            assert!((norm[0] - exact).abs() < 1e-12 * exact.max(1.0));
            assert_eq!(found[0], factor as f32);
        }
    }
}

#[test]
fn conversions() {
    let x: Vec<f32> = noise(3000, 1);
    let n = x.len() as i64;
    let grid = [3, 1, 1];
    let (nearest, dithered, back, scaled) = in_every_order(|| {
        let (mut nearest, mut dithered): (Vec<bf16>, Vec<bf16>) =
            (unwritten(3000), unwritten(3000));
        launch!("round_bf16", grid, 256, 0; &x, &mut nearest, n, 0i64, 0i32);
        launch!("round_bf16", grid, 256, 0; &x, &mut dithered, n, 77i64, 1i32);
        let mut back: Vec<f32> = unwritten(3000);
        launch!("widen_bf16", grid, 256, 0; &nearest, &mut back, n);
        let mut scaled = x.clone();
        launch!("scale_f32", grid, 256, 0; &mut scaled, n, -2.0f32);
        (nearest, dithered, back, scaled)
    });
    for i in 0..x.len() {
        assert_eq!(nearest[i], bf16::from_f32(x[i]));
        assert_eq!(dithered[i], rounded_with(x[i], sixteen_bits(77 + i as u32)));
        assert_eq!(back[i], nearest[i].to_f32());
        assert_eq!(scaled[i], -2.0 * x[i]);
    }
    assert_close("dithered", &dithered, &wide(&x), 2.0);
}
