//! The compiled kernels, as the build script leaves them.

#[cfg(feature = "cuda-emulated")]
use std::ffi::{CString, c_char, c_int, c_void};

/// Bytes that begin where a driver may read words.
#[cfg(feature = "cuda")]
#[repr(C, align(16))]
struct Aligned<B: ?Sized>(B);

/// The images for GPUs, to be loaded one and all. Each holds machine code for sm_80 and sm_90, and PTX for what comes
/// after; the driver chooses.
#[cfg(feature = "cuda")]
pub fn all() -> impl Iterator<Item = &'static [u8]> {
    static IMAGES: &[&Aligned<[u8]>] = &include!(concat!(env!("OUT_DIR"), "/images.rs"));
    IMAGES.iter().map(|image| &image.0)
}

/// A kernel on the CPU, with the calling convention of `cuLaunchKernel`: grid, block, bytes of dynamic shared memory,
/// arguments. It returns when the kernel is done, and stops the program where a launch is not as the kernel says.
#[cfg(feature = "cuda-emulated")]
pub type Host = unsafe extern "C" fn(u32, u32, u32, u32, u32, u32, u32, *mut *mut c_void);

#[cfg(feature = "cuda-emulated")]
unsafe extern "C" {
    fn emulate_find(name: *const c_char) -> Option<Host>;
    fn emulate_parameter_size(name: *const c_char, index: c_int) -> usize;
    fn emulate_order(order: c_int);
    fn emulate_fence(at: *mut u8, bytes: usize);
}

/// The kernel of this name on the CPU.
#[cfg(feature = "cuda-emulated")]
pub fn emulated(name: &str) -> Option<Host> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name ends with a zero byte.
    unsafe { emulate_find(name.as_ptr()) }
}

/// The sizes in bytes of a kernel's parameters.
#[cfg(feature = "cuda-emulated")]
pub fn parameter_sizes(name: &str) -> Vec<usize> {
    let name = CString::new(name).expect("a kernel's name");
    // SAFETY: as above.
    let size = |i| unsafe { emulate_parameter_size(name.as_ptr(), i) };
    (0..).map(size).take_while(|&size| size > 0).collect()
}

/// The order in which threads of a block run in later launches from this thread: 0 upwards, 1 downwards, above that
/// shuffled. A kernel whose results depend on it has a race.
#[cfg(feature = "cuda-emulated")]
pub fn set_order(order: i32) {
    // SAFETY: sets a variable of this thread.
    unsafe { emulate_order(order) }
}

/// Bytes beside a buffer, which no kernel may read in a build with AddressSanitizer.
#[cfg(feature = "cuda-emulated")]
pub fn fence(at: *mut u8, bytes: usize) {
    // SAFETY: marks them, and does not touch them.
    unsafe { emulate_fence(at, bytes) }
}
