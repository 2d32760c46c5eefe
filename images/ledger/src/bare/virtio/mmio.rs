//! The MMIO transport: finding a device, agreeing on features, setting queues up.

use core::arch::asm;

use super::DeviceError;
use super::queue::Queue;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;

/// Registers.
const MAGIC_VALUE: u64 = 0x000;
const VERSION_NUMBER: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const STATUS: u64 = 0x070;
const QUEUE_DESC: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
const CONFIG: u64 = 0x100;

/// Status bits.
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;

/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// A device's window.
#[derive(Clone, Copy)]
pub struct Window {
    base: u64,
    what: &'static str,
}

impl Window {
    /// The device of kind `id` at `base`, reset, with exactly these features besides virtio 1.
    ///
    /// # Safety
    /// `base` is the address of a virtio window of this machine.
    pub unsafe fn open(
        base: u64,
        id: u32,
        features: u64,
        what: &'static str,
    ) -> Result<Self, DeviceError> {
        let window = Self { base, what };
        let found = [MAGIC_VALUE, VERSION_NUMBER, DEVICE_ID].map(|at| window.read(at));
        if found != [MAGIC, VERSION, id] {
            return Err(DeviceError::Missing { what, at: base });
        }
        window.write(STATUS, 0);
        window.write(STATUS, ACKNOWLEDGE | DRIVER);
        let wanted = features | VERSION_1;
        for half in 0..2 {
            window.write(DEVICE_FEATURES_SEL, half);
            let ours = (wanted >> (32 * half)) as u32;
            if window.read(DEVICE_FEATURES) & ours != ours {
                return Err(DeviceError::Features { what });
            }
            window.write(DRIVER_FEATURES_SEL, half);
            window.write(DRIVER_FEATURES, ours);
        }
        window.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if window.read(STATUS) & FEATURES_OK == 0 {
            return Err(DeviceError::Features { what });
        }
        Ok(window)
    }

    /// Sets queue `index` up with at most `size` descriptors.
    pub fn queue(&self, index: u32, size: u16) -> Result<Queue, DeviceError> {
        let missing = DeviceError::Queue { what: self.what };
        self.write(QUEUE_SEL, index);
        let most = u16::try_from(self.read(QUEUE_NUM_MAX)).unwrap_or(u16::MAX);
        let size = size.min(most);
        if size < 8 || !size.is_power_of_two() {
            return Err(missing);
        }
        let queue = Queue::new(size);
        self.write(QUEUE_NUM, u32::from(size));
        for (register, address) in [
            (QUEUE_DESC, queue.descriptors()),
            (QUEUE_DRIVER, queue.driver_area()),
            (QUEUE_DEVICE, queue.device_area()),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        if self.read(QUEUE_READY) != 1 {
            return Err(missing);
        }
        Ok(queue)
    }

    /// The driver is ready.
    pub fn go_live(&self) {
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// 32 bits of the configuration space.
    pub fn config(&self, offset: u64) -> u32 {
        self.read(CONFIG + offset)
    }

    fn read(&self, register: u64) -> u32 {
        let value: u32;
        // SAFETY: a register of the window that `open` was promised. The instruction is spelt out
        // because an emulator has to understand it.
        unsafe {
            asm!("mov {value:e}, [{at}]", value = out(reg) value, at = in(reg) self.base + register,
                 options(nostack, preserves_flags));
        }
        value
    }

    fn write(&self, register: u64, value: u32) {
        // SAFETY: as in `read`.
        unsafe {
            asm!("mov [{at}], {value:e}", value = in(reg) value, at = in(reg) self.base + register,
                 options(nostack, preserves_flags));
        }
    }
}
