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
//! | virtio-mmio | `0xd000_0000 + n * 0x1000`: n = 0 network, n = 1… disks | 5, then 10 + disk (at most 4 disks: 10, 11, 14, 15) |

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
