//! The small guests by which `doctor` tries a host out, assembled on the spot.
//!
//! ```text
//! 0x10_0000  code: set-up in ring 0, then the body
//! 0x11_0000  the timer's interrupt stub
//! 0x18_0000  GDT   0x18_1000 IDT   0x18_2000 TSS with an I/O bitmap that opens every port
//! 0x19_0000  page tables: the first 4 GiB, open to ring 3, accessed and dirty preset
//! 0x1a_0000  top of the ring-0 stack      0x1b_0000  top of the ring-3 stack
//! 0x1c_0000  how often the timer came     0x1d_0000  what the body found
//! ```
//!
//! Guests for single instructions are in `trials.rs`. They run on every KVM: ports are open to ring 3 by IOPL and by the bitmap, and ring 3 never
//! changes IF. An exception finds no handler and ends the guest by a triple fault.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, cr3, dword_ptr, dx, eax, ebx, ecx, edx, ptr, qword_ptr, r14, r14d, r15d,
    rax, rbx, rcx, rsi, rsp, word_ptr,
};
use vmm::boot::BootImage;
use vmm::devices::layout;

const CODE: u64 = 0x10_0000;
const STUB: u64 = 0x11_0000;
const GDT: u64 = 0x18_0000;
const IDT: u64 = 0x18_1000;
const TSS: u64 = 0x18_2000;
const PAGE_TABLES: u64 = 0x19_0000;
const KERNEL_STACK: u64 = 0x1a_0000;
const USER_STACK: u64 = 0x1b_0000;
const TIMER_COUNT: u64 = 0x1c_0000;
/// Where [`cpuid`] leaves what it was told: EAX, EBX, ECX, EDX of each leaf in order.
pub(super) const RESULTS: u64 = 0x1d_0000;

pub(super) const KERNEL_CODE: u64 = 0x10;
const USER_DATA: i32 = 0x23;
const USER_CODE: i32 = 0x2b;
const TSS_SELECTOR: u32 = 0x30;
pub(super) const TIMER_VECTOR: u64 = 0x20;
const BITMAP_OFFSET: u16 = 0x68;
const BITMAP_SIZE: u16 = 8192;

/// A port and an address that no device claims.
pub(super) const NOBODYS_PORT: u16 = 0x990;
const NOBODYS_ADDRESS: u32 = 0xe000_0000;

/// Where the body of a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// As a kernel does.
    Zero,
    /// As a program does.
    Three,
}

/// By what ring 3 may get at ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doors {
    /// The privilege level in the flags.
    Iopl,
    /// The bitmap in the task state segment.
    Bitmap,
    /// Either.
    Both,
}

/// What leaves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// IN from a port.
    Port,
    /// A read where no memory is.
    Mmio,
}

/// Accesses something that nobody claims, again and again, and never ends.
pub(super) fn accesses(ring: Ring, access: Access) -> Result<BootImage, IcedError> {
    let mut asm = start(ring)?;
    let mut again = asm.create_label();
    asm.mov(rsi, u64::from(NOBODYS_ADDRESS))?;
    asm.mov(edx, u32::from(NOBODYS_PORT))?;
    asm.set_label(&mut again)?;
    match access {
        Access::Port => asm.in_(eax, dx)?,
        Access::Mmio => asm.mov(eax, dword_ptr(rsi))?,
    }
    asm.jmp(again)?;
    finish(asm)
}

/// Executes CPUID for each of `leaves` (EAX and ECX), leaves the answers at [`RESULTS`], and
/// switches itself off.
pub(super) fn cpuid(ring: Ring, leaves: &[(u32, u32)]) -> Result<BootImage, IcedError> {
    let mut asm = start(ring)?;
    asm.mov(rsi, RESULTS)?;
    for (function, index) in leaves {
        asm.mov(eax, *function)?;
        asm.mov(ecx, *index)?;
        asm.cpuid()?;
        asm.mov(dword_ptr(rsi), eax)?;
        asm.mov(dword_ptr(rsi + 4), ebx)?;
        asm.mov(dword_ptr(rsi + 8), ecx)?;
        asm.mov(dword_ptr(rsi + 12), edx)?;
        asm.add(rsi, 16)?;
    }
    finish(asm)
}

/// Computes and looks at a port by turns until the timer has interrupted it, `rounds` times; what
/// it computes depends on the time and on where exactly the interrupts hit.
pub(super) fn restless(ring: Ring, rounds: u32) -> Result<BootImage, IcedError> {
    // Where ring 0 is emulated, native code does a hundred times as much in the same time.
    let steps: u32 = if ring == Ring::Zero { 20 } else { 3000 };
    let mut asm = start(ring)?;
    if ring == Ring::Zero {
        asm.sti()?;
    }
    let (mut round, mut look, mut compute) =
        (asm.create_label(), asm.create_label(), asm.create_label());
    asm.mov(r15d, rounds)?;
    asm.xor(r14d, r14d)?;
    asm.set_label(&mut round)?;
    arm_timer(&mut asm, 200_000)?;
    asm.set_label(&mut look)?;
    asm.mov(ecx, steps)?;
    asm.set_label(&mut compute)?;
    fold(&mut asm, true)?;
    asm.dec(ecx)?;
    asm.jnz(compute)?;
    asm.mov(edx, u32::from(NOBODYS_PORT))?;
    asm.in_(eax, dx)?;
    asm.mov(rax, qword_ptr(TIMER_COUNT))?;
    asm.cmp(rax, r14)?;
    asm.je(look)?;
    asm.mov(r14, rax)?;
    asm.mov(rax, qword_ptr(TIMER_COUNT + 8))?;
    fold(&mut asm, false)?;
    asm.mov(qword_ptr(RESULTS), rbx)?;
    asm.dec(r15d)?;
    asm.jnz(round)?;
    finish(asm)
}

/// Folds RCX or RAX into RBX, where all of the guest's doings end up.
fn fold(asm: &mut CodeAssembler, counter: bool) -> Result<(), IcedError> {
    asm.rol(rbx, 7)?;
    asm.xor(rbx, if counter { rcx } else { rax })
}

/// Reads the clock and arms the timer `nanos` later.
fn arm_timer(asm: &mut CodeAssembler, nanos: i32) -> Result<(), IcedError> {
    asm.mov(edx, u32::from(layout::CLOCK_LOW))?;
    asm.in_(eax, dx)?;
    fold(asm, false)?;
    asm.add(eax, nanos)?;
    asm.mov(edx, u32::from(layout::TIMER_LOW))?;
    asm.out(dx, eax)?;
    asm.mov(edx, u32::from(layout::CLOCK_HIGH))?;
    asm.in_(eax, dx)?;
    asm.mov(edx, u32::from(layout::TIMER_HIGH))?;
    asm.out(dx, eax)
}

/// Everything before the body.
fn start(ring: Ring) -> Result<CodeAssembler, IcedError> {
    start_after(ring, Doors::Both, |_| Ok(()))
}

/// The same; ring 3 gets at ports by these doors only, and `prepare` is the last thing in ring 0.
pub(super) fn start_after(
    ring: Ring,
    doors: Doors,
    prepare: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<CodeAssembler, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    asm.mov(rax, PAGE_TABLES)?;
    asm.mov(cr3, rax)?;
    asm.mov(rsp, KERNEL_STACK)?;
    asm.mov(rax, GDT)?;
    asm.mov(qword_ptr(rsp - 8), rax)?;
    asm.mov(word_ptr(rsp - 10), 63_u32)?;
    asm.lgdt(ptr(rsp - 10))?;
    asm.mov(rax, IDT)?;
    asm.mov(qword_ptr(rsp - 8), rax)?;
    asm.mov(word_ptr(rsp - 10), (TIMER_VECTOR as u32 + 1) * 16 - 1)?;
    asm.lidt(ptr(rsp - 10))?;
    asm.mov(eax, TSS_SELECTOR)?;
    asm.ltr(ax)?;
    // The interrupt controllers: vectors from 0x20 and 0x28, only the timer's line open.
    let words = [
        (layout::PIC_MASTER, [0x11, TIMER_VECTOR as u32, 4, 1, 0xfe]),
        (
            layout::PIC_SLAVE,
            [0x11, TIMER_VECTOR as u32 + 8, 2, 1, 0xff],
        ),
    ];
    for (port, [first, rest @ ..]) in words {
        out8(&mut asm, port, first)?;
        for word in rest {
            out8(&mut asm, port + 1, word)?;
        }
    }
    prepare(&mut asm)?;
    if ring == Ring::Three {
        let mut body = asm.create_label();
        asm.push(USER_DATA)?;
        asm.push(USER_STACK as i32)?;
        // IOPL 3 or 0, IF, and the bit that is always set.
        asm.push(if doors == Doors::Bitmap {
            0x202
        } else {
            0x3202
        })?;
        asm.push(USER_CODE)?;
        asm.lea(rax, ptr(body))?;
        asm.push(rax)?;
        asm.iretq()?;
        asm.set_label(&mut body)?;
    }
    Ok(asm)
}

fn out8(asm: &mut CodeAssembler, port: u16, value: u32) -> Result<(), IcedError> {
    asm.mov(edx, u32::from(port))?;
    asm.mov(eax, value)?;
    asm.out(dx, al)
}

/// Switches the guest off after its body, and makes an image of it all.
fn finish(asm: CodeAssembler) -> Result<BootImage, IcedError> {
    finish_with(asm, Doors::Both)
}

/// The same with these doors to ports, which must be those of the start.
pub(super) fn finish_with(mut asm: CodeAssembler, doors: Doors) -> Result<BootImage, IcedError> {
    asm.mov(edx, u32::from(layout::POWER))?;
    asm.mov(eax, layout::POWER_OFF)?;
    asm.out(dx, eax)?;
    // Not reached; a guest that goes on would run into whatever follows.
    asm.hlt()?;
    let pieces = [
        (CODE, asm.assemble(CODE)?),
        (STUB, timer_stub()?),
        (GDT, gdt(doors)),
        (IDT, idt()),
        (TSS, tss()),
        (PAGE_TABLES, page_tables()),
    ];
    Ok(BootImage::new(elf(CODE, &pieces)))
}

/// Counts the interrupt and adds up where it hit.
fn timer_stub() -> Result<Vec<u8>, IcedError> {
    let mut asm = CodeAssembler::new(64)?;
    asm.push(rax)?;
    asm.inc(qword_ptr(TIMER_COUNT))?;
    asm.mov(rax, qword_ptr(rsp + 8))?;
    asm.add(qword_ptr(TIMER_COUNT + 8), rax)?;
    asm.mov(eax, 0x20)?;
    asm.out(i32::from(layout::PIC_MASTER), al)?;
    asm.pop(rax)?;
    asm.iretq()?;
    asm.assemble(STUB)
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn gdt(doors: Doors) -> Vec<u8> {
    let limit = match doors {
        // The bitmap would begin behind the end.
        Doors::Iopl => u64::from(BITMAP_OFFSET) - 1,
        Doors::Bitmap | Doors::Both => u64::from(BITMAP_OFFSET + BITMAP_SIZE),
    };
    // A 64-bit TSS that is present and not busy.
    let tss = limit | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;
    let kernel = [0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let user = [0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    words([0, 0, kernel[0], kernel[1], user[0], user[1], tss, TSS >> 32])
}

fn idt() -> Vec<u8> {
    let mut gates = vec![0; TIMER_VECTOR as usize * 2];
    // A present 64-bit interrupt gate.
    gates.push(STUB & 0xffff | KERNEL_CODE << 16 | 0x8e << 40 | (STUB >> 16 & 0xffff) << 48);
    gates.push(STUB >> 32);
    words(gates)
}

fn tss() -> Vec<u8> {
    let mut tss = vec![0; usize::from(BITMAP_OFFSET + BITMAP_SIZE) + 1];
    tss[4..12].copy_from_slice(&KERNEL_STACK.to_le_bytes());
    tss[0x66..0x68].copy_from_slice(&BITMAP_OFFSET.to_le_bytes());
    // The bitmap must end with a byte of ones.
    tss[usize::from(BITMAP_OFFSET + BITMAP_SIZE)] = 0xff;
    tss
}

fn page_tables() -> Vec<u8> {
    // Present, writable, user, accessed; for pages also dirty and 2 MiB.
    const TABLE: u64 = 0x27;
    const PAGE: u64 = 0xe7;
    let mut top = words([(PAGE_TABLES + 0x1000) | TABLE]);
    top.resize(4096, 0);
    let mut tables = words((0..4).map(|i| (PAGE_TABLES + 0x2000 + i * 0x1000) | TABLE));
    tables.resize(4096, 0);
    let pages = words((0..2048).map(|page| page << 21 | PAGE));
    [top, tables, pages].concat()
}

/// An ELF file that loads each of `pieces` at its address.
fn elf(entry: u64, pieces: &[(u64, Vec<u8>)]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const SEGMENT: u64 = 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // Executable, x86-64, version 1.
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(words([entry, HEADER, 0]));
    file.extend(0_u32.to_le_bytes());
    for half in [HEADER, SEGMENT, pieces.len() as u64, 64, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut offset = HEADER + SEGMENT * pieces.len() as u64;
    for (address, bytes) in pieces {
        let len = bytes.len() as u64;
        // To be loaded; readable, writable, executable.
        file.extend(1_u32.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        file.extend(words([offset, *address, *address, len, len, 1]));
        offset += len;
    }
    for (_, bytes) in pieces {
        file.extend(bytes);
    }
    file
}
