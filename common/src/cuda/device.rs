//! The seam between the decoder and a GPU: memory, copies, kernels by name, matrix products, captured graphs.
//!
//! Two things stand behind it: the CUDA driver, loaded when it is asked for (`driver`), and the same kernels run on the
//! CPU (`emulated`), which tests hold to the CPU's own decoder. All work of a device is done in the order it was given.

use crate::kernels::gemm;
use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use rayon::prelude::*;
use std::ffi::c_void;
use std::sync::Arc;

/// A place in the device's memory.
pub type Address = u64;

/// Free and all memory of a device, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// What can be allocated now.
    pub free: usize,
    /// What the device has.
    pub total: usize,
}

/// How many blocks of how many threads run a kernel, and the dynamic shared memory of each block, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y and z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, bytes.
    pub shared: u32,
}

impl Launch {
    /// Blocks in a row.
    pub fn row(blocks: usize, threads: usize) -> Self {
        Self::plane(blocks, 1, threads)
    }

    /// Blocks in a plane.
    pub fn plane(x: usize, y: usize, threads: usize) -> Self {
        Self {
            grid: [x as u32, y as u32, 1],
            block: [threads as u32, 1, 1],
            shared: 0,
        }
    }

    /// The same in so many layers.
    pub fn deep(self, z: usize) -> Self {
        let [x, y, _] = self.grid;
        Self {
            grid: [x, y, z as u32],
            ..self
        }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self {
            shared: bytes as u32,
            ..self
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }
}

/// The bytes of the largest argument: `Routing` has ten numbers.
const MOST_BYTES: usize = 40;

/// An argument of a kernel: its bytes in the order of this machine, which is the device's.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub struct Arg {
    bytes: [u8; MOST_BYTES],
    size: usize,
}

impl Arg {
    /// A number, or a structure of numbers as the kernel declares it.
    pub fn plain<T: Plain>(value: T) -> Self {
        let mut bytes = [0; MOST_BYTES];
        let size = size_of::<T>();
        bytes[..size].copy_from_slice(bytes_of_slice(std::slice::from_ref(&value)));
        Self { bytes, size }
    }

    /// How long it is, bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Where its bytes are, as launches want it.
    pub fn pointer(&self) -> *mut c_void {
        (&raw const self.bytes).cast_mut().cast()
    }
}

macro_rules! arguments {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Arg {
            fn from(value: $kind) -> Self {
                Self::plain(value)
            }
        }
    )*};
}
arguments!(u64, u32, i32, f32, f64);

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        buffer.address().into()
    }
}

/// Nothing where a kernel takes an optional array.
impl From<Option<&Buffer>> for Arg {
    fn from(buffer: Option<&Buffer>) -> Self {
        buffer.map_or(0, Buffer::address).into()
    }
}

/// A row-major matrix on the device, its rows `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Its first element.
    pub at: Address,
    /// What its elements are.
    pub precision: Precision,
    /// Elements from one row to the next.
    pub stride: usize,
}

/// Which way the operands of a product lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// C = A·Bᵀ of A `[m, k]` and B `[n, k]`: a linear map, x·Wᵀ.
    RowsByRows,
    /// C = A·B of A `[m, k]` and B `[k, n]`: its gradient to the input, dy·W.
    RowsByColumns,
    /// C = Aᵀ·B of A `[k, m]` and B `[k, n]`: its gradient to the weight, dyᵀ·x.
    ColumnsByColumns,
}

/// C = scale·(A by B) + keep·C, `[m, n]`. A and B have one format; sums are float32, and no TF32 in float32.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// How A and B lie.
    pub form: Form,
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// The left operand.
    pub a: Operand,
    /// The right operand.
    pub b: Operand,
    /// What is written.
    pub c: Operand,
    /// Factor of the product.
    pub scale: f32,
    /// Factor of what C holds; 0 does not read it.
    pub keep: f32,
}

/// What a device can do; see [`Device`].
pub(super) trait Backend: Send + Sync {
    fn name(&self) -> String;
    fn memory(&self) -> Result<Memory>;
    fn limit(&self, bytes: usize);
    fn allocate(&self, bytes: usize) -> Result<Address>;
    fn free(&self, at: Address, bytes: usize);
    fn upload(&self, from: &[u8], to: Address) -> Result<()>;
    fn download(&self, from: Address, to: &mut [u8]) -> Result<()>;
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()>;
    fn clear(&self, at: Address, bytes: usize) -> Result<()>;
    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()>;
    fn multiply(&self, product: Product) -> Result<()>;
    fn synchronize(&self) -> Result<()>;
    fn begin_capture(&self) -> Result<()>;
    fn end_capture(&self) -> Result<Box<dyn Replay>>;
}

/// Work that was captured, to be done again and again.
pub(super) trait Replay: Send + Sync {
    fn run(&self) -> Result<()>;
}

/// A GPU, or what stands in for one.
#[derive(Clone)]
pub struct Device(pub(super) Arc<dyn Backend>);

impl Device {
    /// What it is called, for people.
    pub fn name(&self) -> String {
        self.0.name()
    }

    /// How much memory it has.
    pub fn memory(&self) -> Result<Memory> {
        self.0.memory()
    }

    /// From now on it is as if it had no more memory than this; what the driver itself takes is not counted.
    pub fn limit_memory(&self, bytes: usize) {
        self.0.limit(bytes);
    }

    /// Memory of so many bytes; what it holds is left to chance.
    ///
    /// # Errors
    /// More than there is: the line says how much was asked for and how much is free.
    pub fn allocate(&self, bytes: usize) -> Result<Buffer> {
        let at = self.0.allocate(bytes).with_context(|| {
            let free = self.memory().map_or(0, |m| m.free);
            format!(
                "the GPU has no room for {} MB more ({} MB are free)",
                bytes >> 20,
                free >> 20
            )
        })?;
        Ok(Buffer {
            block: Arc::new(Block {
                device: self.clone(),
                at,
                bytes,
            }),
            at,
            bytes,
        })
    }

    /// Memory that is all zero.
    pub fn zeroed(&self, bytes: usize) -> Result<Buffer> {
        let buffer = self.allocate(bytes)?;
        buffer.clear()?;
        Ok(buffer)
    }

    /// Memory with these values.
    pub fn buffer_of<T: Plain>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.allocate(size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// Memory with these bytes, part after part.
    pub fn buffer_of_parts(&self, parts: &[&[u8]]) -> Result<Buffer> {
        let buffer = self.allocate(parts.iter().map(|part| part.len()).sum())?;
        let mut at = 0;
        for part in parts {
            buffer.write(at, part)?;
            at += part.len();
        }
        Ok(buffer)
    }

    /// Memory with these numbers, rounded to `precision`.
    pub fn buffer_in(&self, values: &[f32], precision: Precision) -> Result<Buffer> {
        let buffer = self.allocate(values.len() * bytes_of(precision))?;
        buffer.write_in(0, values, precision)?;
        Ok(buffer)
    }

    /// Runs a kernel. An empty grid is nothing to do.
    ///
    /// # Errors
    /// A kernel that there is not, or a launch that the device refuses.
    pub fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        if launch.is_empty() {
            return Ok(());
        }
        (self.0.launch(kernel, launch, args)).with_context(|| format!("kernel {kernel}"))
    }

    /// Multiplies matrices.
    pub fn multiply(&self, product: Product) -> Result<()> {
        if product.m == 0 || product.n == 0 {
            return Ok(());
        }
        assert_eq!(product.a.precision, product.b.precision);
        self.0.multiply(product)
    }

    /// Waits until all work is done.
    pub fn synchronize(&self) -> Result<()> {
        self.0.synchronize()
    }

    /// Records what `work` asks for instead of doing it. Nothing may be allocated, freed or copied from or to the host
    /// meanwhile, and all addresses must live as long as the graph is run.
    pub fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.0.begin_capture()?;
        let done = work();
        let graph = self.0.end_capture();
        done?;
        Ok(Graph {
            work: graph?,
            _device: self.clone(),
        })
    }
}

/// Captured work.
pub struct Graph {
    work: Box<dyn Replay>,
    /// Lives longer than what it is to run.
    _device: Device,
}

impl Graph {
    /// Does the work once more.
    pub fn run(&self) -> Result<()> {
        self.work.run()
    }
}

/// Numbers that may be copied byte by byte.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub unsafe trait Plain: Copy + Default {}
// SAFETY: all bits of these are value bits.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
// SAFETY: 16 bits, all of them value bits.
unsafe impl Plain for bf16 {}
// SAFETY: as above.
unsafe impl Plain for f16 {}

fn bytes_of_slice<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// What numbers are stored and multiplied as. The residual stream and all sums are float32 in each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    F32,
    Bf16,
    /// Half precision: eight times as fine as bfloat16, of the same size, but of numbers below 65504 alone. Only what scoring
    /// runs can be done in it.
    F16,
}

impl Precision {
    /// As `--dtype` and the names of kernels have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

impl From<gemm::Precision> for Precision {
    fn from(precision: gemm::Precision) -> Self {
        match precision {
            gemm::Precision::F32 => Self::F32,
            gemm::Precision::Bf16 => Self::Bf16,
        }
    }
}

/// Bytes of a number.
pub fn bytes_of(precision: Precision) -> usize {
    match precision {
        Precision::F32 => 4,
        Precision::Bf16 | Precision::F16 => 2,
    }
}

/// Memory on a device, or a part of it; given back when the last that shares it is dropped. Places in it are counted in
/// elements.
#[derive(Clone)]
pub struct Buffer {
    block: Arc<Block>,
    at: Address,
    bytes: usize,
}

/// Memory as it was allocated.
struct Block {
    device: Device,
    at: Address,
    bytes: usize,
}

impl Buffer {
    /// A part of it: `len` elements of so many bytes each, from `first` on.
    pub fn part(&self, first: usize, len: usize, bytes: usize) -> Self {
        assert!((first + len) * bytes <= self.bytes, "past the end");
        Self {
            block: self.block.clone(),
            at: self.element(first, bytes),
            bytes: len * bytes,
        }
    }

    /// Where it is.
    pub fn address(&self) -> Address {
        self.at
    }

    /// Where its element `index` of so many bytes each is.
    pub fn element(&self, index: usize, bytes: usize) -> Address {
        debug_assert!(index * bytes <= self.bytes);
        self.at + (index * bytes) as u64
    }

    /// How long it is, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// As a matrix `[?, cols]`, from row `first` on.
    pub fn rows(&self, first: usize, cols: usize, precision: Precision) -> Operand {
        Operand {
            at: self.element(first * cols, bytes_of(precision)),
            precision,
            stride: cols,
        }
    }

    /// Sets it to zero.
    pub fn clear(&self) -> Result<()> {
        self.device().0.clear(self.at, self.bytes)
    }

    /// Copies values to its elements from `first` on.
    pub fn write<T: Plain>(&self, first: usize, values: &[T]) -> Result<()> {
        self.check(first, values.len(), size_of::<T>())?;
        let to = self.element(first, size_of::<T>());
        self.device().0.upload(bytes_of_slice(values), to)
    }

    /// Copies numbers, rounded to `precision`, to its elements from `first` on.
    pub fn write_in(&self, first: usize, values: &[f32], precision: Precision) -> Result<()> {
        match precision {
            Precision::F32 => self.write(first, values),
            Precision::Bf16 => self.write_rounded(first, values, bf16::from_f32),
            Precision::F16 => self.write_rounded(first, values, f16::from_f32),
        }
    }

    fn write_rounded<T: Plain + Send>(
        &self,
        first: usize,
        values: &[f32],
        round: fn(f32) -> T,
    ) -> Result<()> {
        /// Elements rounded before they are sent: the whole of a big tensor is never held twice.
        const PART: usize = 1 << 22;
        let mut rounded = vec![];
        for (part, values) in values.chunks(PART).enumerate() {
            let values = values.par_iter().with_min_len(1 << 14);
            values.map(|&v| round(v)).collect_into_vec(&mut rounded);
            self.write(first + part * PART, &rounded)?;
        }
        Ok(())
    }

    /// Its elements from `first` on, once all work before is done.
    pub fn read<T: Plain>(&self, first: usize, len: usize) -> Result<Vec<T>> {
        self.check(first, len, size_of::<T>())?;
        let mut values = vec![T::default(); len];
        // SAFETY: every bit pattern is a `T`, and the bytes are those of `values`.
        let bytes = unsafe {
            std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), len * size_of::<T>())
        };
        self.device()
            .0
            .download(self.element(first, size_of::<T>()), bytes)?;
        Ok(values)
    }

    /// Its numbers in `precision`, widened.
    pub fn read_in(&self, first: usize, len: usize, precision: Precision) -> Result<Vec<f32>> {
        match precision {
            Precision::F32 => self.read(first, len),
            Precision::Bf16 => {
                let values: Vec<bf16> = self.read(first, len)?;
                Ok(values.into_iter().map(f32::from).collect())
            }
            Precision::F16 => {
                let values: Vec<f16> = self.read(first, len)?;
                Ok(values.into_iter().map(f32::from).collect())
            }
        }
    }

    /// Copies bytes from another buffer on the device.
    pub fn copy_from(&self, other: &Self, bytes: usize) -> Result<()> {
        ensure!(
            bytes <= self.bytes && bytes <= other.bytes,
            "a copy of {bytes} bytes past the end of device memory"
        );
        self.device().0.copy(other.at, self.at, bytes)
    }

    fn device(&self) -> &Device {
        &self.block.device
    }

    fn check(&self, first: usize, len: usize, size: usize) -> Result<()> {
        ensure!(
            (first + len) * size <= self.bytes,
            "{len} elements at {first} are past the end of device memory ({} bytes)",
            self.bytes
        );
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.device.0.free(self.at, self.bytes);
    }
}
