//! The compiled kernels.

use std::ffi::c_void;

/// A kernel on the CPU, with the calling convention of `cuLaunchKernel`.
pub type Host = unsafe extern "C" fn(u32, u32, u32, u32, u32, u32, u32, *mut *mut c_void);

#[cfg(feature = "cuda")]
pub fn for_capability(_: (i32, i32)) -> impl Iterator<Item = &'static [u8]> {
    std::iter::empty()
}

#[cfg(feature = "cuda-emulated")]
pub fn emulated(_: &str) -> Option<Host> {
    None
}
