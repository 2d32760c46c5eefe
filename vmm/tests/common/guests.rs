//! The guests the tests run. Each folds what it sees into RBX and switches itself off.

use iced_x86::code_asm::*;
use vmm::boot::BootImage;
use vmm::devices::layout;

use super::guest::{COUNTERS, FREE, Guest, RIP_SUM, Ring, ok};
use super::virtio::{self, Descriptor, NEXT, Queue, WRITE};

/// A port, a page of addresses, that no device claims.
const NOBODYS_PORT: u16 = 0x990;
const NOBODYS_ADDRESS: u64 = 0xe000_0000;
/// The memory that [`super::config`] gives a guest.
const MEMORY_END: u64 = 4 << 20;

const BUFFERS: u64 = FREE;
const QUEUES: u64 = FREE + 0x1_0000;

/// Switches itself off at once.
pub fn off(ring: Ring) -> BootImage {
    Guest::new(ring).build()
}

/// Computes for ever, without exits.
pub fn spin() -> BootImage {
    let mut guest = Guest::new(Ring::Three);
    let mut again = guest.asm.create_label();
    ok(guest.asm.set_label(&mut again));
    ok(guest.asm.inc(rbx));
    ok(guest.asm.jmp(again));
    guest.build()
}

/// HLT with interrupts off.
pub fn dead() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    ok(guest.asm.hlt());
    guest.build()
}

/// An exception without a way to handle it.
pub fn triple_fault() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    ok(guest.asm.push(0));
    ok(guest.asm.push(0));
    ok(guest.asm.lidt(ptr(rsp)));
    ok(guest.asm.ud2());
    guest.build()
}

/// Reads the clock and arms the timer `nanos` later. Uses RAX and RDX.
fn arm(guest: &mut Guest, nanos: i32) {
    guest.in32(layout::CLOCK_LOW);
    guest.fold();
    ok(guest.asm.add(eax, nanos));
    guest.out32_eax(layout::TIMER_LOW);
    guest.in32(layout::CLOCK_HIGH);
    guest.out32_eax(layout::TIMER_HIGH);
}

/// Halts in ring 0 until the timer is due, `rounds` times.
pub fn halting(rounds: u32) -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    guest.repeat(rounds, |guest| {
        arm(guest, 300_000);
        ok(guest.asm.sti());
        ok(guest.asm.hlt());
        ok(guest.asm.cli());
        ok(guest.asm.mov(rax, qword_ptr(COUNTERS)));
        guest.fold();
    });
    guest.build()
}

/// Waits at the idle port until the timer is due, `rounds` times.
pub fn idling(ring: Ring, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    guest.repeat(rounds, |guest| {
        arm(guest, 300_000);
        guest.idle();
        ok(guest.asm.mov(rax, qword_ptr(COUNTERS)));
        guest.fold();
    });
    guest.build()
}

/// Computes without exits until the timer has interrupted it, `rounds` times. In ring 0 it has
/// interrupts off for part of that.
pub fn computing(ring: Ring, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    ok(guest.asm.xor(r14d, r14d));
    guest.repeat(rounds, |guest| {
        arm(guest, 900_000);
        let mut off = guest.asm.create_label();
        let mut on = guest.asm.create_label();
        if ring == Ring::Zero {
            ok(guest.asm.cli());
            ok(guest.asm.mov(ecx, 20_000));
            ok(guest.asm.set_label(&mut off));
            ok(guest.asm.dec(ecx));
            ok(guest.asm.jnz(off));
            ok(guest.asm.sti());
        }
        ok(guest.asm.set_label(&mut on));
        ok(guest.asm.mov(rax, qword_ptr(COUNTERS)));
        ok(guest.asm.cmp(rax, r14));
        ok(guest.asm.je(on));
        ok(guest.asm.mov(r14, rax));
    });
    guest.build()
}

/// Computes and looks at a port by turns until the timer has interrupted it, `rounds` times. What
/// it folds tells where the interrupts hit.
pub fn interrupted(ring: Ring, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    if ring == Ring::Zero {
        ok(guest.asm.sti());
    }
    // Native code has time for much more than emulated code.
    let steps = if ring == Ring::Zero { 20 } else { 3000 };
    ok(guest.asm.xor(r14d, r14d));
    guest.repeat(rounds, |guest| {
        arm(guest, 900_000);
        let mut look = guest.asm.create_label();
        let mut compute = guest.asm.create_label();
        ok(guest.asm.set_label(&mut look));
        ok(guest.asm.mov(ecx, steps));
        ok(guest.asm.set_label(&mut compute));
        ok(guest.asm.mov(rax, rcx));
        guest.fold();
        ok(guest.asm.dec(ecx));
        ok(guest.asm.jnz(compute));
        guest.in32(NOBODYS_PORT);
        ok(guest.asm.mov(rax, qword_ptr(COUNTERS)));
        ok(guest.asm.cmp(rax, r14));
        ok(guest.asm.je(look));
        ok(guest.asm.mov(r14, rax));
        ok(guest.asm.mov(rax, qword_ptr(RIP_SUM)));
        guest.fold();
    });
    guest.build()
}

/// Ports in all sizes and as strings, both ways and in both directions.
pub fn ports(ring: Ring, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    let text: Vec<u8> = (0..300u16).map(|i| b'a' + (i % 26) as u8).collect();
    guest.data(BUFFERS, text);
    guest.repeat(rounds, |guest| {
        for port in [NOBODYS_PORT, layout::ENTROPY, layout::PIC_MASTER + 1] {
            port_sizes(guest, port);
        }
        let a = &mut guest.asm;
        ok(a.cld());
        // What the console gets; more than one exit on some hosts.
        ok(a.mov(rsi, BUFFERS));
        ok(a.mov(ecx, 300));
        ok(a.mov(edx, u32::from(layout::SERIAL)));
        ok(a.rep().outsb());
        ok(a.mov(rsi, BUFFERS));
        ok(a.mov(ecx, 64));
        ok(a.mov(edx, u32::from(NOBODYS_PORT)));
        ok(a.rep().outsd());
        // Random bytes over a page boundary, then downwards.
        ok(a.mov(rdi, BUFFERS + 0x1000 - 301));
        ok(a.mov(ecx, 600));
        ok(a.mov(edx, u32::from(layout::ENTROPY)));
        ok(a.rep().insb());
        ok(a.mov(rdi, BUFFERS + 0x2000 + 400));
        ok(a.mov(ecx, 200));
        ok(a.std());
        ok(a.rep().insd());
        ok(a.cld());
        ok(a.mov(rax, qword_ptr(BUFFERS + 0x1000 - 4)));
        guest.fold();
        ok(guest.asm.mov(rax, qword_ptr(BUFFERS + 0x2000)));
        guest.fold();
        ok(guest.asm.mov(rax, rdi));
        guest.fold();
    });
    guest.build()
}

fn port_sizes(guest: &mut Guest, port: u16) {
    ok(guest.asm.mov(edx, u32::from(port)));
    ok(guest.asm.xor(eax, eax));
    ok(guest.asm.in_(al, dx));
    guest.fold();
    ok(guest.asm.in_(ax, dx));
    guest.fold();
    ok(guest.asm.in_(eax, dx));
    guest.fold();
    if port == NOBODYS_PORT {
        ok(guest.asm.out(dx, al));
        ok(guest.asm.out(dx, ax));
        ok(guest.asm.out(dx, eax));
    }
}

/// Addresses without memory: all sizes, read-modify-write, strings, across the end of memory, and
/// (in ring 3) 16 bytes at once. Needs a network device.
pub fn mmio(ring: Ring, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    guest.data(BUFFERS, (0..=255).collect());
    guest.repeat(rounds, |guest| {
        for address in [
            NOBODYS_ADDRESS,
            layout::VIRTIO_BASE,
            layout::VIRTIO_BASE + 0x100,
        ] {
            mmio_sizes(guest, address);
        }
        mmio_strings(guest);
        if ring == Ring::Three {
            mmio_16_bytes(guest);
        }
    });
    guest.build()
}

fn mmio_sizes(guest: &mut Guest, address: u64) {
    ok(guest.asm.mov(edi, address as u32));
    ok(guest.asm.xor(eax, eax));
    ok(guest.asm.mov(al, byte_ptr(rdi)));
    guest.fold();
    ok(guest.asm.mov(ax, word_ptr(rdi)));
    guest.fold();
    ok(guest.asm.mov(eax, dword_ptr(rdi)));
    guest.fold();
    ok(guest.asm.mov(rax, qword_ptr(rdi)));
    guest.fold();
    if address == NOBODYS_ADDRESS {
        ok(guest.asm.mov(byte_ptr(rdi), bl));
        ok(guest.asm.mov(word_ptr(rdi + 2), bx));
        ok(guest.asm.mov(dword_ptr(rdi + 4), ebx));
        ok(guest.asm.mov(qword_ptr(rdi + 8), rbx));
        ok(guest.asm.add(dword_ptr(rdi), ebx));
    }
}

fn mmio_strings(guest: &mut Guest) {
    let a = &mut guest.asm;
    ok(a.cld());
    ok(a.mov(rsi, BUFFERS));
    ok(a.mov(rdi, NOBODYS_ADDRESS));
    ok(a.mov(ecx, 32));
    ok(a.rep().movsd());
    ok(a.mov(rsi, layout::VIRTIO_BASE));
    ok(a.mov(rdi, BUFFERS + 0x1000));
    ok(a.mov(ecx, 24));
    ok(a.rep().movsd());
    // From device to device.
    ok(a.mov(rsi, layout::VIRTIO_BASE));
    ok(a.mov(rdi, NOBODYS_ADDRESS));
    ok(a.mov(ecx, 10));
    ok(a.rep().movsd());
    ok(a.mov(rdi, NOBODYS_ADDRESS));
    ok(a.mov(rax, rbx));
    ok(a.mov(ecx, 10));
    ok(a.rep().stosd());
    // Half memory, half nothing.
    ok(a.mov(edi, MEMORY_END as u32 - 4));
    ok(a.mov(qword_ptr(rdi), rbx));
    ok(a.mov(rax, qword_ptr(rdi)));
    guest.fold();
    ok(guest.asm.mov(rax, qword_ptr(BUFFERS + 0x1000)));
    guest.fold();
    ok(guest.asm.mov(rax, rsi));
    guest.fold();
}

fn mmio_16_bytes(guest: &mut Guest) {
    let a = &mut guest.asm;
    ok(a.mov(rsi, BUFFERS));
    ok(a.mov(rdi, NOBODYS_ADDRESS));
    ok(a.movups(xmm3, xmmword_ptr(rsi)));
    ok(a.movups(xmmword_ptr(rdi), xmm3));
    ok(a.movdqu(xmmword_ptr(rdi + 32), xmm3));
    ok(a.mov(rdi, layout::VIRTIO_BASE));
    ok(a.movups(xmm4, xmmword_ptr(rdi)));
    ok(a.movdqu(xmmword_ptr(rsi + 0x800), xmm4));
    ok(a.mov(rax, qword_ptr(rsi + 0x808)));
    guest.fold();
}

/// x87 and SSE registers full of results that only a right FPU state gives, with exits between.
pub fn floating_point(rounds: u32) -> BootImage {
    let mut guest = Guest::new(Ring::Three);
    guest.data(
        BUFFERS,
        [1.0_f64, 1.5, 0.75, 3.25]
            .iter()
            .flat_map(|f| f.to_le_bytes())
            .collect(),
    );
    let a = &mut guest.asm;
    ok(a.fninit());
    ok(a.fldpi());
    ok(a.mov(rsi, BUFFERS));
    ok(a.movups(xmm0, xmmword_ptr(rsi)));
    ok(a.movups(xmm1, xmmword_ptr(rsi + 16)));
    ok(a.movups(xmm15, xmm0));
    guest.repeat(rounds, |guest| {
        let a = &mut guest.asm;
        ok(a.fld1());
        ok(a.faddp(st1, st0));
        ok(a.fsqrt());
        ok(a.mulpd(xmm15, xmm1));
        ok(a.addpd(xmm15, xmm0));
        ok(a.divpd(xmm15, xmm1));
        guest.in32(NOBODYS_PORT);
        ok(guest.asm.movups(xmmword_ptr(BUFFERS + 0x100), xmm15));
        ok(guest.asm.mov(rax, qword_ptr(BUFFERS + 0x100)));
        guest.fold();
    });
    guest.build()
}

/// Reads and writes a listed MSR, tries others, and counts the #GP it gets for those at
/// [`GP_COUNT`].
pub fn msrs() -> BootImage {
    const LSTAR: u32 = 0xc000_0082;
    const TSC: u32 = 0x10;
    const KVMCLOCK: u32 = 0x4b56_4d01;
    const APERF: u32 = 0xe8;
    let mut guest = Guest::new(Ring::Zero);
    guest.on_general_protection(|a| {
        ok(a.inc(qword_ptr(GP_COUNT)));
        ok(a.add(rsp, 8));
        // RDMSR and WRMSR have two bytes.
        ok(a.add(qword_ptr(rsp), 2));
        ok(a.iretq());
    });
    let a = &mut guest.asm;
    ok(a.mov(ecx, LSTAR));
    ok(a.mov(eax, 0x1234_5678));
    ok(a.xor(edx, edx));
    ok(a.wrmsr());
    ok(a.xor(eax, eax));
    ok(a.rdmsr());
    guest.fold();
    for register in [TSC, KVMCLOCK, APERF] {
        let a = &mut guest.asm;
        ok(a.mov(ecx, register));
        ok(a.xor(eax, eax));
        ok(a.xor(edx, edx));
        ok(a.rdmsr());
        ok(a.wrmsr());
        guest.fold();
    }
    ok(guest.asm.mov(qword_ptr(GP_COUNT + 8), rbx));
    guest.build()
}

/// Where [`msrs`] counts, and next to it keeps RBX.
pub const GP_COUNT: u64 = FREE + 0x8_0000;

/// Sends each frame it receives back as it is, `count` times.
pub fn echo(ring: Ring, count: u32) -> BootImage {
    const BUFFER_SIZE: u64 = 0x800;
    const HEADER: u32 = 12;
    let mut guest = Guest::new(ring);
    let receive = Queue {
        device: 0,
        index: 0,
        at: QUEUES,
    };
    let send = Queue {
        device: 0,
        index: 1,
        at: QUEUES + 0x1000,
    };
    let buffers: Vec<Descriptor> = (0..virtio::ENTRIES)
        .map(|i| Descriptor {
            address: BUFFERS + i * BUFFER_SIZE,
            len: 1536,
            flags: WRITE,
            next: 0,
        })
        .collect();
    receive.prepare(&mut guest, &buffers, virtio::ENTRIES as u16);
    send.prepare(&mut guest, &[], 0);
    virtio::start(&mut guest, 0, 0, &[receive, send]);
    if ring == Ring::Zero {
        ok(guest.asm.sti());
    }
    ok(guest.asm.mov(r12d, virtio::ENTRIES as u32));
    ok(guest.asm.xor(r13d, r13d));
    ok(guest.asm.xor(r14d, r14d));
    guest.repeat(count, |guest| {
        receive.wait_for_used(guest, r13d);
        let a = &mut guest.asm;
        // Which buffer (R8), how long (R9).
        ok(a.mov(eax, r13d));
        ok(a.and(eax, virtio::ENTRIES as i32 - 1));
        ok(a.mov(r8d, dword_ptr(rax * 8 + receive.used() + 4)));
        ok(a.mov(r9d, dword_ptr(rax * 8 + receive.used() + 8)));
        ok(a.inc(r13d));
        ok(a.mov(r10d, r8d));
        ok(a.imul_3(r10d, r10d, BUFFER_SIZE as i32));
        ok(a.add(r10d, BUFFERS as i32));
        fold_bytes(guest, HEADER);
        let a = &mut guest.asm;
        ok(a.mov(qword_ptr(send.descriptors()), r10));
        ok(a.mov(dword_ptr(send.descriptors() + 8), r9d));
        ok(a.mov(dword_ptr(send.descriptors() + 12), 0));
        ok(a.xor(ecx, ecx));
        send.offer(guest, r14d, true);
        ok(guest.asm.mov(ecx, r8d));
        receive.offer(guest, r12d, false);
    });
    guest.build()
}

/// Folds the bytes from R10 + `skip` to R10 + R9, every fourth of them.
fn fold_bytes(guest: &mut Guest, skip: u32) {
    let mut again = guest.asm.create_label();
    ok(guest.asm.mov(r11d, skip));
    ok(guest.asm.set_label(&mut again));
    ok(guest.asm.movzx(eax, byte_ptr(r10 + r11)));
    guest.fold();
    ok(guest.asm.add(r11d, 4));
    ok(guest.asm.cmp(r11d, r9d));
    ok(guest.asm.jb(again));
}

/// Writes a sector of disk 0, flushes, reads it back and compares, `rounds` times, at sectors
/// below 64. A difference asks for a reset.
pub fn disk(ring: Ring, rounds: u32) -> BootImage {
    const WRITTEN: u64 = BUFFERS;
    const READ: u64 = BUFFERS + 0x200;
    const HEADERS: u64 = BUFFERS + 0x400;
    const STATUSES: u64 = BUFFERS + 0x500;
    /// Requests by their virtio numbers.
    const REQUESTS: [u32; 3] = [1, 4, 0];
    let mut guest = Guest::new(ring);
    let queue = Queue {
        device: 1,
        index: 0,
        at: QUEUES,
    };
    let part = |address, len, flags, next| Descriptor {
        address,
        len,
        flags,
        next,
    };
    queue.prepare(
        &mut guest,
        &[
            part(HEADERS, 16, NEXT, 1),
            part(WRITTEN, 512, NEXT, 2),
            part(STATUSES, 1, WRITE, 0),
            part(HEADERS + 16, 16, NEXT, 4),
            part(STATUSES + 1, 1, WRITE, 0),
            part(HEADERS + 32, 16, NEXT, 6),
            part(READ, 512, NEXT | WRITE, 7),
            part(STATUSES + 2, 1, WRITE, 0),
        ],
        0,
    );
    for (i, request) in (0u64..).zip(REQUESTS) {
        guest.data(HEADERS + i * 16, u64::from(request).to_le_bytes().to_vec());
    }
    guest.data(STATUSES, vec![0xaa; 3]);
    // VIRTIO_BLK_F_FLUSH.
    virtio::start(&mut guest, 1, 1 << 9, &[queue]);
    if ring == Ring::Zero {
        ok(guest.asm.sti());
    }
    ok(guest.asm.xor(r13d, r13d));
    ok(guest.asm.xor(r14d, r14d));
    guest.repeat(rounds, |guest| {
        let a = &mut guest.asm;
        // Which sector, and what to write there.
        ok(a.imul_3(eax, r15d, 7));
        ok(a.and(eax, 63));
        ok(a.mov(qword_ptr(HEADERS + 8), rax));
        ok(a.mov(qword_ptr(HEADERS + 40), rax));
        let mut fill = a.create_label();
        ok(a.mov(ecx, 64));
        ok(a.set_label(&mut fill));
        ok(a.mov(rax, rcx));
        guest.fold();
        let a = &mut guest.asm;
        ok(a.mov(qword_ptr(rcx * 8 + (WRITTEN - 8)), rbx));
        ok(a.dec(ecx));
        ok(a.jnz(fill));
        for head in [0, 3, 5] {
            ok(guest.asm.mov(ecx, head));
            queue.offer(guest, r14d, true);
            queue.wait_for_used(guest, r13d);
            ok(guest.asm.inc(r13d));
        }
        compare(guest, WRITTEN, READ);
        ok(guest.asm.mov(eax, dword_ptr(STATUSES)));
        guest.fold();
    });
    guest.build()
}

/// Asks for a reset unless the 512 bytes at both addresses are equal.
fn compare(guest: &mut Guest, here: u64, there: u64) {
    let mut equal = guest.asm.create_label();
    let mut next = guest.asm.create_label();
    let mut differ = guest.asm.create_label();
    ok(guest.asm.mov(ecx, 64));
    ok(guest.asm.set_label(&mut next));
    ok(guest.asm.mov(rax, qword_ptr(rcx * 8 + (here - 8))));
    ok(guest.asm.cmp(rax, qword_ptr(rcx * 8 + (there - 8))));
    ok(guest.asm.jne(differ));
    ok(guest.asm.dec(ecx));
    ok(guest.asm.jnz(next));
    ok(guest.asm.jmp(equal));
    ok(guest.asm.set_label(&mut differ));
    guest.out32(layout::POWER, layout::POWER_RESET);
    ok(guest.asm.set_label(&mut equal));
}

/// Reads a port or an address that nobody claims, `rounds` times, and does nothing else.
pub fn exits(ring: Ring, mmio: bool, rounds: u32) -> BootImage {
    let mut guest = Guest::new(ring);
    ok(guest.asm.mov(edi, NOBODYS_ADDRESS as u32));
    ok(guest.asm.mov(edx, u32::from(NOBODYS_PORT)));
    guest.repeat(rounds, |guest| {
        // The repetition's own label stands on the first instruction.
        if mmio {
            ok(guest.asm.mov(eax, dword_ptr(rdi)));
        } else {
            ok(guest.asm.in_(eax, dx));
        }
    });
    guest.build()
}

/// Reads a port that nobody claims with RBX holding `value`.
pub fn register(value: u32) -> BootImage {
    let mut guest = Guest::new(Ring::Three);
    ok(guest.asm.mov(ebx, value));
    guest.in32(NOBODYS_PORT);
    guest.build()
}

/// Reads random bytes into [`STRING_TARGET`] by one string instruction.
pub fn string_input() -> BootImage {
    let mut guest = Guest::new(Ring::Three);
    ok(guest.asm.mov(rdi, STRING_TARGET));
    ok(guest.asm.mov(edx, u32::from(layout::ENTROPY)));
    ok(guest.asm.insd());
    guest.build()
}

/// Where [`string_input`] puts what it reads.
pub const STRING_TARGET: u64 = FREE;

/// Arms the timer for a deadline that has passed, reads a port, lets interrupts in, reads the
/// port again.
pub fn masked() -> BootImage {
    let mut guest = Guest::new(Ring::Zero);
    guest.out32(layout::TIMER_MILLIS, 1);
    guest.in32(NOBODYS_PORT);
    ok(guest.asm.sti());
    guest.in32(NOBODYS_PORT);
    guest.build()
}
