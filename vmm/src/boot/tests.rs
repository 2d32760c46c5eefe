//! What is loaded where, and what damaged images get.

use proptest::prelude::*;
use vm_memory::Bytes as _;

use super::*;

const MEMORY: u64 = 4 << 20;
const ENTRY: u64 = KERNEL_MIN + 0x10;
const PHYSICAL: usize = 64 + 24;
const FILE_SIZE: usize = 64 + 32;
const MEMORY_SIZE: usize = 64 + 40;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory can be mapped")
}

fn config() -> MachineConfig {
    MachineConfig {
        memory: MEMORY,
        command_line: "quiet".to_owned(),
        mac: None,
        disks: Vec::new(),
        acpi: false,
    }
}

/// An ELF file with one segment of `content`.
fn elf(content: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for (width, value) in [
        (2, 2),
        (2, 62),
        (4, 1),
        (8, ENTRY),
        (8, 64),
        (8, 0),
        (4, 0),
        (2, 64),
        (2, 56),
        (2, 1),
        (2, 64),
        (2, 0),
        (2, 0),
        // The segment.
        (4, 1),
        (4, 7),
        (8, 120),
        (8, KERNEL_MIN),
        (8, KERNEL_MIN),
        (8, content.len() as u64),
        (8, content.len() as u64),
        (8, 1),
    ] {
        file.extend_from_slice(&value.to_le_bytes()[..width]);
    }
    assert_eq!(file.len(), 120);
    file.extend_from_slice(content);
    file
}

fn load_file(file: Vec<u8>) -> Result<EntryState, BootError> {
    load(&memory(), &config(), &BootImage::new(file))
}

fn with_word(at: usize, value: u64) -> Vec<u8> {
    let mut file = elf(&[0x90; 64]);
    file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    file
}

#[test]
fn everything_is_where_the_guest_looks_for_it() {
    let memory = memory();
    let content: Vec<u8> = (0..64).collect();
    let entry = load(&memory, &config(), &BootImage::new(elf(&content))).expect("it loads");
    assert_eq!(entry.instruction, ENTRY);
    assert_eq!(entry.boot_params, BOOT_PARAMS);

    let mut loaded = [0; 64];
    memory
        .read_slice(&mut loaded, GuestAddress(KERNEL_MIN))
        .expect("inside");
    assert_eq!(loaded[..], content);

    let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("inside");
    let line_at = u64::from(params.hdr.cmd_line_ptr);
    let mut line = [0; 6];
    memory
        .read_slice(&mut line, GuestAddress(line_at))
        .expect("inside");
    assert_eq!(&line, b"quiet\0");
    assert_eq!(params.e820_entries, 2);
    let (addr, size) = (params.e820_table[1].addr, params.e820_table[1].size);
    assert_eq!((addr, addr + size), (KERNEL_MIN, MEMORY));

    // The last page of the first 4 GiB, through all three levels.
    let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).expect("inside");
    let directory_pointers = read(entry.page_tables) & !0xfff;
    let directory = read(directory_pointers + 3 * 8) & !0xfff;
    assert_eq!(read(directory + 511 * 8), ((4u64 << 30) - (2 << 20)) | 0xe3);
    assert_eq!(
        read(entry.gdt + u64::from(entry.code_selector)) >> 53 & 1,
        1,
        "64-bit code"
    );
}

#[test]
fn the_digest_names_the_kernel() {
    let image = BootImage::new(elf(&[1]));
    assert_eq!(image.digest(), image.clone().digest());
    assert_ne!(image.digest(), BootImage::new(elf(&[2])).digest());
}

#[test]
fn damaged_images_are_refused_with_the_reason() {
    let refused = |file: Vec<u8>, reason: &str| {
        let error = load_file(file).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    };
    refused(Vec::new(), "cut off");
    refused(
        b"MZ and so on, as long as a header is, at least 64 bytes of no ELF".to_vec(),
        "mark",
    );
    let mut short = elf(&[0x90; 64]);
    short.truncate(100);
    refused(short, "program headers lies outside");
    let mut other_cpu = elf(&[0x90; 64]);
    other_cpu[18] = 183;
    refused(other_cpu, "another CPU");
    let mut narrow = elf(&[0x90; 64]);
    narrow[4] = 1;
    refused(narrow, "32-bit");
    let mut relocatable = elf(&[0x90; 64]);
    relocatable[16] = 3;
    refused(relocatable, "fixed addresses");
    refused(with_word(24, 0), "entry point 0x0");
    refused(with_word(32, u64::MAX), "program headers");
    refused(with_word(FILE_SIZE, 1 << 40), "outside its file");
    refused(
        with_word(PHYSICAL, BOOT_PARAMS),
        "only 0x100000 to 0x400000",
    );
    refused(with_word(PHYSICAL, MEMORY - 8), "only 0x100000 to 0x400000");
    refused(with_word(MEMORY_SIZE, MEMORY), "only 0x100000 to 0x400000");
    refused(
        with_word(MEMORY_SIZE, u64::MAX),
        "only 0x100000 to 0x400000",
    );
}

#[test]
fn a_command_line_has_a_limit() {
    for (line, fits) in [
        ("x".repeat(COMMAND_LINE_MAX), true),
        ("x".repeat(COMMAND_LINE_MAX + 1), false),
        ("a\0b".to_owned(), false),
    ] {
        let config = MachineConfig {
            command_line: line,
            ..config()
        };
        let result = load(&memory(), &config, &BootImage::new(elf(&[0x90; 64])));
        assert_eq!(result.is_ok(), fits);
    }
}

proptest! {
    /// Whatever the file holds: an error or a machine, and no panic.
    #[test]
    fn no_file_can_harm(changes in prop::collection::vec((0usize..120, any::<u8>()), 0..12), len in 0usize..200) {
        let mut file = elf(&[0x90; 64]);
        for (at, value) in changes {
            file[at] = value;
        }
        file.truncate(len);
        let _ = load_file(file);
    }
}
