//! All devices of a machine behind one bus.

use replay_log::{Arrival, DiskOutcome, RequestNumber};

use super::clock::{self, Clock};
use super::layout;
use super::pic::{Pic, Register, Which};
use super::pit::{PIT_TIMER, Pit};
use super::power::Power;
use super::print::Print;
use super::serial::Serial;
use super::timer::{TIMER, Timer};
use super::virtio::block::{Block, REQUESTS};
use super::virtio::console::{self, Console};
use super::virtio::mmio::Mmio;
use super::virtio::net::{self, Net};
use super::virtio::rng::Rng;
use super::virtio::{Outside, RequestCounter};
use crate::GuestMemory;
use crate::config::MachineConfig;
use crate::machine::MachineError;
use crate::tape::{Delivery, GuestEnd, Sources, Tape, TapeError};

/// Which address space an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Port I/O.
    Port,
    /// Memory-mapped I/O.
    Mmio,
}

/// The devices of one machine.
pub struct Platform {
    pic: Pic,
    pit: Pit,
    serial: Serial,
    clock: Clock,
    timer: Timer,
    power: Power,
    print: Print,
    requests: RequestCounter,
    net: Option<Mmio<Net>>,
    disks: Vec<Mmio<Block>>,
    console: Mmio<Console>,
    rng: Mmio<Rng>,
}

/// A virtio device by its window.
enum Window {
    Net,
    Disk(usize),
    Console,
    Rng,
}

impl Platform {
    /// The devices that `config` asks for, as they are at power-on. The configuration was
    /// checked: it has at most [`layout::MAX_DISKS`] disks.
    pub fn new(config: &MachineConfig) -> Self {
        assert!(
            config.disks.len() <= layout::MAX_DISKS,
            "a machine's configuration is checked before it is built"
        );
        Self {
            pic: Pic::new(),
            pit: Pit::new(),
            serial: Serial::new(),
            clock: Clock::default(),
            timer: Timer::default(),
            power: Power::default(),
            print: Print::default(),
            requests: RequestCounter::default(),
            net: config.mac.map(|mac| Mmio::new(Net::new(mac))),
            disks: (0..)
                .zip(&config.disks)
                .map(|(disk, size)| Mmio::new(Block::new(disk, *size)))
                .collect(),
            console: Mmio::new(Console::default()),
            rng: Mmio::new(Rng),
        }
    }

    /// The guest reads. Unclaimed addresses read as all ones.
    pub fn read(
        &mut self,
        space: Space,
        address: u64,
        data: &mut [u8],
        _memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        self.power.accessed();
        match space {
            Space::Port => self.read_port(address, data, tape)?,
            Space::Mmio => self.read_mmio(address, data),
        }
        self.drive_lines();
        Ok(())
    }

    /// The guest writes. Writes to unclaimed addresses are ignored.
    pub fn write(
        &mut self,
        space: Space,
        address: u64,
        data: &[u8],
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        self.write_repeated(space, address, data.len(), data, memory, tape)
    }

    /// The guest writes several times to one address in one exit (`rep outs`): `data` holds
    /// accesses of `size` bytes each. What it wrote to the console becomes one command.
    pub fn write_repeated(
        &mut self,
        space: Space,
        address: u64,
        size: usize,
        data: &[u8],
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        self.power.accessed();
        for access in data.chunks(size.max(1)) {
            match space {
                Space::Port => self.write_port(address, access, memory, tape)?,
                Space::Mmio => self.write_mmio(address, access, memory, tape)?,
            }
        }
        self.serial.flush(tape)?;
        self.drive_lines();
        Ok(())
    }

    fn read_port(
        &mut self,
        address: u64,
        data: &mut [u8],
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        let Ok(port) = u16::try_from(address) else {
            data.fill(0xff);
            return Ok(());
        };
        if port == layout::ENTROPY && matches!(data.len(), 1 | 2 | 4) {
            return clock::read_entropy(data, tape);
        }
        let word = match (port, data.len()) {
            (layout::CLOCK_LOW, 4) => Some(self.clock.read_low(tape)?),
            (layout::CLOCK_HIGH, 4) => Some(self.clock.read_high()),
            (layout::CLOCK_MILLIS, 4) => Some(self.clock.read_millis(tape)?),
            (layout::CLOCK_SHORT, 4) => Some(self.clock.read_short(tape)?),
            _ => None,
        };
        if let Some(word) = word {
            data.copy_from_slice(&word.to_le_bytes());
            return Ok(());
        }
        // A wide access to byte-wide devices is one access to each port in turn.
        for (port, byte) in (u32::from(port)..).zip(data) {
            *byte = match u16::try_from(port) {
                Ok(port) => self.read_byte(port, tape)?,
                Err(_) => 0xff,
            };
        }
        Ok(())
    }

    fn read_byte(&mut self, port: u16, tape: &mut dyn Tape) -> Result<u8, TapeError> {
        if let Some((which, register)) = pic_register(port) {
            Ok(self.pic.read(which, register))
        } else if let Some(offset) = serial_register(port) {
            Ok(self.serial.read(offset))
        } else if let Some(counter) = pit_register(port) {
            self.pit.read(counter, tape)
        } else if port == layout::SPEAKER {
            self.pit.read_speaker(tape)
        } else {
            Ok(self.power.read_acpi(port).unwrap_or(0xff))
        }
    }

    fn write_port(
        &mut self,
        address: u64,
        data: &[u8],
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        let Ok(port) = u16::try_from(address) else {
            return Ok(());
        };
        if port == layout::IDLE {
            self.power.write_idle(data.iter().any(|byte| *byte != 0));
            return self.look_at_queues(memory, tape);
        }
        if let Ok(word) = <[u8; 4]>::try_from(data) {
            let word = u32::from_le_bytes(word);
            match port {
                layout::TIMER_LOW => {
                    self.timer.write_low(word);
                    return Ok(());
                }
                layout::TIMER_HIGH => return self.timer.write_high(word, tape),
                layout::TIMER_MILLIS => return self.timer.write_millis(word, tape),
                layout::TIMER_DISTANCE => {
                    return self.timer.write_distance(word, self.clock.told(), tape);
                }
                layout::POWER => {
                    self.power.write(word);
                    return Ok(());
                }
                layout::PRINT_WHERE => {
                    self.print.write_where(word);
                    return Ok(());
                }
                layout::PRINT => return self.print.write_length(word, memory, tape),
                _ => {}
            }
        }
        match (port, data) {
            (layout::ACPI_ENABLE, &[low, high]) => {
                self.power.write_acpi_enable([low, high]);
                return Ok(());
            }
            (layout::ACPI_CONTROL, &[low, high]) => {
                self.power
                    .write_acpi_control(u16::from_le_bytes([low, high]));
                return Ok(());
            }
            (layout::ACPI_RESET, &[value]) => {
                // What would switch off elsewhere does not here.
                if u32::from(value) == layout::POWER_RESET {
                    self.power.write(layout::POWER_RESET);
                }
                return Ok(());
            }
            _ => {}
        }
        for (port, byte) in (u32::from(port)..).zip(data) {
            let Ok(port) = u16::try_from(port) else {
                break;
            };
            if let Some((which, register)) = pic_register(port) {
                self.pic.write(which, register, *byte);
            } else if let Some(offset) = serial_register(port) {
                self.serial.write(offset, *byte);
            } else if let Some(counter) = pit_register(port) {
                self.pit.write(counter, *byte, tape)?;
            } else if port == layout::SPEAKER {
                self.pit.write_speaker(*byte, tape)?;
            }
        }
        Ok(())
    }

    /// Whatever the exit was, it is served: what devices could not ask of the outside when
    /// something arrived, they ask now.
    pub fn exit_served(&mut self, tape: &mut dyn Tape) -> Result<(), TapeError> {
        self.pit.exit(tape)
    }

    fn look_at_queues(
        &mut self,
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        let mut outside = Outside {
            memory,
            tape,
            requests: &mut self.requests,
        };
        if let Some(net) = &mut self.net {
            net.look(&mut outside)?;
        }
        for disk in &mut self.disks {
            disk.look(&mut outside)?;
        }
        self.console.look(&mut outside)?;
        self.rng.look(&mut outside)
    }

    fn read_mmio(&self, address: u64, data: &mut [u8]) {
        match self.window(address, data.len()) {
            Some((Window::Net, offset)) => {
                if let Some(net) = &self.net {
                    net.read(offset, data);
                }
            }
            Some((Window::Disk(disk), offset)) => self.disks[disk].read(offset, data),
            Some((Window::Console, offset)) => self.console.read(offset, data),
            Some((Window::Rng, offset)) => self.rng.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write_mmio(
        &mut self,
        address: u64,
        data: &[u8],
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        let Some((window, offset)) = self.window(address, data.len()) else {
            return Ok(());
        };
        let mut outside = Outside {
            memory,
            tape,
            requests: &mut self.requests,
        };
        match (window, &mut self.net) {
            (Window::Net, Some(net)) => net.write(offset, data, &mut outside),
            (Window::Net, None) => Ok(()),
            (Window::Disk(disk), _) => self.disks[disk].write(offset, data, &mut outside),
            (Window::Console, _) => self.console.write(offset, data, &mut outside),
            (Window::Rng, _) => self.rng.write(offset, data, &mut outside),
        }
    }

    /// The device whose window holds all of an access, and where in the window.
    fn window(&self, address: u64, len: usize) -> Option<(Window, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_BASE)?;
        let (index, offset) = (
            offset / layout::VIRTIO_WINDOW,
            offset % layout::VIRTIO_WINDOW,
        );
        let end = offset.checked_add(len as u64)?;
        let window = match u8::try_from(index).ok()? {
            layout::NET_WINDOW => self.net.as_ref().map(|_| Window::Net)?,
            layout::CONSOLE_WINDOW => Window::Console,
            layout::RNG_WINDOW => Window::Rng,
            index => {
                let disk = usize::from(index - layout::DISK_WINDOW);
                (disk < self.disks.len()).then_some(Window::Disk(disk))?
            }
        };
        (end <= layout::VIRTIO_WINDOW).then_some((window, offset))
    }

    /// Takes an arrival; ends the idle state.
    pub fn deliver(
        &mut self,
        delivery: Delivery,
        memory: &GuestMemory,
    ) -> Result<(), MachineError> {
        let Delivery { arrival, data } = delivery;
        let taken = match &arrival {
            Arrival::Frame { bytes, .. } => self.receive(bytes, memory)?,
            Arrival::DiskDone { request, outcome } => {
                self.disk_done(*request, *outcome, data.as_deref(), memory)?
            }
            Arrival::TimerDue { timer } if *timer == TIMER => {
                self.timer.due();
                true
            }
            Arrival::TimerDue { timer } if *timer == PIT_TIMER => {
                if self.pit.due() {
                    self.pic.set_line(layout::TIMER_IRQ, false);
                    self.pic.set_line(layout::TIMER_IRQ, true);
                }
                true
            }
            Arrival::TimerDue { .. } => false,
            Arrival::Console { bytes } => self.typed(bytes, memory)?,
        };
        if !taken {
            return Err(MachineError::CannotTake {
                what: arrival.to_string(),
            });
        }
        self.power.arrival();
        self.drive_lines();
        Ok(())
    }

    fn receive(&mut self, frame: &[u8], memory: &GuestMemory) -> Result<bool, MachineError> {
        if !self.takes_frame(memory) {
            return Ok(false);
        }
        if let Some(net) = &mut self.net {
            net.serve(net::RECEIVE, |_, ring| Net::receive(frame, ring, memory))?;
        }
        Ok(true)
    }

    /// What is typed goes to the virtio console once its driver is live, else to the serial port.
    fn typed(&mut self, bytes: &[u8], memory: &GuestMemory) -> Result<bool, MachineError> {
        if !self.console_is_live() {
            return Ok(self.serial.receive(bytes));
        }
        if bytes.len() > self.console.device().room() {
            return Ok(false);
        }
        self.console.serve(console::RECEIVE, |console, ring| {
            console.receive(bytes, ring, memory)
        })?;
        Ok(true)
    }

    fn console_is_live(&self) -> bool {
        self.console.live_ring(console::RECEIVE).is_some()
    }

    fn disk_done(
        &mut self,
        request: RequestNumber,
        outcome: DiskOutcome,
        data: Option<&[u8]>,
        memory: &GuestMemory,
    ) -> Result<bool, MachineError> {
        let owner = |disk: &&mut Mmio<Block>| disk.device().knows(request);
        let Some(disk) = self.disks.iter_mut().find(owner) else {
            return Ok(false);
        };
        match disk.device_mut().finish(request, outcome, data) {
            Err(_) => return Ok(false),
            Ok(None) => {}
            Ok(Some(finished)) => {
                disk.serve(REQUESTS, |_, ring| finished.tell(data, ring, memory))?;
            }
        }
        Ok(true)
    }

    fn takes_frame(&self, memory: &GuestMemory) -> bool {
        self.net
            .as_ref()
            .and_then(|net| net.live_ring(net::RECEIVE))
            .is_some_and(|ring| ring.available(memory))
    }

    /// What can be delivered now.
    pub fn can_take(&self, memory: &GuestMemory) -> Sources {
        Sources {
            frame: self.takes_frame(memory),
            console: if self.console_is_live() {
                self.console.device().room()
            } else {
                self.serial.room()
            },
        }
    }

    /// Whether the guest waits at the idle port.
    pub fn idle(&self) -> bool {
        self.power.idle()
    }

    /// How the guest ended itself through the power port, if it did.
    pub fn ended(&self) -> Option<GuestEnd> {
        self.power.ended()
    }

    /// Whether the interrupt controller has an interrupt for the CPU.
    pub fn interrupt_waits(&self) -> bool {
        self.pic.interrupt_waits()
    }

    /// Acknowledges the waiting interrupt: its vector. The guest goes on from the idle port.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        self.power.interrupted();
        self.pic.acknowledge()
    }

    /// Adds the state of all devices.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        self.pic.digest(hasher);
        self.pit.digest(hasher);
        self.serial.digest(hasher);
        self.clock.digest(hasher);
        self.timer.digest(hasher);
        self.power.digest(hasher);
        self.print.digest(hasher);
        hasher.update(&self.requests.drawn().to_le_bytes());
        if let Some(net) = &self.net {
            net.digest(hasher);
        }
        for disk in &self.disks {
            disk.digest(hasher);
        }
        self.console.digest(hasher);
        self.rng.digest(hasher);
    }

    /// Puts the levels of all lines to the interrupt controller.
    fn drive_lines(&mut self) {
        self.pic.set_line(layout::TIMER_IRQ, self.timer.line());
        self.pic.set_line(layout::SERIAL_IRQ, self.serial.line());
        if let Some(net) = &self.net {
            self.pic.set_line(layout::NET_IRQ, net.line());
        }
        for (disk, line) in self.disks.iter().zip(layout::DISK_IRQS) {
            self.pic.set_line(line, disk.line());
        }
        self.pic.set_line(layout::CONSOLE_IRQ, self.console.line());
        self.pic.set_line(layout::RNG_IRQ, self.rng.line());
    }
}

fn pic_register(port: u16) -> Option<(Which, Register)> {
    Some(match port {
        layout::PIC_MASTER => (Which::Master, Register::Command),
        layout::PIC_SLAVE => (Which::Slave, Register::Command),
        layout::PIC_TRIGGER => (Which::Master, Register::Trigger),
        _ if port == layout::PIC_MASTER + 1 => (Which::Master, Register::Data),
        _ if port == layout::PIC_SLAVE + 1 => (Which::Slave, Register::Data),
        _ if port == layout::PIC_TRIGGER + 1 => (Which::Slave, Register::Trigger),
        _ => return None,
    })
}

fn pit_register(port: u16) -> Option<u8> {
    port.checked_sub(layout::PIT)
        .filter(|offset| *offset < 4)
        .map(|offset| offset as u8)
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(layout::SERIAL)
        .filter(|offset| *offset < 8)
        .map(|offset| offset as u8)
}

#[cfg(test)]
#[path = "platform_tests.rs"]
mod tests;
