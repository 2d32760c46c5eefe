//! A split virtqueue, without interrupts and without notifications: the device looks at every
//! queue when the ledger goes idle.

use alloc::alloc::{alloc, alloc_zeroed, handle_alloc_error};
use core::alloc::Layout;
use core::sync::atomic::{Ordering, fence};

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// In the available ring: do not interrupt.
const NO_INTERRUPT: u16 = 1;

/// A part of a request.
#[derive(Clone, Copy)]
pub struct Part {
    /// Where it is.
    pub address: u64,
    /// How long it is.
    pub len: u32,
    /// Whether the device writes it.
    pub device_writes: bool,
}

/// A virtqueue. Its memory is never given back.
pub struct Queue {
    size: u16,
    descriptors: *mut Descriptor,
    /// flags, index, ring
    available: *mut u16,
    /// flags, index
    used: *mut u16,
    /// Behind them: chain, bytes written
    used_ring: *mut [u32; 2],
    next_available: u16,
    next_used: u16,
}

#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Memory that is never given back: devices may write to it as long as the machine runs. It is
/// zeroed if asked for; buffers are not, because untouched memory costs nothing.
pub fn forever(bytes: usize, align: usize, zeroed: bool) -> *mut u8 {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), align) else {
        unreachable!("alignments here are powers of two");
    };
    let allocate = if zeroed { alloc_zeroed } else { alloc };
    // SAFETY: the size is not zero.
    let memory = unsafe { allocate(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    memory
}

impl Queue {
    /// Memory for `size` descriptors, a power of two.
    pub fn new(size: u16) -> Self {
        let count = usize::from(size);
        let available: *mut u16 = forever(6 + 2 * count, 8, true).cast();
        let used = forever(6 + 8 * count, 8, true);
        // SAFETY: the first element of what was just allocated.
        unsafe { available.write_volatile(NO_INTERRUPT) };
        Self {
            size,
            descriptors: forever(16 * count, 16, true).cast(),
            available,
            used: used.cast(),
            used_ring: used.wrapping_add(4).cast(),
            next_available: 0,
            next_used: 0,
        }
    }

    /// How many descriptors there are.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.descriptors as u64
    }

    /// The address of the available ring.
    pub fn driver_area(&self) -> u64 {
        self.available as u64
    }

    /// The address of the used ring.
    pub fn device_area(&self) -> u64 {
        self.used as u64
    }

    /// Writes a chain into the descriptors from `first` on.
    ///
    /// # Safety
    /// The device owns none of these descriptors, and may access the parts until the chain is used.
    pub unsafe fn write_chain(&mut self, first: u16, parts: &[Part]) {
        for (at, part) in (first..).zip(parts) {
            assert!(at < self.size, "a chain lies within the table");
            let last = usize::from(at - first) + 1 == parts.len();
            let (next_flag, next) = if last { (0, 0) } else { (NEXT, at + 1) };
            let write_flag = if part.device_writes { WRITE } else { 0 };
            let descriptor = Descriptor {
                address: part.address,
                len: part.len,
                flags: next_flag | write_flag,
                next,
            };
            // SAFETY: within the table, by the assertion.
            unsafe {
                self.descriptors
                    .add(usize::from(at))
                    .write_volatile(descriptor);
            }
        }
    }

    /// Makes the chain at `first` available. The device sees it at its next look.
    pub fn offer(&mut self, first: u16) {
        let slot = usize::from(self.next_available & (self.size - 1));
        self.next_available = self.next_available.wrapping_add(1);
        // SAFETY: the ring has `size` elements behind two.
        unsafe {
            self.available.add(2 + slot).write_volatile(first);
            fence(Ordering::Release);
            self.available.add(1).write_volatile(self.next_available);
        }
    }

    /// Takes a used chain: its first descriptor and how many bytes the device wrote.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        // SAFETY: the index and the ring lie within what was allocated.
        unsafe {
            if self.used.add(1).read_volatile() == self.next_used {
                return None;
            }
            fence(Ordering::Acquire);
            let slot = usize::from(self.next_used & (self.size - 1));
            self.next_used = self.next_used.wrapping_add(1);
            let [first, written] = self.used_ring.add(slot).read_volatile();
            let first = first as u16;
            assert!(
                first < self.size,
                "the device used a descriptor that is none"
            );
            Some((first, written))
        }
    }
}
