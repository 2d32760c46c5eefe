//! Linux kernels by the 64-bit boot protocol, and initial RAM disks.

use bytes::Bytes;
use linux_loader::loader::bootparam::{boot_params, setup_header};
use proptest::prelude::*;
use vm_memory::{ByteValued as _, Bytes as _};

use super::*;

const MEMORY: u64 = 8 << 20;
const PREFERRED: u64 = 2 << 20;
const ROOM: u32 = 1 << 20;
const HEADER_AT: usize = 0x1f1;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory can be mapped")
}

fn config() -> MachineConfig {
    MachineConfig {
        memory: MEMORY,
        command_line: "console=ttyS0".to_owned(),
        mac: None,
        disks: Vec::new(),
        acpi: false,
    }
}

/// A header of protocol 2.15 as a kernel has it.
fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        version: 0x20f,
        loadflags: 1,
        xloadflags: 1,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: PREFERRED,
        init_size: ROOM,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    }
}

/// A bzImage: boot sector and one sector of setup code, then `code`.
fn bzimage(header: &setup_header, code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let bytes = header.as_slice();
    file[HEADER_AT..HEADER_AT + bytes.len()].copy_from_slice(bytes);
    file.extend_from_slice(code);
    file
}

fn code() -> Vec<u8> {
    (0..0x400u32).map(|i| (i % 251) as u8).collect()
}

fn start(
    memory: &GuestMemory,
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
) -> Result<EntryState, BootError> {
    let image = BootImage {
        kernel: kernel.into(),
        initrd: initrd.map(Bytes::from),
    };
    load(memory, &config(), &image)
}

fn read(memory: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory
        .read_slice(&mut bytes, GuestAddress(at))
        .expect("inside");
    bytes
}

#[test]
fn a_bzimage_is_put_where_it_prefers_and_started_in_64_bit_mode() {
    let memory = memory();
    let entry = start(&memory, bzimage(&header(), &code()), None).expect("it loads");
    assert_eq!(entry.instruction, PREFERRED + 0x200);
    assert_eq!(read(&memory, PREFERRED, 0x400), code());
    let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("inside");
    let (version, alignment) = (params.hdr.version, params.hdr.kernel_alignment);
    assert_eq!((version, alignment), (0x20f, 0x20_0000), "its own header");
    let (line, loader) = (params.hdr.cmd_line_ptr, params.hdr.type_of_loader);
    assert_eq!((u64::from(line), loader), (COMMAND_LINE, 0xff));
    let (image, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!((image, size), (0, 0));
}

#[test]
fn an_initial_ram_disk_ends_where_memory_does() {
    let memory = memory();
    let initrd: Vec<u8> = (0..10_000u32).map(|i| (i % 249) as u8).collect();
    let kernel = bzimage(&header(), &code());
    start(&memory, kernel.clone(), Some(initrd.clone())).expect("it loads");
    let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("inside");
    let (at, size) = (params.hdr.ramdisk_image, params.hdr.ramdisk_size);
    assert_eq!(u64::from(at), MEMORY - 3 * 4096, "whole pages");
    assert_eq!(size, 10_000);
    assert_eq!(read(&memory, at.into(), 10_000), initrd);

    let room = (MEMORY - PREFERRED - u64::from(ROOM)) as usize;
    start(&memory, kernel.clone(), Some(vec![7; room])).expect("it just fits");
    let error = start(&memory, kernel, Some(vec![7; room + 1])).expect_err("one byte too many");
    let told = error.to_string();
    assert!(
        told.contains(&format!("{room} are left")) && told.contains("more memory"),
        "{told}"
    );
}

#[test]
fn an_initial_ram_disk_is_not_put_beyond_what_the_kernel_reads() {
    let memory = memory();
    let low = setup_header {
        initrd_addr_max: 0x40_0fff,
        ..header()
    };
    start(&memory, bzimage(&low, &code()), Some(vec![1; 4096])).expect("it loads");
    let params: boot_params = memory.read_obj(GuestAddress(BOOT_PARAMS)).expect("inside");
    let at = params.hdr.ramdisk_image;
    assert_eq!(at, 0x40_0000);
}

#[test]
fn kernels_that_cannot_be_started_are_refused_with_the_reason() {
    let refused = |file: Vec<u8>, reason: &str| {
        let error = start(&memory(), file, None).expect_err(reason).to_string();
        assert!(error.contains(reason), "{error}");
    };
    let changed = |change: fn(&mut setup_header)| {
        let mut header = header();
        change(&mut header);
        bzimage(&header, &code())
    };
    refused(changed(|h| h.version = 0x20b), "older than 2.12");
    refused(changed(|h| h.xloadflags = 0), "no 64-bit entry");
    refused(changed(|h| h.loadflags = 0), "below 1 MiB");
    refused(changed(|h| h.init_size = 0x300), "longer than its header");
    refused(changed(|h| h.setup_sects = 200), "code lies outside");
    refused(changed(|h| h.setup_sects = 0), "code lies outside");
    refused(changed(|h| h.pref_address = 0x1000), "only 0x100000 to");
    refused(changed(|h| h.pref_address = u64::MAX), "only 0x100000 to");
    refused(changed(|h| h.init_size = u32::MAX), "only 0x100000 to");
    let mut short = bzimage(&header(), &[]);
    short.truncate(HEADER_AT + 40);
    refused(short, "setup header lies outside");
}

#[test]
fn the_digest_names_the_ram_disk_too() {
    let image = |initrd: Option<&'static [u8]>| BootImage {
        kernel: Bytes::from_static(b"kernel"),
        initrd: initrd.map(Bytes::from_static),
    };
    let digests = [
        image(None),
        image(Some(b"")),
        image(Some(b"a")),
        image(Some(b"b")),
    ]
    .map(|image| image.digest());
    for (i, digest) in digests.iter().enumerate() {
        assert!(!digests[..i].contains(digest));
    }
    let joined = BootImage::new(&b"kernela"[..]);
    assert_ne!(joined.digest(), image(Some(b"a")).digest());
}

proptest! {
    /// Whatever the header says: an error or a machine, and no panic.
    #[test]
    fn no_header_can_harm(
        changes in prop::collection::vec((HEADER_AT..HEADER_AT + 0x7b, any::<u8>()), 0..16),
        len in 0x206usize..1024 + 0x400,
        initrd in 0usize..20_000,
    ) {
        let mut file = bzimage(&header(), &code());
        for (at, value) in changes {
            // It stays one that says it is a bzImage.
            if !(0x202..0x206).contains(&at) {
                file[at] = value;
            }
        }
        file.truncate(len);
        let _ = start(&memory(), file, Some(vec![1; initrd]));
    }
}

/// Every table is where the one before it says, and its bytes add up to zero.
#[test]
fn acpi_tables_are_there_if_they_are_wanted() {
    let image = BootImage::new(bzimage(&header(), &code()));
    let without = memory();
    load(&without, &config(), &image).expect("bootable");
    assert_eq!(read(&without, acpi::RSDP, 0x2000), [0; 0x2000]);

    let with = memory();
    let config = MachineConfig {
        acpi: true,
        mac: Some([2, 0, 0, 0, 0, 1]),
        disks: vec![512, 512],
        ..config()
    };
    load(&with, &config, &image).expect("bootable");
    let params: boot_params = with.read_obj(GuestAddress(BOOT_PARAMS)).expect("inside");
    let rsdp = params.acpi_rsdp_addr;
    assert_eq!(rsdp, acpi::RSDP);
    assert_eq!(read(&with, rsdp, 8), b"RSD PTR ");
    let number = |at: u64, len: usize| {
        let bytes = read(&with, at, len);
        let digits = bytes.iter().rev();
        digits.fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let table = |at: u64, signature: &[u8]| {
        let bytes = read(&with, at, number(at + 4, 4) as usize);
        assert_eq!(&bytes[..4], signature);
        let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "{}", String::from_utf8_lossy(signature));
        bytes
    };
    let xsdt = number(rsdp + 24, 8);
    table(xsdt, b"XSDT");
    let fadt = number(xsdt + 36, 8);
    table(fadt, b"FACP");
    assert_eq!(read(&with, number(fadt + 36, 4), 4), b"FACS");
    let dsdt = table(number(fadt + 40, 4), b"DSDT");
    let count = |what: &[u8]| dsdt.windows(what.len()).filter(|it| *it == what).count();
    assert_eq!(
        count(b"LNRO0005"),
        5,
        "network, two disks, console, entropy"
    );
    assert_eq!(count(b"_S5_"), 1);
}
