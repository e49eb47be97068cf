use common::kernels::gemm::*;
use std::time::Instant;
fn main() {
    let (m, k) = (602, 576);
    for scale in [1.0f32, 1e-37, 1e-41] {
    let w: Vec<f32> = (0..m * k).map(|i| ((i % 97) as f32 / 97.0 - 0.5)*scale).collect();
    let b = Packed::from_rows(Mat::new(&w, 1, k), Precision::Bf16);
    let mut c = vec![0.0; m];
    let mut time = |name: &str, a: Left| {
        let mut best = f64::MAX;
        for _ in 0..200 {
            let t = Instant::now();
            matmul(a, b.panels(), &mut c, 1, Write::Set, Threads::One);
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{scale} {name}: {:.1} us, {:.2} elements/ns", best * 1e6, (m * k) as f64 / best / 1e9);
    };
    time("rows", Left::Rows(Mat::new(&w, m, k)));
    time("columns", Left::Columns(Mat::new(&w, k, m)));
    }
}
