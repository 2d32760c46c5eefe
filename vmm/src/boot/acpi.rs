//! ACPI tables (ACPI 6.5, chapter 5) for kernels that find virtio-mmio devices by nothing else.
//!
//! ```text
//! RSDP ──► XSDT ──► FADT ──► FACS
//!                     └────► DSDT: the virtio devices ("LNRO0005", with window and line), \_S5
//! ```
//!
//! The machine keeps its 8259 and 8254, so it is not "hardware-reduced", and has the few registers
//! that this asks for (`layout`). There is no MADT: interrupts are those of the 8259 pair.

use acpi_tables::aml::{
    Device, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::GuestMemory;
use crate::config::MachineConfig;
use crate::devices::layout;

/// Where the RSDP is: in the area that kernels search, below the kernel and outside the memory map.
pub const RSDP: u64 = 0xe_0000;
const FACS_AT: u64 = 0xe_0040;
const FADT_AT: u64 = 0xe_0100;
const DSDT_AT: u64 = 0xe_0400;
const XSDT_AT: u64 = 0xe_1000;

const OEM: [u8; 6] = *b"UNDSTY";
const TABLE: [u8; 8] = *b"UNDSTUDY";
const REVISION: u32 = 1;
/// `IAPC_BOOT_ARCH`: there is no VGA, no MSI, no ASPM, no CMOS clock; no 8042 either, which needs no
/// bit.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;

/// What the tables say of one virtio device: its window's number and its interrupt line.
type Announced = (u8, u8);

/// Writes the tables.
pub(super) fn write(memory: &GuestMemory, config: &MachineConfig) -> Result<(), GuestMemoryError> {
    let put = |at: u64, table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        memory.write_slice(&bytes, GuestAddress(at))
    };
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(FADT_AT);
    put(RSDP, &Rsdp::new(OEM, XSDT_AT))?;
    put(FACS_AT, &FACS::new())?;
    put(FADT_AT, &fadt())?;
    memory.write_slice(dsdt(config).as_slice(), GuestAddress(DSDT_AT))?;
    put(XSDT_AT, &xsdt)
}

fn fadt() -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .firmware_ctrl_32(FACS_AT as u32)
        .dsdt_32(DSDT_AT as u32)
        .flag(Flags::Wbinvd)
        // Neither button is a fixed one, and the clock wakes nobody.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    fadt.sci_int = u16::from(layout::ACPI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(layout::ACPI_STATUS).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::ACPI_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    // Power states that no processor has: worse than what would be used.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        layout::ACPI_RESET.into(),
    );
    fadt.reset_value = layout::POWER_RESET as u8;
    fadt.finalize()
}

fn dsdt(config: &MachineConfig) -> Sdt {
    let mut code = Vec::new();
    let devices: Vec<_> = announced(config).map(VirtioDevice).collect();
    let devices = devices.iter().map(|device| device as &dyn Aml).collect();
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(&mut code);
    // Sleep state 5, off: the value that goes into PM1 control.
    let off = Package::new(vec![&layout::ACPI_OFF, &ZERO, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &off).to_aml_bytes(&mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&code);
    dsdt
}

/// The virtio devices that the machine has.
fn announced(config: &MachineConfig) -> impl Iterator<Item = Announced> {
    let net = config.mac.map(|_| (layout::NET_WINDOW, layout::NET_IRQ));
    let disks = config.disks.iter().zip(layout::DISK_IRQS);
    let disks = (layout::DISK_WINDOW..).zip(disks);
    net.into_iter()
        .chain(disks.map(|(window, (_, irq))| (window, irq)))
        .chain([
            (layout::CONSOLE_WINDOW, layout::CONSOLE_IRQ),
            (layout::RNG_WINDOW, layout::RNG_IRQ),
        ])
}

/// One device of the DSDT.
struct VirtioDevice(Announced);

impl Aml for VirtioDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self((window, irq)) = *self;
        let base = layout::VIRTIO_BASE + u64::from(window) * layout::VIRTIO_WINDOW;
        let registers = Memory32Fixed::new(true, base as u32, layout::VIRTIO_WINDOW as u32);
        let interrupt = Interrupt::new(true, false, false, true, irq.into());
        let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
        Device::new(
            Path::new(&format!("VIO{window}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &window),
                &Name::new("_CCA".into(), &ONE),
                &Name::new("_CRS".into(), &resources),
            ],
        )
        .to_aml_bytes(sink);
    }
}
