//! A GPU that is not there: host memory, the very kernels compiled for the CPU, and the CPU's own matrix product.
//!
//! It is strict where a GPU is merely undefined: fresh memory holds NaNs, writes past the end of a buffer are found when
//! it is given back (under AddressSanitizer all accesses beside it, as they happen: `just test-sanitized`), work that is
//! being captured is not done, and there is only as much memory as it was made with.

use super::device::{
    Address, Arg, Backend, Device, Form, Launch, Memory, Operand, Precision, Product, Replay,
};
use super::images::{self, Host};
use crate::kernels::gemm::{self, Left, Mat, Packed, Threads, Write, matmul};
use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// Bytes before and after each buffer that must stay as they were.
const GUARD: usize = 256;
const UNTOUCHED: u8 = 0xa5;

struct Emulated {
    total: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Live buffers and their lengths.
    buffers: HashMap<Address, usize>,
    used: usize,
    capture: Option<Vec<Work>>,
}

/// Something to do, as a graph keeps it.
#[derive(Clone)]
enum Work {
    Launch(Host, Launch, Vec<Arg>),
    Multiply(Product),
    Copy(Address, Address, usize),
    Clear(Address, usize),
}

/// A device with so much memory.
pub fn open(total: usize) -> Device {
    Device(Arc::new(Emulated {
        total: total.into(),
        state: Mutex::default(),
    }))
}

impl Emulated {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with the lock")
    }

    /// Does it, or keeps it for the graph that is being captured.
    fn take(&self, work: Work) -> Result<()> {
        if let Some(graph) = &mut self.state().capture {
            graph.push(work);
            return Ok(());
        }
        work.run();
        Ok(())
    }

    fn not_in_a_graph(&self) -> Result<()> {
        ensure!(self.state().capture.is_none(), "not allowed inside a graph");
        Ok(())
    }
}

fn block(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * GUARD, GUARD).expect("a size that can be")
}

impl Backend for Emulated {
    fn name(&self) -> String {
        "an emulated GPU".to_owned()
    }

    fn memory(&self) -> Result<Memory> {
        let total = self.total.load(SeqCst);
        Ok(Memory {
            free: total.saturating_sub(self.state().used),
            total,
        })
    }

    fn limit(&self, bytes: usize) {
        self.total.fetch_min(bytes, SeqCst);
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        self.not_in_a_graph()?;
        let mut state = self.state();
        let total = self.total.load(SeqCst);
        ensure!(state.used + bytes <= total, "out of memory");
        // SAFETY: the layout has a size above 0, and all of it is written.
        let at = unsafe {
            let start = alloc(block(bytes));
            ensure!(!start.is_null(), "out of the host's memory");
            start.write_bytes(UNTOUCHED, GUARD);
            start.add(GUARD).write_bytes(0xff, bytes); // NaN in either format
            start.add(GUARD + bytes).write_bytes(UNTOUCHED, GUARD);
            images::fence(start, GUARD);
            images::fence(start.add(GUARD + bytes), GUARD);
            start.add(GUARD) as Address
        };
        state.used += bytes;
        state.buffers.insert(at, bytes);
        Ok(at)
    }

    fn free(&self, at: Address, bytes: usize) {
        let mut state = self.state();
        let known = state.buffers.remove(&at);
        let capturing = state.capture.is_some();
        state.used -= bytes;
        drop(state);
        // SAFETY: the block was made by `allocate` with this length, and its owner is gone.
        let intact = unsafe {
            let start = (at as *mut u8).sub(GUARD);
            let guard = |first| std::slice::from_raw_parts(start.add(first), GUARD);
            let intact = (guard(0).iter().chain(guard(GUARD + bytes))).all(|&b| b == UNTOUCHED);
            dealloc(start, block(bytes));
            intact
        };
        if !std::thread::panicking() {
            assert_eq!(known, Some(bytes), "freed what was not allocated");
            assert!(intact, "a kernel wrote past a buffer of {bytes} bytes");
            assert!(!capturing, "freed inside a graph");
        }
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        self.not_in_a_graph()?;
        // SAFETY: the range was checked against its buffer.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        self.not_in_a_graph()?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.take(Work::Copy(from, to, bytes))
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.take(Work::Clear(at, bytes))
    }

    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        let host = images::emulated(kernel).context("this build has no such kernel")?;
        let sizes: Vec<usize> = args.iter().map(Arg::size).collect();
        let declared = images::parameter_sizes(kernel);
        ensure!(
            sizes == declared,
            "arguments of {sizes:?} bytes for parameters of {declared:?}"
        );
        self.take(Work::Launch(host, launch, args.to_vec()))
    }

    fn multiply(&self, product: Product) -> Result<()> {
        self.take(Work::Multiply(product))
    }

    fn synchronize(&self) -> Result<()> {
        self.not_in_a_graph()
    }

    fn begin_capture(&self) -> Result<()> {
        self.not_in_a_graph()?;
        self.state().capture = Some(vec![]);
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Replay>> {
        match self.state().capture.take() {
            Some(work) => Ok(Box::new(Recorded(work))),
            None => bail!("nothing is being captured"),
        }
    }
}

struct Recorded(Vec<Work>);

impl Replay for Recorded {
    fn run(&self) -> Result<()> {
        self.0.iter().for_each(Work::run);
        Ok(())
    }
}

impl Work {
    fn run(&self) {
        match self {
            Self::Launch(host, launch, args) => {
                let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
                let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
                // SAFETY: as for a real launch: the arguments fit the kernel, which is the caller's promise.
                unsafe { host(x, y, z, bx, by, bz, launch.shared, pointers.as_mut_ptr()) };
            }
            Self::Multiply(product) => multiply(*product),
            // SAFETY: both ranges were checked against their buffers; a device's copy may not overlap either.
            Self::Copy(from, to, bytes) => unsafe {
                std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes);
            },
            // SAFETY: the range is that of a live buffer.
            Self::Clear(at, bytes) => unsafe { (*at as *mut u8).write_bytes(0, *bytes) },
        }
    }
}

/// As cuBLAS does it: operands as they are, sums in float32, the result rounded once.
fn multiply(p: Product) {
    let (a_shape, b_shape) = match p.form {
        Form::RowsByRows => ((p.m, p.k), (p.n, p.k)),
        Form::RowsByColumns => ((p.m, p.k), (p.k, p.n)),
        Form::ColumnsByColumns => ((p.k, p.m), (p.k, p.n)),
    };
    let (a, b) = (read(p.a, a_shape), read(p.b, b_shape));
    let mat = |values, shape: (usize, usize)| Mat::new(values, shape.0, shape.1);
    let left = match p.form {
        Form::ColumnsByColumns => Left::Columns(mat(&a, a_shape)),
        _ => Left::Rows(mat(&a, a_shape)),
    };
    // Products of 16-bit numbers are exact in float32.
    let right = match p.form {
        Form::RowsByRows => Packed::from_rows(mat(&b, b_shape), gemm::Precision::F32),
        _ => Packed::from_columns(mat(&b, b_shape), gemm::Precision::F32),
    };
    let mut c = vec![0.0; p.m * p.n];
    matmul(left, right.panels(), &mut c, p.n, Write::Set, Threads::All);
    if p.keep != 0.0 {
        let old = read(p.c, (p.m, p.n));
        c.iter_mut()
            .zip(old)
            .for_each(|(c, old)| *c = p.scale * *c + p.keep * old);
    } else {
        c.iter_mut().for_each(|c| *c *= p.scale);
    }
    write(p.c, &c, p.n);
}

fn read(operand: Operand, (rows, cols): (usize, usize)) -> Vec<f32> {
    assert!(cols <= operand.stride || rows <= 1);
    let mut values = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        let first = row * operand.stride;
        // SAFETY: the operand is a live buffer of this shape, which is the caller's promise.
        unsafe {
            match operand.precision {
                Precision::F32 => {
                    let at = (operand.at as *const f32).add(first);
                    values.extend_from_slice(std::slice::from_raw_parts(at, cols));
                }
                Precision::Bf16 => {
                    let at = (operand.at as *const bf16).add(first);
                    let row = std::slice::from_raw_parts(at, cols);
                    values.extend(row.iter().map(|v| v.to_f32()));
                }
                Precision::F16 => {
                    let at = (operand.at as *const f16).add(first);
                    let row = std::slice::from_raw_parts(at, cols);
                    values.extend(row.iter().map(|v| v.to_f32()));
                }
            }
        }
    }
    values
}

fn write(operand: Operand, values: &[f32], cols: usize) {
    for (row, values) in values.chunks_exact(cols).enumerate() {
        let first = row * operand.stride;
        for (i, &value) in values.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe {
                match operand.precision {
                    Precision::F32 => (operand.at as *mut f32).add(first + i).write(value),
                    Precision::Bf16 => (operand.at as *mut bf16)
                        .add(first + i)
                        .write(bf16::from_f32(value)),
                    Precision::F16 => (operand.at as *mut f16)
                        .add(first + i)
                        .write(f16::from_f32(value)),
                }
            }
        }
    }
}
