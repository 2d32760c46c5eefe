//! The ledger on the bare machine: what boots, and the loop that joins network, service and disk.
//!
//! Everything but a few instructions runs in ring 3 (`bare/boot.s`). There are no interrupts: the
//! loop works until nothing is left, then writes the idle port, which hands all queues to the
//! devices and waits until anything arrives.

#![no_std]
#![no_main]

extern crate alloc;

mod bare;

use core::panic::PanicInfo;

use bare::{console, machine, ports};

/// The first Rust code, in ring 3. `boot_params` is the address that the VMM passed.
///
/// # Safety
/// Called once, by `boot.s`.
#[unsafe(no_mangle)]
unsafe extern "C" fn ledger_main(boot_params: u64) -> ! {
    // SAFETY: this is the one call, with what the VMM passed.
    let boot = unsafe { bare::boot::Boot::take(boot_params) };
    match machine::Machine::new(&boot) {
        Ok(mut machine) => machine.run(),
        Err(error) => {
            console::line(format_args!("ledger: {error}"));
            ports::power_off()
        }
    }
}

/// An exception ends the guest: there is nothing that could be repaired.
#[unsafe(no_mangle)]
extern "C" fn ledger_exception(vector: u64, error: u64, rip: u64, cs: u64, address: u64) -> ! {
    console::line(format_args!(
        "ledger: exception {vector} at RIP {rip:#x} (error {error:#x}, ring {}, CR2 {address:#x})",
        cs & 3
    ));
    ports::power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::line(format_args!("ledger: {info}"));
    ports::power_off()
}

/// The prebuilt standard crates know how to unwind; nothing here ever does (`panic = "abort"`), so
/// this only satisfies the linker.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    ports::power_off()
}
