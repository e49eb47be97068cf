//! A buffer that parallel tasks write, each in places of its own.

/// It; a task asks for its places.
pub(super) struct Shared {
    data: *mut f32,
    len: usize,
}

// SAFETY: `slice` is unsafe; its callers promise that no two tasks touch the same place.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(data: &mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    /// # Safety
    /// No other reference to these elements may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, at: usize, len: usize) -> &mut [f32] {
        assert!(at + len <= self.len);
        // SAFETY: in bounds; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(at), len) }
    }
}
