//! Launching kernels on vectors, and what the tests compare with.

use super::kernels;
use half::bf16;
use std::ffi::c_void;
use std::fmt::Debug;

/// How activations are stored.
pub trait Element: Copy + PartialEq + Debug + Default {
    /// The ending of kernels' names.
    const NAME: &str;
    /// The error of one rounding, relative.
    const EPSILON: f64;
    fn from(x: f32) -> Self;
    fn to(self) -> f32;
}

impl Element for f32 {
    const NAME: &str = "f32";
    const EPSILON: f64 = 6e-8;
    fn from(x: f32) -> Self {
        x
    }
    fn to(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const NAME: &str = "bf16";
    const EPSILON: f64 = 4e-3;
    fn from(x: f32) -> Self {
        bf16::from_f32(x)
    }
    fn to(self) -> f32 {
        self.to_f32()
    }
}

/// A parameter of a kernel, by value.
pub struct Arg {
    bytes: [u64; 4],
    size: usize,
}

/// Values that kernels take as they are.
pub trait Plain: Copy {}
impl Plain for i32 {}
impl Plain for i64 {}
impl Plain for f32 {}
impl Plain for f64 {}

impl Arg {
    pub fn value<T: Copy>(value: T) -> Self {
        let mut arg = Self {
            bytes: [0; 4],
            size: size_of::<T>(),
        };
        assert!(arg.size <= 32 && align_of::<T>() <= 8);
        // SAFETY: the value fits, as was just checked.
        unsafe { arg.bytes.as_mut_ptr().cast::<T>().write(value) };
        arg
    }
}

impl<T: Plain> From<T> for Arg {
    fn from(value: T) -> Self {
        Self::value(value)
    }
}

impl<T> From<&Vec<T>> for Arg {
    fn from(from: &Vec<T>) -> Self {
        Self::value(from.as_ptr())
    }
}

impl<T> From<&mut Vec<T>> for Arg {
    fn from(to: &mut Vec<T>) -> Self {
        Self::value(to.as_mut_ptr())
    }
}

impl<T> From<Option<&Vec<T>>> for Arg {
    fn from(from: Option<&Vec<T>>) -> Self {
        Self::value(from.map_or(std::ptr::null(), |v| v.as_ptr()))
    }
}

/// A null pointer.
pub struct Null;
impl From<Null> for Arg {
    fn from(_: Null) -> Self {
        Self::value(std::ptr::null::<u8>())
    }
}

/// launch!("kernel", grid, threads, shared bytes; arguments …)
macro_rules! launch {
    ($kernel:expr, $grid:expr, $threads:expr, $shared:expr; $($arg:expr),* $(,)?) => {
        $crate::device::run(&$kernel, $grid, $threads, $shared, vec![$($crate::device::Arg::from($arg)),*])
    };
}
pub(crate) use launch;

pub fn run(kernel: &str, grid: [usize; 3], threads: usize, shared: usize, mut args: Vec<Arg>) {
    let host = kernels::emulated(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
    let sizes: Vec<usize> = args.iter().map(|arg| arg.size).collect();
    assert_eq!(
        sizes,
        kernels::parameter_sizes(kernel),
        "parameters of {kernel}"
    );
    let mut pointers: Vec<*mut c_void> = (args.iter_mut())
        .map(|arg| arg.bytes.as_mut_ptr().cast())
        .collect();
    let [x, y, z] = grid.map(|n| n as u32);
    // SAFETY: the arguments have the sizes of the kernel's parameters; vectors behind pointers outlive the call.
    unsafe {
        host(
            x,
            y,
            z,
            threads as u32,
            1,
            1,
            shared as u32,
            pointers.as_mut_ptr(),
        )
    };
}

/// Runs it with several orders of threads, which must agree.
pub fn in_every_order<R: PartialEq + Debug>(run: impl Fn() -> R) -> R {
    kernels::set_order(0);
    let result = run();
    for order in [1, 7, 8] {
        kernels::set_order(order);
        assert!(
            run() == result,
            "order {order} of the threads changes the result"
        );
    }
    kernels::set_order(0);
    result
}

/// Reproducible numbers in −1 … 1.
pub fn noise<T: Element>(len: usize, seed: u32) -> Vec<T> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| T::from(next())).collect()
}

/// What a kernel must have overwritten.
pub fn unwritten<T: Element>(len: usize) -> Vec<T> {
    vec![T::from(f32::NAN); len]
}

pub fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to() as f64).collect()
}

/// Holds results to exact ones: no further off than `roundings` roundings of the largest.
pub fn assert_close<T: Element>(what: &str, ours: &[T], exact: &[f64], roundings: f64) {
    assert_eq!(ours.len(), exact.len(), "{what}");
    let largest = exact.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    for (i, (x, y)) in ours.iter().zip(exact).enumerate() {
        let error = (x.to() as f64 - y).abs();
        assert!(
            error <= roundings * T::EPSILON * largest,
            "{what}: element {i} is {x:?}, not {y} ({:.1} roundings of {largest})",
            error / (T::EPSILON * largest)
        );
    }
}

/// Both storage types.
macro_rules! for_both {
    ($($test:ident),* $(,)?) => {
        $(mod $test {
            #[test]
            fn f32() { super::$test::<f32>() }
            #[test]
            fn bf16() { super::$test::<half::bf16>() }
        })*
    };
}
pub(crate) use for_both;
