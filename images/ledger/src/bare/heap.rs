//! The global allocator: talc over all memory behind the image.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use talc::{ErrOnOom, Span, Talc};

/// One thread, no interrupt handlers: no lock.
struct Heap(UnsafeCell<Talc<ErrOnOom>>);

// SAFETY: the machine has one CPU and the ledger no interrupt handlers, so nothing is concurrent.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(Talc::new(ErrOnOom)));

/// Gives the allocator its memory.
///
/// # Safety
/// Called once, before anything is allocated; nothing else uses `start..end`.
pub unsafe fn claim(start: u64, end: u64) {
    let span = Span::new(start as *mut u8, end as *mut u8);
    // SAFETY: not concurrent; the caller vouches for the span. A span that is too small leaves an
    // empty heap, which the first allocation reports.
    let _ = unsafe { (*HEAP.0.get()).claim(span) };
}

// SAFETY: talc is an allocator; calls are not concurrent.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: not concurrent; callers pass layouts of non-zero size.
        unsafe { (*self.0.get()).malloc(layout) }.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: callers pass what `alloc` returned for this layout.
        unsafe { (*self.0.get()).free(NonNull::new_unchecked(memory), layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`; not concurrent.
        unsafe {
            let talc = &mut *self.0.get();
            let memory = NonNull::new_unchecked(memory);
            if size < layout.size() {
                talc.shrink(memory, layout, size);
                return memory.as_ptr();
            }
            if size == layout.size() {
                return memory.as_ptr();
            }
            talc.grow(memory, layout, size)
                .map_or(ptr::null_mut(), NonNull::as_ptr)
        }
    }
}
