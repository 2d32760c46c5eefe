//! Assembling a guest: tables, interrupt stubs, the way into its ring, and an ELF file around it.
//!
//! ```text
//! 0x10_0000  code: set-up in ring 0, then the body
//! 0x11_0000  stubs, 0x80 bytes each: 32 exceptions, 16 interrupts
//! 0x18_0000  GDT   0x18_1000 IDT   0x18_2000 TSS with an I/O bitmap that opens every port
//! 0x19_0000  page tables: the first 4 GiB, open to ring 3, accessed and dirty preset
//! 0x1a_0000  top of the ring-0 stack      0x1b_0000  top of the ring-3 stack
//! 0x1c_0000  counters of interrupts, then what the stubs note down
//! 0x20_0000  free for the body, and `Guest::data`
//! ```
//!
//! Made to run on every KVM: ports are open to ring 3 by IOPL and by the bitmap, vector
//! instructions stay in ring 3, ring 3 never changes IF.

use iced_x86::code_asm::*;
use vmm::boot::BootImage;
use vmm::devices::layout;

pub const CODE: u64 = 0x10_0000;
const STUBS: u64 = 0x11_0000;
const STUB_SIZE: u64 = 0x80;
const GDT: u64 = 0x18_0000;
const IDT: u64 = 0x18_1000;
const TSS: u64 = 0x18_2000;
const PAGE_TABLES: u64 = 0x19_0000;
const KERNEL_STACK: u64 = 0x1a_0000;
const USER_STACK: u64 = 0x1b_0000;
/// How often each interrupt line came, 16 quadwords.
pub const COUNTERS: u64 = 0x1c_0000;
/// Where the last interrupt hit (RIP), and a running sum of all such places.
pub const LAST_RIP: u64 = 0x1c_0080;
pub const RIP_SUM: u64 = 0x1c_0088;
/// The vector of an exception nobody expected.
pub const EXCEPTION: u64 = 0x1c_0090;
/// The first address that a body has to itself.
pub const FREE: u64 = 0x20_0000;

const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
const USER_DATA: u16 = 0x23;
const USER_CODE: u16 = 0x2b;
const TSS_SELECTOR: u16 = 0x30;
const EXCEPTIONS: u64 = 32;
const LINES: u64 = 16;
const BITMAP_OFFSET: u16 = 0x68;
const BITMAP_SIZE: u16 = 8192;

/// Where a body runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    Zero,
    Three,
}

/// A guest being assembled.
pub struct Guest {
    /// The body goes here.
    pub asm: CodeAssembler,
    data: Vec<(u64, Vec<u8>)>,
}

/// Unwraps what the assembler says: a test that cannot be assembled is wrong.
pub fn ok<T>(assembled: Result<T, iced_x86::IcedError>) -> T {
    assembled.expect("the test's own code can be assembled")
}

impl Guest {
    /// A guest whose body runs in `ring`: interrupts are on in ring 3, off in ring 0; all lines
    /// are open at the interrupt controllers, vectors 0x20 to 0x2f.
    pub fn new(ring: Ring) -> Self {
        let mut guest = Self {
            asm: ok(CodeAssembler::new(64)),
            data: vec![
                (GDT, gdt()),
                (IDT, idt()),
                (TSS, tss()),
                (PAGE_TABLES, page_tables()),
            ],
        };
        for vector in 0..EXCEPTIONS + LINES {
            let code = if vector < EXCEPTIONS {
                exception_stub(vector)
            } else {
                interrupt_stub(vector - EXCEPTIONS)
            };
            assert!(code.len() as u64 <= STUB_SIZE);
            guest.data.push((STUBS + vector * STUB_SIZE, code));
        }
        guest.prologue(ring);
        guest
    }

    fn prologue(&mut self, ring: Ring) {
        let a = &mut self.asm;
        ok(a.mov(rax, PAGE_TABLES));
        ok(a.mov(cr3, rax));
        ok(a.mov(rsp, KERNEL_STACK));
        for (base, limit, is_gdt) in [(GDT, 63, true), (IDT, (EXCEPTIONS + LINES) * 16 - 1, false)]
        {
            ok(a.mov(rax, base));
            ok(a.mov(qword_ptr(rsp - 8), rax));
            ok(a.mov(word_ptr(rsp - 10), limit as u32));
            if is_gdt {
                ok(a.lgdt(ptr(rsp - 10)));
            } else {
                ok(a.lidt(ptr(rsp - 10)));
            }
        }
        ok(a.mov(eax, u32::from(TSS_SELECTOR)));
        ok(a.ltr(ax));
        for (first, vectors, cascade) in
            [(layout::PIC_MASTER, 0x20, 4), (layout::PIC_SLAVE, 0x28, 2)]
        {
            self.out8(first, 0x11);
            self.out8(first + 1, vectors);
            self.out8(first + 1, cascade);
            self.out8(first + 1, 1);
            self.out8(first + 1, 0);
        }
        if ring == Ring::Three {
            self.enter_ring_3();
        }
    }

    fn enter_ring_3(&mut self) {
        let a = &mut self.asm;
        let mut body = a.create_label();
        ok(a.push(i32::from(USER_DATA)));
        ok(a.push(USER_STACK as i32));
        // IOPL 3, IF, and the bit that is always set.
        ok(a.push(0x3202));
        ok(a.push(i32::from(USER_CODE)));
        ok(a.lea(rax, ptr(body)));
        ok(a.push(rax));
        ok(a.iretq());
        ok(a.set_label(&mut body));
        // An instruction takes one label; the body may begin with one of its own.
        ok(a.nop());
    }

    /// Replaces the stub of #GP. It begins with the error code on the stack.
    pub fn on_general_protection(&mut self, body: impl FnOnce(&mut CodeAssembler)) {
        const VECTOR: u64 = 13;
        let address = STUBS + VECTOR * STUB_SIZE;
        let mut a = ok(CodeAssembler::new(64));
        body(&mut a);
        let code = ok(a.assemble(address));
        assert!(code.len() as u64 <= STUB_SIZE);
        self.data.retain(|(at, _)| *at != address);
        self.data.push((address, code));
    }

    /// Puts bytes where the guest finds them.
    pub fn data(&mut self, address: u64, bytes: Vec<u8>) {
        self.data.push((address, bytes));
    }

    /// Writes a byte to a port. Uses RAX and RDX.
    pub fn out8(&mut self, port: u16, value: u8) {
        ok(self.asm.mov(edx, u32::from(port)));
        ok(self.asm.mov(eax, u32::from(value)));
        ok(self.asm.out(dx, al));
    }

    /// Writes a doubleword to a port. Uses RAX and RDX.
    pub fn out32(&mut self, port: u16, value: u32) {
        ok(self.asm.mov(eax, value));
        self.out32_eax(port);
    }

    /// Writes EAX to a port. Uses RDX.
    pub fn out32_eax(&mut self, port: u16) {
        ok(self.asm.mov(edx, u32::from(port)));
        ok(self.asm.out(dx, eax));
    }

    /// Reads a doubleword from a port into EAX. Uses RDX.
    pub fn in32(&mut self, port: u16) {
        ok(self.asm.mov(edx, u32::from(port)));
        ok(self.asm.in_(eax, dx));
    }

    /// Writes a doubleword to an address. Uses RAX and RDX.
    pub fn write32(&mut self, address: u64, value: u32) {
        ok(self.asm.mov(edx, address as u32));
        ok(self.asm.mov(dword_ptr(rdx), value));
    }

    /// Folds RAX into RBX, where all of a guest's doings end up.
    pub fn fold(&mut self) {
        ok(self.asm.rol(rbx, 7));
        ok(self.asm.xor(rbx, rax));
    }

    /// Waits until anything arrives that came after the last wait.
    pub fn idle(&mut self) {
        self.out8(layout::IDLE, 1);
    }

    /// Writes `body` `count` times, counting down in `R15`.
    pub fn repeat(&mut self, count: u32, body: impl FnOnce(&mut Self)) {
        let mut again = self.asm.create_label();
        ok(self.asm.mov(r15d, count));
        ok(self.asm.set_label(&mut again));
        body(self);
        ok(self.asm.dec(r15d));
        ok(self.asm.jnz(again));
    }

    /// Ends the body by switching off, and makes an image of it all.
    pub fn build(mut self) -> BootImage {
        self.out32(layout::POWER, layout::POWER_OFF);
        // Not reached; a guest that goes on would run into whatever follows.
        ok(self.asm.hlt());
        let code = ok(self.asm.assemble(CODE));
        assert!(code.len() as u64 <= STUBS - CODE, "the body is too long");
        self.data.insert(0, (CODE, code));
        BootImage::new(elf(CODE, &self.data))
    }
}

/// An ELF file that loads each of `pieces` at its address.
pub fn elf(entry: u64, pieces: &[(u64, Vec<u8>)]) -> Vec<u8> {
    const HEADER: usize = 64;
    const SEGMENT: usize = 56;
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&entry.to_le_bytes());
    file.extend_from_slice(&(HEADER as u64).to_le_bytes());
    file.extend_from_slice(&0u64.to_le_bytes());
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER, SEGMENT, pieces.len(), 64, 0, 0] {
        file.extend_from_slice(&(half as u16).to_le_bytes());
    }
    let mut offset = (HEADER + SEGMENT * pieces.len()) as u64;
    for (address, bytes) in pieces {
        let len = bytes.len() as u64;
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&7u32.to_le_bytes());
        for word in [offset, *address, *address, len, len, 1] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        offset += len;
    }
    for (_, bytes) in pieces {
        file.extend_from_slice(bytes);
    }
    file
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn gdt() -> Vec<u8> {
    let limit = u64::from(BITMAP_OFFSET + BITMAP_SIZE);
    // A 64-bit TSS that is present and not busy.
    let tss_low = limit | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;
    words([
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        tss_low,
        TSS >> 32,
    ])
}

fn idt() -> Vec<u8> {
    words((0..EXCEPTIONS + LINES).flat_map(|vector| {
        let stub = STUBS + vector * STUB_SIZE;
        let low =
            stub & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40 | (stub >> 16 & 0xffff) << 48;
        [low, stub >> 32]
    }))
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
    let table = |entries: Vec<u64>| {
        let mut bytes = words(entries);
        bytes.resize(4096, 0);
        bytes
    };
    let mut tables = table(vec![(PAGE_TABLES + 0x1000) | TABLE]);
    tables.extend(table(
        (0..4)
            .map(|i| (PAGE_TABLES + 0x2000 + i * 0x1000) | TABLE)
            .collect(),
    ));
    tables.extend(words((0..2048).map(|page| page << 21 | PAGE)));
    tables
}

/// Notes down the vector and asks for a reset: a test that sees one has failed.
fn exception_stub(vector: u64) -> Vec<u8> {
    let mut a = ok(CodeAssembler::new(64));
    ok(a.mov(rax, vector));
    ok(a.mov(qword_ptr(EXCEPTION), rax));
    ok(a.mov(edx, u32::from(layout::POWER)));
    ok(a.mov(eax, layout::POWER_RESET));
    ok(a.out(dx, eax));
    ok(a.hlt());
    ok(a.assemble(STUBS + vector * STUB_SIZE))
}

/// Counts, notes down where it hit, and ends the interrupt.
fn interrupt_stub(line: u64) -> Vec<u8> {
    let mut a = ok(CodeAssembler::new(64));
    ok(a.push(rax));
    ok(a.inc(qword_ptr(COUNTERS + line * 8)));
    ok(a.mov(rax, qword_ptr(rsp + 8)));
    ok(a.mov(qword_ptr(LAST_RIP), rax));
    ok(a.add(qword_ptr(RIP_SUM), rax));
    ok(a.mov(eax, 0x20));
    if line >= 8 {
        ok(a.out(i32::from(layout::PIC_SLAVE), al));
    }
    ok(a.out(i32::from(layout::PIC_MASTER), al));
    ok(a.pop(rax));
    ok(a.iretq());
    ok(a.assemble(STUBS + (EXCEPTIONS + line) * STUB_SIZE))
}
