//! What a GPU gives: the rates that its users are measured against. One JSON object on stdout.
//!
//! - `gemm_tflops`: our matrix product at the shapes of an 8B Llama's layers and of SmolLM2-135M's, by format, and the
//!   best of them.
//! - `read_gbps`: bytes read and written by a copy on the device, a second.
//! - `upload_gbps`: bytes from the host a second.
//! - `launch_us`: a small kernel after another; `graph_us`: the same inside a captured graph.
//!
//! `cargo run --release -p common --features cuda --example gpu_rates [NUMBER]`

use anyhow::Result;
use common::cuda::{self, Arg, Buffer, Device, Form, Launch, Precision, Product, bytes_of};
use serde_json::json;
use std::time::Instant;

fn main() -> Result<()> {
    let number = std::env::args().nth(1).map_or(Ok(0), |n| n.parse())?;
    let device = cuda::open(number)?;
    let memory = device.memory()?;
    let (launch, graph) = launches(&device)?;
    let rates = json!({
        "device": device.name(),
        "memory_gb": memory.total as f64 / 1e9,
        "free_gb": memory.free as f64 / 1e9,
        "gemm_tflops": {
            "bf16": products(&device, Precision::Bf16)?,
            "f32": products(&device, Precision::F32)?,
        },
        "read_gbps": copies(&device)?,
        "upload_gbps": uploads(&device)?,
        "launch_us": launch,
        "graph_us": graph,
    });
    println!("{rates:#}");
    Ok(())
}

/// Seconds of one of `times` runs, after one that does not count.
fn seconds(device: &Device, times: u32, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    device.synchronize()?;
    let start = Instant::now();
    for _ in 0..times {
        work()?;
    }
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64() / f64::from(times))
}

/// Numbers that look random: products of zeros run faster than real ones.
fn noise(device: &Device, len: usize, precision: Precision) -> Result<Buffer> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let values: Vec<f32> = (0..len).map(|_| next()).collect();
    device.buffer_in(&values, precision)
}

/// TFLOP/s by shape, and the best.
fn products(device: &Device, precision: Precision) -> Result<serde_json::Value> {
    let mut found = serde_json::Map::new();
    let mut best = 0f64;
    for (m, n, k) in [
        (8192, 6144, 4096),
        (8192, 28672, 4096),
        (8192, 4096, 14336),
        (8192, 8192, 8192),
        (256, 28672, 4096),
        (8192, 3072, 576),
        (8192, 576, 1536),
        (8192, 16384, 576),
    ] {
        let a = noise(device, m * k, precision)?;
        let b = noise(device, n * k, precision)?;
        let c = device.allocate(m * n * bytes_of(precision))?;
        let product = Product {
            form: Form::RowsByRows,
            m,
            n,
            k,
            a: a.rows(0, k, precision),
            b: b.rows(0, k, precision),
            c: c.rows(0, n, precision),
            scale: 1.0,
            keep: 0.0,
        };
        let each = seconds(device, 20, || device.multiply(product))?;
        let rate = 2.0 * (m * n * k) as f64 / each / 1e12;
        best = best.max(rate);
        found.insert(format!("{m}x{n}x{k}"), json!(rate));
    }
    found.insert("best".to_owned(), json!(best));
    Ok(found.into())
}

fn copies(device: &Device) -> Result<f64> {
    const BYTES: usize = 4 << 30;
    let (from, to) = (device.zeroed(BYTES)?, device.zeroed(BYTES)?);
    let each = seconds(device, 20, || to.copy_from(&from, BYTES))?;
    Ok(2.0 * BYTES as f64 / each / 1e9)
}

fn uploads(device: &Device) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    let (from, to) = (vec![1u8; BYTES], device.allocate(BYTES)?);
    let each = seconds(device, 4, || to.write(0, &from))?;
    Ok(BYTES as f64 / each / 1e9)
}

/// Microseconds of a small kernel, launched and in a graph.
fn launches(device: &Device) -> Result<(f64, f64)> {
    const TIMES: u32 = 1000;
    let x = device.zeroed(4 << 10)?;
    let small = || -> Result<()> {
        let args = [Arg::from(&x), Arg::plain(1024u64), Arg::from(1.0f32)];
        device.launch("scale_f32", Launch::row(1, 256), &args)
    };
    let launched = seconds(device, TIMES, small)?;
    let graph = device.capture(|| (0..TIMES).try_for_each(|_| small()))?;
    let replayed = seconds(device, 10, || graph.run())? / f64::from(TIMES);
    Ok((launched * 1e6, replayed * 1e6))
}
