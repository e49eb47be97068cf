//! A real GPU: the CUDA driver and cuBLAS, loaded when one is asked for. Without them there is an error, not a panic.

use super::device::{
    Address, Arg, Backend, Device, Form, Launch, Memory, Operand, Precision, Product, Replay,
};
use super::images;
use anyhow::{Context, Result, bail, ensure};
use cudarc::cublas::{result as blas, sys as blas_sys};
use cudarc::driver::{result as cuda, sys};
use rayon::prelude::*;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

/// The oldest cards that have bfloat16 matrix units and the copies that the kernels use: Ampere.
const OLDEST: (i32, i32) = (8, 0);
/// What cuBLAS may use beside its operands; NVIDIA's advice for Hopper. Given once, so that graphs can hold products.
const WORKSPACE: usize = 32 << 20;
/// Copies from the host go through pinned memory in parts of so many bytes, filled and sent in turn.
const PART: usize = 16 << 20;
/// Bytes of a part that one thread copies at a time.
const COPIED: usize = 1 << 19;
/// Dynamic shared memory that a kernel gets without asking: 48 KB less what kernels declare by themselves.
const SHARED_UNASKED: u32 = 47 << 10;

/// One GPU, one stream.
struct Driver {
    name: String,
    device: sys::CUdevice,
    context: Opened,
    stream: sys::CUstream,
    pool: sys::CUmemoryPool,
    blas: blas_sys::cublasHandle_t,
    workspace: sys::CUdeviceptr,
    modules: Vec<sys::CUmodule>,
    kernels: Mutex<HashMap<String, Kernel>>,
    staging: Mutex<Staging>,
    capturing: AtomicBool,
    /// What the user lets us take of its memory, bytes.
    limit: AtomicUsize,
}

/// A GPU's context, as one opening of it has it.
#[derive(Clone, Copy)]
struct Opened {
    handle: sys::CUcontext,
    opening: u64,
}

impl Opened {
    fn new(handle: sys::CUcontext) -> Self {
        static OPENINGS: AtomicU64 = AtomicU64::new(0);
        let opening = OPENINGS.fetch_add(1, SeqCst) + 1;
        Self { handle, opening }
    }

    /// Makes it this thread's, if it is not: a launch is short, and each begins with this.
    fn bind(self) -> Result<()> {
        thread_local! {
            static CURRENT: Cell<u64> = const { Cell::new(0) };
        }
        if CURRENT.get() != self.opening {
            // SAFETY: the context lives as long as what was opened with it.
            unsafe { cuda::ctx::set_current(self.handle)? };
            CURRENT.set(self.opening);
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Kernel {
    function: sys::CUfunction,
    /// Dynamic shared memory that it was told to allow.
    shared: u32,
}

/// Two pinned parts, and the events after which each may be filled again.
struct Staging {
    parts: [*mut u8; 2],
    sent: [sys::CUevent; 2],
    next: usize,
}

// SAFETY: the driver's handles may be used from every thread; each call makes the context the thread's own first, and
// what changes is behind mutexes.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

/// How many GPUs the driver shows; none where there is no driver.
pub fn count() -> usize {
    // SAFETY: only tries to load a library by its well-known name.
    let present = unsafe { sys::is_culib_present() };
    match present && cuda::init().is_ok() {
        true => cuda::device::get_count().map_or(0, |n| n as usize),
        false => 0,
    }
}

/// Opens the GPU with this number.
///
/// # Errors
/// No driver, no such GPU, one that is too old, no cuBLAS.
pub fn open(ordinal: usize) -> Result<Device> {
    // SAFETY: only tries to load a library by its well-known name.
    let has_driver = unsafe { sys::is_culib_present() };
    ensure!(
        has_driver,
        "there is no CUDA driver (libcuda.so.1) on this machine"
    );
    cuda::init().context("the CUDA driver does not start")?;
    let count = cuda::device::get_count().context("counting GPUs")?;
    ensure!(
        ordinal < count as usize,
        "there {} (they are numbered from 0)",
        match count {
            0 => "is no GPU".to_owned(),
            1 => "is one GPU".to_owned(),
            n => format!("are {n} GPUs"),
        }
    );
    let device = cuda::device::get(ordinal as c_int)?;
    let name = cuda::device::get_name(device)?;
    let capability = capability(device)?;
    ensure!(
        capability >= OLDEST,
        "{name} has compute capability {}.{}, but {}.{} (Ampere) is the oldest that will do",
        capability.0,
        capability.1,
        OLDEST.0,
        OLDEST.1
    );
    // SAFETY: only tries to load a library by its well-known name.
    let has_blas = unsafe { blas_sys::is_culib_present() };
    ensure!(
        has_blas,
        "cuBLAS (libcublas.so.13 or .12) is not found: install the CUDA runtime, or name its folder in LD_LIBRARY_PATH"
    );
    let driver = Driver::new(device, name, capability)?;
    Ok(Device(Arc::new(driver)))
}

fn capability(device: sys::CUdevice) -> Result<(i32, i32)> {
    use sys::CUdevice_attribute_enum::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    // SAFETY: the device came from `get`.
    let of = |attribute| unsafe { cuda::device::get_attribute(device, attribute) };
    Ok((of(MAJOR)?, of(MINOR)?))
}

impl Driver {
    fn new(device: sys::CUdevice, name: String, capability: (i32, i32)) -> Result<Self> {
        // SAFETY: every handle is used only after the call that made it succeeded, with the context current.
        unsafe {
            let context = Opened::new(cuda::primary_ctx::retain(device)?);
            context.bind()?;
            let stream = cuda::stream::create(cuda::stream::StreamKind::NonBlocking)?;
            let pool = cuda::device::get_default_mem_pool(device)?;
            // Freed memory stays in the pool: the next pass wants it again.
            let mut keep = u64::MAX;
            cuda::mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut keep).cast(),
            )?;
            let blas = blas::create_handle().context("cuBLAS does not start")?;
            blas::set_stream(blas, stream.cast())?;
            let workspace = cuda::malloc_sync(WORKSPACE)?;
            blas_sys::cublasSetWorkspace_v2(blas, workspace as *mut c_void, WORKSPACE).result()?;
            // Sums of bfloat16 products stay float32 where a product is split along k, too.
            let exact = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
            blas_sys::cublasSetMathMode(blas, exact).result()?;
            let modules = images::all()
                .map(|image| {
                    // Aligned as the driver reads it, which bytes in a program are not.
                    let mut aligned = vec![0u64; image.len().div_ceil(8)];
                    let bytes: *mut u8 = aligned.as_mut_ptr().cast();
                    std::ptr::copy_nonoverlapping(image.as_ptr(), bytes, image.len());
                    Ok(cuda::module::load_data(aligned.as_ptr().cast())?)
                })
                .collect::<Result<_>>()
                .with_context(|| {
                    format!(
                        "{name} (compute capability {}.{}) does not take the kernels of this build",
                        capability.0, capability.1
                    )
                })?;
            Ok(Self {
                name,
                device,
                context,
                stream,
                pool,
                blas,
                workspace,
                modules,
                kernels: Mutex::default(),
                staging: Mutex::new(Staging::new()?),
                capturing: AtomicBool::new(false),
                limit: AtomicUsize::new(usize::MAX),
            })
        }
    }

    fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    fn kernel(&self, name: &str, shared: u32) -> Result<sys::CUfunction> {
        let mut kernels = self.kernels.lock().expect("no thread panics with the lock");
        let kernel = match kernels.get_mut(name) {
            Some(kernel) => kernel,
            None => kernels.entry(name.to_owned()).or_insert(Kernel {
                function: self.find(name)?,
                shared: SHARED_UNASKED,
            }),
        };
        if shared > kernel.shared {
            let most =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function came from a loaded module.
            let allowed = unsafe {
                cuda::function::set_function_attribute(kernel.function, most, shared as i32)
            };
            allowed.with_context(|| {
                format!(
                    "{name} takes {} KB of a block's shared memory, more than this GPU has; 16 bits (--dtype) take less",
                    shared.div_ceil(1024)
                )
            })?;
            kernel.shared = shared;
        }
        Ok(kernel.function)
    }

    fn find(&self, name: &str) -> Result<sys::CUfunction> {
        let symbol = CString::new(name)?;
        for &module in &self.modules {
            // SAFETY: the module was loaded and is unloaded only when `self` is dropped.
            if let Ok(function) = unsafe { cuda::module::get_function(module, symbol.clone()) } {
                return Ok(function);
            }
        }
        bail!("this build has no such kernel")
    }

    fn pool_bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: these attributes are 64-bit numbers.
        unsafe { cuda::mem_pool::get_attribute(self.pool, attribute, (&raw mut bytes).cast())? };
        Ok(bytes as usize)
    }
}

impl Backend for Driver {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn memory(&self) -> Result<Memory> {
        self.bind()?;
        let (free, total) = cuda::mem_get_info()?;
        let reserved =
            self.pool_bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        let limit = self.limit.load(SeqCst);
        Ok(Memory {
            free: (free + reserved.saturating_sub(used)).min(limit.saturating_sub(used)),
            total: total.min(limit),
        })
    }

    fn limit(&self, bytes: usize) {
        self.limit.store(bytes, SeqCst);
    }

    fn allocate(&self, bytes: usize) -> Result<Address> {
        ensure!(!self.capturing.load(SeqCst), "allocation inside a graph");
        self.bind()?;
        let limit = self.limit.load(SeqCst);
        if limit < usize::MAX {
            let used =
                self.pool_bytes(sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
            ensure!(used + bytes <= limit, "more than --memory-budget");
        }
        // SAFETY: the stream is ours, and all use of the memory is on it. Nothing is not allocated as nothing.
        Ok(unsafe { cuda::malloc_async(self.stream, bytes.max(1)) }?)
    }

    fn free(&self, at: Address, _bytes: usize) {
        debug_assert!(!self.capturing.load(SeqCst), "memory freed inside a graph");
        // Nobody can be told of a failure here; the context going away frees everything.
        if self.bind().is_ok() {
            // SAFETY: `at` came from `allocate`, and its buffer is gone.
            let _ = unsafe { cuda::free_async(at, self.stream) };
        }
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<()> {
        ensure!(
            !self.capturing.load(SeqCst),
            "a copy from the host inside a graph"
        );
        self.bind()?;
        if from.len() <= PART / 64 {
            // SAFETY: a copy from pageable memory has read it all when the call returns.
            return Ok(unsafe { cuda::memcpy_htod_async(to, from, self.stream) }?);
        }
        let mut staging = self.staging.lock().expect("no thread panics with the lock");
        staging.send(from, to, self.stream)
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<()> {
        ensure!(
            !self.capturing.load(SeqCst),
            "a copy to the host inside a graph"
        );
        self.bind()?;
        // SAFETY: `to` lives until the stream is done, which is waited for.
        unsafe {
            cuda::memcpy_dtoh_async(to, from, self.stream)?;
            cuda::stream::synchronize(self.stream)?;
        }
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: both ranges were checked against their buffers.
        Ok(unsafe { cuda::memcpy_dtod_async(to, from, bytes, self.stream) }?)
    }

    fn clear(&self, at: Address, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: the range is that of a live buffer.
        Ok(unsafe { cuda::memset_d8_async(at, 0, bytes, self.stream) }?)
    }

    fn launch(&self, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        self.bind()?;
        let function = self.kernel(kernel, launch.shared)?;
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: arguments are read during the call; that they fit the kernel is the caller's promise.
        unsafe {
            cuda::launch_kernel(
                function,
                (x, y, z),
                (bx, by, bz),
                launch.shared,
                self.stream,
                &mut pointers,
            )?;
        }
        Ok(())
    }

    /// cuBLAS counts column by column: to it, a row-major matrix is its transpose. So Cᵀ = Bᵀ·Aᵀ is asked for, with
    /// the operands exchanged.
    fn multiply(&self, p: Product) -> Result<()> {
        use blas_sys::cublasOperation_t::{CUBLAS_OP_N as AS_IS, CUBLAS_OP_T as TURNED};
        self.bind()?;
        let (of_b, of_a) = match p.form {
            Form::RowsByRows => (TURNED, AS_IS),
            Form::RowsByColumns => (AS_IS, AS_IS),
            Form::ColumnsByColumns => (AS_IS, TURNED),
        };
        let size = |n: usize| c_int::try_from(n).context("a matrix is too large");
        let pointer = |operand: Operand| operand.at as *mut c_void;
        // SAFETY: the operands are live buffers of these shapes, which is the caller's promise; the scalars are read
        // during the call.
        unsafe {
            blas::gemm_ex(
                self.blas,
                of_b,
                of_a,
                size(p.n)?,
                size(p.m)?,
                size(p.k)?,
                (&raw const p.scale).cast(),
                pointer(p.b),
                kind(p.b.precision),
                size(p.b.stride)?,
                pointer(p.a),
                kind(p.a.precision),
                size(p.a.stride)?,
                (&raw const p.keep).cast(),
                pointer(p.c),
                kind(p.c.precision),
                size(p.c.stride)?,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT,
            )
            .context("cuBLAS")
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: the stream is ours.
        Ok(unsafe { cuda::stream::synchronize(self.stream) }?)
    }

    fn begin_capture(&self) -> Result<()> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is ours.
        unsafe { cuda::stream::begin_capture(self.stream, mode)? };
        self.capturing.store(true, SeqCst);
        Ok(())
    }

    fn end_capture(&self) -> Result<Box<dyn Replay>> {
        self.bind()?;
        self.capturing.store(false, SeqCst);
        // SAFETY: the stream is capturing; the graph is not used after it was made into something to run.
        unsafe {
            let graph = cuda::stream::end_capture(self.stream)?;
            let ready = cuda::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            cuda::graph::destroy(graph)?;
            Ok(Box::new(Captured {
                graph: ready?,
                context: self.context,
                stream: self.stream,
            }))
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: all buffers hold the device, so none is left; each handle was made by `new` and is used no more.
        // Failures have nobody to go to.
        unsafe {
            let _ = cuda::stream::synchronize(self.stream);
            self.staging.get_mut().map(Staging::destroy).ok();
            let _ = blas::destroy_handle(self.blas);
            let _ = cuda::free_sync(self.workspace);
            for &module in &self.modules {
                let _ = cuda::module::unload(module);
            }
            let _ = cuda::stream::destroy(self.stream);
            let _ = cuda::primary_ctx::release(self.device);
        }
    }
}

impl Staging {
    /// # Safety
    /// A context is current.
    unsafe fn new() -> Result<Self> {
        let part = || -> Result<*mut u8> {
            // SAFETY: plain pinned memory.
            Ok(unsafe { cuda::malloc_host(PART, 0) }?.cast())
        };
        let event = || cuda::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self {
            parts: [part()?, part()?],
            sent: [event()?, event()?],
            next: 0,
        })
    }

    /// Copies part by part: while one is on its way, the other is filled.
    fn send(&mut self, from: &[u8], to: Address, stream: sys::CUstream) -> Result<()> {
        for (i, bytes) in from.chunks(PART).enumerate() {
            let (part, sent) = (self.parts[self.next], self.sent[self.next]);
            // SAFETY: the event says that the part is no longer read, and the part is PART bytes long.
            unsafe {
                cuda::event::synchronize(sent)?;
                let part = std::slice::from_raw_parts_mut(part, bytes.len());
                // One thread would not fill the bus.
                (part.par_chunks_mut(COPIED).zip(bytes.par_chunks(COPIED)))
                    .for_each(|(to, from)| to.copy_from_slice(from));
                cuda::memcpy_htod_async(to + (i * PART) as u64, part, stream)?;
                cuda::event::record(sent, stream)?;
            }
            self.next = 1 - self.next;
        }
        Ok(())
    }

    fn destroy(&mut self) {
        for (&part, &sent) in self.parts.iter().zip(&self.sent) {
            // SAFETY: made by `new`, the stream is done, and nothing uses them after this.
            unsafe {
                let _ = cuda::event::destroy(sent);
                let _ = cuda::free_host(part.cast());
            }
        }
    }
}

/// A graph on the stream that it was captured on. (Its owner holds the device's buffers, so the device outlives it.)
struct Captured {
    graph: sys::CUgraphExec,
    context: Opened,
    stream: sys::CUstream,
}

// SAFETY: as for `Driver`.
unsafe impl Send for Captured {}
// SAFETY: as for `Driver`.
unsafe impl Sync for Captured {}

impl Replay for Captured {
    fn run(&self) -> Result<()> {
        self.context.bind()?;
        // SAFETY: graph and stream live.
        Ok(unsafe { cuda::graph::launch(self.graph, self.stream) }?)
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // SAFETY: the graph is ours; a launched one may be destroyed.
        let _ = unsafe { cuda::graph::exec_destroy(self.graph) };
    }
}

fn kind(precision: Precision) -> blas_sys::cudaDataType {
    match precision {
        Precision::F32 => blas_sys::cudaDataType::CUDA_R_32F,
        Precision::Bf16 => blas_sys::cudaDataType::CUDA_R_16BF,
        Precision::F16 => blas_sys::cudaDataType::CUDA_R_16F,
    }
}
