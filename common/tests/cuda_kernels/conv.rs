//! Short convolutions between gates: held to the CPU's kernels, and token by token to what a batch gives.

use crate::delta::{Numbers, narrow, segments, turn};
use crate::device::{
    Element, assert_close, for_both, in_every_order, launch, noise, unwritten, wide,
};
use common::kernels::gated_conv::{self, Shape};
use common::kernels::layout::Layout;

/// More channels than a block has threads, or few; prompts with responses, some shorter than the convolution, some of nothing.
fn cases() -> [(Shape, Layout); 3] {
    let case = |channels, kernel, groups: &[(usize, &[usize])]| {
        let mut layout = Layout::default();
        groups
            .iter()
            .for_each(|(root, own)| layout.push(*root, own));
        (Shape { channels, kernel }, layout)
    };
    [
        case(
            12,
            3,
            &[(5, &[4, 2, 19]), (7, &[]), (2, &[3, 0]), (70, &[0, 1])],
        ),
        case(300, 4, &[(1, &[1]), (17, &[8])]),
        case(5, 1, &[(1, &[9, 2]), (3, &[])]),
    ]
}

fn grid(shape: Shape, rows: usize) -> [usize; 3] {
    [rows, shape.channels.div_ceil(256), 1]
}

fn numbers(shape: Shape) -> (i32, i32) {
    (shape.channels as i32, shape.kernel as i32)
}

fn forward<T: Element>(shape: Shape, layout: &Layout, weight: &Vec<f32>, raw: &Vec<T>) -> Vec<T> {
    let (of, segments) = segments(layout);
    let (channels, kernel) = numbers(shape);
    let mut out: Vec<T> = unwritten(layout.tokens() * shape.channels);
    launch!(format!("gated_conv_{}", T::NAME), grid(shape, layout.tokens()), 256, 0;
        raw, &of, &segments, weight, &mut out, channels, kernel);
    out
}

fn both_ways<T: Element>() {
    for (shape, layout) in cases() {
        let (tokens, parts) = (layout.tokens(), 2);
        let weight: Vec<f32> = noise(shape.channels * shape.kernel, 1);
        let raw: Vec<T> = noise(tokens * shape.input_width(), 5);
        let d_out: Vec<T> = noise(tokens * shape.channels, 6);
        let (of, segments) = segments(&layout);
        let (channels, kernel) = numbers(shape);
        let (out, d_raw, partial) = in_every_order(|| {
            let out = forward(shape, &layout, &weight, &raw);
            let mut d_raw: Vec<T> = unwritten(raw.len());
            launch!(format!("gated_conv_backward_{}", T::NAME), grid(shape, tokens), 256, 0;
                &raw, &of, &segments, &weight, &d_out, &mut d_raw, channels, kernel);
            let mut partial: Vec<f32> = unwritten(parts * weight.len());
            launch!(format!("gated_conv_gradient_{}", T::NAME), [shape.channels.div_ceil(256), parts, 1], 256, 0;
                &raw, &of, &segments, &d_out, &mut partial, tokens as i32, channels, kernel);
            (out, d_raw, partial)
        });
        let (raw, turned) = (narrow(&raw), turn(&weight, shape.kernel));
        let mut expected = vec![0.0; out.len()];
        gated_conv::forward(&layout, shape, &turned, &raw, &mut expected);
        assert_close("out", &out, &wide(&expected), 4.0);
        let mut expected = vec![0.0; raw.len()];
        let d_weight = gated_conv::backward(
            &layout,
            shape,
            &turned,
            &raw,
            &mut narrow(&d_out),
            &mut expected,
        );
        assert_close("d_raw", &d_raw, &wide(&expected), 10.0);
        let sum = |i: usize| {
            (0..parts)
                .map(|part| partial[part * weight.len() + i])
                .sum()
        };
        let sums: Vec<f32> = (0..weight.len()).map(sum).collect();
        assert_close(
            "d_weight",
            &sums,
            &wide(&turn(&d_weight, shape.channels)),
            100.0,
        );
    }
}

/// Token by token, from what a prompt left, to the same bits as all at once.
fn steps<T: Element>() {
    for shape in cases().map(|(shape, _)| shape) {
        let (slots, lengths, prompts) = (3, [9, 7], [4, 2]); // the last slot is nobody's
        let mut layout = Layout::default();
        lengths.iter().for_each(|&len| layout.push(len, &[]));
        let weight: Vec<f32> = noise(shape.channels * shape.kernel, 1);
        let raw: Vec<T> = noise(layout.tokens() * shape.input_width(), 5);
        let all = forward(shape, &layout, &weight, &raw);
        let (channels, kernel) = numbers(shape);
        // The prompts' memories come after those of the slots.
        let spans: Vec<Numbers> = vec![[0, prompts[0], 0, 0, 3], [9, prompts[1], 0, 0, 4]];
        in_every_order(|| {
            let each = (shape.kernel - 1) * shape.channels;
            let mut past: Vec<f32> = unwritten(5 * each);
            launch!(format!("gated_conv_keep_{}", T::NAME), [shape.channels.div_ceil(256), 2, 1], 256, 0;
                &raw, &spans, &mut past, channels, kernel);
            let finished = vec![0, 0, 1i32];
            for step in 0..5 {
                let from = match step {
                    0 => vec![3, 4, 2i32],
                    _ => vec![0, 1, 2],
                };
                let rows = [prompts[0] as usize + step, 9 + prompts[1] as usize + step];
                let row = |x: &[T], r: usize| {
                    let width = x.len() / layout.tokens();
                    x[r * width..(r + 1) * width].to_vec()
                };
                let own = [rows[0], rows[1], 0].map(|r| row(&raw, r)).concat();
                let mut found: Vec<T> = unwritten(slots * shape.channels);
                launch!(format!("gated_conv_step_{}", T::NAME), grid(shape, slots), 256, 0;
                    &own, &mut past, &from, &finished, &weight, &mut found, channels, kernel);
                let (found, nobodys) = found.split_at(2 * shape.channels);
                assert_eq!(found, rows.map(|r| row(&all, r)).concat());
                assert!(nobodys.iter().all(|x| x.to().is_nan()));
            }
            assert!(past[2 * each..3 * each].iter().all(|x| x.is_nan()));
        });
    }
}

for_both!(both_ways, steps);
