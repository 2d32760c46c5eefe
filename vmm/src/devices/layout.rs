//! Where the guest finds what: ports, MMIO windows, interrupt lines. Part of the machine model.
//!
//! | device | where | line |
//! |---|---|---|
//! | 8259 pair | ports `0x20 0x21 0xa0 0xa1`, edge or level `0x4d0 0x4d1` | |
//! | 8254 | ports `0x40..0x44`, gate of counter 2 `0x61` | 0 |
//! | serial console, 16550 | ports `0x3f8..0x400` | 4 |
//! | clock | `0x510` R32: asks the time, returns the low half of the nanoseconds since power-on and latches the high half; `0x514` R32: the latched high half; `0x518` R32: asks the time, returns whole milliseconds, modulo 2^32; `0x51c` R32: asks the time, returns its 31 low bits in ns, bit 31 set if the others have changed since `0x510` was read | |
//! | timer 0 | `0x520` W32: low half of the deadline in ns (kept); `0x524` W32: high half, arms (deadline 0 disarms); `0x528` W32: arms with an absolute deadline in ms (0 disarms); `0x52c` W32: arms with a distance in ns from the time that the clock has told last (0 disarms) | 0 |
//! | entropy | `0x530` R8/R16/R32: random bits | |
//! | power | `0x540` W32: 1 switches off, 2 resets | |
//! | idle | `0x544` W, any size: looks at all virtio queues as if they were notified, then waits until anything arrives; written with a value other than 0, it does not wait if something has arrived at another exit since the last write here | |
//! | print | `0x550` W32: the physical address of a text (kept; 0 at power-on: none); `0x554` W32: so many bytes of it, at most 4096, go to the console | |
//! | ACPI's fixed registers | `0x600` PM1 status: reads as 0; `0x602` PM1 enable, R W16: kept; `0x604` R16: 1 (ACPI is on), W16: bit 13 with 5 in bits 10 to 12 switches off; `0x606` W8: 2 resets | 9, never raised |
//! | virtio-mmio | `0xd000_0000 + n * 0x1000`: n = 0 network, n = 1 to 4 disks, n = 5 console, n = 6 entropy | 5 network, 10 11 14 15 disks, 3 console, 6 entropy |

/// First port of the master 8259 (command, data).
pub const PIC_MASTER: u16 = 0x20;
/// First port of the slave 8259 (command, data).
pub const PIC_SLAVE: u16 = 0xa0;
/// First port of the 8259s' trigger registers (master, slave): a set bit makes a line level-triggered.
pub const PIC_TRIGGER: u16 = 0x4d0;
/// First port of the 8254 (three counters, control).
pub const PIT: u16 = 0x40;
/// The port that gates the 8254's counter 2 and shows its output.
pub const SPEAKER: u16 = 0x61;
/// First port of the 16550.
pub const SERIAL: u16 = 0x3f8;
/// Interrupt line of the 16550.
pub const SERIAL_IRQ: u8 = 4;
/// Clock: low half of the nanoseconds.
pub const CLOCK_LOW: u16 = 0x510;
/// Clock: latched high half of the nanoseconds.
pub const CLOCK_HIGH: u16 = 0x514;
/// Clock: milliseconds.
pub const CLOCK_MILLIS: u16 = 0x518;
/// Clock: the 31 low bits of the nanoseconds, and whether the others have changed.
pub const CLOCK_SHORT: u16 = 0x51c;
/// Timer 0: low half of the deadline.
pub const TIMER_LOW: u16 = 0x520;
/// Timer 0: high half of the deadline, arms.
pub const TIMER_HIGH: u16 = 0x524;
/// Timer 0: deadline in milliseconds, arms.
pub const TIMER_MILLIS: u16 = 0x528;
/// Timer 0: distance in nanoseconds from the time that was told last, arms.
pub const TIMER_DISTANCE: u16 = 0x52c;
/// Interrupt line of timer 0, and of the 8254: a guest uses one of them.
pub const TIMER_IRQ: u8 = 0;
/// Entropy.
pub const ENTROPY: u16 = 0x530;
/// Power control.
pub const POWER: u16 = 0x540;
/// Written to [`POWER`]: switch off.
pub const POWER_OFF: u32 = 1;
/// Written to [`POWER`]: reset.
pub const POWER_RESET: u32 = 2;
/// Idle: wait until anything arrives.
pub const IDLE: u16 = 0x544;
/// Print: where the text stands.
pub const PRINT_WHERE: u16 = 0x550;
/// Print: how many bytes of the text go to the console.
pub const PRINT: u16 = 0x554;
/// ACPI: PM1 status, two bytes, and PM1 enable after it. No event ever happens.
pub const ACPI_STATUS: u16 = 0x600;
/// ACPI: PM1 enable.
pub const ACPI_ENABLE: u16 = 0x602;
/// ACPI: PM1 control.
pub const ACPI_CONTROL: u16 = 0x604;
/// ACPI: the reset register, a byte; takes [`POWER_RESET`].
pub const ACPI_RESET: u16 = 0x606;
/// The sleep type that, written to [`ACPI_CONTROL`], switches off.
pub const ACPI_OFF: u8 = 5;
/// The line of ACPI's interrupt, which is never raised.
pub const ACPI_IRQ: u8 = 9;
/// The first virtio-mmio window.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// The size of a virtio-mmio window and the distance between two.
pub const VIRTIO_WINDOW: u64 = 0x1000;
/// Interrupt line of the network device.
pub const NET_IRQ: u8 = 5;
/// An MTU of 1,500 with Ethernet header and VLAN tag. Longer frames are dropped, both ways, and so
/// are those shorter than a header.
pub const MAX_FRAME: usize = 1518;
/// Interrupt lines of the disks, in order.
pub const DISK_IRQS: [u8; MAX_DISKS] = [10, 11, 14, 15];
/// How many disks a machine can have.
pub const MAX_DISKS: usize = 4;
/// Which virtio-mmio window is the network device's, the first disk's, the console's, the entropy
/// device's.
pub const NET_WINDOW: u8 = 0;
/// See [`NET_WINDOW`].
pub const DISK_WINDOW: u8 = 1;
/// See [`NET_WINDOW`].
pub const CONSOLE_WINDOW: u8 = 5;
/// See [`NET_WINDOW`].
pub const RNG_WINDOW: u8 = 6;
/// Interrupt line of the virtio console.
pub const CONSOLE_IRQ: u8 = 3;
/// Interrupt line of the entropy device.
pub const RNG_IRQ: u8 = 6;
