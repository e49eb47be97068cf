//! Memory for big buffers: asks the kernel for huge pages, where touching gigabytes for the first time costs a fifth.

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, with its big blocks marked for transparent huge pages.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

// SAFETY: all blocks come from and go back to `System`, unchanged; advice about their pages changes no content.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about `layout` is handed on.
        let block = unsafe { System.alloc(layout) };
        advise(block, layout.size());
        block
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        let block = unsafe { System.alloc_zeroed(layout) };
        advise(block, layout.size());
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        let block = unsafe { System.realloc(block, layout, size) };
        advise(block, size);
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

/// Marks the whole pages inside a big block. Whether the kernel follows is its business.
fn advise(block: *mut u8, size: usize) {
    /// Smaller blocks are left alone: they are reused too fast to matter, and would only round memory up.
    #[cfg(target_os = "linux")]
    const BIG: usize = 4 << 20;
    #[cfg(target_os = "linux")]
    if !block.is_null() && size >= BIG {
        const PAGE: usize = 4096;
        let skip = block.align_offset(PAGE);
        // SAFETY: the range lies inside a live block of our own, and MADV_HUGEPAGE never changes what memory holds.
        unsafe {
            let first = block.add(skip).cast();
            libc::madvise(first, (size - skip) & !(PAGE - 1), libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (block, size);
}
