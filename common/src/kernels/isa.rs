//! Which vector instructions this processor has, asked once; and a macro that compiles a loop for each of them.

use std::sync::OnceLock;

/// The instruction sets that the kernels know, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512F/BW/VL/DQ; `bf16` says whether `vdpbf16ps` is there too, and `vpdpbusd` as wherever that is.
    Avx512 { bf16: bool },
    /// AVX2 with FMA.
    Avx2,
    /// ARM's vectors of 128 bits (all of 64-bit ARM has them).
    Neon,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl Isa {
    /// The best set of this machine; `DICE_ISA=portable|avx2|avx512` asks for a lesser one (to compare or to debug).
    pub fn current() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let best = Self::detect();
            match (std::env::var("DICE_ISA").as_deref(), best) {
                (Ok("portable"), _) => Self::Portable,
                (Ok("avx2"), Self::Avx512 { .. }) => Self::Avx2,
                (Ok("avx512"), Self::Avx512 { .. }) => Self::Avx512 { bf16: false },
                _ => best,
            }
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn detect() -> Self {
        let fma = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        match (fma, avx512) {
            (true, true) => Self::Avx512 {
                bf16: is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512vnni"),
            },
            (true, false) => Self::Avx2,
            _ => Self::Portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Self {
        match cfg!(target_arch = "aarch64") {
            true => Self::Neon,
            false => Self::Portable,
        }
    }
}

/// Compiles the body once per instruction set and picks one at run time. The body must be plain loops over slices,
/// which the compiler then vectorises; no sum in it may rely on an order that differs between the versions. In it `FMA`
/// says whether a fused multiply-add is an instruction: where it is not, it would be a slow call.
macro_rules! multiversion {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<const FMA: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body::<true>($($arg),*) }
                match $crate::kernels::isa::Isa::current() {
                    // SAFETY: `Isa::current` returns a set only where the processor has its features.
                    $crate::kernels::isa::Isa::Avx512 { .. } => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::kernels::isa::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::isa::Isa::Neon | $crate::kernels::isa::Isa::Portable => {}
                }
            }
            #[allow(unreachable_code)]
            { body::<{ cfg!(target_arch = "aarch64") }>($($arg),*) }
        }
    };
}
pub(crate) use multiversion;

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    //! What several kernels say with vectors.
    use std::arch::x86_64::*;

    /// Asks for the line that a word lies in, which may be any address.
    #[inline(always)]
    pub fn fetch<const HINT: i32>(word: *const f32) {
        // SAFETY: a hint. (Newer compilers know that it is safe.)
        #[allow(unused_unsafe)]
        unsafe {
            _mm_prefetch::<HINT>(word.cast())
        };
    }

    /// The first so many of 16 lanes.
    #[inline(always)]
    pub fn mask(lanes: usize) -> u16 {
        ((1u32 << lanes.min(16)) - 1) as u16
    }

    /// What kernels say of vectors of either width: what anyone may who has the instructions, and what reads and writes.
    macro_rules! vectors {
        ($(#[$doc:meta])* $width:ident, $features:literal, $vector:ty, $lanes:literal,
         {$(fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty = $body:expr;)*}
         {$(fn $access:ident($($by:ident: $by_ty:ty),*) -> $gives:ty = $what:expr;)*}) => {
            $(#[$doc])*
            pub mod $width {
                use std::arch::x86_64::*;

                pub type Vector = $vector;
                pub const LANES: usize = $lanes;

                $(
                    #[inline]
                    #[target_feature(enable = $features)]
                    pub fn $name($($arg: $ty),*) -> $ret { $body }
                )*
                $(
                    /// # Safety
                    /// So many words must be there.
                    #[inline]
                    #[target_feature(enable = $features)]
                    pub unsafe fn $access($($by: $by_ty),*) -> $gives {
                        // SAFETY: the caller's promise.
                        unsafe { $what }
                    }
                )*

                /// Two vectors, one after the other.
                ///
                /// # Safety
                /// So many words must be there.
                #[inline]
                #[target_feature(enable = $features)]
                pub unsafe fn store_two(at: *mut f32, [low, high]: [Vector; 2]) {
                    // SAFETY: the caller's promise.
                    unsafe {
                        store(at, low);
                        store(at.add(LANES), high);
                    }
                }
            }
        };
    }

    vectors!(
        /// 512 bits.
        wide, "avx512f", __m512, 16,
        {
            fn zero() -> Vector = _mm512_setzero_ps();
            fn splat(x: f32) -> Vector = _mm512_set1_ps(x);
            fn add(a: Vector, b: Vector) -> Vector = _mm512_add_ps(a, b);
            fn multiply_add(a: Vector, b: Vector, sum: Vector) -> Vector = _mm512_fmadd_ps(a, b, sum);
            fn total(x: Vector) -> f32 = _mm512_reduce_add_ps(x);
        }
        {
            fn load(at: *const f32) -> Vector = _mm512_loadu_ps(at);
            fn load_first(lanes: usize, at: *const f32) -> Vector = _mm512_maskz_loadu_ps(super::mask(lanes), at);
            fn store(at: *mut f32, x: Vector) -> () = _mm512_storeu_ps(at, x);
        }
    );

    vectors!(
        /// 256 bits.
        narrow, "avx2,fma", __m256, 8,
        {
            fn zero() -> Vector = _mm256_setzero_ps();
            fn splat(x: f32) -> Vector = _mm256_set1_ps(x);
            fn add(a: Vector, b: Vector) -> Vector = _mm256_add_ps(a, b);
            fn multiply_add(a: Vector, b: Vector, sum: Vector) -> Vector = _mm256_fmadd_ps(a, b, sum);
            fn total(x: Vector) -> f32 = {
                let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            };
            fn first_lanes(lanes: usize) -> __m256i = {
                let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.min(LANES) as i32), numbers)
            };
        }
        {
            fn load(at: *const f32) -> Vector = _mm256_loadu_ps(at);
            fn load_first(lanes: usize, at: *const f32) -> Vector = _mm256_maskload_ps(at, first_lanes(lanes));
            fn store(at: *mut f32, x: Vector) -> () = _mm256_storeu_ps(at, x);
        }
    );

    /// sum + the products of pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn multiply_pairs(x: __m512, y: __m512, sum: __m512) -> __m512 {
        // SAFETY: a vector of words and one of bfloat16 pairs are the same bits.
        let pairs = |v: __m512| unsafe { std::mem::transmute::<__m512, __m512bh>(v) };
        _mm512_dpbf16_ps(sum, pairs(x), pairs(y))
    }
}
