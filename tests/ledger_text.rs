//! The ledger executes nothing whose result depends on the host, and nothing that some KVM cannot
//! run in ring 3: its text is disassembled and every instruction looked at.

use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind,
};
use understudy::images;

/// What every x86-64 CPU has, and nothing that came later.
const BASELINE: [CpuidFeature; 14] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::FPU,
    CpuidFeature::FPU387,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::CX8,
    CpuidFeature::MULTIBYTENOP,
];

/// Instructions of the baseline that ask the host, change the interrupt flag or enter ring 0.
const FORBIDDEN: [Mnemonic; 13] = [
    Mnemonic::Cli,
    Mnemonic::Cpuid,
    Mnemonic::Hlt,
    Mnemonic::Int,
    Mnemonic::Into,
    Mnemonic::Lsl,
    Mnemonic::Popfq,
    Mnemonic::Rdmsr,
    Mnemonic::Sgdt,
    Mnemonic::Smsw,
    Mnemonic::Sti,
    Mnemonic::Str,
    Mnemonic::Syscall,
];

/// What is wrong with an instruction.
fn fault(instruction: &Instruction) -> Option<&'static str> {
    if instruction.is_invalid() {
        return Some("no instruction");
    }
    if instruction.encoding() != EncodingKind::Legacy {
        return Some("VEX, EVEX or XOP");
    }
    // An older CPU executes TZCNT as BSF; compilers use it for operands that are not zero, where
    // both give the same (the flags differ, so copies must agree about it: pairing compares CPUID).
    let features = instruction.cpuid_features();
    let newer = |feature| !BASELINE.contains(feature);
    if instruction.mnemonic() != Mnemonic::Tzcnt && features.iter().any(newer) {
        return Some("not in the baseline");
    }
    if FORBIDDEN.contains(&instruction.mnemonic()) {
        return Some("forbidden");
    }
    if instruction.has_segment_prefix() && touches_memory(instruction) {
        return Some("a segment override");
    }
    let named = (0..instruction.op_count()).any(|op| {
        instruction.op_kind(op) == OpKind::Register
            && instruction.op_register(op).is_segment_register()
    });
    if named {
        return Some("reads or loads a segment register");
    }
    let mut info = InstructionInfoFactory::new();
    let mut registers = info.info(instruction).used_registers().iter();
    registers
        .any(|used| used.register().is_cr() || used.register().is_dr())
        .then_some("a control or debug register")
}

fn touches_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|op| instruction.op_kind(op) == OpKind::Memory)
        && !matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Lea)
}

/// The bytes and the address of a section of an ELF file.
fn section<'a>(elf: &'a [u8], wanted: &str) -> Option<(&'a [u8], u64)> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(elf.get(at..at + 8)?.try_into().ok()?));
    let table = usize::try_from(u64_at(0x28)?).ok()?;
    let header = |index: u16| table + usize::from(index) * 64;
    let names = usize::try_from(u64_at(header(u16_at(0x3e)?) + 0x18)?).ok()?;
    (0..u16_at(0x3c)?).find_map(|index| {
        let at = header(index);
        let name = elf.get(names + u32_at(at)? as usize..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        let offset = usize::try_from(u64_at(at + 0x18)?).ok()?;
        let size = usize::try_from(u64_at(at + 0x20)?).ok()?;
        let bytes = elf.get(offset..offset + size)?;
        (name == wanted.as_bytes()).then_some((bytes, u64_at(at + 0x10)?))
    })
}

fn faults(text: &[u8], address: u64) -> Vec<String> {
    Decoder::with_ip(64, text, address, DecoderOptions::NONE)
        .iter()
        .filter_map(|instruction| {
            let fault = fault(&instruction)?;
            Some(format!(
                "{:#x}: {:?}: {fault}",
                instruction.ip(),
                instruction.mnemonic()
            ))
        })
        .collect()
}

#[test]
fn the_text_is_repeatable_everywhere() {
    let image = images::find("ledger").expect("the ledger is embedded");
    let (text, address) = section(&image.kernel, ".text").expect("it has text");
    assert!(text.len() > 50_000, "the text is all there");
    let faults = faults(text, address);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn what_is_forbidden_is_found() {
    let samples: [(&str, &[u8]); 14] = [
        ("rdtsc", &[0x0f, 0x31]),
        ("rdtscp", &[0x0f, 0x01, 0xf9]),
        ("rdrand eax", &[0x0f, 0xc7, 0xf0]),
        ("rdseed eax", &[0x0f, 0xc7, 0xf8]),
        ("xsave [rax]", &[0x0f, 0xae, 0x20]),
        ("xgetbv", &[0x0f, 0x01, 0xd0]),
        ("cpuid", &[0x0f, 0xa2]),
        ("vaddps ymm0, ymm0, ymm0", &[0xc5, 0xfc, 0x58, 0xc0]),
        ("popcnt eax, eax", &[0xf3, 0x0f, 0xb8, 0xc0]),
        ("mov eax, cs", &[0x8c, 0xc8]),
        (
            "mov rax, fs:[0]",
            &[0x64, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0],
        ),
        ("mov rax, cr2", &[0x0f, 0x20, 0xd0]),
        ("sti", &[0xfb]),
        ("rdpmc", &[0x0f, 0x33]),
    ];
    for (name, bytes) in samples {
        assert_eq!(faults(bytes, 0).len(), 1, "{name}");
    }
    // What it does use: IN, OUT, SSE2, UD2.
    let used = [0xec, 0xee, 0xef, 0x66, 0x0f, 0xef, 0xc0, 0x0f, 0x0b];
    assert!(faults(&used, 0).is_empty());
}
