//! The pair of 8259 interrupt controllers that a PC has, as far as kernels use them.
//!
//! ```text
//!   lines 0..=7 ──▶ master ──▶ CPU
//!                     ▲ 2
//!   lines 8..=15 ─▶ slave
//!
//!   one chip's initialisation:
//!
//!   Ready ──ICW1──▶ Icw2 ──▶ Icw3 (unless single) ──▶ Icw4 (if asked for) ──▶ Ready
//!                     ▲
//!                     └── ICW1 at any time
//! ```
//!
//! An edge stays latched in the request register when its line falls again, so that no pulse is
//! lost. The slave's output is not latched by the master: line 2 is requested for as long as the
//! slave has something to say. A chip that was never initialised masks everything.

/// The line of the master that the slave hangs on.
const CASCADE: u8 = 2;

/// Which initialisation word a chip expects at its data port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Ready,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259.
#[derive(Clone, Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "they are independent modes of the chip, each set by its own bit"
)]
struct Chip {
    /// Levels of the lines now.
    lines: u8,
    /// Requests: latched edges, and levels of level-triggered lines.
    requests: u8,
    /// Interrupts that were acknowledged and not ended.
    in_service: u8,
    /// A set bit masks its line.
    mask: u8,
    /// Which lines are level-triggered (the ELCR of the chipset).
    level: u8,
    /// ICW1 made all lines level-triggered.
    all_level: bool,
    stage: Stage,
    wants_icw4: bool,
    single: bool,
    vector_base: u8,
    /// The line with the lowest priority; 7 unless rotated.
    lowest: u8,
    auto_end: bool,
    rotate_on_auto_end: bool,
    fully_nested_special: bool,
    special_mask: bool,
    /// The command port reads the in-service register instead of the requests.
    read_in_service: bool,
    /// The next read of the command port is a poll.
    poll: bool,
}

impl Chip {
    const fn new() -> Self {
        Self {
            lines: 0,
            requests: 0,
            in_service: 0,
            mask: 0xff,
            level: 0,
            all_level: false,
            stage: Stage::Ready,
            wants_icw4: false,
            single: false,
            vector_base: 0,
            lowest: 7,
            auto_end: false,
            rotate_on_auto_end: false,
            fully_nested_special: false,
            special_mask: false,
            read_in_service: false,
            poll: false,
        }
    }

    const fn level_triggered(&self) -> u8 {
        if self.all_level { 0xff } else { self.level }
    }

    fn set_line(&mut self, line: u8, high: bool) {
        let bit = 1 << line;
        let rising = high && self.lines & bit == 0;
        if high {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if rising || (high && self.level_triggered() & bit != 0) {
            self.requests |= bit;
        } else if !high && self.level_triggered() & bit != 0 {
            self.requests &= !bit;
        }
    }

    /// How far down the order of priority the most urgent of these lines stands; 8 for none.
    fn rank(&self, lines: u8) -> u32 {
        lines
            .rotate_right(u32::from(self.lowest) + 1)
            .trailing_zeros()
    }

    /// The line that would be acknowledged now. `from_slave` is the level of the slave's output.
    fn pending(&self, from_slave: bool) -> Option<u8> {
        let requests = if from_slave {
            self.requests | 1 << CASCADE
        } else {
            self.requests
        };
        let rank = self.rank(requests & !self.mask);
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.fully_nested_special && from_slave {
            // A more urgent line of the slave may interrupt a less urgent one; the slave itself
            // lets nothing else through.
            blocking &= !(1 << CASCADE);
        }
        (rank < self.rank(blocking)).then(|| (rank as u8 + self.lowest + 1) & 7)
    }

    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.level_triggered() & bit == 0 {
            self.requests &= !bit;
        }
        if !self.auto_end {
            self.in_service |= bit;
        } else if self.rotate_on_auto_end {
            self.lowest = line;
        }
    }

    fn most_urgent_in_service(&self) -> Option<u8> {
        let mut served = self.in_service;
        if self.special_mask {
            served &= !self.mask;
        }
        let rank = self.rank(served);
        (rank < 8).then(|| (rank as u8 + self.lowest + 1) & 7)
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialise(value);
        } else if value & 0x08 != 0 {
            self.operation_3(value);
        } else {
            self.operation_2(value);
        }
    }

    /// ICW1. Latched edges are forgotten, levels are not.
    fn initialise(&mut self, value: u8) {
        *self = Self {
            lines: self.lines,
            level: self.level,
            mask: 0,
            all_level: value & 0x08 != 0,
            single: value & 0x02 != 0,
            wants_icw4: value & 0x01 != 0,
            stage: Stage::Icw2,
            ..Self::new()
        };
        self.requests = self.lines & self.level_triggered();
    }

    /// OCW2: ends of interrupts, rotation of priorities.
    fn operation_2(&mut self, value: u8) {
        let named = value & 7;
        let rotate = value & 0x80 != 0;
        let specific = value & 0x40 != 0;
        let end = value & 0x20 != 0;
        match (end, specific) {
            (true, _) => {
                let line = if specific {
                    Some(named)
                } else {
                    self.most_urgent_in_service()
                };
                if let Some(line) = line {
                    self.in_service &= !(1 << line);
                    if rotate {
                        self.lowest = line;
                    }
                }
            }
            (false, true) if rotate => self.lowest = named,
            (false, true) => {}
            (false, false) => self.rotate_on_auto_end = rotate,
        }
    }

    /// OCW3: which register reads, polling, the special mask mode.
    fn operation_3(&mut self, value: u8) {
        self.poll = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.read_in_service = value & 0x01 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        self.stage = match self.stage {
            Stage::Ready => {
                self.mask = value;
                Stage::Ready
            }
            Stage::Icw2 => {
                self.vector_base = value & 0xf8;
                match (self.single, self.wants_icw4) {
                    (false, _) => Stage::Icw3,
                    (true, true) => Stage::Icw4,
                    (true, false) => Stage::Ready,
                }
            }
            // The wiring is fixed: what the guest says about it changes nothing.
            Stage::Icw3 if self.wants_icw4 => Stage::Icw4,
            Stage::Icw3 => Stage::Ready,
            Stage::Icw4 => {
                self.fully_nested_special = value & 0x10 != 0;
                self.auto_end = value & 0x02 != 0;
                Stage::Ready
            }
        };
    }

    const fn register(&self) -> u8 {
        if self.read_in_service {
            self.in_service
        } else {
            self.requests
        }
    }

    fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&[
            self.lines,
            self.requests,
            self.in_service,
            self.mask,
            self.level,
            u8::from(self.all_level),
            self.stage as u8,
            u8::from(self.wants_icw4),
            u8::from(self.single),
            self.vector_base,
            self.lowest,
            u8::from(self.auto_end),
            u8::from(self.rotate_on_auto_end),
            u8::from(self.fully_nested_special),
            u8::from(self.special_mask),
            u8::from(self.read_in_service),
            u8::from(self.poll),
        ]);
    }
}

/// Which of the two chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Lines 0 to 7; its output is the CPU's.
    Master,
    /// Lines 8 to 15.
    Slave,
}

/// Which port of a chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// The first port: ICW1, OCW2, OCW3; reads requests, in-service or the poll word.
    Command,
    /// The second port: the other ICWs; reads and writes the mask.
    Data,
    /// The chipset's register that makes lines level-triggered.
    Trigger,
}

/// The two chips.
#[derive(Clone, Debug)]
pub struct Pic {
    master: Chip,
    slave: Chip,
}

impl Pic {
    /// As at power-on.
    pub const fn new() -> Self {
        Self {
            master: Chip::new(),
            slave: Chip::new(),
        }
    }

    /// A device drives its line (0 to 15, not 2).
    pub fn set_line(&mut self, line: u8, high: bool) {
        assert!(line < 16 && line != CASCADE, "no device hangs on this line");
        if line < 8 {
            self.master.set_line(line, high);
        } else {
            self.slave.set_line(line - 8, high);
        }
    }

    /// Whether an interrupt waits for the CPU.
    pub fn interrupt_waits(&self) -> bool {
        self.master.pending(self.slave_requests()).is_some()
    }

    /// The CPU acknowledges: the vector of the most urgent interrupt. Without any, it is the
    /// spurious one (master's line 7, not marked as in service).
    pub fn acknowledge(&mut self) -> u8 {
        let from_slave = self.slave.pending(false);
        let Some(line) = self.master.pending(from_slave.is_some()) else {
            return self.master.vector_base | 7;
        };
        self.master.acknowledge(line);
        if line != CASCADE {
            return self.master.vector_base | line;
        }
        // Line 2 can have been requested by nothing but the slave.
        let line = from_slave.unwrap_or(7);
        if from_slave.is_some() {
            self.slave.acknowledge(line);
        }
        self.slave.vector_base | line
    }

    /// The guest reads a port.
    pub fn read(&mut self, which: Which, register: Register) -> u8 {
        let from_slave = which == Which::Master && self.slave_requests();
        let chip = self.chip(which);
        match register {
            Register::Command if chip.poll => {
                chip.poll = false;
                let Some(line) = chip.pending(from_slave) else {
                    return 7;
                };
                chip.acknowledge(line);
                0x80 | line
            }
            Register::Command if from_slave => {
                // The slave's output is not latched, yet it reads as the request that it is.
                chip.register() | u8::from(!chip.read_in_service) << CASCADE
            }
            Register::Command => chip.register(),
            Register::Data => chip.mask,
            Register::Trigger => chip.level,
        }
    }

    /// The guest writes a port.
    pub fn write(&mut self, which: Which, register: Register, value: u8) {
        let chip = self.chip(which);
        match register {
            Register::Command => chip.write_command(value),
            Register::Data => chip.write_data(value),
            Register::Trigger => {
                // Timer, keyboard and cascade, clock and coprocessor are edges on every PC.
                let fixed = match which {
                    Which::Master => 0b0000_0111,
                    Which::Slave => 0b0010_0001,
                };
                chip.level = value & !fixed;
                chip.requests = (chip.requests & !chip.level) | (chip.lines & chip.level);
            }
        }
    }

    /// Adds the state of both chips.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        self.master.digest(hasher);
        self.slave.digest(hasher);
    }

    fn slave_requests(&self) -> bool {
        self.slave.pending(false).is_some()
    }

    const fn chip(&mut self, which: Which) -> &mut Chip {
        match which {
            Which::Master => &mut self.master,
            Which::Slave => &mut self.slave,
        }
    }
}

#[cfg(test)]
#[path = "pic_tests.rs"]
mod tests;
