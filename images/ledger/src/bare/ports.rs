//! The machine's ports (the VMM's `devices/layout.rs`). Every access is an exit, about 27 µs where
//! ring 3 is native and KVM is not.

use core::arch::asm;

/// The console's data register.
const SERIAL: u16 = 0x3f8;
/// Asks the time: milliseconds since power-on, modulo 2^32.
const CLOCK_MILLIS: u16 = 0x518;
/// The low half of a deadline in nanoseconds, and the high half, which arms.
const TIMER_LOW: u16 = 0x520;
const TIMER_HIGH: u16 = 0x524;
/// A deadline in milliseconds, which arms.
const TIMER_MILLIS: u16 = 0x528;
/// Random bits.
const ENTROPY: u16 = 0x530;
/// Power: 1 switches off.
const POWER: u16 = 0x540;
/// Hands all queues to the devices and waits.
const IDLE: u16 = 0x544;

/// Milliseconds since power-on, modulo 2^32.
pub fn clock_millis() -> u32 {
    read(CLOCK_MILLIS)
}

/// Arms the timer with a deadline in milliseconds since power-on; it cannot be 0.
pub fn arm_timer(deadline: u64) {
    if let Ok(millis) = u32::try_from(deadline) {
        write(TIMER_MILLIS, millis.max(1));
    } else {
        let nanos = deadline.saturating_mul(1_000_000);
        write(TIMER_LOW, nanos as u32);
        write(TIMER_HIGH, (nanos >> 32) as u32);
    }
}

/// 64 random bits.
pub fn entropy() -> u64 {
    u64::from(read(ENTROPY)) << 32 | u64::from(read(ENTROPY))
}

/// Lets the devices look at all queues, then waits until anything arrives. Does not wait if
/// something has arrived at another exit since the last call, so nothing can be overlooked.
pub fn idle() {
    write(IDLE, 1);
}

/// Switches the machine off.
pub fn power_off() -> ! {
    loop {
        write(POWER, 1);
        idle();
    }
}

/// Writes bytes to the console: one exit where ring 3 is native under VMX or SVM, one exit a byte where
/// KVM emulates the instruction.
pub fn console(bytes: &[u8]) {
    // SAFETY: reads `bytes` only; the direction flag is clear by the calling convention.
    unsafe {
        asm!(
            "rep outsb",
            inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _,
            in("dx") SERIAL,
            options(nostack, readonly, preserves_flags),
        );
    }
}

fn read(port: u16) -> u32 {
    let value: u32;
    // SAFETY: the machine's 32-bit ports change no memory when they are read.
    unsafe {
        asm!("in eax, dx", out("eax") value, in("dx") port, options(nostack, nomem, preserves_flags));
    }
    value
}

fn write(port: u16, value: u32) {
    // SAFETY: what devices write to memory on this occasion are queues and buffers, which are only
    // accessed volatile or through raw pointers; without `nomem` the compiler keeps nothing over it.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
    }
}
