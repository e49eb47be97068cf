//! Launching kernels on vectors, and what the tests compare with.

use super::kernels;
use common::cuda::{self, Buffer, Device, Launch};
use common::kernels::activation::Curve;
use half::{bf16, f16};
use std::ffi::c_void;
use std::fmt::Debug;
use std::sync::LazyLock;

/// A real GPU, where the tests are built for one (feature `cuda`) and there is one: then the kernels run there.
static GPU: LazyLock<Option<Device>> = LazyLock::new(|| {
    let found = cuda::count() > 0;
    found.then(|| cuda::open(0).expect("the GPU opens"))
});

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

impl Element for f16 {
    const NAME: &str = "f16";
    const EPSILON: f64 = 5e-4;
    fn from(x: f32) -> Self {
        f16::from_f32(x)
    }
    fn to(self) -> f32 {
        self.to_f32()
    }
}

/// A parameter of a kernel: a value, or the address of a vector.
#[derive(Clone, Copy)]
pub struct Arg {
    bytes: [u64; 5],
    size: usize,
    vector: Option<Vector>,
}

/// A vector whose address is a parameter.
#[derive(Clone, Copy, PartialEq)]
struct Vector {
    at: *mut u8,
    bytes: usize,
    written: bool,
}

/// Values that kernels take as they are.
pub trait Plain: Copy {}
impl Plain for i32 {}
impl Plain for i64 {}
impl Plain for f32 {}
impl Plain for f64 {}
impl Plain for Curve {}

impl Arg {
    pub fn value<T: Copy>(value: T) -> Self {
        let mut arg = Self {
            bytes: [0; 5],
            size: size_of::<T>(),
            vector: None,
        };
        assert!(arg.size <= size_of_val(&arg.bytes) && align_of::<T>() <= 8);
        // SAFETY: the value fits, as was just checked.
        unsafe { arg.bytes.as_mut_ptr().cast::<T>().write(value) };
        arg
    }

    /// The same for a device.
    fn words<const N: usize>(&self) -> cuda::Arg {
        // SAFETY: there are at least so many bytes.
        cuda::Arg::plain(unsafe { self.bytes.as_ptr().cast::<Words<N>>().read() })
    }

    fn vector(at: *mut u8, bytes: usize, written: bool) -> Self {
        let vector = Some(Vector { at, bytes, written });
        Self {
            vector,
            ..Self::value(at)
        }
    }

    /// As a launch on a GPU takes it; vectors are copied there, each once, and stay in `copies`.
    fn on(&self, gpu: &Device, copies: &mut Vec<(Vector, Buffer)>) -> cuda::Arg {
        let Some(vector) = self.vector else {
            return match self.size {
                4 => self.words::<1>(),
                8 => self.words::<2>(),
                12 => self.words::<3>(),
                16 => self.words::<4>(),
                20 => self.words::<5>(),
                40 => self.words::<10>(),
                size => panic!("no parameter has {size} bytes"),
            };
        };
        if !copies.iter().any(|(known, _)| *known == vector) {
            // SAFETY: the vector outlives the launch.
            let values = unsafe { std::slice::from_raw_parts(vector.at, vector.bytes) };
            copies.push((vector, gpu.buffer_of(values).unwrap()));
        }
        let found = copies.iter().find(|(known, _)| *known == vector);
        cuda::Arg::from(&found.expect("it was just put there").1)
    }
}

/// A parameter of so many words.
#[derive(Clone, Copy)]
#[repr(C)]
struct Words<const N: usize>([u32; N]);
impl<const N: usize> Default for Words<N> {
    fn default() -> Self {
        Self([0; N])
    }
}
// SAFETY: 32-bit numbers without padding.
unsafe impl<const N: usize> cuda::Plain for Words<N> {}

impl<T: Plain> From<T> for Arg {
    fn from(value: T) -> Self {
        Self::value(value)
    }
}

impl<T> From<&Vec<T>> for Arg {
    fn from(from: &Vec<T>) -> Self {
        Self::vector(
            from.as_ptr().cast_mut().cast(),
            size_of_val(&from[..]),
            false,
        )
    }
}

impl<T> From<&mut Vec<T>> for Arg {
    fn from(to: &mut Vec<T>) -> Self {
        Self::vector(to.as_mut_ptr().cast(), size_of_val(&to[..]), true)
    }
}

impl<T> From<Option<&Vec<T>>> for Arg {
    fn from(from: Option<&Vec<T>>) -> Self {
        from.map_or_else(|| Null.into(), Self::from)
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
    if let Some(gpu) = &*GPU {
        return run_on(gpu, kernel, grid, threads, shared, &args);
    }
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

fn run_on(
    gpu: &Device,
    kernel: &str,
    [x, y, z]: [usize; 3],
    threads: usize,
    shared: usize,
    args: &[Arg],
) {
    let mut copies = vec![];
    let args: Vec<cuda::Arg> = args.iter().map(|arg| arg.on(gpu, &mut copies)).collect();
    let launch = Launch::plane(x, y, threads).deep(z).shared(shared);
    gpu.launch(kernel, launch, &args).unwrap();
    for (vector, buffer) in copies.iter().filter(|(vector, _)| vector.written) {
        let values: Vec<u8> = buffer.read(0, vector.bytes).unwrap();
        // SAFETY: the vector was given to be written, and is as long.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), vector.at, values.len()) };
    }
}

/// Runs it with several orders of threads, which must agree. (A GPU has its own order, another every time.)
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
