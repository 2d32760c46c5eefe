//! The MMIO transport of virtio 1.2, version 2 (no legacy interface).
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER      FEATURES_OK            DRIVER_OK
//!   Reset ──────────────────────▶ Found ─────────▶ Negotiated ─────────▶ Live
//!     ▲                           (features)       (queues)               │ a lie
//!     │                                                                   ▼
//!     └──────────── status 0, from anywhere ───────────────────── DEVICE_NEEDS_RESET
//! ```
//!
//! A step out of order has no effect: the bit does not stick, as the driver sees when it reads the
//! status back. The interrupt line is level: high while the interrupt status is not zero. A driver
//! that keeps its line masked can leave the status alone forever.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK,
    VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;

use super::ring::Ring;
use super::{Device, Outside, Tell, Trouble};
use crate::GuestMemory;
use crate::tape::TapeError;

/// "virt", little endian.
const MAGIC: u32 = 0x7472_6976;
/// "UNDR", little endian.
const VENDOR: u32 = 0x5244_4e55;
const USED_BUFFERS: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// A virtio device behind its window.
#[derive(Debug)]
pub struct Mmio<D> {
    device: D,
    rings: Vec<Ring>,
    status: u32,
    interrupts: u32,
    device_features_page: u32,
    driver_features_page: u32,
    driver_features: u64,
    selected: u32,
}

impl<D: Device> Mmio<D> {
    /// As at power-on.
    pub fn new(device: D) -> Self {
        Self {
            device,
            rings: D::QUEUES.iter().map(|size| Ring::new(*size)).collect(),
            status: 0,
            interrupts: 0,
            device_features_page: 0,
            driver_features_page: 0,
            driver_features: 0,
            selected: 0,
        }
    }

    /// The device itself.
    pub const fn device(&self) -> &D {
        &self.device
    }

    /// One of its queues, if the driver is live and has enabled it.
    pub fn live_ring(&self, queue: usize) -> Option<&Ring> {
        self.rings
            .get(queue)
            .filter(|ring| self.live() && ring.ready())
    }

    /// The level of the interrupt line.
    pub const fn line(&self) -> bool {
        self.interrupts != 0
    }

    /// The guest reads its window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(u64::from(reg::VIRTIO_MMIO_CONFIG)) {
            let config = self.device.config();
            for (at, byte) in (offset..).zip(data) {
                let known = usize::try_from(at).ok().and_then(|at| config.get(at));
                *byte = known.copied().unwrap_or(0);
            }
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset as u32).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        let ring = self.rings.get(self.selected as usize);
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => 2,
            reg::VIRTIO_MMIO_DEVICE_ID => D::KIND,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_page {
                0 => Self::offered() as u32,
                1 => (Self::offered() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => ring.map_or(0, |ring| u32::from(ring.max_size())),
            reg::VIRTIO_MMIO_QUEUE_READY => ring.map_or(0, |ring| u32::from(ring.ready())),
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupts,
            reg::VIRTIO_MMIO_STATUS => self.status,
            // There is no shared memory region: length and address read as -1.
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes, so its generation (like all else) is 0.
            _ => 0,
        }
    }

    /// The guest writes its window.
    pub fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        outside: &mut Outside<'_>,
    ) -> Result<(), TapeError> {
        // The configuration of no device can be written.
        let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) else {
            return Ok(());
        };
        let value = u32::from_le_bytes(word);
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_page = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.selected = value,
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => return self.notified(value, outside),
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupts &= !value,
            reg::VIRTIO_MMIO_STATUS => self.set_status(value, outside.memory),
            _ => self.set_up_queue(offset, value, outside.memory),
        }
        Ok(())
    }

    fn offered() -> u64 {
        D::FEATURES | 1 << VIRTIO_F_VERSION_1
    }

    const fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    const fn live(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.has(VIRTIO_CONFIG_S_NEEDS_RESET)
    }

    fn accept_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let shift = match self.driver_features_page {
            0 => 0,
            1 => 32,
            // Nothing is offered there: remember that the driver took something that it must
            // not, by a bit that is not offered either.
            _ if value != 0 => {
                self.driver_features |= 1 << 63;
                return;
            }
            _ => return,
        };
        self.driver_features &= !(u64::from(u32::MAX) << shift);
        self.driver_features |= u64::from(value) << shift;
    }

    fn set_status(&mut self, value: u32, memory: &GuestMemory) {
        if value == 0 {
            self.reset();
            return;
        }
        // Only a reset clears bits, and only the device sets this one.
        let mut added = value & !self.status & !VIRTIO_CONFIG_S_NEEDS_RESET;
        let acceptable = self.driver_features & !Self::offered() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            added &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.status | added) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.go_live(memory);
        }
    }

    fn go_live(&mut self, memory: &GuestMemory) {
        for queue in D::UNNOTIFIED {
            let ring = &mut self.rings[*queue];
            if ring.ready()
                && let Err(lie) = ring.decline_notifications(memory)
            {
                self.distrust(&lie);
                return;
            }
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.interrupts = 0;
        self.device_features_page = 0;
        self.driver_features_page = 0;
        self.driver_features = 0;
        self.selected = 0;
        for ring in &mut self.rings {
            ring.reset();
        }
        self.device.reset();
    }

    fn set_up_queue(&mut self, offset: u32, value: u32, memory: &GuestMemory) {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let Some(ring) = self.rings.get_mut(self.selected as usize) else {
            return;
        };
        if offset == reg::VIRTIO_MMIO_QUEUE_READY {
            if value & 1 == 0 {
                ring.disable();
            } else if !ring.ready()
                && let Err(lie) = ring.enable(memory)
            {
                self.distrust(&lie);
            }
            return;
        }
        if ring.ready() {
            return;
        }
        let setup = &mut ring.setup;
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => setup.size = value,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut setup.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut setup.descriptors, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut setup.driver, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut setup.driver, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut setup.device, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut setup.device, value),
            _ => {}
        }
    }

    fn notified(&mut self, queue: u32, outside: &mut Outside<'_>) -> Result<(), TapeError> {
        let queue = queue as usize;
        self.serve(queue, |device, ring| device.notified(queue, ring, outside))
    }

    /// Looks at all queues as if the driver had notified each.
    pub fn look(&mut self, outside: &mut Outside<'_>) -> Result<(), TapeError> {
        for queue in 0..self.rings.len() {
            self.serve(queue, |device, ring| device.notified(queue, ring, outside))?;
        }
        Ok(())
    }

    /// Lets the device work on a queue, if the driver is live and has enabled it.
    pub fn serve(
        &mut self,
        queue: usize,
        work: impl FnOnce(&mut D, &mut Ring) -> Result<Tell, Trouble>,
    ) -> Result<(), TapeError> {
        let live = self.live();
        let Some(ring) = self
            .rings
            .get_mut(queue)
            .filter(|ring| live && ring.ready())
        else {
            return Ok(());
        };
        match work(&mut self.device, ring) {
            Ok(Tell::Nothing) => {}
            Ok(Tell::Driver) => self.interrupts |= USED_BUFFERS,
            Err(Trouble::Guest(lie)) => self.distrust(&lie),
            Err(Trouble::Tape(error)) => return Err(error),
        }
        Ok(())
    }

    /// The driver broke the rules: nothing more is done for it until it resets the device.
    fn distrust(&mut self, lie: &super::ring::Lie) {
        tracing::debug!(device = D::KIND, error = %lie, "a virtio device needs a reset");
        self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            self.interrupts |= CONFIG_CHANGED;
        }
    }

    /// Lets the device change without a queue (completions for a driver that is gone).
    pub const fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Adds the transport, the queues and the device.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        for number in [
            self.status,
            self.interrupts,
            self.device_features_page,
            self.driver_features_page,
            self.driver_features as u32,
            (self.driver_features >> 32) as u32,
            self.selected,
        ] {
            hasher.update(&number.to_le_bytes());
        }
        for ring in &self.rings {
            ring.digest(hasher);
        }
        self.device.digest(hasher);
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
